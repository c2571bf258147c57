"""F1 config.loading: from a file to a `Config`, or to everything that is wrong with it.

A config's way: YAML to plain data, variables replaced (`document`, `environment`); the data to a
`Config` (`values`, `models`); the `Config` judged as a whole (`checks`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from proxy.config.checks import NOT_YET, check
from proxy.config.document import Document, read
from proxy.config.models import Client, Config, Route, Upstream


def load(
    path: Path, environ: Mapping[str, str], host: str | None = None, port: int | None = None
) -> Config:
    """The config in a file; `host` and `port` of the command line go before it. Or ConfigError."""
    document = read(path, environ)
    _choose_built_in(document, environ)
    _override_listen(document, host, port)
    config, faults = _validated(document.data)
    for fault in faults:
        document.complain(fault["loc"], _wording(fault))
    if config is None:  # what is sound is judged all the same: all problems come at once
        config, _ = _validated(_sound(document.data, faults))
    if config is not None:
        check(config, document)
    document.raise_problems()
    assert config is not None
    return config


def _choose_built_in(document: Document, environ: Mapping[str, str]) -> None:
    """Resolves `upstreams: built-in`, the only choice that falls back to the demo."""
    if document.data.get("upstreams") != "built-in":
        return
    if key := environ.get("SLUICE_KEY"):
        document.names["clients", 0, "key"] = "SLUICE_KEY"
        document.data.setdefault("clients", [{"name": "sluice", "key": key}])
    if key := environ.get("OPENAI_API_KEY"):
        document.names["upstreams", "openai", "api_key"] = "OPENAI_API_KEY"
        openai = {"base_url": "https://api.openai.com/v1", "api_key": key}
        document.data["upstreams"] = {"openai": openai}
    else:
        document.data["upstreams"] = {"demo": {"base_url": "demo://"}}


def _override_listen(document: Document, host: str | None, port: int | None) -> None:
    listen = document.data.setdefault("listen", {})
    for key, value in (("host", host), ("port", port)):
        if value is not None and isinstance(listen, dict):
            listen[key] = value
            document.names["listen", key] = f"--{key}"


def _validated(data: object) -> tuple[Config | None, list[Any]]:
    try:
        return Config.model_validate(data), []
    except ValidationError as error:
        faults: list[Any] = error.errors()
        for fault in faults:  # of a bad key pydantic speaks as of a part of its value
            fault["loc"] = tuple(step for step in fault["loc"] if step != "[key]")
        # No news: a default could not be computed, because what it follows from is at fault.
        return None, [fault for fault in faults if fault["type"] != "default_factory_not_called"]


_STAND_INS: dict[str, Any] = {
    "upstreams": Upstream.model_construct(base_url=""),
    "routes": Route.model_construct(name="", models=(), upstreams=()),
    "clients": Client.model_construct(name=""),
}


def _sound(data: dict[str, Any], faults: list[Any]) -> dict[str, Any]:
    """The data, now with defaults and stand-ins in place of what is at fault."""
    for section, *inside in (fault["loc"] for fault in faults):
        if inside and section in _STAND_INS:
            data[section][inside[0]] = _STAND_INS[section]
        else:
            data.pop(section, None)
    return data


# Pydantic's complaints in our words: its own would repeat the value ----------------------------

_MAPPING = "must be a mapping: lines of `key: value`, with a space after the colon"
_WORDS = {
    "literal_error": "must be one of {expected}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "path_type": "must be text",
    "too_short": "must not be empty",
    "model_type": _MAPPING,
    "dict_type": _MAPPING,
    "tuple_type": "must be a list: [a, b], or lines of `- a`",
}


def _wording(fault: Any) -> str:
    kind, context = fault["type"], fault.get("ctx", {})
    *around, key = fault["loc"]
    if kind == "extra_forbidden":
        allowed = sorted(_fields(around).keys() - NOT_YET.get(_model(around), {}).keys())
        near = difflib.get_close_matches(str(key), allowed, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"is an unknown key: {hint}allowed are {', '.join(allowed)}"
    if kind == "missing":
        return f"is required: {_fields(around)[key].description}"
    words = "{error}" if kind == "value_error" else _WORDS.get(kind, "is not valid")
    return ("is empty, and " if fault["input"] is None else "") + words.format(**context)


def _fields(where: list[str | int]) -> dict[str, FieldInfo]:
    fields: dict[str, FieldInfo] = _model(where).model_fields
    return fields


def _model(where: list[str | int]) -> Any:
    """The model at that place."""
    kind: Any = Config
    for step in where:
        is_model = hasattr(kind, "model_fields")
        kind = kind.model_fields[step].annotation if is_model else _inner(kind)
        if NoneType in get_args(kind):
            kind = _inner(kind)
    return kind


def _inner(kind: Any) -> Any:
    """X of X | None, tuple[X, ...] and Mapping[str, X]."""
    return [each for each in get_args(kind) if each not in (None, NoneType, ...)][-1]
