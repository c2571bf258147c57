"""F0 requests: HTTP/1.1 requests as pure values, read more strictly than any server behind us.

The counterpart of `framing`, which reads responses. `RequestReader` takes bytes until a head is
whole; `request_body` says which body follows it. What could be read in two ways is refused with one
ProxyError: whoever stands behind us would read it the other way, and find a second request in what
we took for a body (RFC 9112 11.2). Refused too is what is only ever sent by mistake or in malice:
bare LF, folded lines, control characters, a second Host. The connection ends there, since nobody
can say where the next request would begin.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from multidict import CIMultiDict, CIMultiDictProxy

from proxy.errors import ProxyError
from proxy.framing import Chunked, Header, NoBody, Sized, read_fields

MAX_LINE = 16 * 1024  # bytes of a request line
MAX_HEAD = 32 * 1024  # bytes of a head, its request line included
MAX_FIELDS = 128

# https://www.iana.org/assignments/http-methods, but for PRI, which is HTTP/2's preface.
METHODS = frozenset(
    b"ACL BASELINE-CONTROL BIND CHECKIN CHECKOUT CONNECT COPY DELETE GET HEAD LABEL LINK LOCK MERGE "
    b"MKACTIVITY MKCALENDAR MKCOL MKREDIRECTREF MKWORKSPACE MOVE OPTIONS ORDERPATCH PATCH POST "
    b"PROPFIND PROPPATCH PUT QUERY REBIND REPORT SEARCH TRACE UNBIND UNCHECKOUT UNLINK UNLOCK UPDATE "
    b"UPDATEREDIRECTREF VERSION-CONTROL".split()
)
FORWARDED_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"  # the common ones, for Allow

_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([!-~]+) HTTP/([0-9])\.([0-9])\r\n")
_EMPTY_LINES = re.compile(rb"(?:\r\n)+")  # RFC 9112 2.2 forgives them before a request
_LINE_PART = re.compile(rb"[!-~ ]*\r?")
# What no head can hold: a bare LF, a bare CR, control characters.
_NEVER = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_ABSOLUTE = re.compile(rb"https?://[^/?#]+(?:[/?].*)?", re.IGNORECASE)
# RFC 3986 3.2.2, without the delimiters that no host of ours needs, and a port (RFC 9112 3.2).
_HOST = re.compile(r"(?:[A-Za-z0-9\-._~%]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{0,5}))?")
_CHUNKED = re.compile(r"chunked", re.IGNORECASE | re.ASCII)  # else the Kelvin sign is a k
_LENGTH = re.compile(r"[0-9]{1,18}")


class RequestHead(NamedTuple):
    """Request line and header fields; `minor` is the x of HTTP/1.x. `fields` are `headers` for
    looking them up, as text."""

    method: str
    target: str
    minor: int
    headers: tuple[Header, ...]
    fields: CIMultiDictProxy[str]

    def __repr__(self) -> str:
        return f"<RequestHead {self.method}>"  # the rest may hold a key

    @property
    def keeps_alive(self) -> bool:
        """Whether another request may follow (RFC 9112 9.3); HTTP/1.0 clients connect anew."""
        options = ",".join(self.fields.getall("Connection", ())).lower()
        return self.minor == 1 and "close" not in {each.strip() for each in options.split(",")}


class RequestReader:
    """Takes a connection's bytes until a request head is whole; then it is ready for the next."""

    def __init__(self) -> None:
        self._buffer = b""
        self._searched = 0  # bytes of the buffer in which no head ends

    @property
    def begun(self) -> bool:
        """Whether a part of a head has come."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> tuple[RequestHead, bytes] | None:
        """Returns the head and the bytes behind it, or None while it is not whole.

        Raises ProxyError as soon as it can't become a head.
        """
        buffer = self._buffer + data if self._buffer else data
        if empty := _EMPTY_LINES.match(buffer):
            buffer = buffer[empty.end() :]
        end = buffer.find(b"\r\n\r\n", max(0, self._searched - 3))
        if end < 0:
            _check_unfinished(buffer, self._searched)
            self._buffer, self._searched = buffer, len(buffer)
            return None
        self._buffer, self._searched = b"", 0
        return parse_head(buffer[: end + 4]), buffer[end + 4 :]


def _check_unfinished(buffer: bytes, searched: int) -> None:
    """Refuses at once what can't become a head, instead of waiting for a timeout."""
    if _NEVER.search(buffer, max(0, searched - 1)):
        raise _invalid("a bare CR or LF, or a control character")
    line_end = buffer.find(b"\r\n", 0, MAX_LINE + 2)
    _check_size(len(buffer), line_end)
    if line_end >= max(0, searched - 1):
        _parse_line(buffer)
    elif line_end < 0 and (buffer.count(b" ") > 2 or not _LINE_PART.fullmatch(buffer, searched)):
        raise _invalid("no request line of HTTP/1.1")


