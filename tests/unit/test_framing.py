"""Responses as bytes: the same in every split, and refused wherever two readers could differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import h11
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.framing import (
    LAST_CHUNK,
    MAX_HEAD,
    Chunked,
    FramingError,
    HeadReader,
    NoBody,
    ResponseHead,
    Sized,
    UntilClose,
    body_of,
    chunk,
    parse_head,
)


@dataclass(frozen=True)
class Read:
    """What was made of one answer. `whole`: its end was seen, by its framing or by the close."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    payload: bytes
    whole: bool
    done: bool  # before the close
    surplus: bool


def read(pieces: Iterable[bytes], method: str = "GET") -> Read:
    """Plays pieces and then the close, as a connection does. Raises FramingError."""
    reader, head, body, payload = HeadReader(), None, None, b""
    for piece in pieces:
        rest = piece
        if body is None:
            found = reader.feed(piece)
            if found is None:
                continue
            head, rest = found
            body = body_of(head, method)
            if not rest:
                continue
        given = body.feed(rest)
        assert isinstance(given, bytes)
        payload += given
    if head is None or body is None:
        raise FramingError("no head")
    done = body.done
    try:
        body.eof()
    except FramingError:
        whole = False
    else:
        whole = body.done
    return Read(head.status, head.headers, payload, whole, done, bool(body.surplus))


def outcome(pieces: Iterable[bytes], method: str = "GET") -> Read | str:
    try:
        return read(pieces, method)
    except FramingError:
        return "refused"


def splits(data: bytes) -> Iterator[list[bytes]]:
    """Every way to cut in two, in single bytes, and in threes."""
    yield [data]
    for at in range(1, len(data)):
        yield [data[:at], data[at:]]
    yield [data[at : at + 1] for at in range(len(data))]
    yield [data[at : at + 3] for at in range(0, len(data), 3)]


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
CLOSING = b"HTTP/1.1 200 OK\r\n\r\n"

# Whole answers: bytes, payload, done before the close ----------------------------------------

