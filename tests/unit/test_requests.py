"""Requests are read in one way or not at all."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import ProxyError
from proxy.framing import Chunked, NoBody, Sized
from proxy.requests import MAX_FIELDS, MAX_HEAD, MAX_LINE, RequestHead, RequestReader, request_body

HOST = b"Host: sluice\r\n"
GET = b"GET /v1/models?a=%2F HTTP/1.1\r\n" + HOST + b"X-A:  1 \r\nx-a:\r\n\r\n"


def read(data: bytes) -> RequestHead:
    found = RequestReader().feed(data)
    assert found is not None
    return found[0]


def refused(data: bytes) -> ProxyError:
    with pytest.raises(ProxyError) as caught:
        head = read(data)
        request_body(head)
    assert caught.value.close
    return caught.value


def test_a_head_as_it_came_and_what_is_behind_it() -> None:
    found = RequestReader().feed(GET + b"GET /next")
    assert found is not None
    head, rest = found
    assert (head.method, head.target, head.minor) == ("GET", "/v1/models?a=%2F", 1)
    assert head.headers == ((b"Host", b"sluice"), (b"X-A", b"1"), (b"x-a", b""))
    assert head.fields.getall("X-a") == ["1", ""]
    assert rest == b"GET /next"


@given(st.lists(st.integers(0, len(GET) * 2)))
def test_the_same_in_every_split(cuts: list[int]) -> None:
    data, reader, heads = GET * 2, RequestReader(), []
    edges = [0, *sorted(cuts), len(data)]
    for start, end in pairwise(edges):
        piece = data[start:end]
        while piece:
            found = reader.feed(piece)
            if found is None:
                break
            head, piece = found
            heads.append(head)
    assert heads == [read(GET)] * 2
    assert not reader.begun


def test_empty_lines_before_a_request_are_forgiven() -> None:
    assert read(b"\r\n\r\n" + GET) == read(GET)
    reader = RequestReader()
    for piece in (b"\r", b"\n\r", b"\n"):
        assert reader.feed(piece) is None
    assert not reader.begun
    assert reader.feed(GET) is not None


@pytest.mark.parametrize(
    "data",
    [
        # Request lines (RFC 9112 3)
        b"GET /\r\n",  # HTTP/0.9
        b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET / HTTP/1.1 \r\n" + HOST + b"\r\n",
        b" GET / HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET\t/ HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET / http/1.1\r\n" + HOST + b"\r\n",
        b"GET / HTTP/1.10\r\n" + HOST + b"\r\n",
        b"GET / HTTP/2.0\r\n" + HOST + b"\r\n",
        b"GET / HTTP/1.2\r\n" + HOST + b"\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\xc3\xbc HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET v1/models HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET * HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET ftp://x/ HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET http:///x HTTP/1.1\r\n" + HOST + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01",  # TLS
        # Fields (RFC 9112 5)
        b"GET / HTTP/1.1\n" + HOST + b"\n",
        b"GET / HTTP/1.1\r\nHost: sluice\n\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + b"\n",
        b"GET / HTTP/1.1\r\n" + HOST + b"A : 1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + b"A: 1\r\n b\r\n\r\n",
        b"GET / HTTP/1.1\r\n A: 1\r\n" + HOST + b"\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + b"A: 1\rB: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + b"A: \x00\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + b"A: \x7f\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + b": 1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + b"A\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + b"A(: 1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + b"\xc3\xbc: 1\r\n\r\n",
        # Host (RFC 9112 3.2)
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n",
        b"GET / HTTP/1.0\r\n" + HOST + HOST + b"\r\n",
        *[
            b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host
            for host in (b"", b"a b", b"a/b", b"a@b", b"a,b", b"a:x", b"a:99999", b"[::1", b"\xfc")
        ],
    ],
)
def test_what_is_no_request_is_refused_at_once(data: bytes) -> None:
    assert refused(data).code == "invalid_request"


@pytest.mark.parametrize(
    "fields",
    [
        # RFC 9112 6.1 to 6.3
        b"Content-Length: 3\r\nContent-Length: 3\r\n",
        b"Content-Length: 3, 3\r\n",
        b"Content-Length: +3\r\n",
        b"Content-Length: -3\r\n",
        b"Content-Length: 0x3\r\n",
        b"Content-Length: 3 0\r\n",
        b"Content-Length: 3_0\r\n",
        b"Content-Length:\r\n",
        b"Content-Length: 99999999999999999999\r\n",
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked, chunked\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding: identity\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        "Transfer-Encoding: chun\N{KELVIN SIGN}ed\r\n".encode(),
        b"Transfer-Encoding: chunked;a=b\r\n",
        b'Transfer-Encoding: "chunked"\r\n',
        b"Transfer-Encoding:\r\n",
    ],
)
def test_a_body_whose_end_can_be_read_in_two_ways_is_refused(fields: bytes) -> None:
    assert refused(b"POST / HTTP/1.1\r\n" + HOST + fields + b"\r\n").code == "invalid_request"


def test_http_1_0_has_no_transfer_encoding() -> None:
    data = b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert refused(data).code == "invalid_request"


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        (b"", NoBody),
        (b"Content-Length: 0\r\n", Sized),
        (b"content-LENGTH: 007\r\n", Sized),
        (b"Transfer-Encoding: Chunked\r\n", Chunked),
    ],
)
def test_which_body_follows(fields: bytes, kind: type) -> None:
    assert isinstance(request_body(read(b"POST / HTTP/1.1\r\n" + HOST + fields + b"\r\n")), kind)


@pytest.mark.parametrize("method", [b"FOO", b"get", b"PRI", b"G" * 1000])
def test_methods_that_nobody_registered(method: bytes) -> None:
    error = refused(method + b" / HTTP/1.1\r\n" + HOST + b"\r\n")
    assert error.status == 405
    assert "GET" in error.headers()["Allow"]


@pytest.mark.parametrize(
    "line",
    [
        b"PROPFIND /x HTTP/1.1",
        b"OPTIONS * HTTP/1.1",
        b"CONNECT a:443 HTTP/1.1",
        b"GET HTTP://a/x HTTP/1.1",
        b"GET http://a?x HTTP/1.1",
        b"GET /#x HTTP/1.1",
    ],
)
def test_targets_of_every_form(line: bytes) -> None:
    assert read(line + b"\r\n" + HOST + b"\r\n").target.encode() == line.split()[1]


@pytest.mark.parametrize(
    "host", [b"a", b"a_b.c-d:80", b"a:", b"127.0.0.1:1", b"[::1]:65535", b"%41"]
)
def test_hosts(host: bytes) -> None:
    assert read(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host).fields["Host"].encode() == host


@pytest.mark.parametrize(
    ("version", "connection", "kept"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"Connection: keep-alive\r\n", True),
        (b"1.1", b"Connection: x, Close\r\n", False),
        (b"1.1", b"Connection: x\r\nConnection: close\r\n", False),
        (b"1.0", b"", False),
        (b"1.0", b"Connection: keep-alive\r\n", False),
    ],
)
def test_keep_alive(version: bytes, connection: bytes, kept: bool) -> None:
    assert read(b"GET / HTTP/%b\r\n" % version + HOST + connection + b"\r\n").keeps_alive == kept


# Bounds ---------------------------------------------------------------------------------------


def head_of(size: int) -> bytes:
    start = b"GET / HTTP/1.1\r\n" + HOST + b"A: "
    return start + b"a" * (size - len(start) - 4) + b"\r\n\r\n"


def line_of(size: int) -> bytes:
    return b"GET /" + b"a" * (size - 14) + b" HTTP/1.1\r\n" + HOST + b"\r\n"


def test_just_within_the_bounds() -> None:
    assert read(head_of(MAX_HEAD))
    assert read(line_of(MAX_LINE))
    assert read(b"GET / HTTP/1.1\r\n" + HOST + b"A: 1\r\n" * (MAX_FIELDS - 1) + b"\r\n")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (head_of(MAX_HEAD + 1), "headers_too_large"),
        (b"GET / HTTP/1.1\r\n" + HOST + b"A: 1\r\n" * MAX_FIELDS + b"\r\n", "headers_too_large"),
        (b"GET / HTTP/1.1\r\n" + b"A: 1\r\n" * MAX_HEAD, "headers_too_large"),
        (line_of(MAX_LINE + 1), "uri_too_long"),
        (b"GET /" + b"a" * MAX_LINE, "uri_too_long"),
        (b"GET /" + b"a" * MAX_HEAD, "uri_too_long"),
    ],
)
def test_just_beyond_them(data: bytes, code: str) -> None:
    assert refused(data).code == code


def test_a_head_that_never_ends_is_refused_while_it_comes() -> None:
    reader = RequestReader()
    reader.feed(b"GET / HTTP/1.1\r\n")
    with pytest.raises(ProxyError) as caught:
        for _ in range(MAX_HEAD):
            reader.feed(b"A: 1\r\n")
    assert caught.value.code == "headers_too_large"


@pytest.mark.parametrize(
    "drip", [b"GET / HTTP/1.1\r\nHost: x\r\nA: \x00", b"GET /\x01", b"GET / HTTP/1.1\r\nA\rB"]
)
def test_what_can_never_become_a_head_is_not_waited_for(drip: bytes) -> None:
    reader = RequestReader()
    with pytest.raises(ProxyError):
        for at in range(len(drip)):
            assert reader.feed(drip[at : at + 1]) is None


def test_messages_quote_nothing() -> None:
    for data in (b"GET / HTTP/1.1\r\nHost: x\r\nsecret : 1\r\n\r\n", b"secret / HTTP/1.1\r\n\r\n"):
        assert "secret" not in refused(data).message
