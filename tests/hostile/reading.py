"""What a reader who shares no line with the proxy makes of HTTP/1.1 bytes: h11, and a regex or two.

h11 is lenient in places (bare LF, folded lines, Content-Length beside Transfer-Encoding). It reads
some meaning into such bytes, others read another: `plain_request` and `plain_answer` tell which
spellings nobody can read in two ways.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import h11

_ROOM = 2**20  # bytes h11 may hold of one head: bounds are the proxy's business

# h11 holds trailers to the rules for headers of those names; the proxy only drops them.
_TRAILER_TAKEN_FOR_A_HEADER = re.compile(r"Content-Length|Transfer-Encoding")

_EMPTY_LINES = re.compile(rb"^(?:\r\n)+")  # RFC 9112 2.2 ignores them, h11 does not

# The grammar of RFC 9112 and RFC 9110 5.5, without what is obsolete or forgiven.
_FIELDS = rb"((?:[-!#$%&'*+.^_`|~0-9A-Za-z]+:[\t -~\x80-\xff]*\r\n)*)\r\n"
_REQUEST_HEAD = re.compile(rb"(?:\r\n)*[A-Z-]+ [!-~]+ HTTP/1\.([01])\r\n" + _FIELDS)
_STATUS_LINE = rb"HTTP/1\.([01]) (%b)(?: [\t -~\x80-\xff]*)?\r\n"
_INTERIM_HEAD = re.compile(_STATUS_LINE % rb"1[0-9][0-9]" + _FIELDS)
_ANSWER_HEAD = re.compile(_STATUS_LINE % rb"[2-5][0-9][0-9]" + _FIELDS)
_HOST = re.compile(rb"(?:[-0-9A-Za-z._~%]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[\t -~\x80-\xff]*)?\r\n")
_TRAILERS = re.compile(_FIELDS)


@dataclass(frozen=True, slots=True)
class Request:
    """A request, as somebody understood it."""

    method: str
    target: str
    body: bytes = b""


class End(Enum):
    """What follows the last whole request."""

    NOTHING = "nothing, or a part of a request"
    REFUSED = "bytes that are no request"
    CLOSE = "nothing: the last request said that it was the last"


@dataclass(frozen=True, slots=True)
class Reading:
    """Whole requests, each with the bytes it was read from, and what follows them: maybe a request
    that has `begun` with a sound head, and the bytes of it all."""

    requests: tuple[Request, ...]
    spellings: tuple[bytes, ...]
    end: End
    begun: Request | None
    rest: bytes

    @property
    def methods(self) -> list[str]:
        """Of the requests, and of what follows: the answer to HEAD has no body."""
        behind = "HEAD" if self.rest.startswith(b"HEAD ") else "GET"
        return [*(request.method for request in self.requests), behind]


def read_requests(data: bytes) -> Reading:
    """The requests that h11 reads one after another, as a server."""
    requests: list[Request] = []
    spellings: list[bytes] = []
    begun: Request | None = None
    end = End.NOTHING
    while data and end is End.NOTHING:
        connection = h11.Connection(h11.SERVER, _ROOM)
        connection.receive_data(_EMPTY_LINES.sub(b"", data, 1))
        begun, whole, end = _next_request(connection)
        if begun is None or not whole:
            break
        requests.append(begun)
        begun = None
        rest = connection.trailing_data[0]
        spellings.append(data[: len(data) - len(rest)])
        data = rest
    return Reading(tuple(requests), tuple(spellings), end, begun, data)


def _next_request(connection: h11.Connection) -> tuple[Request | None, bool, End]:
    """One request as far as it goes, whether it is whole, and what can follow it."""
    request: Request | None = None
    end = End.NOTHING
    while True:
        try:
            event = _next_event(connection, in_body=request is not None)
        except h11.RemoteProtocolError:
            return request, False, End.REFUSED
        match event:
            case h11.Request():
                request = Request(event.method.decode(), event.target.decode())
                options = b",".join(value for name, value in event.headers if name == b"connection")
                closes = b"close" in {each.strip() for each in options.lower().split(b",")}
                end = End.CLOSE if closes or event.http_version == b"1.0" else End.NOTHING
            case h11.Data():
                assert request is not None
                request = replace(request, body=request.body + event.data)
            case h11.EndOfMessage():
                return request, True, end
            case _:
                return request, False, End.NOTHING


def _next_event(connection: h11.Connection, *, in_body: bool) -> object:
    try:
        return connection.next_event()
    except h11.RemoteProtocolError as error:
        if in_body and _TRAILER_TAKEN_FOR_A_HEADER.search(str(error)):
            return h11.EndOfMessage()
        raise


def plain_request(spelling: bytes) -> bool:
    """Whether the bytes of one request can be read in one way only."""
    head = _REQUEST_HEAD.match(spelling)
    if head is None:
        return False
    values = _values(head[2])
    hosts = values.get(b"host", [])
    if not (head[1] == b"1") <= len(hosts) <= 1 or not all(map(_HOST.fullmatch, hosts)):
        return False
    body = spelling[head.end() :]
    return _plain_body(values, body, modern=head[1] == b"1", unframed=not body)


def plain_answer(spelling: bytes, method: str) -> bool:
    """Whether the bytes of one answer, interim ones before it included, can."""
    at = 0
    while interim := _INTERIM_HEAD.match(spelling, at):
        if {b"content-length", b"transfer-encoding"} & _values(interim[3]).keys():
            return False  # RFC 9110 8.6, RFC 9112 6.1: some would wait for its body
        at = interim.end()
    head = _ANSWER_HEAD.match(spelling, at)
    if head is None:
        return False
    values, body = _values(head[3]), spelling[head.end() :]
    if method == "HEAD" or head[2] in (b"204", b"304"):
        return not body and _plain_framing(values, modern=head[1] == b"1")
    return _plain_body(values, body, modern=head[1] == b"1", unframed=True)


def _values(fields: bytes) -> dict[bytes, list[bytes]]:
    values: dict[bytes, list[bytes]] = {}
    for line in fields.splitlines():
        name, _, value = line.partition(b":")
        values.setdefault(name.lower(), []).append(value.strip(b" \t"))
    return values


def _plain_framing(values: dict[bytes, list[bytes]], *, modern: bool) -> bool:
    codings, lengths = values.get(b"transfer-encoding", []), values.get(b"content-length", [])
    if codings:
        return modern and not lengths and [each.lower() for each in codings] == [b"chunked"]
    return len(lengths) <= 1 and all(map(_LENGTH.fullmatch, lengths))


def _plain_body(
    values: dict[bytes, list[bytes]], body: bytes, *, modern: bool, unframed: bool
) -> bool:
    """`unframed`: whether the body is a plain one if no field says how long it is."""
    if not _plain_framing(values, modern=modern):
        return False
    if b"transfer-encoding" in values:
        return _plain_chunks(body)
    lengths = values.get(b"content-length")
    return len(body) == int(lengths[0]) if lengths else unframed


def _plain_chunks(body: bytes) -> bool:
    at = 0
    while size := _CHUNK_SIZE.match(body, at):
        data = size.end()
        at = data + int(size[1], 16) + 2
        if at == data + 2:
            return _TRAILERS.fullmatch(body, data) is not None
        if body[at - 2 : at] != b"\r\n":
            return False
    return False


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, interim ones (1xx) included. Names of fields are in lower case."""

    status: int
    fields: tuple[tuple[bytes, bytes], ...]
    body: bytes

    def value(self, name: bytes) -> str | None:
        """The value of the first field of this name."""
        values = (value for key, value in self.fields if key == name)
        value = next(values, None)
        return None if value is None else value.decode("latin-1")

    @property
    def closes(self) -> bool:
        return (self.value(b"connection") or "").lower() == "close"