ANSWERS = {
    "sized": (SIZED + b"hello", b"hello", True),
    "sized, empty": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"", True),
    "sized, leading zeros": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 005\r\n\r\nhello",
        b"hello",
        True,
    ),
    "chunked": (CHUNKED + b"3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n", b"hello", True),
    "chunked, empty": (CHUNKED + b"0\r\n\r\n", b"", True),
    "chunked, odd sizes": (
        CHUNKED + b"0a\r\n0123456789\r\n0000B\r\nhello\r\n0\r\n\r\r\n000\r\n\r\n",
        b"0123456789hello\r\n0\r\n\r",
        True,
    ),
    "chunked, extensions": (
        CHUNKED + b'3;a=b\r\nhel\r\n2;x="\xe4 y"\r\nlo\r\n0;last\r\n\r\n',
        b"hello",
        True,
    ),
    "chunked, trailers": (
        CHUNKED + b"5\r\nhello\r\n0\r\nX-Sum: 1\r\nContent-Length: 99\r\nEmpty:\r\n\r\n",
        b"hello",
        True,
    ),
    "chunked, spelled otherwise": (
        b"HTTP/1.1 200 OK\r\ntRANSFER-eNCODING:\tCHUNKED \r\n\r\n1\r\nx\r\n0\r\n\r\n",
        b"x",
        True,
    ),
    "until close": (CLOSING + b"hello", b"hello", False),
    "until close, empty": (CLOSING, b"", False),
    "until close, old": (b"HTTP/1.0 200 OK\r\n\r\nhello", b"hello", False),
    "no reason": (b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\nhi", b"hi", True),
    "no space for a reason": (b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nhi", b"hi", True),
    "no fields": (b"HTTP/1.1 599 \xfcber\r\n\r\nhi", b"hi", False),
    "odd fields": (
        b"HTTP/1.1 200 OK\r\n!#$%&'*+-.^_`|~09Az:\t x\t\xff \t\r\nEmpty:\r\nContent-Length: 2\r\n\r\nhi",
        b"hi",
        True,
    ),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
    "204 with a length": (b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", b"", True),
    "304 with a length": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", b"", True),
    "304 chunked": (b"HTTP/1.1 304 X\r\nTransfer-Encoding: chunked\r\n\r\n", b"", True),
    "interim": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
        + SIZED
        + b"hello",
        b"hello",
        True,
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_same_in_every_split(name: str) -> None:
    data, payload, done = ANSWERS[name]
    expected = read([data])
    assert (expected.payload, expected.whole, expected.done) == (payload, True, done)
    assert not expected.surplus
    for pieces in splits(data):
        assert read(pieces) == expected, pieces


@pytest.mark.parametrize("name", [name for name in ANSWERS if ANSWERS[name][2]])
def test_a_cut_is_never_whole(name: str) -> None:
    data, payload, _ = ANSWERS[name]
    for end in range(len(data)):
        cut = outcome([data[:end]])
        assert cut == "refused" or (isinstance(cut, Read) and not cut.whole)
        if isinstance(cut, Read):  # what has come is handed on all the same
            assert payload.startswith(cut.payload)


@pytest.mark.parametrize("name", [name for name in ANSWERS if ANSWERS[name][2]])
def test_surplus_is_seen_and_never_payload(name: str) -> None:
    data, payload, _ = ANSWERS[name]
    for surplus in (b"x", b"\r\n", SIZED + b"stolen"):
        for pieces in splits(data + surplus):
            found = read(pieces)
            assert (found.payload, found.whole, found.surplus) == (payload, True, True)


@pytest.mark.parametrize("name", [name for name in ANSWERS if name != "interim"])
def test_the_answer_to_head_ends_with_its_head(name: str) -> None:
    head = ANSWERS[name][0].partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    for pieces in splits(head):
        found = read(pieces, "HEAD")
        assert (found.payload, found.done, found.surplus) == (b"", True, False)


@pytest.mark.parametrize("field", [b"Content-Length: 0", b"Transfer-Encoding: chunked"])
def test_an_interim_response_has_no_body(field: bytes) -> None:
    with pytest.raises(FramingError):
        HeadReader().feed(b"HTTP/1.1 103 Early Hints\r\n" + field + b"\r\n\r\n")


def test_a_head_of_too_many_fields_is_refused() -> None:
    start = b"HTTP/1.1 200 OK\r\n"
    assert len(parse_head(start + b"A: 1\r\n" * 256 + b"\r\n").headers) == 256
    with pytest.raises(FramingError):
        parse_head(start + b"A: 1\r\n" * 257 + b"\r\n")


def test_a_body_after_head_is_surplus() -> None:
    found = read([SIZED + b"hello"], "HEAD")
    assert (found.payload, found.surplus) == (b"", True)


def test_parts_of_a_chunk_are_handed_on_as_they_come() -> None:
    body = Chunked()
    assert body.feed(b"5\r\nhe") == b"he"
    assert body.feed(b"l") == b"l"
    assert body.feed(b"lo\r") == b"lo"
    assert not body.done
    assert body.feed(b"\n0\r\n\r") == b""
    assert not body.done
    assert body.feed(b"\n") == b""
    assert body.done
    assert not body.surplus


def test_a_piece_that_is_payload_alone_is_not_copied() -> None:
    body = Chunked()
    body.feed(b"%x\r\n" % 1000)
    piece = b"x" * 500
    assert body.feed(piece) is piece
    assert Sized(500).feed(piece) is piece
    assert UntilClose().feed(piece) is piece


# Heads that are refused ----------------------------------------------------------------------

BAD_HEADS = {
    "space before the colon": b"HTTP/1.1 200 OK\r\nContent-Length : 5\r\n\r\n",
    "tab before the colon": b"HTTP/1.1 200 OK\r\nContent-Length\t: 5\r\n\r\n",
    "a folded line": b"HTTP/1.1 200 OK\r\nX: 1\r\n 2\r\n\r\n",
    "a line folded with a tab": b"HTTP/1.1 200 OK\r\nX: 1\r\n\t2\r\n\r\n",
    "a fold before the first field": b"HTTP/1.1 200 OK\r\n X: 1\r\n\r\n",
    "a bare LF": b"HTTP/1.1 200 OK\r\nX: 1\nY: 2\r\n\r\n",
    "bare LFs": b"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello",
    "a bare LF before the end": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\nhello",
    "a bare LF at the end": b"HTTP/1.1 200 OK\r\nContent-Length: 5\n\r\nhello",
    "a bare CR": b"HTTP/1.1 200 OK\r\nX: 1\rY: 2\r\n\r\n",
    "a bare CR in the reason": b"HTTP/1.1 200 O\rK\r\n\r\n",
    "a CR too many": b"HTTP/1.1 200 OK\r\nX: 1\r\r\n\r\n",
    "NUL in a value": b"HTTP/1.1 200 OK\r\nX: a\x00b\r\n\r\n",
    "NUL in a name": b"HTTP/1.1 200 OK\r\nX\x00: a\r\n\r\n",
    "a control byte": b"HTTP/1.1 200 OK\r\nX: a\x01b\r\n\r\n",
    "DEL": b"HTTP/1.1 200 OK\r\nX: a\x7fb\r\n\r\n",
    "no colon": b"HTTP/1.1 200 OK\r\nContent-Length 5\r\n\r\n",
    "no name": b"HTTP/1.1 200 OK\r\n: 5\r\n\r\n",
    "a name beyond ASCII": b"HTTP/1.1 200 OK\r\nX\xe4: 5\r\n\r\n",
    "a name with a separator": b"HTTP/1.1 200 OK\r\nX(y): 5\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "one length twice": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\ncontent-length: 5\r\n\r\n",
    "+5": b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\n",
    "-5": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    "5, 5": b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\n",
    "0x5": b"HTTP/1.1 200 OK\r\nContent-Length: 0x5\r\n\r\n",
    "5_0": b"HTTP/1.1 200 OK\r\nContent-Length: 5_0\r\n\r\n",
    "5.0": b"HTTP/1.1 200 OK\r\nContent-Length: 5.0\r\n\r\n",
    "5 0": b"HTTP/1.1 200 OK\r\nContent-Length: 5 0\r\n\r\n",
    "no number": b"HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\n",
    "superscript two": b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\n",
    "huge": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
    "very huge": b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    "a bad length on 304": b"HTTP/1.1 304 X\r\nContent-Length: +5\r\n\r\n",
    "TE beside a length": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n"
    ),
    "a length beside TE": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    ),
    "TE in HTTP/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    "TE gzip, chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    "TE chunked, gzip": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, gzip\r\n\r\n",
    "TE identity": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\n",
    "TE with a parameter": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked;q=1\r\n\r\n",
    "TE twice": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n"
    ),
    "TE empty": b"HTTP/1.1 200 OK\r\nTransfer-Encoding:\r\n\r\n",
    "TE with a vertical tab": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: \x0bchunked\r\n\r\n",
    "HTTP/2.0": b"HTTP/2.0 200 OK\r\n\r\n",
    "HTTP/1.2": b"HTTP/1.2 200 OK\r\n\r\n",
    "HTTP/0.9": b"hello",
    "http/1.1": b"http/1.1 200 OK\r\n\r\n",
    "HTTP/1.10": b"HTTP/1.10 200 OK\r\n\r\n",
    "ICY": b"ICY 200 OK\r\n\r\n",
    "status 20": b"HTTP/1.1 20 OK\r\n\r\n",
    "status 2000": b"HTTP/1.1 2000 OK\r\n\r\n",
    "status 099": b"HTTP/1.1 099 OK\r\n\r\n",
    "status 600": b"HTTP/1.1 600 OK\r\n\r\n",
    "status two hundred": b"HTTP/1.1 two OK\r\n\r\n",
    "two spaces": b"HTTP/1.1  200 OK\r\n\r\n",
    "a tab for a space": b"HTTP/1.1\t200 OK\r\n\r\n",
    "an empty line first": b"\r\n" + SIZED + b"hello",
    "101": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
    "101 after 100": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 101 X\r\n\r\n",
    "a bad interim answer": b"HTTP/1.1 100 Continue\r\nX : 1\r\n\r\n" + SIZED + b"hello",
    "a head too large": b"HTTP/1.1 200 OK\r\n" + b"X: " + b"a" * MAX_HEAD + b"\r\n\r\n",
}


