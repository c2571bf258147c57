"""F0 framing: HTTP/1.1 responses as pure values, no sockets and no clocks (RFC 9112).

`requests` reads requests with the same bodies. A response is a head and a body. `HeadReader` takes bytes until the head is whole and gives a
`ResponseHead`; `body_of` says which of the four bodies follows it:

    NoBody       HEAD, 204, 304: nothing, whatever the headers say
    Sized        Content-Length: exactly that many bytes
    Chunked      Transfer-Encoding: chunked: until the last chunk and its trailers
    UntilClose   neither: until the upstream closes the connection

A body takes bytes (`feed`) and gives back their payload. It is `done` at its own end; what came
after is its `surplus`: behind a request it is the next one, behind a response it belongs to nobody,
is never relayed, and such a connection is never used again. `eof` tells a body that no more bytes will come.

Two rules. Whatever can be read in two ways is refused (`FramingError`), because the next reader
would choose the other way: that is how responses get smuggled. And payload is handed on as it
comes, also parts of a chunk: a proxy that waits for the rest of a chunk delays the reader.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

MAX_HEAD = 64 * 1024  # bytes of all heads of one response, the interim (1xx) ones included
_MAX_FIELDS = 256
_MAX_CHUNK_LINE = 1024  # a chunk's size and its extensions
_MAX_TRAILERS = 16 * 1024
_AT_ONCE = 500  # chunks

Header = tuple[bytes, bytes]  # name as it was spelled, value without the white space around it

# RFC 9110 5.6.2 tokens and 5.5 field values. No white space before the colon, no folded lines, no
# bare CR or LF, no NUL: aiohttp's llhttp response parser lets those pass outside of debug mode.
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*))?\r\n")
_FIELDS = re.compile(rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*\r\n)*\r\n")
_TRAILER = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_LENGTH = re.compile(rb"[0-9]{1,18}")
# RFC 9112 7.1: the size in hexadecimal digits only (int() would take signs, 0x and underscores).
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t\x20-\x7e\x80-\xff]*)?")
_CHUNK_LINE_START = re.compile(rb"[0-9A-Fa-f]{1,15}(?:;[\t\x20-\x7e\x80-\xff]*)?\r?")


class FramingError(Exception):
    """The bytes are no HTTP/1.1 response, or one that can be read in two ways."""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """Status line and header fields; `minor` is the x of HTTP/1.x."""

    minor: int
    status: int
    reason: bytes = field(repr=False)
    headers: tuple[Header, ...] = field(repr=False)
    _by_name: dict[bytes, list[bytes]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_name: dict[bytes, list[bytes]] = {}
        for name, value in self.headers:
            by_name.setdefault(name.lower(), []).append(value)
        object.__setattr__(self, "_by_name", by_name)

    def values(self, name: bytes) -> list[bytes]:
        """All values of the fields called `name` (lower case), in their order."""
        return self._by_name.get(name, [])

    @property
    def content_type(self) -> bytes:
        """The media type in lower case, without its parameters; empty if there is none."""
        values = self.values(b"content-type")
        return values[0].partition(b";")[0].strip().lower() if values else b""

    @property
    def keeps_alive(self) -> bool:
        """Whether the connection may serve another request (RFC 9112 9.3)."""
        options = b",".join(self.values(b"connection")).lower()
        return self.minor == 1 and b"close" not in {o.strip() for o in options.split(b",")}


class HeadReader:
    """Takes a connection's bytes until a final response head is whole."""

    def __init__(self) -> None:
        self._buffer = b""
        self._seen = 0
        self._searched = 0  # bytes of the buffer in which no head ends

    def feed(self, data: bytes) -> tuple[ResponseHead, bytes] | None:
        """Returns the head and the bytes behind it, or None while it is not whole.

        Interim responses are skipped (RFC 9110 15.2); 101 is refused, since no upgrade was asked.
        """
        self._buffer += data
        self._seen += len(data)
        while True:
            end = self._buffer.find(b"\r\n\r\n", max(0, self._searched - 3))
            if end < 0:
                self._check_unfinished()
                return None
            self._searched = 0
            block, self._buffer = self._buffer[: end + 4], self._buffer[end + 4 :]
            if self._seen - len(self._buffer) > MAX_HEAD:
                raise FramingError(f"its head is larger than {MAX_HEAD // 1024} KiB")
            head = parse_head(block)
            if head.status >= 200:
                rest, self._buffer = self._buffer, b""  # it may be large, and the stream long
                return head, rest
            if head.status == 101:
                raise FramingError("it switched protocols without being asked")
            if head.values(b"content-length") or head.values(b"transfer-encoding"):
                # RFC 9110 8.6, RFC 9112 6.1: whoever believes it takes the answer for its body.
                raise FramingError("an interim response claims to have a body")

    def _check_unfinished(self) -> None:
        """Refuses at once what can't become a head, instead of waiting for a timeout."""
        if self._seen > MAX_HEAD:
            raise FramingError(f"its head is larger than {MAX_HEAD // 1024} KiB")
        start = self._buffer[:7]
        if start != b"HTTP/1."[: len(start)]:
            raise FramingError("it does not begin like an HTTP/1.x response")
        if _BARE_LF.search(self._buffer, max(0, self._searched - 1)):
            raise FramingError("its head has a line that ends in a bare LF")
        self._searched = len(self._buffer)


