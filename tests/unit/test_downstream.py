"""A client's connection: how it reads, how its requests come, and what a relayed answer looks like."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast
from unittest.mock import Mock

import pytest
from aiohttp import web

from proxy.downstream import (
    ClientConnection,
    Handler,
    LastAnswer,
    Nowhere,
    Server,
    Sink,
    Timeouts,
    _has_left,
    _taken,
)
from proxy.errors import Dialect, ProxyError
from proxy.framing import ResponseHead
from proxy.payload import Payload

GET = b"GET /x HTTP/1.1\r\nHost: sluice\r\n\r\n"
OLD = b"GET /x HTTP/1.0\r\n\r\n"
CLOSE = b"GET /x HTTP/1.1\r\nHost: sluice\r\nConnection: close\r\n\r\n"
HEAD = b"HEAD /x HTTP/1.1\r\nHost: sluice\r\n\r\n"


class Socket:
    """What a reset asks of a socket."""

    family = socket.AF_UNIX

    def __init__(self) -> None:
        self.options: list[tuple[object, ...]] = []

    def setsockopt(self, *option: object) -> None:
        self.options.append(option)


class Transport(asyncio.Transport):
    """A client that reads nothing; `buffered` is what it has not read."""

    def __init__(self) -> None:
        self.linger = Socket()
        super().__init__({"socket": self.linger, "peername": ("127.0.0.1", 1)})
        self.written = b""
        self.writes = 0
        self.buffered = 0
        self.ended: str | None = None
        self.said_all = False
        self.held = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert self.ended is None and not self.said_all
        self.written += data
        self.writes += 1

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def is_closing(self) -> bool:
        return self.ended is not None

    def close(self) -> None:
        self.ended = self.ended or "close"

    def abort(self) -> None:
        self.ended = self.ended or "abort"

    def write_eof(self) -> None:
        self.said_all = True

    def pause_reading(self) -> None:
        assert not self.held
        self.held = True

    def resume_reading(self) -> None:
        assert self.held
        self.held = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass


class Now:
    """The loop's time, moved by hand."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    async def pass_(self, seconds: float) -> None:
        self.now += seconds
        await settle()


async def settle() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


@pytest.fixture
async def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    now = Now(asyncio.get_running_loop().time())
    monkeypatch.setattr(asyncio.get_running_loop(), "time", now)
    return now


def refuse(error: ProxyError) -> web.Response:
    return LastAnswer(status=error.status, body=error.body(Dialect.CHAT), headers=error.headers())


class Dialogue:
    """One connection; `serve` says how its requests are answered."""

    def __init__(self, server: Server, connection: ClientConnection, transport: Transport) -> None:
        self.server, self.connection, self.client = server, connection, transport

    async def says(self, *pieces: bytes) -> bytes:
        """Sends pieces, and returns what came back since the last time."""
        for piece in pieces or (b"",):
            if piece:
                self.connection.data_received(piece)
            await settle()
        written, self.client.written = self.client.written, b""
        return written


