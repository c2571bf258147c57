"""F1 config: YAML and ${ENV} to one frozen `Config`; the only reader of files and environment.

A file's way is the order of this module:

    (1) YAML nodes ─► plain data, and the line of every key and value
    (2) ${VAR}     ─► replaced in the texts among them
    (3) plain data ─► `Config`: the models, their types and ranges
    (4) `Config`   ─► checked for what is right in itself and lies in combination
    (5) `Config`   ─► YAML again, and the JSON Schema

Every step complains to one `Document`, so that all problems come at once, each with its line. No
complaint repeats a value: it may be a key, or have come from the environment.
"""

from __future__ import annotations

import copy
import difflib
import ipaddress
import logging
import re
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin
from urllib.parse import unquote, urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    WrapSerializer,
)
from pydantic.fields import FieldInfo

Where = tuple[str | int, ...]  # the way to a key or value: ("routes", 1, "models", 0)
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_Model = TypeVar("_Model", bound=BaseModel)
_logger = logging.getLogger("sluice.config")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a config: `FILE:LINE: path.to[1].key: what is wrong`."""

    file: str
    line: int | None
    path: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return ": ".join(part for part in (place, self.path, self.message) if part)


class ConfigError(Exception):
    """A config that is refused, with everything that is wrong with it."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line or 0))
        super().__init__("\n".join(map(str, self.problems)))


@dataclass(slots=True)
class Document:
    """A config as plain data, with the line of every part and the problems found so far."""

    file: str
    data: dict[str, Any]
    lines: dict[Where, int] = field(default_factory=dict)
    names: dict[Where, str] = field(default_factory=dict)  # of parts not in the file: `--host`
    problems: list[Problem] = field(default_factory=list)
    broken: set[Where] = field(default_factory=set)

    def complain(self, where: Where, message: str) -> None:
        """Adds a problem; but a part that is broken already is not judged further."""
        if self.is_broken(where):
            return
        self.broken.add(where)
        if where in self.names:
            self.problems.append(Problem("", None, self.names[where], message))
        else:
            self.problems.append(Problem(self.file, self._line(where), _spelled(where), message))

    def is_broken(self, where: Where) -> bool:
        return any(where[:end] in self.broken for end in range(len(where) + 1))

    def has(self, where: Where) -> bool:
        return where in self.lines or where in self.names

    def raise_problems(self) -> None:
        if self.problems:
            raise ConfigError(self.problems)

    def _line(self, where: Where) -> int | None:
        """The line of a part; of one that is not there, the line of what encloses it."""
        while where and where not in self.lines:
            where = where[:-1]
        return self.lines.get(where)


def _spelled(where: Where) -> str:
    """`routes[1].models[0]`, cut where a key isn't one: in {api_key:KEY} the space is missing."""
    text = ""
    for part in where:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = re.sub(r"[^\w.<?-].*", "...", part, flags=re.DOTALL)
            text += f".{name}" if text else name
    return text


# (1) YAML nodes to plain data and lines ------------------------------------------------------

_TAG = "tag:yaml.org,2002:"
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_SCALARS = {_TAG + kind for kind in ("str", "int", "float", "bool", "null", "timestamp")}
_COLLECTIONS = {_TAG + "map", _TAG + "seq"}
_MOST_VALUES = 100_000  # anchors within anchors let a small file grow without bound


