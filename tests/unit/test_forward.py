"""Asking upstreams: what they are sent, whose answer is the answer, and what becomes of the rest."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import pytest

from proxy import config
from proxy.answer import Answer
from proxy.circuit import Verdict
from proxy.connection import State, UpstreamConnection
from proxy.errors import ProxyError
from proxy.exchange import Ask, Exchange, Outcome, Phase, Upload
from proxy.forward import Forwarder
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

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

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
    forwarded = story.exchange.forwarded
    assert forwarded == story.ticks  # now
    assert story.exchange.first_byte is None
    story.wire.connections[0].data_received(WHOLE)
    await opening
    assert story.exchange.forwarded == forwarded
    assert story.exchange.first_byte == forwarded + 1
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
        (b"429", "rate_limited", "upstream_timeout"),  # it says nothing either way
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
    if result == "answer":
        story.exchange.outcome = Outcome.COMPLETED
    await answer.close()
    assert story.upstream.last_error == last_error


@pytest.mark.parametrize(("cut", "idle"), [(0, 1), (1, 0)])
async def test_a_refused_key_of_ours_is_not_shown(cut: int, idle: int) -> None:
    story = Story(api_key="sk-secret")
    refusal = b"HTTP/1.1 401 No\r\nContent-Length: 9\r\n\r\nsk-secret"
    with pytest.raises(ProxyError) as caught:
        await story.answered(refusal[: len(refusal) - cut])
    assert caught.value.code == "upstream_auth"
    assert "sk-secret" not in caught.value.message
    assert story.exchange.attempt_results == [("up", "upstream_auth")]
    assert story.upstream.last_error == "upstream_auth"
    # Whoever comes next reads none of it either.
    assert repr(story.upstream.pool) == f"<Pool idle={idle}>"


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


# Several candidates -------------------------------------------------------------------------------


def response(
    status: int = 200, body: bytes = b"", *fields: bytes, length: int | None = None
) -> bytes:
    """A whole response, or with another `length` than the body has, a part of one."""
    length = len(body) if length is None else length
    lines = [b"HTTP/1.1 %d X" % status, *fields, b"Content-Length: %d" % length]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def stream(body: bytes, *, length: int | None = None) -> bytes:
    return response(200, body, b"Content-Type: text/event-stream", length=length)


class Death:
    """The upstream closes the connection."""


Step = bytes | Death | ProxyError
EVENT = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
FAILURE = b'data: {"error":{"message":"overloaded"}}\n\n'
DIES = Death()
CALLS: tuple[Step, ...] = (stream(EVENT),)
REFUSED = ProxyError("upstream_unreachable", "refused")
UNREACHED = ProxyError("upstream_timeout", "late", clock="connect")
BUSY = response(429, b"busy", b"Retry-After: 7")
BROKEN = response(500, b"broken")
NOT_OURS = response(401, b"sk-secret")
FAILS = stream(FAILURE)
NO_HTTP = b"SSH-2.0\r\n\r\n"
POST = Ask("POST", b"/chat/completions", (), b'{"stream":true}', "m", stream=True)


class Played(Transport):
    """A connection whose upstream follows a script: it begins when a request's head has come, and
    each step has a turn of the loop for itself."""

    def __init__(self, connection: UpstreamConnection, steps: tuple[Step, ...]) -> None:
        super().__init__()
        self._connection = connection
        self.script = steps
        self._steps: list[Step] = []
        self._paused = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        super().write(data)
        if b" HTTP/1.1\r\n" in data:
            self._steps = list(self.script)
            asyncio.get_running_loop().call_soon(self._play)

    def _play(self) -> None:
        if self.aborted or self._paused or not self._steps:
            return
        match self._steps.pop(0):
            case bytes(data):
                self._connection.data_received(data)
            case _:
                self._connection.connection_lost(None)
        asyncio.get_running_loop().call_soon(self._play)

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False
        asyncio.get_running_loop().call_soon(self._play)


class Script(Wire):
    """An upstream that answers each connection's request with the same steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: tuple[Step, ...] = ()
        self.transports: list[Played] = []

    async def connect(self) -> UpstreamConnection:
        await asyncio.sleep(0)
        match self.steps:
            case [ProxyError() as refusal]:
                raise ProxyError(refusal.code, refusal.message, clock=refusal.clock)
        connection = UpstreamConnection("up")
        self.transports.append(Played(connection, self.steps))
        connection.connection_made(self.transports[-1])
        self.connections.append(connection)
        return connection

    @property
    def requests(self) -> list[bytes]:
        """What was sent on each connection."""
        return [each.written for each in self.transports]