Serve = Callable[[Handler], Awaitable[Dialogue]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    begun: list[Dialogue] = []

    async def serve(handler: Handler) -> Dialogue:
        server = Server(handler, timeouts=lambda: Timeouts(10, 75, 120), refuse=refuse)
        connection, transport = server(), Transport()
        connection.connection_made(transport)
        await settle()
        begun.append(Dialogue(server, connection, transport))
        return begun[-1]

    yield serve
    for each in begun:
        each.connection.connection_lost(None)
        await each.server.shutdown(0)


async def ok(request: web.BaseRequest) -> web.StreamResponse:
    return web.Response(text="ok")


def answer(*fields: tuple[bytes, bytes], status: int = 200, reason: bytes = b"OK") -> ResponseHead:
    return ResponseHead(1, status, reason, fields)


SIZED = answer((b"Content-Length", b"5"))
STREAM = answer((b"Content-Type", b"text/event-stream"), (b"Content-Length", b"5"))
OURS = [(b"Sluice-Attempts", b"1")]


def sinks(head: ResponseHead, *does: Any, stream: bool = False, then: Any = None) -> Handler:
    """A handler that writes an answer: bytes are written, words are called."""

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        sink = Sink(request, head, OURS, stream=stream)
        for step in does:
            if isinstance(step, bytes):
                sink.write(step)
            else:
                getattr(sink, step)()
        if then is not None:
            then(sink)
        return sink

    return handler


# The sink -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "head", "stream", "expected"),
    [
        (
            GET,
            SIZED,
            False,
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nSluice-Attempts: 1\r\n\r\nhello",
        ),
        (
            GET,
            answer(),
            False,
            (
                b"HTTP/1.1 200 OK\r\nSluice-Attempts: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
                b"5\r\nhello\r\n0\r\n\r\n"
            ),
        ),
        (
            GET,
            STREAM,
            True,
            (
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                b"Cache-Control: no-cache, no-transform\r\nX-Accel-Buffering: no\r\n"
                b"Sluice-Attempts: 1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
            ),
        ),
        (
            CLOSE,
            SIZED,
            False,
            (
                b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nSluice-Attempts: 1\r\n"
                b"Connection: close\r\n\r\nhello"
            ),
        ),
        (
            OLD,
            SIZED,
            False,
            (
                b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nSluice-Attempts: 1\r\n"
                b"Connection: close\r\n\r\nhello"
            ),
        ),
        (
            OLD,
            answer(),
            False,
            b"HTTP/1.1 200 OK\r\nSluice-Attempts: 1\r\nConnection: close\r\n\r\nhello",
        ),
        (
            GET,
            answer((b"X", b"\xfc"), status=299, reason=b"N\xf6"),
            False,
            (
                b"HTTP/1.1 299 N\xf6\r\nX: \xfc\r\nSluice-Attempts: 1\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
            ),
        ),
    ],
    ids=["sized", "chunked", "stream", "last", "old", "old, until close", "letters"],
)
async def test_whole_answers(
    serve: Serve, request_: bytes, head: ResponseHead, stream: bool, expected: bytes
) -> None:
    talk = await serve(sinks(head, b"hello", "flush", "finish", stream=stream))
    assert await talk.says(request_) == expected
    assert talk.client.ended == (None if request_ is GET else "close")


@pytest.mark.parametrize(
    ("request_", "status", "fields"),
    [
        (GET, 204, ()),
        (GET, 304, ((b"Content-Length", b"5"),)),
        (HEAD, 200, ((b"Content-Length", b"5"),)),
        (HEAD, 200, ()),
    ],
)
async def test_answers_without_a_body_have_no_chunk(
    serve: Serve, request_: bytes, status: int, fields: Any
) -> None:
    talk = await serve(sinks(answer(*fields, status=status), "finish"))
    written = await talk.says(request_)
    assert written.startswith(b"HTTP/1.1 %d " % status)
    assert written.endswith(b"\r\n\r\n")
    assert written.count(b"\r\n\r\n") == 1
    assert b"chunked" not in written
    assert (b"Content-Length: 5" in written) == bool(fields)
    assert talk.client.ended is None
    assert await talk.says(request_) == written


async def test_the_head_goes_out_with_the_first_bytes_or_alone(serve: Serve) -> None:
    talk = await serve(sinks(SIZED, b"he", b"llo", "finish"))
    await talk.says(GET)
    assert talk.client.writes == 2
    talk = await serve(sinks(SIZED, "flush", "flush", b"hello", "finish"))
    assert (await talk.says(GET)).endswith(b"\r\n\r\nhello")
    assert talk.client.writes == 2


@pytest.mark.parametrize(
    ("request_", "head", "end"),
    [
        (GET, SIZED, "close"),
        (GET, answer(), "close"),
        (OLD, SIZED, "close"),
        (OLD, answer(), "abort"),
    ],
)
async def test_a_cut_ends_the_connection_without_a_last_chunk(
    serve: Serve, request_: bytes, head: ResponseHead, end: str
) -> None:
    talk = await serve(sinks(head, b"hel", "cut"))
    written = await talk.says(request_)
    assert written.endswith((b"\r\n\r\nhel", b"\r\n\r\n3\r\nhel\r\n"))
    assert talk.client.ended == end
    assert bool(talk.client.linger.options[-1:]) >= (end == "abort")