def _read(path: Path, environ: Mapping[str, str]) -> Document:
    file = str(path)
    root = _compose(_text_of(path), file)
    if root is None:
        raise _refusal(file, 1, "is empty: a mapping with at least `upstreams` is needed")
    if not isinstance(root, yaml.MappingNode):
        raise _refusal(file, _line_of(root), "must be a mapping of keys to values")
    document = Document(file, {})
    try:
        document.data = _Reader(document, environ).read(root, (), _line_of(root)) or {}
    except RecursionError:
        raise _refusal(file, 1, "is nested too deeply") from None
    return document


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise _refusal(str(path), None, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _refusal(str(path), None, "is not UTF-8 text") from None


def _compose(text: str, file: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        # Without the names in it: an unquoted key that begins with * or & is an alias to YAML.
        words = ", ".join(filter(None, (error.context, error.problem)))
        problem = re.sub(r"'[\w!-]{2,}'", "'...'", words)
        variable = "${" in "".join(text.split("\n")[line - 1 : line])
        hint = " (inside {} or [], put ${...} in quotes)" if variable else ""
        raise _refusal(file, line, f"is not valid YAML: {problem}{hint}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _refusal(file, line, "is not valid YAML: a control character") from None
    except RecursionError:
        raise _refusal(file, 1, "is nested too deeply") from None


def _refusal(file: str, line: int | None, message: str) -> ConfigError:
    return ConfigError([Problem(file, line, "", message)])


def _line_of(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


class _Reader:
    """Makes plain data of YAML nodes, which unlike the data know their lines and duplicates."""

    def __init__(self, document: Document, environ: Mapping[str, str]) -> None:
        self._document = document
        self._environ = environ
        self._loader = yaml.SafeLoader("")
        self._enclosing: list[yaml.Node] = []
        self._flat: set[yaml.Node] = set()
        self._count = 0

    def read(self, node: yaml.Node, where: Where, line: int) -> Any:
        self._count += 1
        self._document.lines[where] = line
        if self._count > _MOST_VALUES:
            message = "is too large, with all its anchors written out"
            raise _refusal(self._document.file, line, message)
        if trouble := self._trouble(node):
            return self._document.complain(where, trouble)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, where)
        self._enclosing.append(node)
        value: Any
        if not isinstance(node, yaml.MappingNode):
            items = enumerate(node.value)
            value = [self.read(item, (*where, index), _line_of(item)) for index, item in items]
        else:
            pairs = self._pairs(node, where).items()
            value = {key: self.read(item, (*where, key), line) for key, (item, line) in pairs}
        self._enclosing.pop()
        return value

    def _trouble(self, node: yaml.Node) -> str | None:
        if node in self._enclosing:
            return "contains itself: an anchor must not be used inside what it names"
        if node.tag not in (_SCALARS if isinstance(node, yaml.ScalarNode) else _COLLECTIONS):
            return "has a YAML tag, which means nothing here"
        is_float, is_int = node.tag == _TAG + "float", node.tag == _TAG + "int"
        if (is_float and ":" in node.value) or (is_int and not _DECIMAL.fullmatch(node.value)):
            return (
                "is no decimal number to YAML (5:30 is 330, 010 is 8): "
                "write it as a plain number, or in quotes if text is meant"
            )
        return None

    def _scalar(self, node: yaml.ScalarNode, where: Where) -> Any:
        try:
            value = self._loader.construct_object(node)
        except (ValueError, KeyError, AttributeError):  # the 31st of February, `!!bool x`
            return self._document.complain(where, "is no value to YAML: put it in quotes")
        try:
            return expand(value, self._environ) if isinstance(value, str) else value
        except ValueError as error:
            return self._document.complain(where, str(error))

    def _pairs(self, node: yaml.MappingNode, where: Where) -> dict[str, tuple[yaml.Node, int]]:
        """The values of a mapping and their lines by key, `<<` merged in."""
        if node not in self._flat:
            self._flat.add(node)
            self._flatten(node, where)
        pairs = {}
        for key, value in node.value:
            if key.tag == _TAG + "str":
                # A scalar is found by its own line, all else (and an alias) by that of its key.
                is_alias = value.start_mark.index < key.start_mark.index
                by_itself = isinstance(value, yaml.ScalarNode) and not is_alias
                pairs[key.value] = value, _line_of(value if by_itself else key)
            else:
                self._complain_of_key(key, where, "is not text to YAML: put this key in quotes")
        return pairs

    def _flatten(self, node: yaml.MappingNode, where: Where) -> None:
        first: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in first:
                message = f"is a duplicate key, given on line {first[key.value]} already"
                self._complain_of_key(key, where, message)
            elif isinstance(key, yaml.ScalarNode):
                first[key.value] = _line_of(key)
        try:
            self._loader.flatten_mapping(node)  # merged pairs first: the mapping's own win
        except yaml.MarkedYAMLError:
            self._document.complain((*where, "<<"), "must be a mapping, or a list of mappings")

    def _complain_of_key(self, key: yaml.Node, where: Where, message: str) -> None:
        """Complains of a key, but not of the value there, which is judged for itself."""
        name = key.value if isinstance(key, yaml.ScalarNode) else "?"
        path = _spelled((*where, name))
        self._document.problems.append(Problem(self._document.file, _line_of(key), path, message))


# (2) ${VAR} ----------------------------------------------------------------------------------

_VARIABLE = re.compile(
    r"\$(?: (?P<dollar>\$) | \{ (?P<name>[A-Za-z_][A-Za-z0-9_]*) (?: :- (?P<default>[^}]*) )? \}"
    r" | (?P<malformed>\{) )",
    re.VERBOSE,
)


class FromEnv(str):
    """Text that had a variable in it: unlike text in quotes it may stand for a number."""

    __slots__ = ()


def expand(text: str, environ: Mapping[str, str]) -> str:
    """`text` with ${VAR}, ${VAR:-default} and $$ replaced, once. ValueError: it cannot be."""

    def replacement(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if match["dollar"]:
            return "$"
        if match["malformed"] or "${" in (default or ""):
            raise ValueError(
                "has a malformed ${: write ${NAME} or ${NAME:-default}, or $${ for the text ${"
            )
        if default is not None:
            return environ.get(name) or default.replace("$$", "$")
        if name not in environ:
            raise ValueError(
                f"the environment variable {name} is not set: set it, or write ${{{name}:-default}}"
            )
        return environ[name]

    expanded = _VARIABLE.sub(replacement, text)
    return FromEnv(expanded) if "${" in text.replace("$$", "") else expanded


# (3) Values ----------------------------------------------------------------------------------

_SECONDS = {"h": Fraction(3600), "m": Fraction(60), "s": Fraction(1), "ms": Fraction(1, 1000)}
_BYTES = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}
_PER = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0}
_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,12})?)(ms|s|m|h)?")
_SIZE = re.compile(r"([0-9]{1,15})(B|KiB|MiB|GiB)?")
_RATE = re.compile(r"([0-9]{1,15})/(.+)")
_LONGEST = 10 * 366 * 86400
_LARGEST = 2**50