class Several:
    """One forwarder over candidates a, b and c, each with its script; the clock stands still."""

    def __init__(
        self, scripts: dict[str, tuple[Step, ...]], *, attempts: int = 3, **settings: Any
    ) -> None:
        self.wires = {name: Script() for name in scripts}
        self.upstreams = {
            name: Upstream(
                name,
                config.Upstream.model_validate(
                    {"base_url": f"http://{name}.example", "api_key": f"sk-{name}"}
                    | {"circuit": {"failures": 1}}
                    | settings
                ),
                wire.connect,
            )
            for name, wire in self.wires.items()
        }
        for name, steps in scripts.items():
            self.wires[name].steps = steps
        self.forwarder = Forwarder(self.upstreams, lambda: 1000.0)
        self.route = config.Route(
            models=("*",), name="all", upstreams=tuple(scripts), attempts=attempts
        )
        self.exchange = Exchange("id", "id", "POST", "/v1/chat/completions", 0.0)

    async def open(self, ask: Ask = POST) -> Answer:
        return await self.forwarder.open(self.route, ask, self.exchange)

    async def tell(self, ask: Ask = POST) -> str:
        """Who answers what; or the error's code, and whose it is."""
        try:
            answer = await self.open(ask)
        except ProxyError as error:
            self.clean()
            return f"{self.exchange.upstream} {error.clock or error.code}"
        reader = Reader()
        async with answer:
            answer.deliver_to(reader)
            await settle()
        self.clean()
        assert self.exchange.upstream == answer.upstream.name
        return f"{answer.upstream.name} {answer.head.status} {reader.code}"

    @property
    def asked(self) -> list[tuple[str, str]]:
        assert len(self.exchange.attempt_results) == self.exchange.attempts
        return self.exchange.attempt_results

    def clean(self) -> None:
        """Nothing is left: no slot, no connection but in its pool, no task."""
        assert [each.in_progress for each in self.upstreams.values()] == [0] * len(self.upstreams)
        for name, wire in self.wires.items():
            states = [each.state for each in wire.connections]
            assert set(states) <= {State.IDLE, State.CLOSED}, (name, states)
            pool = self.upstreams[name].pool
            assert repr(pool) == f"<Pool idle={states.count(State.IDLE)}>"
        assert asyncio.all_tasks() <= {asyncio.current_task()}