@pytest.mark.parametrize("name", BAD_HEADS)
def test_refused_heads(name: str) -> None:
    data = BAD_HEADS[name]
    assert outcome([data]) == "refused"
    if len(data) < 1000:
        for pieces in splits(data):
            assert outcome(pieces) == "refused", pieces


@pytest.mark.parametrize(
    "start",
    [
        b"G",
        b"\n",
        b"\r",
        b"HTTP/2",
        b"HTTP /1.1",
        b"HTTP/1.1 200 OK\n",
        b"HTTP/1.1 200 OK\r\nA: b\n",
    ],
)
def test_what_cannot_become_a_head_is_refused_at_once(start: bytes) -> None:
    with pytest.raises(FramingError):
        HeadReader().feed(start)


def test_a_head_of_200_kb_is_refused_before_it_is_whole() -> None:
    reader = HeadReader()
    reader.feed(b"HTTP/1.1 200 OK\r\n")
    with pytest.raises(FramingError, match="larger than 64 KiB"):
        for _ in range(200):
            reader.feed(b"X: " + b"a" * 1019 + b"\r\n")


def test_endless_interim_answers_are_refused() -> None:
    reader = HeadReader()
    with pytest.raises(FramingError, match="larger than 64 KiB"):
        for _ in range(10_000):
            assert reader.feed(b"HTTP/1.1 100 Continue\r\n\r\n") is None


