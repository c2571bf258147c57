"""F1 config.addresses: hosts, URLs, networks and files: for each a parser and its type."""

from __future__ import annotations

import ipaddress
import re
import ssl
import stat
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, WithJsonSchema

from proxy.config.values import Text, text

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"  # RFC 1035 2.3.1, and _ of containers
_HOST = rf"{_LABEL}(?:\.{_LABEL})*"
_AUTHORITY = rf"(?P<host>{_HOST}|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{{1,5}}))?"
_EGRESS = re.compile(rf"(?P<url>(?i:http)://{_AUTHORITY})/?")
_BASE_URL = re.compile(rf"(?P<origin>(?i:https?)://{_AUTHORITY})(?P<path>/[^?#\\\s]*)?")
_ORIGIN = re.compile(rf"[a-z][a-z0-9+.-]*://{_AUTHORITY}")


def host(name: str) -> str:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        if not re.fullmatch(_HOST, name):
            raise ValueError("must be a host name, or an IP address without brackets") from None
    return name


def network(value: object) -> Network:
    try:
        return ipaddress.ip_network(text(value))
    except ValueError:
        raise ValueError(
            "must be an address, or a network like 10.0.0.0/8 or fd00::/8 (no bits after its prefix)"
        ) from None


def origin(value: str) -> str:
    if value != "*" and not _ORIGIN.fullmatch(value.lower()):
        raise ValueError('must be "*", or an origin: scheme://host[:port] without a path')
    return value.lower()


def base_url(url: str) -> str:
    if url == "demo://":
        return url
    match = _BASE_URL.fullmatch(url)
    if match is None or not url.isascii() or not 0 < int(match["port"] or 80) < 65536:
        raise ValueError(
            "must be http(s)://host[:port][/path] without query and credentials, or demo://"
        )
    if url.rstrip("/").endswith("/chat/completions"):
        raise ValueError("must end before /chat/completions, which comes with the request")
    host(match["host"].strip("[]"))
    return match["origin"].lower() + (match["path"] or "").rstrip("/")


def egress(url: str) -> str:
    """A forward proxy; its port must be said, as programs disagree about the default (80, 1080)."""
    match = _EGRESS.fullmatch(url)
    if match is None or not 0 < int(match["port"] or 0) < 65536:
        raise ValueError("must be http://host:port of a forward proxy, without path or credentials")
    host(match["host"].strip("[]"))
    return match["url"].lower()


def regular_file(path: Path) -> Path:
    """No directory, and no device or pipe, whose end may never come."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise ValueError("must be a regular file")
    return path


def _certificates(path: Path) -> Path:
    try:
        ssl.create_default_context(cafile=path)
    except ssl.SSLError:
        raise ValueError("must be a file with certificates (PEM)") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    return path


Host = Annotated[Text, AfterValidator(host)]
Networks = tuple[
    Annotated[Network, BeforeValidator(network), WithJsonSchema({"type": "string"})], ...
]
Origins = tuple[Annotated[Text, AfterValidator(origin)], ...]
BaseUrl = Annotated[Text, AfterValidator(base_url)]
Egress = Annotated[Text, AfterValidator(egress)]
CaPath = Annotated[Path, AfterValidator(regular_file), AfterValidator(_certificates)]