@pytest.mark.parametrize(
    ("scripts", "told", "asked"),
    [
        # Any response but those below is the answer.
        ([CALLS, CALLS], "a 200 whole", ["answer"]),
        ([(response(404, b"no"),), CALLS], "a 404 whole", ["answer"]),
        ([(response(302),), CALLS], "a 302 whole", ["answer"]),
        ([(response(403, b"no"),), CALLS], "a 403 whole", ["answer"]),
        # Responses that are none.
        ([(BROKEN,), CALLS], "b 200 whole", ["server_error", "answer"]),
        ([(BUSY,), CALLS], "b 200 whole", ["rate_limited", "answer"]),
        ([(NOT_OURS,), CALLS], "b 200 whole", ["upstream_auth", "answer"]),
        ([(FAILS,), CALLS], "b 200 whole", ["error_event", "answer"]),
        # Without another one, the last of them is relayed.
        ([(BROKEN,), (BUSY,)], "b 429 whole", ["server_error", "rate_limited"]),
        ([(BUSY,), (BROKEN,)], "b 500 whole", ["rate_limited", "server_error"]),
        ([(BROKEN,)], "a 500 whole", ["server_error"]),
        ([(BROKEN,), (REFUSED,)], "a 500 whole", ["server_error", "upstream_unreachable"]),
        ([(BUSY,), (DIES,)], "a 429 whole", ["rate_limited", "upstream_aborted"]),
        (
            [(BROKEN,), (REFUSED,), (UNREACHED,)],
            "a 500 whole",
            ["server_error", "upstream_unreachable", "upstream_timeout"],
        ),
        ([(FAILS,), (REFUSED,)], "a 200 whole", ["error_event", "upstream_unreachable"]),
        # It is not looked into what is relayed in any case.
        ([(FAILS,)], "a 200 whole", ["answer"]),
        ([(BROKEN,), (FAILS,)], "b 200 whole", ["server_error", "answer"]),
        # A refused key of ours is not shown, but a response all the same.
        ([(NOT_OURS,)], "a upstream_auth", ["upstream_auth"]),
        ([(BROKEN,), (NOT_OURS,)], "b upstream_auth", ["server_error", "upstream_auth"]),
        ([(NOT_OURS,), (BROKEN,)], "b 500 whole", ["upstream_auth", "server_error"]),
        ([(NOT_OURS,), (REFUSED,)], "a upstream_auth", ["upstream_auth", "upstream_unreachable"]),
        # No response.
        ([(REFUSED,), CALLS], "b 200 whole", ["upstream_unreachable", "answer"]),
        ([(UNREACHED,), CALLS], "b 200 whole", ["upstream_timeout", "answer"]),
        ([(DIES,), CALLS], "b 200 whole", ["upstream_aborted", "answer"]),
        ([(b"HTTP/1.1 2", DIES), CALLS], "b 200 whole", ["upstream_aborted", "answer"]),
        # Behind the head too, while that is held back.
        ([(stream(b"", length=9), DIES), CALLS], "b 200 whole", ["upstream_aborted", "answer"]),
        (
            [(stream(b": hi\n\ndata:", length=99), DIES), CALLS],
            "b 200 whole",
            ["upstream_aborted", "answer"],
        ),
        ([(stream(EVENT, length=99), DIES), CALLS], "a 200 upstream_aborted", ["answer"]),
        ([(response(200, b"{", length=9), DIES), CALLS], "a 200 upstream_aborted", ["answer"]),
        ([(REFUSED,), (DIES,)], "b upstream_aborted", ["upstream_unreachable", "upstream_aborted"]),
        ([(DIES,), (UNREACHED,)], "b connect", ["upstream_aborted", "upstream_timeout"]),
        # It may be at work, and be paid.
        ([(NO_HTTP,), CALLS], "a upstream_invalid", ["upstream_invalid"]),
        ([(BROKEN,), (NO_HTTP,)], "b upstream_invalid", ["server_error", "upstream_invalid"]),
        # All in a row.
        ([(REFUSED,), (BROKEN,), CALLS], "c 200 whole", ["upstream_unreachable", "server_error", "answer"]),
    ],
)  # fmt: skip
async def test_whose_answer_it_is(
    scripts: list[tuple[Step, ...]], told: str, asked: list[str]
) -> None:
    several = Several(dict(zip("abc", scripts, strict=False)))
    assert await several.tell() == told
    assert several.asked == list(zip("abc", asked, strict=False))


@pytest.mark.parametrize(
    ("steps", "clock"),
    [
        ((), "first_byte"),
        ((b"HTTP/1.1 200",), "first_byte"),
        ((stream(b": hi\n\n", length=99),), "idle"),
    ],
)
async def test_a_timeout_behind_the_request_is_not_tried_elsewhere(
    steps: tuple[Step, ...], clock: str
) -> None:
    timeouts = {"first_byte": 0.01, "idle": 0.01}
    several = Several({"a": steps, "b": CALLS}, timeouts=timeouts)
    assert await several.tell() == f"a {clock}"
    assert several.asked == [("a", "upstream_timeout")]
    assert several.wires["b"].connections == []


async def test_a_stream_that_does_not_come_to_its_first_event_has_stalled() -> None:
    timeouts = {"stall": 0.01}
    several = Several({"a": (stream(b": hi\n\n", length=99),), "b": CALLS}, timeouts=timeouts)
    assert await several.tell() == "a stall"
    assert several.asked == [("a", "upstream_timeout")]
    assert not several.upstreams["a"].circuit.is_closed


@pytest.mark.parametrize(
    ("attempts", "told"), [(1, "a 500 whole"), (2, "b 500 whole"), (3, "c 500 whole"), (9, "c 500 whole")]
)  # fmt: skip
async def test_so_many_attempts_and_no_candidate_twice(attempts: int, told: str) -> None:
    several = Several(dict.fromkeys("abc", (BROKEN,)), attempts=attempts)
    assert await several.tell() == told
    assert several.exchange.attempts == min(attempts, 3)


