"""F1 config.values: what one value may be: for each kind a parser, its rendering, and its type.

A parser takes what YAML or a variable gave. Its ValueError says what is allowed and never repeats
the value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from types import MappingProxyType
from typing import Annotated, Any
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    SecretStr,
    WrapSerializer,
)
from pydantic_core import CoreSchema

from proxy.config.environment import FromEnv
from proxy.headers import HOP_BY_HOP


@dataclass(frozen=True, slots=True)
class _Written:
    """For the JSON Schema: a value may also be written as such a text, or come from a variable."""

    pattern: str = ""

    def __get_pydantic_json_schema__(
        self, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        variable = r"\$\{"
        pattern = f"^({self.pattern})$|{variable}" if self.pattern else variable
        return {"anyOf": [handler(core), {"type": "string", "pattern": pattern}]}


def _shown(show: Callable[[Any], Any]) -> PlainSerializer:
    """How a value is rendered; in a `Config` it stays as it is."""
    return PlainSerializer(show, when_used="json")


def _matching(pattern: str, message: str) -> AfterValidator:
    regex = re.compile(pattern)

    def check(value: str) -> str:
        if not regex.fullmatch(value):
            raise ValueError(message)
        return value

    return AfterValidator(check)


# Text ----------------------------------------------------------------------------------------


def text(value: object) -> str:
    if not isinstance(value, str):
        quotes = isinstance(value, bool | int | float | date)  # `on` and `no` are booleans to YAML
        raise ValueError("must be text" + (": put it in quotes" if quotes else ""))
    if not value.strip():
        raise ValueError("must not be blank")
    if not value.isprintable():
        raise ValueError("must not have control characters")
    return str(value)  # an exact str: FromEnv has done its duty


Text = Annotated[str, BeforeValidator(text)]
OneOf = (BeforeValidator(text), _Written())  # before a Literal
Patterns = Annotated[tuple[Text, ...], Field(min_length=1)]
Name = Annotated[
    Text,
    _matching(
        "[A-Za-z0-9][A-Za-z0-9._-]{0,127}",
        "must be a name: 1 to 128 of A-Z a-z 0-9 . _ -, the first a letter or digit",
    ),
]
Sha256 = Annotated[Text, _matching("[0-9a-f]{64}", "must be 64 digits of 0-9 a-f")]


_STORE_OPTIONS = {"db", "username", "password"}


def _reachable(url: str) -> str:
    """Refuses what the client library would stumble over at the first request."""
    if url == "memory":
        return url
    parts = urlsplit(url)
    hint = "percent-encode what is special in a password"
    try:
        has_place = bool(parts.path if parts.scheme == "unix" else parts.hostname)
        _ = parts.port
    except ValueError:
        raise ValueError(f"has a malformed host or port: {hint}") from None
    if not has_place:
        raise ValueError(f"must name a host, or of unix:// a path: {hint}")
    if parts.scheme != "unix" and not re.fullmatch("/?[0-9]{0,5}", parts.path):
        raise ValueError(f"must have nothing but a database's number behind the host: {hint}")
    if unknown := parse_qs(parts.query, keep_blank_values=True).keys() - _STORE_OPTIONS:
        shown = ", ".join(sorted(unknown)) if all(map(str.isidentifier, unknown)) else "an option"
        raise ValueError(f"has {shown}, which is not known here: db, username, password are")
    return url


def _without_secrets(url: str) -> str:
    """A store's URL as it is shown; a password may also stand in its query."""
    url = re.sub(r"(?<=://)[^/]*@", "***@", url)
    return re.sub(r"(?<=[?&]password=)[^&]*", "***", url)


Store = Annotated[
    Text,
    _matching("memory|(rediss?|unix)://.+", "must be memory, redis://, rediss:// or unix://"),
    AfterValidator(_reachable),
    _shown(_without_secrets),
]


# Numbers and switches ------------------------------------------------------------------------


def whole(value: object) -> int:
    """A whole number, which a variable may give too; "8080" in quotes is none."""
    is_text = isinstance(value, str) and re.fullmatch("-?[0-9]{1,15}", value)
    if is_text and isinstance(value, FromEnv):
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("must be a whole number" + (", without quotes" if is_text else ""))
    return value


def switch(value: object) -> bool:
    is_text = isinstance(value, str) and value.lower() in {"true", "false"}
    if is_text and isinstance(value, FromEnv):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError("must be true or false" + (", without quotes" if is_text else ""))
    return value


Port = Annotated[int, Field(ge=0, le=65535), BeforeValidator(whole), _Written()]
Count = Annotated[int, Field(ge=1), BeforeValidator(whole), _Written()]
Switch = Annotated[bool, BeforeValidator(switch), _Written()]


# Durations -----------------------------------------------------------------------------------