def parse_head(block: bytes) -> ResponseHead:
    """Reads one head, from the status line to the empty line."""
    line = _STATUS_LINE.match(block)
    if line is None:
        raise FramingError("its status line is malformed")
    if block.count(b"\r\n") - 2 > _MAX_FIELDS:
        raise FramingError(f"its head has more than {_MAX_FIELDS} fields")
    headers = read_fields(block, line.end())
    if headers is None:
        raise FramingError("its head has a malformed header field")
    return ResponseHead(int(line[1]), int(line[2]), line[3] or b"", headers)


def read_fields(block: bytes, start: int) -> tuple[Header, ...] | None:
    """The header fields of a head, from `start` to the empty line; None if one is malformed."""
    if _FIELDS.fullmatch(block, start) is None:
        return None
    headers = []
    for each in block[start:-4].split(b"\r\n") if start < len(block) - 2 else []:
        name, _, value = each.partition(b":")
        headers.append((name, value.strip(b" \t")))
    return tuple(headers)


class NoBody:
    """Nothing follows the head."""

    behind = False
    done = True
    reusable = True

    def __init__(self) -> None:
        self.surplus = b""

    def feed(self, data: bytes) -> bytes:
        self.surplus = data
        return b""

    def eof(self) -> None:
        """Nothing is missing."""


class Sized:
    """Exactly `length` bytes."""

    behind = False
    reusable = True

    def __init__(self, length: int) -> None:
        self.length = length
        self.surplus = b""
        self.done = length == 0
        self._left = length

    def feed(self, data: bytes) -> bytes:
        left = self._left - len(data)
        if left < 0:
            data, self.surplus = data[: self._left], data[self._left :]
            left = 0
        self._left = left
        self.done = left == 0
        return data

    def eof(self) -> None:
        if not self.done:
            raise FramingError(f"it is {self._left} of {self.length} bytes short")


class UntilClose:
    """Everything until the upstream closes: its end can't be told from a cut."""

    behind = False
    reusable = False
    surplus = b""

    def __init__(self) -> None:
        self.done = False

    def feed(self, data: bytes) -> bytes:
        return data

    def eof(self) -> None:
        self.done = True


@lru_cache(4096)  # a stream's chunks have few sizes
def _chunk_size(line: bytes) -> int:
    """The size that a chunk's first line states, its extensions ignored."""
    match = _CHUNK_LINE.fullmatch(line)
    if match is None:
        raise FramingError("a chunk has a malformed size")
    return int(match[1], 16)