async def test_each_is_sent_the_same_request_with_its_own_key() -> None:
    several = Several({"a": (BROKEN,), "b": (DIES,), "c": CALLS})
    await several.tell(Ask("POST", b"/x", ((b"X-A", b"1"),), b"body"))
    for name, wire in several.wires.items():
        [sent] = wire.requests
        assert f"Host: {name}.example\r\n".encode() in sent
        assert f"Authorization: Bearer sk-{name}\r\n".encode() in sent
        assert sent.replace(name.encode() + b".example", b"").replace(
            f"sk-{name}".encode(), b""
        ) == (
            b"POST /x HTTP/1.1\r\nHost: \r\nX-A: 1\r\nAuthorization: Bearer \r\n"
            b"Content-Length: 4\r\nVia: 1.1 sluice\r\n\r\nbody"
        )


async def test_what_streams_up_gets_one_attempt() -> None:
    for script in (BROKEN,), (REFUSED,), (DIES,):
        several = Several({"a": script, "b": CALLS})
        await several.tell(Ask("POST", b"/files", (), Upload(2, pieces(b"ab"))))
        assert several.exchange.attempts == 1
        assert several.wires["b"].connections == []


async def test_the_clients_own_key_may_be_refused() -> None:
    several = Several({"a": (NOT_OURS,), "b": CALLS}, api_key=None)
    assert await several.tell() == "a 401 whole"
    assert several.asked == [("a", "answer")]


async def test_a_stale_connection_is_nobodys_attempt() -> None:
    several = Several({"a": CALLS, "b": CALLS}, attempts=1)
    await several.tell()
    [stale] = several.wires["a"].connections
    [transport] = several.wires["a"].transports
    transport.script, transport.written = (DIES,), b""
    assert await several.tell() == "a 200 whole"
    assert stale.state is State.CLOSED
    assert several.asked == [("a", "answer")] * 2
    assert several.wires["b"].connections == []


async def test_nobody_to_ask() -> None:
    several = Several({"a": CALLS, "b": CALLS}, max_streams=1)
    turns = [each.begin(lambda: 0.0) for each in several.upstreams.values()]
    with pytest.raises(ProxyError) as caught:
        await several.open()
    assert (caught.value.code, caught.value.status) == ("no_upstream_available", 503)
    assert (caught.value.retry_after, several.exchange.upstream) == (1, None)
    assert (several.exchange.attempts, several.exchange.attempt_results) == (0, [])
    turns[1].end()
    turns[0].end()
    assert await several.tell() == "a 200 whole"


async def test_one_that_says_for_how_long_is_left_alone() -> None:
    several = Several({"a": (BUSY,), "b": (BUSY,)})
    assert await several.tell() == "b 429 whole"
    with pytest.raises(ProxyError) as caught:
        await several.open()
    assert (caught.value.code, caught.value.retry_after) == ("no_upstream_available", 7)
    # It is no failure.
    assert all(each.circuit.is_closed for each in several.upstreams.values())


@pytest.mark.parametrize("again", [b"Retry-After: 0", b"X-None: 1", b"Retry-After: soon"])
async def test_one_that_does_not_is_asked_again(again: bytes) -> None:
    several = Several({"a": (response(429, b"", again),), "b": CALLS})
    for _ in range(2):
        assert await several.tell() == "b 200 whole"
    assert several.asked == [("a", "rate_limited"), ("b", "answer")] * 2


async def test_the_only_one_is_asked_whatever_it_said() -> None:
    several = Several({"a": (BUSY,)})
    for _ in range(2):
        assert await several.tell() == "a 429 whole"


async def test_a_client_that_has_left_needs_no_second_attempt() -> None:
    # on_disconnect: finish reads on what was begun, and begins nothing.
    several = Several({"a": (BROKEN,), "b": CALLS})
    several.exchange.left = True
    opening = asyncio.create_task(several.open())
    with pytest.raises(ProxyError):
        await opening
    several.exchange.left = False
    opening = asyncio.create_task(several.open())
    await asyncio.sleep(0)
    several.exchange.left = True
    async with await opening as answer:
        assert answer.head.status == 500
    assert several.asked == [("a", "server_error")]