def test_the_largest_head_is_read_however_large_its_body() -> None:
    head = b"HTTP/1.1 200 OK\r\nX: " + b"a" * (MAX_HEAD - 23) + b"\r\n\r\n"
    assert len(head) == MAX_HEAD + 1
    with pytest.raises(FramingError):
        HeadReader().feed(head)
    found = HeadReader().feed(head.replace(b"aa", b"a", 1) + b"x" * 300_000)
    assert found is not None
    assert len(found[1]) == 300_000


def test_what_a_head_says() -> None:
    head = parse_head(
        b"HTTP/1.1 200 Oh K \r\nContent-Type:  Text/Event-Stream ; charset=utf-8\r\n"
        b"X: 1\r\nx: \t2 \t\r\n\r\n"
    )
    assert (head.minor, head.status, head.reason) == (1, 200, b"Oh K ")
    assert head.values(b"x") == [b"1", b"2"]
    assert head.content_type == b"text/event-stream"
    assert parse_head(CLOSING).content_type == b""


@pytest.mark.parametrize(
    ("minor", "connection", "keeps_alive"),
    [
        (1, [], True),
        (1, [b"keep-alive"], True),
        (1, [b"close"], False),
        (1, [b"CLOSE"], False),
        (1, [b"x, close ,y"], False),
        (1, [b"x", b"Close"], False),
        (1, [b"closed"], True),
        (0, [], False),
        (0, [b"keep-alive"], False),  # allowed, and not worth the risk
    ],
)
def test_which_connections_are_kept(minor: int, connection: list[bytes], keeps_alive: bool) -> None:
    fields = tuple((b"cOnnection", value) for value in connection)
    assert ResponseHead(minor, 200, b"", fields).keeps_alive is keeps_alive