class Chunked:
    """Chunks until one of size zero and its trailers, which are dropped (RFC 9112 7.1).

    One read of 256 KB can hold 40,000 chunks and take as long as 200 requests. So after some the
    body is `behind`: it is to be fed again, with nothing, when others have had their turn.
    """

    reusable = True

    def __init__(self) -> None:
        self.done = False
        self.behind = False
        self.surplus = b""
        self._left = 0  # bytes that the current chunk still lacks
        self._between = b""  # an unfinished line between two chunks' data
        self._expects_crlf = False  # the line end behind a chunk's data
        self._trailers: int | None = None  # bytes of trailers seen, once the last chunk came

    def feed(self, data: bytes) -> bytes:
        if self.done:
            self.surplus = data
            return b""
        self.behind = False
        if self._between:
            data, self._between = self._between + data, b""
        parts: list[bytes] = []
        at = 0
        while at < len(data):
            if self._left:
                part = data[at : at + self._left]
                parts.append(part)
                at += len(part)
                self._left -= len(part)
                self._expects_crlf = not self._left
            elif self._expects_crlf:
                if data.startswith(b"\r\n", at):
                    at += 2
                    self._expects_crlf = False
                elif data[at:] == b"\r":
                    self._between = b"\r"
                    break
                else:
                    raise FramingError("a chunk is longer than its size says")
            elif self._trailers is not None:
                at = self._read_trailers(data, at)
                break
            elif len(parts) >= _AT_ONCE:
                self._between, self.behind = data[at:], True
                break
            else:
                line_end = data.find(b"\r\n", at, at + _MAX_CHUNK_LINE)
                if line_end < 0:
                    self._between = self._unfinished_size(data[at:])
                    break
                size = _chunk_size(data[at:line_end])
                at, end = line_end + 2, line_end + 2 + size
                if not size:
                    self._trailers = 0
                elif data[end : end + 2] == b"\r\n":  # all of it is here, as nearly always
                    parts.append(data[at:end])
                    at = end + 2
                else:
                    self._left = size
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @staticmethod
    def _unfinished_size(rest: bytes) -> bytes:
        """The start of a size line, to be kept for the next bytes; refuses anything else."""
        if len(rest) > _MAX_CHUNK_LINE or not _CHUNK_LINE_START.fullmatch(rest):
            raise FramingError("a chunk has a malformed size")
        return rest

    def _read_trailers(self, data: bytes, at: int) -> int:
        while True:
            end = data.find(b"\r\n", at)
            if end < 0:
                self._between = data[at:]
                line = self._between.removesuffix(b"\r")
                if b"\n" in line or (self._trailers or 0) + len(line) > _MAX_TRAILERS:
                    raise FramingError("its trailers are malformed or too large")
                return len(data)
            line, at = data[at:end], end + 2
            if not line:
                self.done = True
                self.surplus = data[at:]
                return len(data)
            self._trailers = (self._trailers or 0) + len(line)
            if self._trailers > _MAX_TRAILERS or not _TRAILER.fullmatch(line):
                raise FramingError("its trailers are malformed or too large")

    def eof(self) -> None:
        if not self.done:
            raise FramingError("it ended before its last chunk")


Body = NoBody | Sized | Chunked | UntilClose


def body_of(head: ResponseHead, method: str) -> Body:
    """Which body follows a response to `method`, by RFC 9112 6.3; refuses the ambiguous ones."""
    codings = head.values(b"transfer-encoding")
    lengths = head.values(b"content-length")
    if len(lengths) > 1:
        raise FramingError("it has more than one Content-Length")
    if lengths and not _LENGTH.fullmatch(lengths[0]):
        raise FramingError("its Content-Length is not a number")
    if codings and (lengths or head.minor == 0):
        raise FramingError("its length is given twice (Transfer-Encoding beside another framing)")
    if codings and [coding.lower() for coding in codings] != [b"chunked"]:
        raise FramingError("its Transfer-Encoding is not chunked")
    if method == "HEAD" or head.status in (204, 304):
        return NoBody()
    if codings:
        return Chunked()
    if lengths:
        return Sized(int(lengths[0]))
    return UntilClose()


def chunk(payload: bytes) -> bytes:
    """One chunk of a chunked body; `payload` must not be empty, as that would be the last one."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


LAST_CHUNK = b"0\r\n\r\n"