# How an upstream has done -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "outcome", "verdict"),
    [
        # An answer is judged by its end.
        (CALLS, Outcome.COMPLETED, Verdict.SUCCESS),
        ((response(404, b"no"),), Outcome.COMPLETED, Verdict.SUCCESS),
        (CALLS, Outcome.UPSTREAM_TRUNCATED, Verdict.FAILURE),
        (CALLS, Outcome.UPSTREAM_ERROR, Verdict.FAILURE),
        (CALLS, Outcome.IDLE_TIMEOUT, Verdict.FAILURE),
        (CALLS, Outcome.STALL_TIMEOUT, Verdict.FAILURE),
        (CALLS, Outcome.TOTAL_TIMEOUT, Verdict.NEITHER),
        (CALLS, Outcome.CLIENT_GONE, Verdict.NEITHER),
        (CALLS, Outcome.SHUTDOWN, Verdict.NEITHER),
        (CALLS, Outcome.KILLED, Verdict.NEITHER),
        (CALLS, None, Verdict.NEITHER),
        # What is none is judged at once, however well it is relayed.
        ((BROKEN,), Outcome.COMPLETED, Verdict.FAILURE),
        ((BUSY,), Outcome.UPSTREAM_ERROR, Verdict.NEITHER),
        ((NOT_OURS,), None, Verdict.FAILURE),
        ((REFUSED,), None, Verdict.FAILURE),
        ((UNREACHED,), None, Verdict.FAILURE),
        ((DIES,), None, Verdict.FAILURE),
        ((NO_HTTP,), None, Verdict.FAILURE),
    ],
)
async def test_what_its_circuit_hears(
    steps: tuple[Step, ...], outcome: Outcome | None, verdict: Verdict
) -> None:
    several = Several({"a": steps}, circuit={"failures": 2})
    up = several.upstreams["a"]
    up.begin(lambda: 0.0).end(Verdict.FAILURE)
    try:
        async with await several.open() as answer:
            answer.deliver_to(Reader())
            several.exchange.outcome = outcome
    except ProxyError:
        pass
    assert up.circuit.is_closed == (verdict is not Verdict.FAILURE)
    up.begin(lambda: 0.0).end(Verdict.FAILURE)
    assert up.circuit.is_closed == (verdict is Verdict.SUCCESS)
    several.clean()


@pytest.mark.parametrize(
    ("timeouts", "closed"), [({"first_byte": 0.01}, False), ({"total": 0.01}, True)]
)
async def test_what_the_operator_limits_is_no_failure(
    timeouts: dict[str, float], closed: bool
) -> None:
    several = Several({"a": ()}, timeouts=timeouts)
    assert await several.tell() == f"a {next(iter(timeouts))}"
    assert several.upstreams["a"].circuit.is_closed == closed


async def test_a_client_whose_upload_fails_says_nothing_of_the_upstream() -> None:
    several = Several({"a": ()})
    stalled = ProxyError("request_timeout", "")
    upload = Upload(None, pieces(b"ab", stalled))
    assert await several.tell(Ask("POST", b"/files", (), upload)) == "a request_timeout"
    assert several.upstreams["a"].circuit.is_closed
    assert several.upstreams["a"].last_error is None


@pytest.mark.parametrize("steps", [CALLS, (BROKEN,), (BUSY,), (FAILS,), (response(404),)])
async def test_what_is_only_fetched_is_no_news(steps: tuple[Step, ...]) -> None:
    several = Several({"a": steps}, max_streams=1)
    up = several.upstreams["a"]
    up.begin(lambda: 0.0).end(Verdict.FAILURE)
    async with await several.forwarder.fetch(up, GET, several.exchange) as answer:
        assert up.is_full
        with pytest.raises(ProxyError, match="no_upstream_available"):
            await several.forwarder.fetch(up, GET, several.exchange)
        answer.deliver_to(Reader())
        several.exchange.outcome = Outcome.COMPLETED
    several.clean()
    assert not up.circuit.is_closed  # a list of models does not say that it generates again,
    assert up.rests_until == 0.0
    fresh = Several({"a": (DIES,)})
    with pytest.raises(ProxyError, match="upstream_aborted"):
        await fresh.forwarder.fetch(fresh.upstreams["a"], GET, fresh.exchange)
    fresh.clean()
    assert fresh.upstreams["a"].circuit.is_closed  # nor that it does not


# A reload in between ------------------------------------------------------------------------------


def reload(several: Several, name: str = "a", **settings: Any) -> None:
    several.upstreams[name].become(
        Upstream(
            name,
            config.Upstream.model_validate({"base_url": f"http://{name}.example"} | settings),
            several.wires[name].connect,
        )
    )