_MILLISECONDS = {"h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}
_DURATION = r"([0-9]{1,12}(?:\.[0-9]{1,12})?)(ms|s|m|h)?"
_LONGEST = 10 * 366 * 86400


def seconds(value: object) -> float:
    """A duration, from seconds or `500ms`, `30s`, `5m`, `1h`."""
    if isinstance(value, str) and (match := re.fullmatch(_DURATION, value)):
        value = float(match[1]) * _MILLISECONDS[match[2] or "s"] / 1000
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _LONGEST:
        return float(value)
    raise ValueError("must be a duration up to 10 years: seconds, or like 500ms, 30s, 5m, 1h")


def longer_than_0(duration: float) -> float:
    if duration == 0:
        raise ValueError("must be longer than 0")
    return duration


def show_seconds(duration: float) -> str | float:
    """In the largest unit that says it exactly; else the bare seconds."""
    for unit, length in _MILLISECONDS.items() if duration else ():
        shown = f"{round(duration * 1000 / length)}{unit}"
        if seconds(shown) == duration:
            return shown
    return duration or "0s"


Pause = Annotated[float, BeforeValidator(seconds), _Written(_DURATION), _shown(show_seconds)]
Duration = Annotated[Pause, AfterValidator(longer_than_0)]


# Sizes and rates -----------------------------------------------------------------------------

_BYTES = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}
_SIZE = r"([0-9]{1,15})(B|KiB|MiB|GiB)?"
_PER = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0}


def size(value: object) -> int:
    """A number of bytes, from one or `64KiB`, `32MiB`, `1GiB`."""
    if isinstance(value, str) and (match := re.fullmatch(_SIZE, value)):
        value = int(match[1]) * _BYTES[match[2] or "B"]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**50:
        raise ValueError("must be a size of at least 1: bytes, or like 64KiB, 32MiB, 1GiB")
    return value


def show_size(value: int) -> str | int:
    unit = next(unit for unit, count in _BYTES.items() if value % count == 0)
    return value if unit == "B" else f"{value // _BYTES[unit]}{unit}"


@dataclass(frozen=True, slots=True)
class Rate:
    """So many in so many seconds."""

    count: int
    per: float

    def __str__(self) -> str:
        named = (unit for unit, per in _PER.items() if per == self.per)
        return f"{self.count}/{next(named, None) or show_seconds(self.per)}"


def rate(value: object) -> Rate:
    """A rate, from `10/minute` or `10/30s`."""
    match = re.fullmatch("([0-9]{1,15})/(.+)", value) if isinstance(value, str) else None
    if match is None or int(match[1]) == 0:
        raise ValueError("must be a rate of at least 1: like 60/minute, 5000/day, 10/30s")
    try:
        return Rate(int(match[1]), _PER.get(match[2]) or longer_than_0(seconds(match[2])))
    except ValueError:
        raise ValueError(
            "must be a rate: N/second, /minute, /hour or /day, or N in a duration like 10/30s"
        ) from None


def rates(value: object) -> tuple[Rate, ...]:
    """One rate, or a list of those that must all hold."""
    if value == []:
        raise ValueError("must not be empty: null lifts a limit")
    return tuple(map(rate, value if isinstance(value, list) else [value]))


Size = Annotated[int, BeforeValidator(size), _Written(_SIZE), _shown(show_size)]
Rates = Annotated[
    tuple[Rate, ...],
    BeforeValidator(rates, json_schema_input_type=str | list[str]),
    _shown(lambda shown: [str(each) for each in shown]),
]


# Keys and headers ----------------------------------------------------------------------------

_NOT_SETTABLE = HOP_BY_HOP | {b"content-length", b"expect", b"host", b"via"}


def key(value: object) -> str:
    found = text(value)
    if not found.isascii() or " " in found:
        raise ValueError("must be visible ASCII without spaces, to stand in a header")
    if found.startswith("$"):
        raise ValueError("is no key: a variable is written ${NAME}, with braces")
    return found


def _header_value(value: object) -> str:
    found = text(value)
    if not found.isascii():
        raise ValueError("must be printable ASCII")
    return found


def _settable(name: str) -> str:
    if name.lower().encode() in _NOT_SETTABLE:
        raise ValueError("cannot be set here: the proxy makes it for each connection")
    return name


_HIDDEN = _shown(lambda _: "***")
Key = Annotated[SecretStr, BeforeValidator(key), _HIDDEN]
HeaderName = Annotated[  # RFC 9110, 5.6.2
    Text, _matching("[!#$%&'*+.^_`|~0-9A-Za-z-]+", "must be a header name: letters, digits, -")
]
# Frozen inside too; a serializer knows plain mappings only.
FROZEN = (
    AfterValidator(MappingProxyType),
    WrapSerializer(lambda mapping, serialize: serialize(dict(mapping))),
)
Headers = Annotated[
    Mapping[
        Annotated[HeaderName, AfterValidator(_settable)],
        Annotated[SecretStr, BeforeValidator(_header_value), _HIDDEN],
    ],
    *FROZEN,
]