def _check_size(size: int, line_end: int) -> None:
    if line_end < 0 and size > MAX_LINE:
        raise ProxyError(
            "uri_too_long", f"The request line is longer than {MAX_LINE} bytes.", close=True
        )
    if size > MAX_HEAD:
        raise ProxyError(
            "headers_too_large",
            f"The request's head is larger than {MAX_HEAD} bytes.",
            close=True,
        )


def parse_head(block: bytes) -> RequestHead:
    """Reads one head, from the request line to the empty line. Raises ProxyError."""
    _check_size(len(block), block.find(b"\r\n", 0, MAX_LINE + 2))
    method, target, minor, end = _parse_line(block)
    if block.count(b"\r\n") - 2 > MAX_FIELDS:
        message = f"The request has more than {MAX_FIELDS} header fields."
        raise ProxyError("headers_too_large", message, close=True)
    headers = read_fields(block, end)
    if headers is None:
        raise _invalid("a malformed header field")
    fields = [
        (name.decode("ascii"), value.decode("utf-8", "surrogateescape")) for name, value in headers
    ]
    head = RequestHead(
        method.decode("ascii"),
        target.decode("ascii"),
        minor,
        headers,
        CIMultiDictProxy(CIMultiDict(fields)),
    )
    _check_host(head)
    return head


def _parse_line(block: bytes) -> tuple[bytes, bytes, int, int]:
    """Method, target, minor version, and where the line ends."""
    line = _LINE.match(block)
    if line is None:
        raise _invalid("no request line of HTTP/1.1 (a target must be percent-encoded ASCII)")
    method, target, major, minor = line.groups()
    if major != b"1" or minor not in b"01":
        raise _invalid("another version than HTTP/1.1 or 1.0")
    if method not in METHODS:
        raise ProxyError(
            "method_not_allowed",
            "The request's method is unknown.",
            extra_headers={"Allow": FORWARDED_METHODS},
            close=True,
        )
    # RFC 9112 3.2: origin-form, absolute-form; authority-form and asterisk-form with one method.
    if not (
        target.startswith(b"/")
        or _ABSOLUTE.fullmatch(target)
        or method == b"CONNECT"
        or (method == b"OPTIONS" and target == b"*")
    ):
        raise _invalid("a target that is neither a path nor a URL")
    return method, target, int(minor), line.end()


def _check_host(head: RequestHead) -> None:
    """RFC 9112 3.2: exactly one, and a valid one; HTTP/1.0 may do without."""
    hosts = head.fields.getall("Host", ())
    if len(hosts) > 1 or (not hosts and head.minor == 1):
        raise _invalid("no Host header" if not hosts else "more than one Host header")
    host = _HOST.fullmatch(hosts[0]) if hosts else None
    if hosts and (host is None or int(host[1] or 0) > 65535):
        raise _invalid("a malformed Host header")


def request_body(head: RequestHead) -> NoBody | Sized | Chunked:
    """Which body follows, by RFC 9112 6.3. Raises ProxyError for the ambiguous ones."""
    codings = head.fields.getall("Transfer-Encoding", ())
    lengths = head.fields.getall("Content-Length", ())
    if codings:
        if lengths:
            raise _invalid("both Transfer-Encoding and Content-Length")
        if head.minor == 0:
            raise _invalid("a Transfer-Encoding, which HTTP/1.0 does not have")
        if len(codings) > 1 or not _CHUNKED.fullmatch(codings[0]):
            raise _invalid("another Transfer-Encoding than one `chunked`")
        return Chunked()
    if len(lengths) > 1:
        raise _invalid("more than one Content-Length")
    if lengths and not _LENGTH.fullmatch(lengths[0]):
        raise _invalid("a Content-Length that is no plain number")
    return Sized(int(lengths[0])) if lengths else NoBody()


def _invalid(what: str) -> ProxyError:
    return ProxyError(
        "invalid_request", f"The request is not valid HTTP/1.1: it has {what}.", close=True
    )