_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
_AUTHORITY = re.compile(r"(\[[^\[\]]+\]|[^\[\]:]+)(:[0-9]+)?")
_ROUTE_NAME = re.compile(r"[A-Za-z0-9._*?/:\[\]!-]{1,128}")
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_CREDENTIAL_HEADERS = {"bearer": "authorization", "x-api-key": "x-api-key", "api-key": "api-key"}
# Hop-by-hop (RFC 9110, 7.6.1), framing, and what the proxy says about the hop itself.
_NOT_SETTABLE = frozenset(
    {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
    | {"content-length", "expect", "host", "via"}
)


def _text(value: object) -> str:
    if isinstance(value, str):
        return str(value)  # an exact str: FromEnv has done its duty
    if isinstance(value, bool):
        raise ValueError("must be text: put it in quotes (on, off, yes, no are booleans to YAML)")
    if isinstance(value, int | float | date):
        raise ValueError("must be text: put it in quotes")
    raise ValueError("must be text, and is empty" if value is None else "must be text")


def _whole(value: object) -> int:
    """A whole number, which a variable may give too; "8080" in quotes is none."""
    if isinstance(value, FromEnv) and re.fullmatch("-?[0-9]{1,15}", value):
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("must be a whole number" + _unquoted(value))
    return value


def _in(allowed: range, message: str) -> Callable[[int], int]:
    def check(number: int) -> int:
        if number not in allowed:
            raise ValueError(message)
        return number

    return check


def _switch(value: object) -> bool:
    if isinstance(value, FromEnv) and value.lower() in {"true", "false"}:
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError("must be true or false" + _unquoted(value))
    return value


def _unquoted(value: object) -> str:
    return ", without quotes" if isinstance(value, str) else ""


def seconds(value: object) -> float:
    """A duration, from seconds or `500ms`, `30s`, `5m`, `1h`."""
    if isinstance(value, str) and (match := _DURATION.fullmatch(value)):
        value = float(Fraction(match[1]) * _SECONDS[match[2] or "s"])
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError("must be a duration: seconds, or like 500ms, 30s, 5m, 1h")
    if not 0 <= value <= _LONGEST:  # NaN is not either
        raise ValueError("must be a duration of at least 0 and at most 10 years")
    return float(value)


def _longer_than_0(duration: float) -> float:
    if duration == 0:
        raise ValueError("must be longer than 0")
    return duration


def _show_duration(duration: float) -> str | float:
    """In the largest unit that says it exactly; else the bare seconds."""
    for unit, length in _SECONDS.items() if duration else ():
        text = f"{round(duration / length)}{unit}"
        if seconds(text) == duration:
            return text
    return duration or "0s"


def size(value: object) -> int:
    """A number of bytes, from one or `64KiB`, `32MiB`, `1GiB`."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        value = int(match[1]) * _BYTES[match[2] or "B"]
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("must be a size: bytes, or like 64KiB, 32MiB, 1GiB")
    if not 0 < value <= _LARGEST:
        raise ValueError("must be a size of at least 1 byte and at most 1048576GiB")
    return value


def _show_size(value: int) -> str | int:
    unit = next(unit for unit, count in _BYTES.items() if value % count == 0)
    return value if unit == "B" else f"{value // _BYTES[unit]}{unit}"


@dataclass(frozen=True, slots=True)
class Rate:
    """So many in so many seconds."""

    count: int
    per: float

    def __str__(self) -> str:
        named = (unit for unit, per in _PER.items() if per == self.per)
        return f"{self.count}/{next(named, None) or _show_duration(self.per)}"


def rate(value: object) -> Rate:
    """A rate, from `10/minute` or `10/30s`."""
    if isinstance(value, Rate):
        return value
    match = _RATE.fullmatch(value) if isinstance(value, str) else None
    if match is None or int(match[1]) == 0:
        raise ValueError("must be a rate of at least 1: like 60/minute, 5000/day, 10/30s")
    return Rate(int(match[1]), _PER.get(match[2]) or _longer_than_0(seconds(match[2])))


def _one_or_more(value: object) -> object:
    if value in ([], ()):
        raise ValueError("must not be empty: null lifts a limit")
    return value if isinstance(value, list | tuple) else (value,)


def _printable(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    if not text.isprintable():
        raise ValueError("must not have control characters")
    return text


def _matching(pattern: str, message: str) -> Callable[[str], str]:
    regex = re.compile(pattern)

    def check(text: str) -> str:
        if not regex.fullmatch(text):
            raise ValueError(message)
        return text

    return check


_visible = _matching(
    "[!-~]+", "must be visible ASCII without spaces, or it could not stand in a header"
)
_header_name = _matching(
    r"[!#$%&'*+.^_`|~0-9A-Za-z-]+",  # RFC 9110, 5.6.2
    "must be a header name: letters, digits, -",
)
_sha256 = _matching("[0-9a-f]{64}", "must be 64 digits of 0-9 a-f")
_store = _matching("memory|(rediss?|unix)://.+", "must be memory, redis://, rediss:// or unix://")
_header_value = _matching("[ -~]*", "must be printable ASCII, without line breaks")


def _key(text: str) -> str:
    return _visible(_printable(text))


def _secret(check: Callable[[str], str]) -> BeforeValidator:
    """Judges a text before it is hidden in a SecretStr."""
    return BeforeValidator(
        lambda value: value if isinstance(value, SecretStr) else check(_text(value))
    )


def _settable(name: str) -> str:
    if _header_name(name).lower() in _NOT_SETTABLE or name.lower().startswith("proxy-"):
        raise ValueError("cannot be set here: the proxy makes it for each connection")
    return name


def _once_each(headers: Mapping[str, Any]) -> Mapping[str, Any]:
    if len({name.lower() for name in headers}) < len(headers):
        raise ValueError("must name each header once: upper and lower case are the same")
    return headers


def _route_name(name: str, info: ValidationInfo) -> str:
    is_its_pattern = name in info.data.get("models", ())[:1]
    if not is_its_pattern and not _ROUTE_NAME.fullmatch(name):
        raise ValueError("must be a name: 1 to 128 of A-Z a-z 0-9 . _ - * ? / : [ ] !")
    return name


def _host(text: str) -> str:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        if not _HOST.fullmatch(text):
            raise ValueError("must be a host name, or an IP address without brackets") from None
    return text


def _network(value: object) -> Network:
    if isinstance(value, Network):
        return value
    text = _text(value)
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError("must be a network like 10.0.0.0/8 or fd00::/8, or an address") from None
    if ipaddress.ip_address(text.partition("/")[0]) == network.network_address:
        return network
    meant = "" if isinstance(value, FromEnv) else f" ({network}?)"
    raise ValueError(f"is an address in a network: write the network's own{meant}, or no /")


def _origin(text: str) -> str:
    if text == "*":
        return text
    match = _ORIGIN.fullmatch(text.lower())
    if match is None or int(match[3] or 0) > 65535:
        raise ValueError('must be "*", or an origin: scheme://host[:port] without a path')
    is_default = match[3] == _DEFAULT_PORTS.get(match[1])
    return f"{match[1]}://{match[2]}" + ("" if is_default or not match[3] else f":{match[3]}")


def _star_alone(origins: tuple[str, ...]) -> tuple[str, ...]:
    if "*" in origins and len(origins) > 1:
        raise ValueError('must be "*" alone, or exact origins')
    return origins


def _base_url(text: str) -> str:
    if text == "demo://":
        return text
    if not text.isascii() or " " in text or "\\" in text:
        raise ValueError("must be ASCII without spaces and backslashes")
    if "?" in text or "#" in text:
        raise ValueError("must not have a query or a fragment: paths are added at its end")
    try:
        url = urlsplit(text)
        host, port = url.hostname, url.port
    except ValueError:
        raise ValueError("must be a URL: its host or port cannot be read") from None
    if url.scheme not in {"http", "https"}:
        raise ValueError("must begin with http:// or https://, or be exactly demo://")
    if "@" in url.netloc:
        raise ValueError("must not have credentials: use api_key or headers")
    if not _AUTHORITY.fullmatch(url.netloc) or host is None or port == 0:
        raise ValueError("must name a host, and a port from 1 to 65535 or none")
    if any(unquote(segment) in {".", ".."} for segment in url.path.split("/")):
        raise ValueError("must not have . or .. in its path")
    _host(host)
    return f"{url.scheme}://{url.netloc.lower()}{url.path.rstrip('/')}"


def _path(value: object) -> Path:
    return value if isinstance(value, Path) else Path(_printable(_text(value)))


def _with_certificates(path: Path) -> Path:
    try:
        ssl.create_default_context(cafile=path)
    except ssl.SSLError:
        raise ValueError("must be a file with certificates (PEM)") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    return path


def _with_a_key(path: Path) -> Path:
    read_key(path)
    return path


def read_key(path: Path) -> str:
    """The key in a file, without the white space around it. ValueError: there is none."""
    try:
        text = path.read_bytes().decode("utf-8").strip()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError("must be a text file with nothing but a key") from None
    try:
        return _key(text)
    except ValueError as error:
        raise ValueError(f"the key in it {error}") from None


def _named_upstreams(value: object) -> object:
    if not isinstance(value, Mapping):
        raise ValueError("must be a mapping of names to upstreams, or the word built-in")
    if not value:
        raise ValueError("must name at least one upstream")
    return value


# (3) Types -----------------------------------------------------------------------------------


def _shown(show: Callable[[Any], Any]) -> PlainSerializer:
    """How a value is rendered; inside, `Config` keeps it as it is."""
    return PlainSerializer(show, when_used="json")


def _null_is(empty: object, kind: Any) -> BeforeValidator:
    return BeforeValidator(
        lambda value: empty if value is None else value, json_schema_input_type=kind | None
    )


def _written(pattern: str) -> Any:
    """The type of a text in the file, for the JSON Schema."""
    return Annotated[str, Field(pattern=rf"^{pattern}$|\$\{{")]


_FROZEN = (
    AfterValidator(MappingProxyType),
    WrapSerializer(lambda mapping, serialize: serialize(dict(mapping))),
)
_seconds = BeforeValidator(seconds, json_schema_input_type=float | _written(_DURATION.pattern))

Duration = Annotated[float, _seconds, AfterValidator(_longer_than_0), _shown(_show_duration)]
Pause = Annotated[float, _seconds, _shown(_show_duration)]  # may be 0: none at all
Size = Annotated[
    int,
    BeforeValidator(size, json_schema_input_type=int | _written(_SIZE.pattern)),
    _shown(_show_size),
]
OneRate = Annotated[
    Rate, BeforeValidator(rate, json_schema_input_type=_written("[0-9]+/.+")), _shown(str)
]
Rates = Annotated[
    tuple[OneRate, ...],
    BeforeValidator(_one_or_more, json_schema_input_type=OneRate | list[OneRate]),
]
Switch = Annotated[bool, BeforeValidator(_switch)]
Port = Annotated[
    int,
    BeforeValidator(_whole),
    AfterValidator(_in(range(65536), "must be a port: 0 to 65535")),
    WithJsonSchema({"type": "integer", "minimum": 0, "maximum": 65535}),
]
Count = Annotated[
    int,
    BeforeValidator(_whole),
    AfterValidator(_in(range(1, 2**31), "must be at least 1")),
    WithJsonSchema({"type": "integer", "minimum": 1}),
]
Word = BeforeValidator(_text)  # before a Literal
Text = Annotated[str, Word, AfterValidator(_printable)]
Patterns = Annotated[tuple[Text, ...], Field(min_length=1)]
Host = Annotated[Text, AfterValidator(_host)]
Name = Annotated[
    Text,
    AfterValidator(
        _matching(
            "[A-Za-z0-9][A-Za-z0-9._-]{0,127}",
            "must be a name: 1 to 128 of A-Z a-z 0-9 . _ -, the first a letter or digit",
        )
    ),
]
Key = Annotated[SecretStr, _secret(_key), _shown(lambda _: "***")]
HeaderValue = Annotated[SecretStr, _secret(_header_value), _shown(lambda _: "***")]
Headers = Annotated[
    Mapping[Annotated[str, AfterValidator(_settable)], HeaderValue],
    AfterValidator(_once_each),
    *_FROZEN,
]
Origins = Annotated[
    tuple[Annotated[Text, AfterValidator(_origin)], ...], AfterValidator(_star_alone)
]
Networks = tuple[
    Annotated[Network, BeforeValidator(_network), WithJsonSchema({"type": "string"})], ...
]
KeyPath = Annotated[Path, BeforeValidator(_path), AfterValidator(_with_a_key)]
CaPath = Annotated[Path, BeforeValidator(_path), AfterValidator(_with_certificates)]


# (3) Models: the file's schema, with its defaults ------------------------------------------------


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True
    )


class Listen(_Part):
    """Where clients are served."""

    host: Host = "127.0.0.1"
    """Address or host name to listen on."""
    port: Port = 8080
    """0: any free one."""


class Admin(_Part):
    """Metrics and the admin API."""

    host: Host = "127.0.0.1"
    """Address of the admin port."""
    port: Port | None = None
    """Serves /metrics and /admin there instead of on the main port."""
    key: Key | None = None
    """Bearer key of /admin; without one there is no /admin."""


class ClientTimeouts(_Part):
    """How long clients may take."""

    head: Duration = 10.0
    """For a whole request head."""
    body: Duration = 30.0
    """Between two reads of a request body."""
    keep_alive: Duration = 75.0
    """Idle between two requests."""
    write: Duration = 120.0
    """A reader that takes nothing."""


class Cors(_Part):
    """Which web pages of other origins may call."""

    origins: Origins = ()
    """["*"], or exact origins like https://chat.example.com."""


class Timeouts(_Part):
    """How long an upstream may take."""

    connect: Duration = 5.0
    """For TCP and TLS."""
    first_byte: Duration = 600.0
    """From the request to the first byte of the answer."""
    idle: Duration = 60.0
    """No byte at all, while the client is reading."""
    stall: Duration = 300.0
    """Only comments, pings and empty deltas, while the client is reading."""
    total: Duration | None = None
    """The whole answer; null: no limit."""


class Circuit(_Part):
    """When an upstream is taken out, and for how long."""

    failures: Count = 5
    """This many in a row take it out."""
    rest: Duration = 30.0
    """After this one probe may bring it back."""


class Upstream(_Part):
    """A server of chat completions."""

    base_url: Annotated[Text, AfterValidator(_base_url)]
    """http(s)://host[:port][/path], or demo:// for the embedded demo."""
    api_key: Key | None = None
    """Sent with every request, instead of the client's."""
    api_key_file: KeyPath | None = None
    """A file with the key, re-read when it changes."""
    auth: Annotated[Literal["bearer", "x-api-key", "api-key", "none"], Word] = "bearer"
    """How the key is sent."""
    headers: Headers = Field(default={}, validate_default=True)
    """Set on every request, replacing the client's."""
    ca_file: CaPath | None = None
    """Certificates (PEM) to trust instead of the system's."""
    egress: Text | None = None
    """http://host:port of a forward proxy."""
    max_streams: Count | None = None
    """Requests in progress; a full upstream is not available."""
    timeouts: Timeouts = Timeouts()
    """How long it may take."""
    circuit: Circuit = Circuit()
    """When it is taken out."""

    @property
    def demo(self) -> bool:
        return self.base_url == "demo://"

    @property
    def injects(self) -> bool:
        """Whether a credential of ours goes up with the requests of others."""
        headers = {name.lower() for name in self.headers}
        return bool(self.api_key or self.api_key_file or headers & {*_CREDENTIAL_HEADERS.values()})

    def key_source(self) -> KeySource | None:
        """A new source of the key; None where the upstream has none."""
        if self.api_key_file:
            return KeyFile(self.api_key_file)
        return KeySource(self.api_key.get_secret_value()) if self.api_key else None


class Route(_Part):
    """Which upstreams serve which models; the first route that matches is taken."""

    models: Patterns
    """Patterns (fnmatch) of the model's name as the client sent it; "*" takes requests without."""
    name: Annotated[Text, AfterValidator(_route_name)] = Field(
        default_factory=lambda route: str(route["models"][0])
    )
    """Label in metrics and logs; default: the first pattern."""
    upstreams: Annotated[tuple[Name, ...], Field(min_length=1)]
    """Candidates, in this order."""
    model: Text | None = None
    """Another name of the model on the way up."""
    attempts: Count = 2
    """How many candidates are tried."""
    on_disconnect: Annotated[Literal["cancel", "finish"], Word] = "cancel"
    """What happens to the upstream's answer when the client leaves."""
    finish_cap: Duration = 300.0
    """How long `finish` reads on."""
    commit_after: Duration = 30.0
    """Streams: how long to wait for a real status."""
    heartbeat: Pause = 15.0
    """A comment after so long without a byte; 0: none."""


class ClientLimits(_Part):
    """What a client may use: a key that is given goes over the global one, null lifts it."""

    requests: Rates | None = None
    """Requests, like 60/minute; a list: all must hold."""
    tokens: Rates | None = None
    """Prompt and completion, like 100000/minute; a list: all must hold."""
    streams: Count | None = None
    """Relayed requests in progress."""


class Limits(ClientLimits):
    """What each client may use; nothing is limited unless it is said here."""


class Client(_Part):
    """Somebody who may call."""

    name: Name
    """Label in metrics and logs."""
    key: Key | None = None
    """The client's key, or:"""
    key_sha256: Annotated[Text, AfterValidator(_sha256)] | None = None
    """its SHA-256, as `sluice key NAME` prints it."""
    models: Patterns = ("*",)
    """Patterns (fnmatch) of the models it may use."""
    user_header: Annotated[Text, AfterValidator(_header_name)] | None = None
    """The limits count for each value of this header apart."""
    limits: ClientLimits = ClientLimits()
    """Its own limits."""


class Resume(_Part):
    """Resumable streams."""

    keep: Duration = 300.0
    """How long an ended stream can be read."""
    grace: Duration = 30.0
    """How long a generation goes on without a reader."""
    max_bytes: Size = 4 * 2**20
    """The largest log of one stream."""
    max_total: Size = 256 * 2**20
    """The largest size of all logs together."""


class Log(_Part):
    """What is logged, and how."""

    format: Annotated[Literal["auto", "text", "json"], Word] = "auto"
    """auto: text on a terminal, else JSON lines."""
    level: Annotated[Literal["debug", "info", "warning", "error"], Word] = "info"
    """The least severe that is logged."""


def _everything_to_the_first(config: dict[str, Any]) -> tuple[Route, ...]:
    return (Route(name="default", models=("*",), upstreams=(next(iter(config["upstreams"])),)),)


class Config(_Part):
    """The configuration of Sluice."""

    listen: Listen = Listen()
    """Where clients are served."""
    admin: Admin = Admin()
    """Metrics and the admin API."""
    open: Switch = False
    """Everybody who reaches the proxy may use its keys."""
    drain_notice: Pause = 0.0
    """How long /readyz says 503 before new connections are refused."""
    drain_timeout: Duration = 300.0
    """How long open streams may go on after that."""
    max_body: Size = 32 * 2**20
    """The largest request body."""
    client_timeouts: ClientTimeouts = ClientTimeouts()
    """How long clients may take."""
    trusted_proxies: Networks = ()
    """Networks whose X-Forwarded-For is believed."""
    cors: Cors = Cors()
    """Which web pages of other origins may call."""
    default_model: Text | None = None
    """The model of live_stream without `model`."""
    upstreams: Annotated[
        Mapping[Name, Upstream],
        BeforeValidator(
            _named_upstreams, json_schema_input_type=dict[str, Upstream] | Literal["built-in"]
        ),
        *_FROZEN,
    ]
    """The servers by name. `built-in`: OpenAI if OPENAI_API_KEY is set, else the embedded demo."""
    routes: Annotated[tuple[Route, ...], Field(min_length=1)] = Field(
        default_factory=_everything_to_the_first
    )
    """First match wins; default: everything goes to the first upstream."""
    clients: Annotated[tuple[Client, ...], _null_is((), tuple[Client, ...])] = ()
    """Who may call; default: everybody."""
    limits: Annotated[Limits, _null_is(Limits(), Limits)] = Limits()
    """What each client may use."""
    store: Annotated[Text, AfterValidator(_store)] = Field("memory", repr=False)
    """memory, or redis://, rediss://, unix:// (not in repr: it may hold a password)."""
    store_failure: Annotated[Literal["allow", "deny"], Word] = "allow"
    """While the store is out of reach."""
    store_timeout: Duration = 0.5
    """How long the store may take."""
    resume: Resume | None = Resume()
    """Resumable streams; null: off."""
    log: Log = Log()
    """What is logged, and how."""

    _built_in: Literal["openai", "demo"] | None = PrivateAttr(default=None)

    @property
    def built_in(self) -> Literal["openai", "demo"] | None:
        """What `upstreams: built-in` has chosen; None where the file names its own upstreams."""
        return self._built_in


class KeySource:
    """Where an upstream's key comes from; asked for each attempt."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def value(self) -> str:
        return self._key


class KeyFile(KeySource):
    """A key in a file, re-read when the file changes.

    While the file is unreadable or blank the last good key stays in use: a rotation that passes
    through such a moment must not fail requests. Such a change is logged, and so is its end.
    """

    def __init__(self, path: Path) -> None:
        try:
            super().__init__(read_key(path))
        except ValueError as error:  # it was good a moment ago, when the config was loaded
            raise _refusal(str(path), None, str(error)) from None
        self._path = path
        self._seen: tuple[int, ...] | None = None  # None: to be read in any case
        self._trouble = ""

    def value(self) -> str:
        trouble = ""
        try:
            self._refresh()
        except ValueError as error:
            trouble, self._seen = str(error), None
        if bool(trouble) != bool(self._trouble):
            now = f"{trouble}: the last good key stays in use" if trouble else "can be read again"
            _logger.warning("%s: %s", self._path, now)
        self._trouble = trouble
        return self._key

    def _refresh(self) -> None:
        seen = self._look()  # before reading: a change in between is then seen the next time
        if seen is None or seen != self._seen:
            self._key = read_key(self._path)
            self._seen = seen

    def _look(self) -> tuple[int, ...] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None  # reading will say why
        return status.st_mtime_ns, status.st_size, status.st_ino


# (3) Loading: pydantic's complaints in our words --------------------------------------------------

_WORDS = {
    "missing": "is required",
    "literal_error": "must be one of {expected}",
    "too_short": "must not be empty",
    "model_type": "must be a mapping",
    "dict_type": "must be a mapping",
    "tuple_type": "must be a list",
}


def load(
    path: Path, environ: Mapping[str, str], host: str | None = None, port: int | None = None
) -> Config:
    """The config in a file; `host` and `port` of the command line go before it. Or ConfigError."""
    document = _read(path, environ)
    _override_listen(document, host, port)
    built_in = _choose_built_in(document, environ)
    config = _validated(document)
    document.raise_problems()
    config._built_in = built_in
    return config


def with_listen(config: Config, host: str | None, port: int | None) -> Config:
    """The same config listening elsewhere. ConfigError, naming `--host`, if it must not."""
    document = Document("", {"listen": config.listen.model_dump()})
    _override_listen(document, host, port)
    listen, faults = _attempt(Listen, document.data["listen"])
    for fault in faults:
        document.complain(("listen", *fault["loc"]), _wording(fault, ()))
    if listen is not None:
        config = config.model_copy(update={"listen": listen})
        _cross_check(config, document)
    document.raise_problems()
    return config


def _override_listen(document: Document, host: str | None, port: int | None) -> None:
    listen = document.data.setdefault("listen", {})
    for key, value in (("host", host), ("port", port)):
        if value is not None and isinstance(listen, dict):
            listen[key] = value
            document.names["listen", key] = f"--{key}"


def _choose_built_in(
    document: Document, environ: Mapping[str, str]
) -> Literal["openai", "demo"] | None:
    """Resolves `upstreams: built-in`, the only choice that falls back to the demo."""
    if document.data.get("upstreams") != "built-in":
        return None
    if environ.get("SLUICE_KEY"):
        document.names["SLUICE_KEY",] = "SLUICE_KEY"
        document.complain(("SLUICE_KEY",), "clients are not available yet: unset it")
    key = environ.get("OPENAI_API_KEY")
    if not key:
        document.data["upstreams"] = {"demo": {"base_url": "demo://"}}
        return "demo"
    document.names["upstreams", "openai", "api_key"] = "OPENAI_API_KEY"
    document.data["upstreams"] = {
        "openai": {"base_url": "https://api.openai.com/v1", "api_key": key}
    }
    return "openai"


def _validated(document: Document) -> Config:
    """The config; where something is wrong, what is right in it, for the checks to see it too."""
    data = document.data
    config, faults = _attempt(Config, data)
    for fault in faults:
        where = _place(fault, document)
        document.complain(where, _wording(fault, where))
    for _ in range(3):  # what is left out may leave something else incomplete
        if config is None and isinstance(data.get("upstreams"), dict):
            data = _without(faults, data)
            config, faults = _attempt(Config, data)
    if config is None:
        raise ConfigError(document.problems)
    _cross_check(config, document)
    _refuse_unavailable(config, data, document)
    return config


def _attempt(model: type[_Model], data: object) -> tuple[_Model | None, list[Any]]:
    try:
        return model.model_validate(data), []
    except ValidationError as error:
        faults: list[Any] = [fault for fault in error.errors() if _is_its_own(fault)]
        for fault in faults:  # of a bad key pydantic speaks as of a part of its value
            fault["loc"] = tuple(step for step in fault["loc"] if step != "[key]")
        return None, faults


def _is_its_own(fault: Any) -> bool:
    """Whether a fault isn't merely the echo of another: a list too short without its bad items."""
    is_echo = fault["type"] == "too_short" and len(fault["input"]) > 0
    return not is_echo and fault["type"] != "default_factory_not_called"


def _place(fault: Any, document: Document) -> Where:
    """Where a fault is in the file: pydantic's way can go on, to what a scalar was taken for."""
    where: Where = fault["loc"]
    while where and fault["type"] != "missing" and not document.has(where):
        where = where[:-1]
    return where


def _without(faults: list[Any], data: dict[str, Any]) -> dict[str, Any]:
    """The data without the faulty parts, and with stand-ins where something has to be."""
    data = copy.deepcopy(data)
    name = "left-out"
    items: dict[str, Any] = {"routes": {}, "models": name, "upstreams": name}
    required = {"base_url": f"http://{name}", "models": [name], "upstreams": [name], "name": name}
    for fault in faults:
        inside, key, rest = _innermost(data, fault["loc"])
        if fault["type"] == "missing":
            inside[key] = required.get(key)
        elif rest and key in items and isinstance(inside.get(key), list):
            inside[key][rest[0]] = items[key]
        else:
            inside.pop(key, None)
    return data


def _innermost(data: dict[str, Any], where: Where) -> tuple[dict[str, Any], str, Where]:
    """The innermost mapping on that way, the key by which the way leaves it, and the rest."""
    found: tuple[dict[str, Any], str, Where] = (data, "", ())
    value: Any = data
    for index, step in enumerate(where):
        if isinstance(value, dict):
            found, value = (value, str(step), where[index + 1 :]), value.get(step)
        else:
            value = value[int(step)] if isinstance(value, list) else None
    return found


def _wording(fault: Any, where: Where) -> str:
    """Our own words: pydantic's would repeat the value."""
    kind, context = fault["type"], fault.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "extra_forbidden":
        allowed = sorted(_fields_around(where))
        near = difflib.get_close_matches(str(where[-1]), allowed, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"is an unknown key: {hint}allowed are {', '.join(allowed)}"
    words = _WORDS.get(kind, "is not valid").format(**context)
    if fault["input"] is None:
        words += ", and is empty"
    if kind == "missing":
        words += f": {_fields_around(where)[str(where[-1])].description}"
    return words


def _fields_around(where: Where) -> dict[str, FieldInfo]:
    """The fields of the model that encloses that place."""
    kind: Any = Config
    for step in where[:-1]:
        arguments = get_args(kind)
        if get_origin(kind) is tuple:
            kind = arguments[0]
        elif arguments:  # Mapping[Name, X]
            kind = arguments[1]
        else:
            kind = kind.model_fields[step].annotation
        kind = next((each for each in get_args(kind) if NoneType in get_args(kind)), kind)
    fields: dict[str, FieldInfo] = kind.model_fields
    return fields


# (4) Cross checks: what is right in itself and lies in combination -------------------------------


@dataclass(frozen=True, slots=True)
class _Lie:
    where: Where
    message: str
    given: Where = ()  # something else that it depends on: no lie if that is broken itself


def _cross_check(config: Config, document: Document) -> None:
    for check in (_keys, _ca_files, _candidates, _labels, _admin_port, _open_proxy):
        for lie in check(config):
            if not document.is_broken(lie.given):
                document.complain(lie.where, lie.message)


def _keys(config: Config) -> Iterator[_Lie]:
    for name, upstream in config.upstreams.items():
        at = ("upstreams", name)
        if upstream.api_key and upstream.api_key_file:
            yield _Lie((*at, "api_key_file"), "must not stand beside api_key: choose one")
        elif upstream.api_key or upstream.api_key_file:
            key = "api_key" if upstream.api_key else "api_key_file"
            if upstream.demo:
                yield _Lie((*at, key), "would not be used: demo:// takes no key")
            if upstream.auth == "none":
                yield _Lie((*at, key), "would not be sent: auth is none")
            for header in upstream.headers:
                if header.lower() == _CREDENTIAL_HEADERS.get(upstream.auth):
                    yield _Lie((*at, "headers", header), f"is where {key} goes: choose one")


def _ca_files(config: Config) -> Iterator[_Lie]:
    for name, upstream in config.upstreams.items():
        if upstream.ca_file and not upstream.base_url.startswith("https://"):
            at = ("upstreams", name)
            message = "would not be used: base_url does not begin with https://"
            yield _Lie((*at, "ca_file"), message, given=(*at, "base_url"))


def _candidates(config: Config) -> Iterator[_Lie]:
    for index, route in enumerate(config.routes):
        for number, name in enumerate(route.upstreams):
            at = ("routes", index, "upstreams", number)
            if name not in config.upstreams:
                message = f"is an unknown upstream: known are {', '.join(config.upstreams)}"
                yield _Lie(at, message, given=("upstreams", name))
            elif name in route.upstreams[:number]:
                yield _Lie(at, "is a candidate of this route already")


def _labels(config: Config) -> Iterator[_Lie]:
    """The names of routes and clients, which metrics and logs tell apart by them."""
    reserved = {"routes": "none", "clients": "anonymous"}
    for section, parts in (("routes", config.routes), ("clients", config.clients)):
        names = [part.name for part in parts]
        for index, name in enumerate(names):
            at, models = (section, index, "name"), (section, index, "models")
            if name == reserved[section]:
                yield _Lie(at, f"must not be {name}: so metrics call the lack of one", models)
            elif name in names[:index]:
                first = f"{section}[{names.index(name)}]"
                yield _Lie(at, f"must be unique: {first} has the same name", models)


def _admin_port(config: Config) -> Iterator[_Lie]:
    hosts = {config.listen.host.lower(), config.admin.host.lower()}
    same_host = len(hosts) == 1 or hosts & {"0.0.0.0", "::"}
    if config.admin.port and config.admin.port == config.listen.port and same_host:
        yield _Lie(("admin", "port"), "must not be the port of listen", given=("listen", "port"))


def _open_proxy(config: Config) -> Iterator[_Lie]:
    injecting = [name for name, upstream in config.upstreams.items() if upstream.injects]
    if injecting and not (config.open or config.clients or _is_loopback(config.listen.host)):
        yield _Lie(
            ("listen", "host"),
            "is not loopback, and without clients everybody who reaches it could spend the key of "
            f"{injecting[0]}: listen on 127.0.0.1, add clients (not available yet), "
            "or allow it with open: true",
            given=("open",),
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


# (4) Cross checks: what is not available yet -----------------------------------------------------

# What to say of a key, and the values that are accepted because they mean "off".
_NOT_YET: dict[str, tuple[Any, ...]] = {
    "default_model": ("is not available yet: null is fine", None),
    "upstreams.*.egress": ("is not available yet: null is fine", None),
    "upstreams.*.max_streams": ("is not available yet: null is fine", None),
    "upstreams.*.circuit": ("is not available yet: leave it out",),
    "upstreams.*.timeouts.stall": ("is not available yet: leave it out",),
    "routes.*.upstreams.1": ("failover is not available yet: name one upstream",),
    "routes.*.model": ("is not available yet: null is fine", None),
    "routes.*.attempts": ("is not available yet: 1 is fine", 1),
    "routes.*.on_disconnect": ("is not available yet: cancel is fine", "cancel"),
    "routes.*.finish_cap": ("is not available yet: leave it out",),
    "routes.*.commit_after": ("is not available yet: leave it out",),
    "routes.*.heartbeat": ("is not available yet: 0 is fine", 0),
    "clients": ("is not available yet: an empty list is fine", ()),
    "limits": ("is not available yet: null is fine", Limits()),
    "store": ("is not available yet: memory is fine", "memory"),
    "store_failure": ("is not available yet: allow is fine", "allow"),
    "store_timeout": ("is not available yet: leave it out",),
    "resume": ("is not available yet: null is fine", None),
}


def _refuse_unavailable(config: Config, data: object, document: Document) -> None:
    for pattern, (message, *accepted) in _NOT_YET.items():
        for where, _ in _matches(pattern, data):
            value: Any = config
            for step in where:
                value = getattr(value, str(step)) if isinstance(value, BaseModel) else value[step]
            if value not in accepted:
                document.complain(where, message)


def _matches(pattern: str, data: Any) -> list[tuple[Where, Any]]:
    """The places in the data that a pattern means, each with what holds its last step."""
    found: list[tuple[Where, Any]] = [((), data)]
    *outer, last = pattern.split(".")
    for wanted in outer:
        found = [
            ((*where, step), value[step])
            for where, value in found
            for step in _steps(value)
            if wanted in {"*", str(step)}
        ]
    return [
        ((*where, step), value)
        for where, value in found
        for step in _steps(value)
        if last == str(step)
    ]


def _steps(value: Any) -> list[str | int]:
    if isinstance(value, dict):
        return list(value)
    return list(range(len(value))) if isinstance(value, list) else []


# (5) Rendering -------------------------------------------------------------------------------


def render(config: Config) -> str:
    """The effective config as YAML: secrets as ***, defaults included; itself a valid config."""
    data = config.model_dump(mode="json")
    for pattern in _NOT_YET:
        for where, holder in _matches(pattern, data):
            del holder[where[-1]]
    text: str = yaml.safe_dump(_escaped(data), sort_keys=False, allow_unicode=True, width=1000)
    return text


def _escaped(value: Any) -> Any:
    """The same with $ written so that loading it gives $ again."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("$", "$$") if isinstance(value, str) else value


def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of what may be written in the file."""
    found: dict[str, Any] = _with_variables(Config.model_json_schema())
    found["$defs"]["Variable"] = {
        "description": "${VAR} or ${VAR:-default}",
        "type": "string",
        "pattern": r"\$\{",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def _with_variables(node: Any) -> Any:
    """The same schema, where a variable may stand for whatever is not simply text."""
    if isinstance(node, list):
        return [_with_variables(item) for item in node]
    if not isinstance(node, dict) or any("pattern" in kind for kind in node.get("anyOf", ())):
        return node
    if node.get("type") in {"integer", "boolean"} or "enum" in node:
        kinds = {key: node[key] for key in node.keys() - {"title", "description", "default"}}
        about = {key: node[key] for key in node.keys() - kinds.keys()}
        return {**about, "anyOf": [kinds, {"$ref": "#/$defs/Variable"}]}
    return {key: _with_variables(item) for key, item in node.items()}