# Chunks that are refused ---------------------------------------------------------------------

BAD_CHUNKS = {
    "+5": b"+5\r\nhello\r\n0\r\n\r\n",
    "-5": b"-5\r\nhello\r\n0\r\n\r\n",
    "0x5": b"0x5\r\nhello\r\n0\r\n\r\n",
    "5_0": b"5_0\r\nhello\r\n0\r\n\r\n",
    "a space before": b" 5\r\nhello\r\n0\r\n\r\n",
    "a space behind": b"5 \r\nhello\r\n0\r\n\r\n",
    "a tab behind": b"5\t\r\nhello\r\n0\r\n\r\n",
    "a space before an extension": b"5 ;a\r\nhello\r\n0\r\n\r\n",
    "16 digits": b"0000000000000005\r\nhello\r\n0\r\n\r\n",
    "16 digits, huge": b"ffffffffffffffff\r\nhello",
    "no digit": b"g\r\nhello\r\n0\r\n\r\n",
    "empty": b"\r\nhello\r\n0\r\n\r\n",
    "only an extension": b";a=b\r\nhello\r\n0\r\n\r\n",
    "LF only": b"5\nhello\n0\n\n",
    "LF behind a size": b"5\nhello\r\n0\r\n\r\n",
    "LF behind data": b"5\r\nhello\n0\r\n\r\n",
    "CR behind a size": b"5\rhello\r\n0\r\n\r\n",
    "no CRLF behind data": b"5\r\nhello0\r\n\r\n",
    "longer than said": b"5\r\nhello!\r\n0\r\n\r\n",
    "LF in an extension": b"5;a\nb\r\nhello\r\n0\r\n\r\n",
    "CR in an extension": b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    "NUL in an extension": b"5;\x00\r\nhello\r\n0\r\n\r\n",
    "a bare LF in trailers": b"0\r\nA: b\n\r\n",
    "trailers that end in LF": b"0\r\n\n",
    "a trailer without a colon": b"0\r\nGET / HTTP/1.1\r\n\r\n",
    "a folded trailer": b"0\r\nA: b\r\n c\r\n\r\n",
    "a space before a trailer's colon": b"0\r\nA : b\r\n\r\n",
    "NUL in a trailer": b"0\r\nA: \x00\r\n\r\n",
}


@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_refused_chunks(name: str) -> None:
    for pieces in splits(CHUNKED + BAD_CHUNKS[name]):
        assert outcome(pieces) == "refused", pieces


@pytest.mark.parametrize(
    "data",
    [
        b"5;" + b"a" * 5000 + b"\r\nhello\r\n0\r\n\r\n",
        b"5;" + b"a" * 1020 + b"\r\nhello\r\n0\r\n\r\n",
        b"0\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
        b"0\r\nA: " + b"b" * 20_000 + b"\r\n\r\n",
        b"0\r\nA: " + b"b" * (16 * 1024 - 3) + b"\r\n\r\n",
    ],
    ids=["extension", "extension, just so", "trailers", "trailer", "trailer, just so"],
)
def test_bounds_do_not_depend_on_the_split(data: bytes) -> None:
    whole = outcome([CHUNKED + data])
    for size in (1, 100, 4096):
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        assert outcome([CHUNKED, *pieces]) == whole


@pytest.mark.parametrize(
    "endless",
    [b"5;" + b"a" * 100_000, b"0\r\nA: " + b"a" * 100_000, b"0\r\n" + b"A: b\r\n" * 50_000],
)
def test_what_never_ends_is_refused(endless: bytes) -> None:
    body = Chunked()
    with pytest.raises(FramingError):
        for at in range(0, len(endless), 500):
            body.feed(endless[at : at + 500])


