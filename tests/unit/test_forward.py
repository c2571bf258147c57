"""Asking an upstream: what it is sent, what becomes of it, and where the connection goes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from proxy import config
from proxy.connection import State, UpstreamConnection
from proxy.errors import ProxyError
from proxy.exchange import Ask, Exchange, Phase, Upload
from proxy.forward import Answer, Forwarder
from proxy.upstreams import Upstream

WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
ROUTE = config.Route(models=("*",), name="all", upstreams=("up",))
GET = Ask("GET", b"/models?a=%2F", ((b"Accept", b"*/*"),))


class Transport(asyncio.Transport):
    """To the pool it shows a socket that nothing ever comes from."""

    quiet: socket.socket

    def __init__(self) -> None:
        super().__init__({"socket": self.quiet})
        self.written = b""
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def abort(self) -> None:
        self.aborted = True


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    near, far = socket.socketpair()
    with near, far:
        Transport.quiet = near
        yield


class Wire:
    """An upstream's side of all connections to it."""

    def __init__(self) -> None:
        self.connections: list[UpstreamConnection] = []
        self.refuses: ProxyError | None = None

    async def connect(self) -> UpstreamConnection:
        if self.refuses is not None:
            raise self.refuses
        connection = UpstreamConnection("up")
        connection.connection_made(Transport())
        self.connections.append(connection)
        return connection

    def transport(self, at: int = -1) -> Transport:
        transport = self.connections[at].transport
        assert isinstance(transport, Transport)
        return transport

    @property
    def sent(self) -> bytes:
        """What went up on the last connection."""
        return self.transport().written


class Reader:
    def __init__(self) -> None:
        self.got = b""
        self.code: str | None = None

    def payload(self, data: bytes) -> None:
        self.got += data

    def ended(self, error: ProxyError | None) -> None:
        self.code = error.code if error else "whole"


class Story:
    """One forwarder over one upstream, with a clock that ticks at each look."""

    def __init__(self, base_url: str = "http://up.example/v1", **settings: Any) -> None:
        self.wire = Wire()
        self.upstream = Upstream(
            "up", config.Upstream(base_url=base_url, **settings), self.wire.connect
        )
        self.ticks = 0.0
        self.forwarder = Forwarder({"up": self.upstream}, self.tick)
        self.exchange = Exchange("id", "id", "POST", "/v1/chat/completions", 0.0)

    def tick(self) -> float:
        self.ticks += 1
        return self.ticks

    def open(self, ask: Ask = GET) -> asyncio.Task[Answer]:
        return asyncio.create_task(self.forwarder.open(ROUTE, ask, self.exchange))

    async def answered(self, data: bytes = WHOLE, ask: Ask = GET) -> Answer:
        opening = self.open(ask)
        await settle()
        self.wire.connections[-1].data_received(data)
        return await opening


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def pieces(*given: bytes | ProxyError | asyncio.Event) -> AsyncIterator[bytes]:
    for each in given:
        match each:
            case bytes():
                yield each
            case asyncio.Event():
                await each.wait()
            case _:
                raise each


# What goes up ---------------------------------------------------------------------------------


async def test_the_request_as_it_is_sent() -> None:
    story = Story(api_key="k", headers={"X-Org": "ours"})
    ask = Ask(
        "POST",
        b"/chat/completions?q=%2e",
        (
            (b"Host", b"sluice"),
            (b"authorization", b"Bearer theirs"),
            (b"X-A", b"1"),
            (b"Accept-Encoding", b"gzip"),
            (b"content-length", b"999"),
        ),
        b'{"stream":true}',
        model="m",
        stream=True,
        identity=True,
    )
    await story.answered(ask=ask)
    assert story.wire.sent == (
        b"POST /v1/chat/completions?q=%2e HTTP/1.1\r\n"
        b"Host: up.example\r\n"
        b"X-A: 1\r\n"
        b"X-Org: ours\r\n"
        b"Authorization: Bearer k\r\n"
        b"Accept-Encoding: identity\r\n"
        b"Content-Length: 15\r\n"
        b"Via: 1.1 sluice\r\n\r\n"
        b'{"stream":true}'
    )
    assert story.exchange.bytes_up == 15


