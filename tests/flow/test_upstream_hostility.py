"""Upstreams that are broken or mean: what they send ends as 502 or as a cut, and reaches nobody else.

More of it: answers that are none and cuts at every byte are in `test_endings`, connections that die
or speak while idle in `test_requests`, TLS in `test_tls`, fuzzed answers in `tests/hostile`.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

from proxy import pool, resolver
from proxy.exchange import Outcome
from tests.flow.conftest import Sluice, Start, listening
from tests.flow.wire import (
    LAST,
    STREAM,
    Close,
    Reset,
    Step,
    Until,
    UntilGone,
    Upstream,
    chunked,
    get,
    json_answer,
    post,
)

EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
OK = json_answer(b'"mine"')
STRAY = json_answer(b'"somebody else\'s"')
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def head(*fields: bytes, line: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"\r\n".join([line, *fields]) + b"\r\n\r\n"


# Each with where it is forbidden, and what a careless reader makes of it.
NO_ANSWERS = {
    # RFC 9112 6.3: two lengths, of which the next reader may choose the other.
    "two equal lengths": head(b"Content-Length: 2", b"Content-Length: 2") + b"{}",
    "a list of lengths": head(b"Content-Length: 2, 2") + b"{}",
    "a signed length": head(b"Content-Length: +2") + b"{}",
    "a negative length": head(b"Content-Length: -2") + b"{}",
    "a hexadecimal length": head(b"Content-Length: 0x2") + b"{}",
    "an empty length": head(b"Content-Length:") + b"{}",
    "an overflowing length": head(b"Content-Length: " + b"9" * 30) + b"{}",
    "chunked twice": head(b"Transfer-Encoding: chunked, chunked") + LAST,
    "chunked in two fields": head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: x") + LAST,
    "chunked, but not last": head(b"Transfer-Encoding: chunked, gzip") + LAST,
    "nearly chunked": head(b"Transfer-Encoding: xchunked") + LAST,
    "chunked in HTTP/1.0": head(b"Transfer-Encoding: chunked", line=b"HTTP/1.0 200 OK") + LAST,
    # RFC 9112 2.2, 5; RFC 9110 5.5: characters that split heads where they are forgiven.
    "a bare CR": head(b"X: a\rSet-Cookie: b"),
    "a bare LF": head(b"X: a\nSet-Cookie: b"),
    "a bell": head(b"X: a\x07b"),
    "a name with a space": head(b"X Y: a"),
    "no name": head(b": a"),
    "no colon": head(b"nonsense"),
    "a tab before the colon": head(b"Content-Length\t: 2") + b"{}",
    "a first line folded": head(b" X: a"),
    # RFC 9112 4: status lines.
    "no status": head(line=b"HTTP/1.1"),
    "a status of two digits": head(line=b"HTTP/1.1 20 OK"),
    "a status of 600": head(line=b"HTTP/1.1 600 OK"),
    "HTTP/1.2": head(line=b"HTTP/1.2 200 OK"),
    "lower case": head(line=b"http/1.1 200 OK"),
    "an empty line before": b"\r\n" + OK,
    "HTTP/0.9": b"<html>",
    "a TLS alert": b"\x15\x03\x01\x00\x02\x02\x50",
    "an endless status line": b"HTTP/1.1 200 " + b"O" * 70_000,
    "an endless field": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000,
    "endless fields": b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 12_000,
}


@pytest.mark.parametrize("answer", NO_ANSWERS.values(), ids=NO_ANSWERS)
async def test_an_answer_that_is_none_reaches_nobody(sluice: Sluice, answer: bytes) -> None:
    sluice.upstream.plays_first(answer + STRAY, UntilGone())
    sluice.upstream.scripts.append([OK])
    reply = await sluice.ask(post(b"{}"))
    assert (reply.status, json.loads(reply.body)["error"]["code"]) == (502, "upstream_invalid")
    assert not reply.values("set-cookie")
    assert (await sluice.ask(post(b"{}"))).body == b'"mine"'
    assert sluice.upstream.connections == 2


# RFC 9112 7.1: what a chunked body can't hold.
NO_CHUNKS = {
    "a signed size": b"+2\r\n{}\r\n",
    "a size in 0x": b"0x2\r\n{}\r\n",
    "a size with an underscore": b"0_2\r\n{}\r\n",
    "a size with a space": b"2 \r\n{}\r\n",
    "an empty size": b"\r\n{}\r\n",
    "an overflowing size": b"f" * 17 + b"\r\n{}\r\n",
    "a size that ends in LF": b"2\n{}\r\n",
    "a bare LF in an extension": b"2;a\nb\r\n{}\r\n",
    "an endless size": b"0" * 70_000,
    "an endless extension": b"2;" + b"a" * 70_000,
    "data longer than said": b"2\r\n{}}\r\n",
    "no line end behind the data": b"2\r\n{}0\r\n\r\n",
    "endless trailers": b"0\r\n" + b"X: a\r\n" * 10_000,
    "an endless trailer": b"0\r\nX: " + b"a" * 70_000,
    "a malformed trailer": b"0\r\nX : a\r\n\r\n",
    "a folded trailer": b"0\r\nX: a\r\n b\r\n\r\n",
}


@pytest.mark.parametrize("chunks", NO_CHUNKS.values(), ids=NO_CHUNKS)
async def test_chunks_that_are_none_reach_nobody(sluice: Sluice, chunks: bytes) -> None:
    sluice.upstream.plays_first(CHUNKED + chunked(b"[1,") + chunks + STRAY, UntilGone())
    sluice.upstream.scripts.append([OK])
    reply = await sluice.ask(post(b"{}"))
    assert not reply.whole
    assert b"else" not in reply.body
    assert (await sluice.record()).outcome is Outcome.UPSTREAM_TRUNCATED
    assert (await sluice.ask(post(b"{}"))).body == b'"mine"'
    assert sluice.upstream.connections == 2


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize(
    ("answer", "method"),
    [
        (OK, "POST"),
        (CHUNKED + chunked(b'"mine"') + LAST, "POST"),
        (head(line=b"HTTP/1.1 204 No Content"), "POST"),
        (head(b"Content-Length: 6", line=b"HTTP/1.1 304 Not Modified"), "GET"),
        (head(b"Content-Length: 6"), "HEAD"),
    ],
    ids=["sized", "chunked", "204", "304", "HEAD"],
)
async def test_a_second_answer_reaches_nobody(
    sluice: Sluice, answer: bytes, method: str, later: bool
) -> None:
    gate = asyncio.Event()
    steps: list[Step] = [answer, Until(gate), STRAY] if later else [answer + STRAY]
    sluice.upstream.plays_first(*steps, UntilGone())
    sluice.upstream.scripts.append([OK])
    request = post(b"{}") if method == "POST" else get(method=method)
    reply = await sluice.ask(request, method=method)
    assert (reply.whole, b"else" in reply.body) == (True, False)
    gate.set()
    await asyncio.wait_for(sluice.upstream.gone.wait(), 5)
    assert (await sluice.ask(post(b"{}"))).body == b'"mine"'
    assert sluice.upstream.connections == 2


@pytest.mark.parametrize("end", [Close(), Reset()], ids=["closed", "reset"])
async def test_a_dead_connection_is_replaced_once(sluice: Sluice, end: Step) -> None:
    sluice.upstream.plays(OK)
    await sluice.ask(post(b"{}"))
    sluice.upstream.plays(end)
    reply = await sluice.ask(post(b"{}"))
    assert (reply.status, b"upstream_aborted" in reply.body) == (502, True)
    assert len(sluice.upstream.requests) == 3


@pytest.mark.parametrize("byte", [b"H", b"HTTP/1.1 100 Continue\r\n\r\n"])
async def test_a_connection_that_has_answered_a_byte_is_not_replaced(
    sluice: Sluice, byte: bytes
) -> None:
    """The request was read, and may be billed."""
    sluice.upstream.plays(OK)
    await sluice.ask(post(b"{}"))
    sluice.upstream.plays(byte, Close())
    assert (await sluice.ask(post(b"{}"))).status == 502
    assert len(sluice.upstream.requests) == 2


async def test_an_upload_is_never_sent_twice(sluice: Sluice) -> None:
    sluice.upstream.plays(OK)
    await sluice.ask(post(b"{}"))
    sluice.upstream.plays(Close())
    assert (await sluice.ask(post(b"RIFF", content_type="audio/wav"))).status == 502
    assert len(sluice.upstream.requests) == 2
    assert sluice.upstream.connections == 2  # a fresh one from the beginning


# Slowness -------------------------------------------------------------------------------------


@dataclass
class Dripping:
    """Answers every request with the same bytes, one by one, without end."""

    drops: Iterable[bytes]
    port: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            for drop in self.drops:
                writer.write(drop)
                await writer.drain()
                await asyncio.sleep(0.01)
        except ConnectionError:
            self.gone.set()


@pytest.mark.parametrize(
    "drops",
    [
        [b"HTTP/1.1 200 OK\r\nX: ", *[b"a"] * 10_000],
        [b"HTTP/1.1 102 Processing\r\n\r\n"] * 10_000,
    ],
    ids=["a head", "interim answers"],
)
async def test_a_head_that_drips_is_late_all_the_same(
    start: Start, upstream: Upstream, drops: list[bytes]
) -> None:
    dripping = Dripping(drops)
    async with listening(dripping):  # type: ignore[arg-type]
        upstream.port = dripping.port
        sluice = await start(up="timeouts: {first_byte: 200ms}")
        reply = await sluice.ask(post())
        assert (reply.status, b"first_byte" in reply.body) == (504, True)
        await asyncio.wait_for(dripping.gone.wait(), 5)


@pytest.mark.parametrize("banner", [b"SSH-2.0-OpenSSH_9.9\r\n", b""])
async def test_an_upstream_that_speaks_or_hangs_up_first(
    start: Start, upstream: Upstream, banner: bytes
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(banner)
        if banner:
            await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        upstream.port = server.sockets[0].getsockname()[1]
        sluice = await start()
        for _ in range(3):
            reply = await sluice.ask(post())
            assert (reply.status, b'"type":"upstream_error"' in reply.body) == (502, True)


async def test_a_stream_that_turns_to_garbage_is_cut_there(sluice: Sluice) -> None:
    gate = asyncio.Event()
    sluice.upstream.plays(STREAM, chunked(EVENT), Until(gate), b"\x00" * 1000, UntilGone())
    client = await sluice.connect()
    await client.send(post())
    await client.until(EVENT)
    gate.set()
    reply = await client.reply()
    assert not reply.whole
    assert b"\x00" not in reply.body
    assert json.loads(reply.body.removeprefix(EVENT)[6:])["error"]["code"] == "upstream_invalid"


# Names that move ------------------------------------------------------------------------------


async def test_a_name_that_moves_is_followed(
    start: Start, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However busy the connection to where it led; here a lookup speaks for no time at all."""
    upstream.plays(json_answer(b'"the old place"'))
    there = ["127.0.0.1"]
    look_up = socket.getaddrinfo

    def answer(host: str, *rest: Any, **more: Any) -> object:
        return look_up(there[0] if host == "up.example" else host, *rest, **more)

    new = Upstream()
    new.plays(json_answer(b'"the new place"'))
    monkeypatch.setattr(socket, "getaddrinfo", answer)
    monkeypatch.setattr(resolver, "_KEEP", 0.0)
    async with await asyncio.start_server(new.serve, "127.0.0.2", upstream.port):
        sluice = await start(host="up.example")
        for _ in range(2):
            assert (await sluice.ask(post(b"{}"))).body == b'"the old place"'
        assert upstream.connections == 1
        there[0] = "127.0.0.2"
        assert (await sluice.ask(post(b"{}"))).body == b'"the old place"'
        monkeypatch.setattr(pool, "LOOKUP_HOLDS", 0.0)
        assert (await sluice.ask(post(b"{}"))).body == b'"the new place"'
        monkeypatch.setattr(pool, "LOOKUP_HOLDS", 1000.0)
        assert (await sluice.ask(post(b"{}"))).body == b'"the new place"'
        assert upstream.connections == 1