async def test_an_answer_that_is_cut_before_its_first_byte(serve: Serve) -> None:
    talk = await serve(sinks(SIZED, "cut"))
    assert (await talk.says(GET)).endswith(b"Sluice-Attempts: 1\r\n\r\n")
    assert talk.client.ended == "close"


async def test_one_answer_after_another(serve: Serve) -> None:
    talk = await serve(sinks(SIZED, b"hello", "finish"))
    both = await talk.says(GET + GET)
    assert both == 2 * (await talk.says(GET))


# Flow -----------------------------------------------------------------------------------------


class Flow:
    def __init__(self) -> None:
        self.told: list[str] = []

    def pause(self) -> None:
        self.told.append("pause")

    def resume(self) -> None:
        self.told.append("resume")

    def client_lost(self) -> None:
        self.told.append("lost")


async def test_whoever_writes_is_told_how_the_client_reads(serve: Serve) -> None:
    talk, flow = await serve(ok), Flow()
    connection = talk.connection
    connection.pause_writing()  # nobody writes yet
    connection.serve(flow)
    assert flow.told == ["pause"]  # it had better wait
    connection.resume_writing()
    connection.pause_writing()
    connection.resume_writing()
    assert flow.told == ["pause", "resume", "pause", "resume"]
    connection.serve(None)
    connection.pause_writing()
    connection.resume_writing()
    assert len(flow.told) == 4


async def test_a_client_that_leaves_is_told_before_its_handler_is_cancelled(serve: Serve) -> None:
    flow = Flow()

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        assert isinstance(request.protocol, ClientConnection)
        request.protocol.serve(flow)
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            flow.told.append("cancelled")
            raise
        raise AssertionError

    talk = await serve(handler)
    await talk.says(GET)
    talk.connection.connection_lost(None)
    assert flow.told == ["lost"]
    await settle()
    assert flow.told == ["lost", "cancelled"]
    talk.connection.serve(None)


async def test_whoever_writes_may_ask_whether_the_client_keeps_up(serve: Serve) -> None:
    asked: list[Sink] = []
    talk = await serve(sinks(SIZED, b"hello", "finish", then=asked.append))
    await talk.says(GET)
    [sink] = asked
    assert sink.keeps_up
    talk.connection.pause_writing()
    assert not sink.keeps_up
    talk.connection.resume_writing()
    assert sink.keeps_up


# Outliving the client -------------------------------------------------------------------------


def outliving(told: list[str], until: asyncio.Event, *, then: bool = True) -> Handler:
    """A handler that goes on without its client, until it is let; `then`: to the end of it."""

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        connection = cast(ClientConnection, request.protocol)
        connection.serve(flow := Flow())
        flow.told = told
        connection.outlive(lambda: told.append("left"))
        try:
            await until.wait()
            told.append("finished")
            if not then:
                connection.outlive(None)
                await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            told.append("cancelled")
            raise
        finally:
            connection.outlive(None)
            connection.serve(None)
        return web.Response(text="ok")

    return handler


async def test_a_handler_may_outlive_its_client(serve: Serve) -> None:
    told: list[str] = []
    until = asyncio.Event()
    talk = await serve(outliving(told, until))
    await talk.says(GET)
    talk.connection.connection_lost(None)
    assert told == ["left", "lost"]
    await settle()
    assert told == ["left", "lost"]  # and nothing cancels it
    until.set()
    await settle()
    assert told == ["left", "lost", "finished"]


async def test_who_no_longer_outlives_is_cancelled_with_its_client(serve: Serve) -> None:
    told: list[str] = []
    until = asyncio.Event()
    until.set()
    talk = await serve(outliving(told, until, then=False))
    await talk.says(GET)
    talk.connection.connection_lost(None)
    await settle()
    assert told == ["finished", "lost", "cancelled"]


async def test_nobody_is_told_of_a_client_that_leaves_behind_its_answer(serve: Serve) -> None:
    told: list[str] = []
    until = asyncio.Event()
    until.set()
    talk = await serve(outliving(told, until))
    assert (await talk.says(GET)).endswith(b"ok")
    talk.connection.connection_lost(None)
    await settle()
    assert told == ["finished"]