@pytest.mark.parametrize(
    ("body", "framing"),
    [(None, b""), (b"", b"Content-Length: 0\r\n"), (b"x" * 100_000, b"Content-Length: 100000\r\n")],
)
async def test_bodies_of_every_size(body: bytes | None, framing: bytes) -> None:
    story = Story(base_url="http://up.example:81")
    await story.answered(ask=Ask("PUT", b"/x", (), body))
    assert story.wire.sent == (
        b"PUT /x HTTP/1.1\r\nHost: up.example:81\r\n%bVia: 1.1 sluice\r\n\r\n%b"
        % (framing, body or b"")
    )


@pytest.mark.parametrize(
    ("length", "framing", "sent"),
    [
        (5, b"Content-Length: 5\r\n", b"hello"),
        (None, b"Transfer-Encoding: chunked\r\n", b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"),
    ],
)
async def test_a_body_that_streams_up(length: int | None, framing: bytes, sent: bytes) -> None:
    story, more = Story(), asyncio.Event()
    opening = story.open(Ask("POST", b"/files", (), Upload(length, pieces(b"he", more, b"llo"))))
    await settle()
    head, _, body = story.wire.sent.partition(b"\r\n\r\n")
    assert framing in head + b"\r\n"
    assert body and sent.startswith(body)
    more.set()
    await settle()
    assert story.wire.sent.endswith(b"\r\n\r\n" + sent)
    story.wire.connections[0].data_received(WHOLE)
    async with await opening as answer:
        answer.deliver_to(Reader())
    assert story.exchange.bytes_up == 5
    assert story.wire.connections[0].state is State.IDLE


async def test_an_upload_waits_for_the_upstream_to_take_it() -> None:
    story = Story()
    opening = story.open(Ask("POST", b"/files", (), Upload(4, pieces(b"ab", b"cd"))))
    await asyncio.sleep(0)
    story.wire.connections[0].pause_writing()
    await settle()
    assert story.wire.sent.endswith(b"ab")
    story.wire.connections[0].resume_writing()
    await settle()
    assert story.wire.sent.endswith(b"abcd")
    story.wire.connections[0].data_received(WHOLE)
    await (await opening).__aexit__()


# What comes of it -------------------------------------------------------------------------------


async def test_the_record_of_an_answer() -> None:
    story = Story()
    opening = story.open()
    await settle()
    assert story.exchange.phase is Phase.WAITING
    assert (story.exchange.upstream, story.exchange.attempts) == ("up", 1)
    assert (story.exchange.forwarded, story.exchange.first_byte) == (1.0, None)
    story.wire.connections[0].data_received(WHOLE)
    await opening
    assert story.exchange.first_byte == 2.0
    assert story.exchange.attempt_results == [("up", "answer")]


async def test_the_body_and_the_way_back_to_the_pool() -> None:
    story, reader = Story(), Reader()
    async with await story.answered() as answer:
        answer.deliver_to(reader)
    assert (reader.got, reader.code) == (b"ok", "whole")
    assert repr(story.upstream.pool) == "<Pool idle=1>"
    again = story.open()
    await settle()
    assert len(story.wire.connections) == 1
    assert story.wire.sent.count(b"GET /v1/models") == 2
    story.wire.connections[0].data_received(WHOLE)
    await again


@pytest.mark.parametrize("take", [True, False])
async def test_an_unfinished_answer_is_hung_up_on(take: bool) -> None:
    story = Story()
    async with await story.answered(WHOLE[:-1]) as answer:
        if take:
            answer.deliver_to(Reader())
    assert story.wire.transport().aborted
    assert repr(story.upstream.pool) == "<Pool idle=0>"


@pytest.mark.parametrize(
    ("status", "result", "last_error"),
    [
        (b"200", "answer", None),
        (b"404", "answer", None),
        (b"401", "answer", None),  # to the client's own key
        (b"429", "rate_limited", "rate_limited"),
        (b"500", "server_error", "server_error"),
        (b"599", "server_error", "server_error"),
    ],
)
async def test_results(status: bytes, result: str, last_error: str | None) -> None:
    story = Story()
    story.upstream.last_error = "upstream_timeout"
    answer = await story.answered(WHOLE.replace(b"200", status))
    assert answer.head.status == int(status)
    assert story.exchange.attempt_results == [("up", result)]
    assert story.upstream.last_error == last_error


async def test_a_refused_key_of_ours_is_not_shown() -> None:
    story = Story(api_key="sk-secret")
    refusal = b"HTTP/1.1 401 No\r\nContent-Length: 9\r\n\r\nsk-secret"
    with pytest.raises(ProxyError) as caught:
        await story.answered(refusal)
    assert caught.value.code == "upstream_auth"
    assert "sk-secret" not in caught.value.message
    assert story.exchange.attempt_results == [("up", "upstream_auth")]
    assert story.upstream.last_error == "upstream_auth"
    assert repr(story.upstream.pool) == "<Pool idle=0>"


@pytest.mark.parametrize("code", ["upstream_unreachable", "upstream_timeout"])
async def test_no_connection(code: str) -> None:
    story = Story()
    story.wire.refuses = ProxyError(code, "", clock="connect")
    with pytest.raises(ProxyError) as caught:
        await story.open()
    assert caught.value is story.wire.refuses
    assert story.exchange.attempt_results == [("up", code)]
    assert (story.upstream.last_error, story.exchange.forwarded) == (code, None)


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 2"])
async def test_a_death_before_the_head(data: bytes) -> None:
    story = Story()
    opening = story.open()
    await settle()
    if data:
        story.wire.connections[0].data_received(data)
    story.wire.connections[0].connection_lost(None)
    with pytest.raises(ProxyError) as caught:
        await opening
    assert caught.value.code == "upstream_aborted"
    assert len(story.wire.connections) == 1  # a fresh one's death may have cost money
    assert story.exchange.attempt_results == [("up", "upstream_aborted")]


async def reused(story: Story) -> UpstreamConnection:
    async with await story.answered() as answer:
        answer.deliver_to(Reader())
    assert story.wire.connections[0].reused
    return story.wire.connections[0]


async def test_a_reused_connection_that_was_dead_is_nobodys_fault() -> None:
    story = Story()
    stale = await reused(story)
    opening = story.open(Ask("POST", b"/x", (), b"{}"))
    await settle()
    stale.connection_lost(ConnectionResetError())
    await settle()
    assert story.wire.sent.endswith(b"{}")
    story.wire.connections[1].data_received(WHOLE)
    assert (await opening).head.status == 200
    assert story.exchange.attempts == 2  # two requests, one attempt each
    assert story.exchange.attempt_results == [("up", "answer")] * 2


async def test_but_only_before_its_first_byte() -> None:
    story = Story()
    stale = await reused(story)
    opening = story.open()
    await settle()
    stale.data_received(b"H")
    stale.connection_lost(None)
    with pytest.raises(ProxyError, match="upstream_aborted"):
        await opening
    assert len(story.wire.connections) == 1


async def test_and_only_once() -> None:
    story = Story()
    stale = await reused(story)
    opening = story.open()
    await settle()
    stale.connection_lost(None)
    await settle()
    story.wire.connections[1].connection_lost(None)
    with pytest.raises(ProxyError, match="upstream_aborted"):
        await opening
    assert len(story.wire.connections) == 2


async def test_a_silent_reused_connection_is_not_asked_again() -> None:
    story = Story(timeouts=config.Timeouts(first_byte=0.01))
    await reused(story)
    with pytest.raises(ProxyError) as caught:
        await story.open()
    assert (caught.value.code, caught.value.clock) == ("upstream_timeout", "first_byte")
    assert len(story.wire.connections) == 1


async def test_what_cannot_be_sent_twice_gets_a_connection_of_its_own() -> None:
    story = Story()
    await reused(story)
    opening = story.open(Ask("POST", b"/files", (), Upload(2, pieces(b"ab"))))
    await settle()
    assert len(story.wire.connections) == 2
    story.wire.connections[1].data_received(WHOLE)
    async with await opening as answer:
        answer.deliver_to(Reader())
    assert repr(story.upstream.pool) == "<Pool idle=2>"


async def test_an_upload_that_fails_never_looks_complete() -> None:
    story, stalled = Story(), ProxyError("request_timeout", "")
    ask = Ask("POST", b"/files", (), Upload(None, pieces(b"ab", stalled)))
    with pytest.raises(ProxyError) as caught:
        await story.open(ask)
    assert caught.value is stalled
    assert not story.wire.sent.endswith(b"0\r\n\r\n")
    assert story.wire.transport().aborted
    # The client's doing: it says nothing about the upstream.
    assert story.exchange.attempt_results == [("up", "cancelled")]
    assert story.upstream.last_error is None


async def test_an_upload_that_fails_after_the_head_cuts_the_answer() -> None:
    story, go, reader = Story(), asyncio.Event(), Reader()
    stalled = ProxyError("request_timeout", "")
    ask = Ask("POST", b"/files", (), Upload(None, pieces(b"ab", go, stalled)))
    async with await story.answered(WHOLE[:-1], ask) as answer:
        answer.deliver_to(reader)
        go.set()
        await settle()
        assert (reader.got, reader.code) == (b"o", "request_timeout")


async def test_an_early_answer_ends_the_upload() -> None:
    story, never = Story(), asyncio.Event()
    ask = Ask("POST", b"/files", (), Upload(None, pieces(b"ab", never)))
    async with await story.answered(WHOLE, ask) as answer:
        reader = Reader()
        answer.deliver_to(reader)
        assert (reader.got, reader.code) == (b"ok", "whole")
    assert story.wire.transport().aborted  # the rest of the request would be a request of its own
    assert repr(story.upstream.pool) == "<Pool idle=0>"


async def test_a_client_that_leaves_while_the_upstream_thinks() -> None:
    story = Story()
    opening = story.open()
    await settle()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert story.wire.transport().aborted
    assert story.exchange.attempt_results == [("up", "cancelled")]
    assert repr(story.upstream.pool) == "<Pool idle=0>"


# What an answer says of itself ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "is_stream", "is_plain"),
    [
        (b"", False, True),
        (b"Content-Type: application/json\r\n", False, True),
        (b"Content-Type: text/event-stream\r\n", True, True),
        (b"content-type: TEXT/Event-Stream;charset=utf-8\r\n", True, True),
        (b"Content-Type: text/event-stream\r\nContent-Encoding: gzip\r\n", True, False),
        (b"Content-Type: text/event-stream\r\nContent-Encoding: identity\r\n", True, True),
        (b"Content-Encoding: identity\r\nContent-Encoding: br\r\n", False, False),
        (b"Content-Encoding: Identity\r\n", False, True),
    ],
)
async def test_what_can_be_read_and_added_to(
    fields: bytes, is_stream: bool, is_plain: bool
) -> None:
    answer = await Story().answered(b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n")
    assert (answer.is_stream, answer.is_plain) == (is_stream, is_plain)
    await answer.__aexit__()


async def test_an_answer_hands_on_what_it_is_told() -> None:
    story = Story()
    paused = []
    async with await story.answered(WHOLE[:-1]) as answer:
        transport = story.wire.transport()
        transport.pause_reading = lambda: paused.append(True)  # type: ignore[method-assign]
        transport.resume_reading = lambda: paused.append(False)  # type: ignore[method-assign]
        answer.pause()
        answer.resume()
        assert paused == [True, False]
        answer.abort()
        assert transport.aborted