def test_what_is_said_of_a_cut() -> None:
    sized = Sized(10)
    sized.feed(b"abc")
    with pytest.raises(FramingError, match="7 of 10 bytes short"):
        sized.eof()
    with pytest.raises(FramingError, match="before its last chunk"):
        Chunked().eof()


def test_which_bodies_leave_a_connection_usable() -> None:
    assert [body.reusable for body in (NoBody, Sized, Chunked, UntilClose)] == [
        True,
        True,
        True,
        False,
    ]


# Random answers ------------------------------------------------------------------------------


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=8), st.data())
def test_chunks_come_back_however_they_are_split(pieces: list[bytes], data: st.DataObject) -> None:
    wire = b"".join(map(chunk, pieces)) + LAST_CHUNK
    cuts = data.draw(st.lists(st.integers(0, len(wire)), max_size=12).map(sorted))
    body, payload = Chunked(), b""
    for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        assert not body.done or start == len(wire)
        payload += body.feed(wire[start:end])
    assert payload == b"".join(pieces)
    assert body.done
    assert not body.surplus


def h11_reads(data: bytes) -> tuple[int, bytes] | None:
    """What h11 makes of an answer and the close behind it; None if it is not whole for it."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    connection.send(h11.EndOfMessage())
    status, payload, closed = 0, b"", False
    try:
        connection.receive_data(data)
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                if closed:
                    return None
                connection.receive_data(b"")
                closed = True
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                payload += event.data
            elif isinstance(event, h11.EndOfMessage):
                return status, payload
            elif not isinstance(event, h11.InformationalResponse):
                return None
    except h11.RemoteProtocolError:
        return None


_SEEDS = [data for data, _, _ in ANSWERS.values()] + [
    CHUNKED + data for data in BAD_CHUNKS.values()
]
_SEEDS += [data for data in BAD_HEADS.values() if len(data) < 1000]
_SNIPPETS = [
    b"\r\n", b"\n", b"\r", b" ", b"\t", b"\x00", b":", b";", b",", b"0", b"5", b"a", b"\xff", b"\x0b",
    b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"chunked", b"identity, ",
    b"0\r\n\r\n", b"1\r\nx\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.0", b" 204 ", b" 304 ",
]  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = draw(st.sampled_from(_SEEDS))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from([0, 0, 1, 1, 2, 5]))
        snippet = draw(st.sampled_from([b"", *_SNIPPETS]))
        data = data[:start] + snippet + data[start + length :]
    return data


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated())
def test_what_both_take_for_whole_is_the_same_to_h11(data: bytes) -> None:
    ours, theirs = outcome([data]), h11_reads(data)
    if isinstance(ours, Read) and ours.whole and theirs is not None:
        assert (ours.status, ours.payload) == theirs


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated(), st.data())
def test_a_mutated_answer_is_the_same_in_every_split(data: bytes, draw: st.DataObject) -> None:
    at = draw.draw(st.integers(0, len(data)))
    pieces = [piece for piece in (data[:at], data[at:]) if piece]
    assert outcome(pieces) == outcome([data])
    assert outcome([data[i : i + 1] for i in range(len(data))]) == outcome([data])


def test_many_chunks_are_read_in_turns() -> None:
    data = b"1\r\nx\r\n" * 1200 + b"0\r\n\r\nnext"
    body, turns = Chunked(), []
    turns.append(body.feed(data))
    while body.behind:
        assert not body.done
        turns.append(body.feed(b""))
    assert [len(turn) for turn in turns] == [500, 500, 200]
    assert (body.done, body.surplus) == (True, b"next")


def test_what_comes_while_a_body_is_behind_is_not_lost() -> None:
    body = Chunked()
    payload = body.feed(b"1\r\nx\r\n" * 600) + body.feed(b"1\r\ny\r\n" * 600)
    while body.behind:
        payload += body.feed(b"")
    assert payload == b"x" * 600 + b"y" * 600