async def test_nowhere_takes_everything_and_shows_nothing() -> None:
    nowhere = Nowhere()
    nowhere.serve(flow := Flow())
    nowhere.write(b"x" * 100_000)
    nowhere.flush()
    nowhere.finish()
    nowhere.cut()
    assert flow.told == []
    assert not nowhere.keeps_up  # so nobody writes a heartbeat there


async def forever(request: web.BaseRequest) -> web.StreamResponse:
    await asyncio.get_running_loop().create_future()
    raise AssertionError


async def test_a_reader_that_takes_nothing_is_let_go(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.downstream._taken", lambda _: 5000)
    talk = await serve(forever)
    await talk.says(GET)
    talk.client.buffered = 1000
    for now in (0.0, 60.0, 119.0):
        talk.connection.check_reader(now)
        assert talk.client.ended is None
    assert talk.connection.owes
    talk.connection.check_reader(121.0)
    assert talk.client.ended == "abort"
    assert talk.client.linger.options[-1][1] == socket.SO_LINGER  # else the kernel keeps offering


async def test_a_reader_that_takes_little_is_not(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = [5000]  # what waits for it need not grow fewer: an upstream may be as fast
    monkeypatch.setattr("proxy.downstream._taken", lambda _: taken[0])
    talk = await serve(forever)
    await talk.says(GET)
    talk.client.buffered = 1000
    for now in range(0, 1000, 100):
        taken[0] += 1
        talk.connection.check_reader(now)
        assert talk.client.ended is None
    talk.client.buffered = 0
    for now in (1000, 2000):
        talk.connection.check_reader(now)
        assert talk.client.ended is None


# Heads that do not come -----------------------------------------------------------------------


@pytest.mark.parametrize("said", [b"", b"G", GET[:-1], b"\r"])
async def test_a_head_that_takes_too_long(serve: Serve, now: Now, said: bytes) -> None:
    talk = await serve(ok)
    if said:
        assert await talk.says(said) == b""
    now.now += 10
    talk.server.sweep()
    assert talk.client.ended is None
    now.now += 0.1
    talk.server.sweep()
    written = await talk.says()
    if not said:  # a browser's spare connection: it expects no answer
        assert (written, talk.client.ended) == (b"", "close")
        return
    head, _, body = written.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert b"Content-Length: %d" % len(body) in head
    assert b"Connection: close" in head
    assert b'"code":"request_timeout"' in body
    assert talk.client.said_all


async def test_a_dripping_head_does_not_help(serve: Serve, now: Now) -> None:
    talk = await serve(ok)
    for at in range(12):
        await talk.says(GET[at : at + 1])
        now.now += 0.9
        talk.server.sweep()
    await talk.says()
    assert talk.client.said_all


async def test_the_clock_begins_anew_with_each_head(serve: Serve, now: Now) -> None:
    talk = await serve(ok)
    for _ in range(4):
        assert b"ok" in await talk.says(GET)
        now.now += 60  # idle: keep_alive counts, not head
        talk.server.sweep()
        assert talk.client.ended is None
    await talk.says(b"G")
    now.now += 9
    talk.server.sweep()
    assert await talk.says() == b""
    now.now += 2
    talk.server.sweep()
    assert b" 408 " in await talk.says()


async def test_the_clock_of_a_pipelined_head_waits_for_its_turn(serve: Serve, now: Now) -> None:
    go = asyncio.Event()

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        await go.wait()
        return web.Response(text="late")

    talk = await serve(handler)
    await talk.says(GET + b"GET /n")
    now.now += 1000
    talk.server.sweep()
    go.set()
    assert b"late" in await talk.says()
    talk.server.sweep()
    now.now += 11
    talk.server.sweep()
    assert b" 408 " in await talk.says()


async def body_of(request: web.BaseRequest) -> bytes:
    payload, body = cast(Payload, request.content), b""
    while request.body_exists and (piece := await payload.take()):
        body += piece
    return body


async def test_a_request_in_progress_has_its_head(serve: Serve, now: Now) -> None:
    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=await body_of(request))

    talk = await serve(handler)
    await talk.says(b"POST /x HTTP/1.1\r\nHost: s\r\nContent-Length: 4\r\n\r\n", b"ab")
    now.now += 1000
    talk.server.sweep()
    assert (await talk.says(b"cd")).endswith(b"abcd")
    talk.server.sweep()
    assert talk.client.ended is None


# Requests that cannot be read -------------------------------------------------------------------


async def seen(request: web.BaseRequest) -> web.StreamResponse:
    return web.Response(body=b"<%b %b>" % (request.raw_path.encode(), await body_of(request)))


def parts(written: bytes) -> list[bytes]:
    """The bodies of the answers."""
    return [each.partition(b"\r\n\r\n")[2] for each in re.split(rb"HTTP/1.1 \d", written)[1:]]


async def test_what_is_no_request_gets_one_answer_and_ends_the_connection(serve: Serve) -> None:
    talk = await serve(seen)
    written = await talk.says(b"NONSENSE\r\n\r\n" + GET, GET)
    assert written.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b'"code":"invalid_request"' in written
    assert len(parts(written)) == 1
    assert talk.client.said_all


async def test_a_valid_request_before_it_is_answered_first(serve: Serve) -> None:
    talk = await serve(seen)
    first, second = parts(await talk.says(GET + b"\x00garbage\r\n\r\n" + GET))
    assert first == b"</x >"
    assert b"invalid_request" in second
    assert talk.client.said_all


async def test_what_a_refused_client_still_sends_is_dropped(serve: Serve) -> None:
    talk = await serve(seen)
    await talk.says(b"\x00")
    for _ in range(10):
        assert await talk.says(b"x" * 100_000) == b""
    assert talk.client.ended is None  # a close now would reset the answer away
    assert not talk.client.held


POST = b"POST /%d HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody"
CHUNKED = b"POST /c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("size", [1, 7, 50, 10_000])
async def test_pipelined_requests_in_whatever_pieces(serve: Serve, size: int) -> None:
    talk = await serve(seen)
    said = POST % 1 + CHUNKED + b"4\r\nbody\r\n0\r\n\r\n" + GET + POST % 2
    pieces = [said[at : at + size] for at in range(0, len(said), size)]
    bodies = parts(await talk.says(*pieces))
    assert bodies == [b"</1 body>", b"</c body>", b"</x >", b"</2 body>"]


async def test_a_malformed_body_fails_whoever_reads_it(serve: Serve) -> None:
    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        with pytest.raises(ProxyError) as caught:
            await body_of(request)
        return refuse(caught.value)

    talk = await serve(handler)
    written = await talk.says(CHUNKED + b"2\r\nab\r\n", b"x\r\n" + GET)
    assert b"a chunk has a malformed size" in written
    assert len(parts(written)) == 1
    assert talk.client.said_all


async def test_a_malformed_body_that_nobody_reads_ends_the_connection(serve: Serve) -> None:
    talk = await serve(ok)
    assert b"ok" in await talk.says(CHUNKED)
    assert await talk.says(b"x\r\n" + GET) == b""


async def test_pipelined_requests_wait_as_bytes_and_not_too_many_of_them(serve: Serve) -> None:
    go = asyncio.Event()

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        await go.wait()
        return web.Response(text="ok")

    talk = await serve(handler)
    count = 0
    while not talk.client.held:
        await talk.says(GET)
        count += 1
        assert count < 5000
    assert len(talk.connection._messages) == 1
    go.set()
    written = b""
    while count != written.count(b"HTTP/1.1 200"):
        written += await talk.says()
    assert not talk.client.held


async def test_a_body_that_nobody_takes_is_not_read_on(serve: Serve) -> None:
    go = asyncio.Event()

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        await go.wait()
        return web.Response(text=str(len(await body_of(request))))

    talk = await serve(handler)
    await talk.says(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n")
    await talk.says(b"x" * 250_000)
    assert not talk.client.held
    await talk.says(b"x" * 49_999)
    assert talk.client.held
    go.set()
    await talk.says()
    assert not talk.client.held
    assert (await talk.says(b"x")).endswith(b"300000")


async def test_bodies_are_not_inflated(serve: Serve) -> None:
    talk = await serve(seen)
    said = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b!!"
    assert (await talk.says(said)).endswith(b"</ \x1f\x8b!!>")


async def test_a_body_in_crumbs_is_read_in_turns(serve: Serve) -> None:
    talk = await serve(seen)
    talk.connection.data_received(CHUNKED + b"1\r\nx\r\n" * 1200)
    assert talk.client.held  # others have their turn first
    await talk.says()
    assert not talk.client.held
    assert (await talk.says(b"0\r\n\r\n" + GET)).endswith(b"</x >")


async def test_no_more_clients_than_can_be_served() -> None:
    server = Server(forever, timeouts=lambda: Timeouts(10, 75, 120), refuse=refuse, most=2)
    talks = []

    async def comes(says: bytes = b"") -> Transport:
        talks.append((server(), Transport()))
        talks[-1][0].connection_made(talks[-1][1])
        await settle()
        if says:
            talks[-1][0].data_received(says)
            await settle()
        return talks[-1][1]

    busy, idle = await comes(GET), await comes()
    third = await comes(GET)
    assert (busy.ended, idle.ended, third.ended) == (None, "abort", None)  # it makes room
    talks[1][0].connection_lost(None)
    await settle()
    fourth = await comes()
    assert (busy.ended, third.ended, fourth.ended) == (None, None, "abort")  # all are at work


async def test_who_has_never_said_anything_makes_room_first() -> None:
    server = Server(ok, timeouts=lambda: Timeouts(10, 75, 120), refuse=refuse, most=2)
    talks = [(server(), Transport()) for _ in range(4)]
    regular, silent, newcomer, another = talks
    for connection, transport in (regular, silent):
        connection.connection_made(transport)
    regular[0].data_received(GET)
    await settle()
    newcomer[0].connection_made(newcomer[1])
    assert (regular[1].ended, silent[1].ended, newcomer[1].ended) == (None, "abort", None)
    silent[0].connection_lost(None)
    newcomer[0].data_received(GET)
    await settle()
    another[0].connection_made(another[1])  # all others are idle between two requests
    assert (regular[1].ended, another[1].ended) == ("abort", None)
    for connection, _ in talks:
        connection.connection_lost(None)
    await server.shutdown(0)


async def test_a_body_that_nobody_wanted_does_not_deafen_a_connection(serve: Serve) -> None:
    talk = await serve(ok)
    said = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 400000\r\n\r\n" + b"x" * 400_000
    talk.connection.data_received(said)
    await talk.says()
    assert not talk.client.held
    assert b"ok" in await talk.says(GET)


async def test_a_client_that_leaves_while_it_is_not_read_from(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = False
    monkeypatch.setattr("proxy.downstream._has_left", lambda _: gone)
    talk = await serve(forever)
    await talk.says(GET, GET, b"x" * 70_000)
    assert talk.client.held
    talk.server.sweep()
    assert talk.client.ended is None
    gone = True
    talk.server.sweep()
    assert talk.client.ended == "abort"


def test_a_client_has_left_when_it_has_closed_its_side() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        transport = Mock(get_extra_info=lambda _: ours)
        theirs.send(b"unread")
        assert not _has_left(transport)
        theirs.shutdown(socket.SHUT_WR)
        assert _has_left(transport)


async def test_a_head_that_is_arriving_is_not_idle(serve: Serve, now: Now) -> None:
    talk = await serve(ok)
    await talk.says(GET)
    now.now += 74
    await talk.says(GET[:5])
    now.now += 2
    talk.connection._process_keepalive()
    assert talk.client.ended is None
    assert b"ok" in await talk.says(GET[5:])
    now.now += 76
    talk.connection._process_keepalive()
    assert talk.client.ended == "close"


def test_what_a_client_has_taken_is_what_its_tcp_acknowledged() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
        server.accept()[0] as ours,
    ):
        transport = Mock(get_extra_info=lambda _: ours)
        before = _taken(transport)
        ours.sendall(b"x" * 5000)
        client.recv(5000, socket.MSG_WAITALL)
        assert _taken(transport) - before == 5000