async def test_who_waits_for_its_connection_goes_up_with_the_key_of_now() -> None:
    several = Several({"a": CALLS})
    opening = asyncio.create_task(several.open())
    await asyncio.sleep(0)
    assert several.wires["a"].connections == []
    reload(several, api_key="sk-new")
    async with await opening:
        [sent] = several.wires["a"].requests
    assert b"Bearer sk-new\r\n" in sent
    assert b"sk-a" not in sent


async def test_and_so_does_a_second_attempt() -> None:
    several = Several({"a": (BROKEN,), "b": CALLS})
    opening = asyncio.create_task(several.open())
    await asyncio.sleep(0)
    reload(several, "b", api_key="sk-new")
    async with await opening:
        [sent] = several.wires["b"].requests
    assert b"Bearer sk-new\r\n" in sent


async def test_and_a_second_connection() -> None:
    several = Several({"a": CALLS})
    await several.tell()
    [transport] = several.wires["a"].transports
    transport.script, transport.written = (DIES,), b""
    opening = asyncio.create_task(several.open())
    await asyncio.sleep(0)
    assert b"sk-a" in transport.written
    reload(several, api_key="sk-new")
    async with await opening:
        assert b"Bearer sk-new\r\n" in several.wires["a"].requests[1]


async def test_a_key_that_was_ours_when_it_was_sent_is_not_shown() -> None:
    # The key is refused as it has been revoked, and the reload that takes it away has come in between.
    several = Several({"a": (b"", NOT_OURS)})
    opening = asyncio.create_task(several.open())
    async with asyncio.timeout(10):
        while not several.wires["a"].connections:
            await asyncio.sleep(0)
    reload(several)
    with pytest.raises(ProxyError) as caught:
        await opening
    assert caught.value.code == "upstream_auth"
    several.clean()


async def test_a_removed_upstream_finishes_what_it_has_begun() -> None:
    several = Several({"a": (stream(EVENT, length=len(EVENT) + 3), b"end")})
    reader = Reader()
    async with await several.open() as answer:
        several.upstreams["a"].pool.close()
        answer.deliver_to(reader)
        await settle()
    assert (reader.got, reader.code) == (EVENT + b"end", "whole")
    [connection] = several.wires["a"].connections
    assert connection.state is State.CLOSED
    assert repr(several.upstreams["a"].pool) == "<Pool idle=0 closed>"


# Cancelled at any moment --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scripts",
    [
        [CALLS],
        [(REFUSED,), CALLS],
        [(BROKEN,), (BUSY,), CALLS],
        [(NOT_OURS,), (DIES,), CALLS],
        [(b"HTTP/1.1 2", DIES), (response(500, b"bro", length=9),), CALLS],
        [(stream(b": hi\n", length=99), b"\n", FAILURE), (stream(b"data", length=99), DIES), CALLS],
        [(FAILS,), (BROKEN,)],
    ],
)
@pytest.mark.parametrize("uploads", [False, True])
@pytest.mark.parametrize("stale", [False, True])
async def test_a_cancellation_leaves_nothing_behind(
    scripts: list[tuple[Step, ...]], uploads: bool, stale: bool
) -> None:
    opening: asyncio.Task[Answer] | None = None
    for turns in range(100):  # of the loop, until it is cancelled
        several = Several(dict(zip("abc", scripts, strict=False)))
        first = several.upstreams["a"]
        if stale and not isinstance(scripts[0][0], ProxyError):
            await reuse(several)
        body = Upload(None, pieces(b"ab", b"cd")) if uploads else b"body"
        opening = asyncio.create_task(several.open(Ask("POST", b"/x", (), body)))
        for _ in range(turns):
            await asyncio.sleep(0)
        if opening.done():
            break
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        several.clean()
        # Nobody was asked who is not in the record, and nothing is said of who was cut off.
        results = [result for _, result in several.asked]
        assert "cancelled" not in results[:-1]
        if results == ["cancelled"]:
            assert first.circuit.is_closed
            assert first.last_error is None
    assert opening is not None and opening.done()
    with suppress(ProxyError):
        await (await opening).close()
    assert turns > 1
    several.clean()


async def reuse(several: Several) -> None:
    """Leaves an idle connection in the first candidate's pool, that dies with the next request."""
    connection = UpstreamConnection("a")
    transport = Played(connection, (DIES,))
    connection.connection_made(transport)
    connection.reused = True
    several.wires["a"].connections.append(connection)
    several.upstreams["a"].pool.release(connection)
