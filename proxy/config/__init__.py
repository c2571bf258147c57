"""F1 config: YAML and ${ENV} to one frozen `Config`; the only reader of files and environment."""

from proxy.config.document import ConfigError
from proxy.config.keys import KeySource
from proxy.config.loading import load
from proxy.config.models import Config, Route, Timeouts, Upstream
from proxy.config.rendering import render, schema

__all__ = [
    "Config",
    "ConfigError",
    "KeySource",
    "Route",
    "Timeouts",
    "Upstream",
    "load",
    "render",
    "schema",
]
