"""F3 inbound: from a client's request to an `Ask`: where it goes, what it asks for, its body.

JSON bodies are read whole, since their model chooses the route; all others stream up as they come.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import cast
from urllib.parse import unquote_to_bytes

import msgspec
from aiohttp import HttpVersion11, web

from proxy.errors import ProxyError
from proxy.exchange import Ask, Upload
from proxy.headers import is_loop
from proxy.payload import Payload
from proxy.requests import FORWARDED_METHODS

PREFIX = "/v1"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_REFUSED_METHODS = ("CONNECT", "TRACE")
# UTF-8 sequences that are longer than need be: another spelling of ASCII, dots and slashes included
_OVERLONG = re.compile(rb"[\xc0\xc1]|\xe0[\x80-\x9f]|\xf0[\x80-\x8f]")
_MAX_ENCODINGS = 4  # rounds of percent-decoding; nobody means more, and each costs its length
# Bytes of a model's name as it stands in the body. A longer one is nobody's, and matching megabytes
# against a route's patterns would hold everybody up.
_MAX_MODEL = 4096
_STOPS = re.compile(rb"[;?#\0]")
_SUSPICIOUS = re.compile(r"[.%\\]|//")


@dataclass(frozen=True, slots=True)
class Bounds:
    """How large a body may be (bytes), and how long it may pause (seconds)."""

    max_body: int
    body_timeout: float


def path_of(raw_target: str) -> str:
    """The path of a request target, without its query; also of one in absolute form."""
    path = raw_target.partition("#")[0].partition("?")[0]
    if not path.startswith("/") and "://" in path:  # RFC 9112 3.2.2
        path = "/" + path.partition("://")[2].partition("/")[2]
    return path


def upstream_target(raw_target: str) -> bytes:
    """What follows `/v1`, path and query, byte by byte as it came.

    Raises ProxyError: invalid_path for whatever an upstream could read as another path than the
    one below its base URL, unknown_url for what is not below `/v1`.
    """
    if "#" in raw_target:
        raise _invalid_path("must not contain a fragment (`#`)")
    path = path_of(raw_target)
    rest = path.removeprefix(PREFIX)
    if _SUSPICIOUS.search(path):
        _refuse_traversal(path)
    if not path.startswith(PREFIX + "/"):
        raise unknown_url()
    query = raw_target.partition("?")
    return (rest + query[1] + query[2]).encode("utf-8", "surrogateescape")


def _refuse_traversal(path: str) -> None:
    decoded = path.encode("utf-8", "surrogateescape")
    for _ in range(_MAX_ENCODINGS):
        once, decoded = decoded, unquote_to_bytes(decoded)
        if decoded == once:
            break
    else:
        raise _invalid_path("is percent-encoded again and again")
    below = decoded.removeprefix(PREFIX.encode())
    if decoded.startswith(b"//") or below.startswith(b"//"):
        raise _invalid_path("must not begin with two slashes")
    if b"\\" in decoded:
        raise _invalid_path("must not contain a backslash, in whatever encoding")
    if _OVERLONG.search(decoded):
        raise _invalid_path("contains overlong UTF-8")
    # Some servers take `;` and what follows for parameters of the segment, or stop at the others.
    if any(_STOPS.split(segment)[0] in (b".", b"..") for segment in decoded.split(b"/")):
        raise _invalid_path("must not contain dot segments, in whatever encoding")


def unknown_url() -> ProxyError:
    return ProxyError(
        "unknown_url",
        f"There is nothing here. Requests to an upstream go to {PREFIX}/..., such as "
        f"{PREFIX}/chat/completions.",
    )


def _invalid_path(problem: str) -> ProxyError:
    return ProxyError("invalid_path", f"The request's path {problem}.")


async def read_ask(request: web.BaseRequest, bounds: Bounds) -> Ask:
    """Reads the request. Raises ProxyError for what must not be forwarded."""
    if request.method in _REFUSED_METHODS:
        raise ProxyError(
            "method_not_allowed",
            f"{request.method} is not forwarded.",
            extra_headers={"Allow": FORWARDED_METHODS},
            close=True,
        )
    target = upstream_target(request.raw_path)
    headers = request.raw_headers
    if is_loop(headers):
        raise ProxyError(
            "loop_detected",
            "This request has been through Sluice before: an upstream's base_url leads back here.",
        )
    _check_declared(request, bounds)
    if not request.body_exists:
        body = b"" if "Content-Length" in request.headers else None
        return Ask(request.method, target, headers, body)
    pieces = _pieces(request, bounds)
    if not _is_json(request.headers.get("Content-Type", "")):
        cast(Payload, request.content).check()  # before anybody is asked
        return Ask(request.method, target, headers, Upload(_declared_length(request), pieces))
    whole = bytearray()  # not a list: a body may come in pieces of a byte
    async for piece in pieces:
        whole += piece
    body = bytes(whole)
    model, stream = _peek(body)
    return Ask(request.method, target, headers, body, model, stream, identity=stream)


def _check_declared(request: web.BaseRequest, bounds: Bounds) -> None:
    """Refuses by the head alone what would be refused later, so that the body need not be sent."""
    expectations = [each.lower() for each in request.headers.getall("Expect", [])]
    if expectations and expectations != ["100-continue"]:
        raise ProxyError(
            "expectation_failed", "The only expectation that is met is 100-continue.", close=True
        )
    if (_declared_length(request) or 0) > bounds.max_body:
        raise _too_large(bounds.max_body)


def _declared_length(request: web.BaseRequest) -> int | None:
    length = request.headers.get("Content-Length")
    return None if length is None else int(length)


def _is_json(content_type: str) -> bool:
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type == "application/json" or media_type.endswith("+json")


async def _pieces(request: web.BaseRequest, bounds: Bounds) -> AsyncIterator[bytes]:
    """The body as it comes, at most `max_body` bytes of it."""
    if "Expect" in request.headers and request.version >= HttpVersion11 and request.transport:
        request.transport.write(_CONTINUE)  # RFC 9110 10.1.1: now that the body will be read
    payload, size = cast(Payload, request.content), 0
    while not payload.is_taken:
        piece = payload.take_nowait() or await _next_piece(payload, bounds.body_timeout)
        size += len(piece)
        if size > bounds.max_body:
            raise _too_large(bounds.max_body)
        if piece:
            yield piece


async def _next_piece(payload: Payload, timeout: float) -> bytes:
    try:
        async with asyncio.timeout(timeout):
            return await payload.take()
    except TimeoutError:
        raise ProxyError(
            "request_timeout", f"The request's body stood still for {timeout:g} s.", close=True
        ) from None


def _too_large(max_body: int) -> ProxyError:
    return ProxyError(
        "request_too_large",
        f"The request's body is larger than {max_body} bytes, this proxy's `max_body`.",
        close=True,
    )


class _Peek(msgspec.Struct):
    """The two members of a request that choose its way, as they stand. Nothing is built of them:
    ten million objects in place of the model's name would take a gigabyte, and a second."""

    model: msgspec.Raw = msgspec.Raw()
    stream: msgspec.Raw = msgspec.Raw()


_peeker = msgspec.json.Decoder(_Peek)
_string = msgspec.json.Decoder(str)
_TRUE = msgspec.Raw(b"true")
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def _peek(body: bytes) -> tuple[str | None, bool]:
    """Model and `stream` of a JSON body; a body that can't be read goes up as it is, unread."""
    try:
        peek = _peeker.decode(body)
    except _UNREADABLE:
        return None, False
    stream = peek.stream == _TRUE
    if len(peek.model) > _MAX_MODEL:
        return None, stream
    try:
        return _string.decode(peek.model), stream
    except _UNREADABLE:  # none, or no string
        return None, stream