class Malformed(Exception):
    """What came is no HTTP/1.1 answer, or no more: `answer` is what had been read of it."""

    def __init__(self, problem: str, answer: Answer | None) -> None:
        super().__init__(problem)
        self.answer = answer


def read_answers(
    data: bytes, methods: Sequence[str], *, closed: bool = False
) -> tuple[list[Answer], bytes]:
    """The whole answers to requests with these methods, and the bytes of one that is not whole.

    `closed` says that no more will come. Raises Malformed.
    """
    answers: list[Answer] = []
    finals = 0
    while data:
        method = methods[finals] if finals < len(methods) else "GET"
        answer, whole, rest = read_answer(data, method, closed=closed)
        if answer is None or not whole:
            break
        answers.append(answer)
        finals += answer.status >= 200
        data = rest
    return answers, data


def read_answer(
    data: bytes, method: str, *, closed: bool = False
) -> tuple[Answer | None, bool, bytes]:
    """One answer, an interim one maybe, as far as it has come; whether it is whole; and what is
    behind it. Raises Malformed."""
    connection = h11.Connection(h11.CLIENT, _ROOM)
    connection.send(h11.Request(method=method, target="/", headers=[("Host", "sluice")]))
    connection.send(h11.EndOfMessage())
    if data:  # no data would be the connection's end
        connection.receive_data(data)
    answer: Answer | None = None
    while True:
        try:
            event = _next_event(connection, in_body=answer is not None)
        except h11.RemoteProtocolError as error:
            raise Malformed(str(error), answer) from error
        match event:
            case h11.InformationalResponse():
                interim = Answer(event.status_code, tuple(event.headers), b"")
                return interim, True, connection.trailing_data[0]
            case h11.Response():
                answer = Answer(event.status_code, tuple(event.headers), b"")
            case h11.Data():
                assert answer is not None
                answer = replace(answer, body=answer.body + event.data)
            case _:
                break
    if answer is None:
        return None, False, data
    until_close = not {b"content-length", b"transfer-encoding"} & {
        name for name, _ in answer.fields
    }
    whole = isinstance(event, h11.EndOfMessage) or (closed and until_close)
    return answer, whole, connection.trailing_data[0] if whole else b""
