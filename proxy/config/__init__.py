"""F1 config: YAML and ${ENV} to one frozen `Config`; the only reader of files and environment."""

from proxy.config.document import ConfigError
from proxy.config.keys import KeySource
from proxy.config.loading import load
from proxy.config.models import Circuit, Client, Config, Limits, Route, Timeouts, Upstream
from proxy.config.rendering import render, schema
from proxy.config.values import Rate

__all__ = [
    "Circuit",
    "Client",
    "Config",
    "ConfigError",
    "KeySource",
    "Limits",
    "Rate",
    "Route",
    "Timeouts",
    "Upstream",
    "load",
    "render",
    "schema",
]
