"""Moving an answer: what the client gets in every ending, and what the record says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from proxy import config
from proxy.answer import Answer
from proxy.connection import Receiver
from proxy.downstream import Flow, Sink
from proxy.errors import ProxyError
from proxy.exchange import Exchange, Outcome, Phase
from proxy.framing import ResponseHead
from proxy.relay import outcome_of, relay

BEAT = b":\n"
EVENT = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
DONE = b"data: [DONE]\n\n"
ABORTED = ProxyError("upstream_aborted", "cut")
SILENT = ProxyError("upstream_timeout", "silent", clock="idle")


class Named:
    name = "up"


class Upstream:
    """An answer whose body the test speaks."""

    upstream = Named
    stall_timeout = 80.0

    def __init__(self, *, stream: bool = True, plain: bool = True, status: int = 200) -> None:
        self.head = ResponseHead(1, status, b"", ())
        self.is_stream = stream
        self.is_plain = plain
        self.is_readable_stream = stream and plain
        self.did: list[str] = []
        self.receiver: Receiver | None = None

    def deliver_to(self, receiver: Receiver) -> None:
        self.receiver = receiver

    def pause(self) -> None:
        self.did.append("pause")

    def resume(self) -> None:
        self.did.append("resume")

    def abort(self) -> None:
        self.did.append("abort")

    def fail(self, error: ProxyError) -> None:
        self.did.append("fail")
        assert self.receiver is not None
        self.receiver.ended(error)


class Client:
    """A sink that writes down what it is told."""

    def __init__(self) -> None:
        self.keeps_up = True
        self.got: list[Any] = []
        self.flow: Flow | None = None
        self.flows = 0

    def serve(self, flow: Flow | None) -> None:
        self.flow = flow
        self.flows += 1

    def write(self, payload: bytes) -> None:
        self.got.append(payload)

    def flush(self) -> None:
        self.got.append("flush")

    def finish(self) -> None:
        self.got.append("finish")

    def cut(self) -> None:
        self.got.append("cut")


class Timers:
    """The loop's timers and the clock, moved by hand."""

    def __init__(self, patch: pytest.MonkeyPatch, start: float) -> None:
        self.now = start
        self.waiting: list[asyncio.TimerHandle] = []
        self._loop = asyncio.get_running_loop()
        patch.setattr(self._loop, "call_later", self._call_later)

    def _call_later(
        self, seconds: float, callback: Callable[..., object], *args: object
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(self.now + seconds, callback, args, self._loop)
        self.waiting.append(handle)
        return handle

    @property
    def running(self) -> list[asyncio.TimerHandle]:
        self.waiting = [each for each in self.waiting if not each.cancelled()]
        return self.waiting

    def advance(self, seconds: float) -> None:
        """Lets time pass, and all timers fire that are due by then."""
        end = self.now + seconds
        while due := [each for each in self.running if each.when() <= end]:
            first = min(due, key=asyncio.TimerHandle.when)
            self.waiting.remove(first)
            self.now = max(self.now, first.when())
            first._run()
        self.now = end


class Story:
    def __init__(
        self,
        path: str = "/v1/chat/completions",
        route: dict[str, Any] | None = None,
        **upstream: Any,
    ) -> None:
        self.upstream = Upstream(**upstream)
        self.client = Client()
        self.exchange = Exchange("id", "id", "POST", path, 0.0)
        self.route = config.Route(models=("*",), name="all", upstreams=("up",), **(route or {}))
        self.now = 10.0
        self.timers: Timers | None = None
        self.task: asyncio.Task[None]

    def with_timers(self, patch: pytest.MonkeyPatch) -> Timers:
        """Time that only the test moves."""
        self.timers = Timers(patch, self.now)
        return self.timers

    def clock(self) -> float:
        return self.now if self.timers is None else self.timers.now

    async def begin(self) -> Receiver:
        """Relays up to the head."""
        self.task = asyncio.create_task(
            relay(
                cast(Answer, self.upstream),
                cast(Sink, self.client),
                self.exchange,
                self.route,
                self.clock,
            )
        )
        self.exchange.task = self.task
        await asyncio.sleep(0)
        assert self.client.got == ["flush"]
        assert self.upstream.receiver is not None
        return self.upstream.receiver

    async def play(self, *pieces: bytes, end: ProxyError | None = None) -> list[Any]:
        """Relays all of it; returns what the client got behind the head."""
        receiver = await self.begin()
        for piece in pieces:
            receiver.payload(piece)
        receiver.ended(end)
        await self.task
        assert self.client.flow is None
        return self.client.got[1:]


async def test_each_piece_is_written_in_the_same_call() -> None:
    story = Story()
    receiver = await story.begin()
    for at, piece in enumerate((ROLE[:9], ROLE[9:], EVENT)):
        story.now += 1
        receiver.payload(piece)
        assert story.client.got[-1] is piece
        assert (story.exchange.chunks, story.exchange.last_payload) == (at + 1, story.now)
    assert story.exchange.phase is Phase.RELAYING
    assert not story.task.done()
    receiver.ended(None)
    await story.task
    assert story.client.got[-1] == "finish"
    assert story.exchange.bytes_down == len(ROLE + EVENT)
    assert story.exchange.outcome is Outcome.COMPLETED


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        ({}, True),
        ({"stream": False}, False),  # not looked for
        ({"plain": False}, False),  # can't be read
    ],
)
async def test_time_to_first_token(kind: dict[str, Any], seen: bool) -> None:
    story = Story(**kind)
    receiver = await story.begin()
    receiver.payload(ROLE)
    assert story.exchange.first_token is None
    story.now = 12.0
    receiver.payload(EVENT)
    story.now = 13.0
    receiver.payload(EVENT)
    assert story.exchange.first_token == (12.0 if seen else None)
    receiver.ended(None)
    await story.task


async def test_a_slow_client_holds_its_upstream() -> None:
    story = Story()
    receiver = await story.begin()
    flow = story.client.flow
    assert flow is not None
    flow.pause()
    flow.resume()
    assert story.upstream.did == ["pause", "resume"]
    receiver.ended(None)
    await story.task
    assert story.client.flows == 2


# Endings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("upstream", "pieces", "outcome"),
    [
        ({}, [EVENT, DONE], Outcome.COMPLETED),
        ({}, [EVENT], Outcome.COMPLETED),  # its framing says that it is whole
        ({}, [], Outcome.COMPLETED),
        ({"stream": False}, [b"{}"], Outcome.COMPLETED),
        ({"stream": False, "status": 404}, [b"{}"], Outcome.COMPLETED),
        ({"stream": False, "status": 429}, [b"{}"], Outcome.UPSTREAM_ERROR),
        ({"stream": False, "status": 500}, [b"{}"], Outcome.UPSTREAM_ERROR),
        ({"status": 503}, [EVENT], Outcome.UPSTREAM_ERROR),
        ({}, [b'data: {"error":{"message":"m"}}\n\n', DONE], Outcome.UPSTREAM_ERROR),
        ({}, [EVENT, b'data: {"error":{"message":"m"}}\n\n'], Outcome.COMPLETED),
        ({"stream": False}, [b'data: {"error":{"message":"m"}}\n\n'], Outcome.COMPLETED),
    ],
)
async def test_whole_answers(
    upstream: dict[str, Any], pieces: list[bytes], outcome: Outcome
) -> None:
    story = Story(**upstream)
    assert await story.play(*pieces) == [*pieces, "finish"]
    assert story.exchange.outcome is outcome


@pytest.mark.parametrize(
    ("upstream", "pieces", "added"),
    [
        ({}, [EVENT], True),
        ({}, [EVENT, b": ping\n"], True),
        ({}, [], True),
        ({}, [EVENT, EVENT[:9]], False),  # within an event
        ({}, [EVENT, EVENT[:-1]], False),
        ({"plain": False}, [EVENT], False),
        ({"stream": False}, [b'{"a":'], False),
        ({"stream": False}, [], False),
        ({"stream": False}, [EVENT], False),
    ],
)
@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ABORTED, Outcome.UPSTREAM_TRUNCATED),
        (ProxyError("upstream_invalid", ""), Outcome.UPSTREAM_TRUNCATED),
        (SILENT, Outcome.IDLE_TIMEOUT),
        (ProxyError("upstream_timeout", "", clock="total"), Outcome.TOTAL_TIMEOUT),
        (ProxyError("request_timeout", ""), Outcome.CLIENT_GONE),
    ],
)
async def test_a_cut_is_said_where_it_can_be_and_seen_in_any_case(
    upstream: dict[str, Any],
    pieces: list[bytes],
    added: bool,
    error: ProxyError,
    outcome: Outcome,
) -> None:
    story = Story(**upstream)
    event = [error.event(story.exchange.dialect, 0)] if added else []
    assert await story.play(*pieces, end=error) == [*pieces, *event, "cut"]
    assert story.exchange.outcome is outcome


@pytest.mark.parametrize(
    ("path", "start"),
    [
        ("/v1/chat/completions", b'data: {"error":{'),
        ("/v1/completions", b'data: {"error":{'),
        ("/v1/messages", b'event: error\ndata: {"type":"error","error":{'),
        ("/v1/responses", b'event: error\ndata: {"type":"error","code":"upstream_aborted"'),
    ],
)
async def test_the_event_is_of_the_paths_protocol(path: str, start: bytes) -> None:
    *_, event, cut = await Story(path).play(b'data: {"sequence_number":6}\n\n', end=ABORTED)
    assert cut == "cut"
    assert event.startswith(start)
    assert event.endswith(b"\n\n")
    assert (b'"sequence_number":7' in event) == (path == "/v1/responses")


@pytest.mark.parametrize("error", [ABORTED, SILENT, ProxyError("upstream_invalid", "")])
async def test_an_upstream_that_said_done_has_finished(error: ProxyError) -> None:
    # interface.md, §4: `An upstream that sent [DONE] but no last chunk counts as completed.`
    story = Story()
    assert await story.play(EVENT, DONE, end=error) == [EVENT, DONE, "finish"]
    assert story.exchange.outcome is Outcome.COMPLETED


async def test_what_is_no_stream_cannot_say_done() -> None:
    # With a Content-Length, the client would take the next answer's bytes for the missing ones.
    story = Story(stream=False)
    assert await story.play(b"text\n" + DONE, end=ABORTED) == [b"text\n" + DONE, "cut"]
    assert story.exchange.outcome is Outcome.UPSTREAM_TRUNCATED


# A client that leaves, and what else ends a relay from outside --------------------------------------


async def test_a_lost_client_is_told_to_the_upstream_at_once() -> None:
    story = Story()
    await story.begin()
    flow = story.client.flow
    assert flow is not None
    flow.client_lost()
    assert story.upstream.did == ["abort"]
    story.task.cancel()  # as aiohttp does next
    with pytest.raises(asyncio.CancelledError):
        await story.task
    assert story.client.got == ["flush"]
    assert story.client.flow is None


@pytest.mark.parametrize(
    ("upstream", "pieces", "outcome"),
    [
        ({}, [EVENT], Outcome.CLIENT_GONE),
        ({}, [EVENT, DONE], Outcome.COMPLETED),
        ({}, [EVENT, DONE[:-1]], Outcome.CLIENT_GONE),
        ({"stream": False}, [DONE], Outcome.CLIENT_GONE),
        ({"stream": False}, [b"{}"], Outcome.CLIENT_GONE),
    ],
)
async def test_a_client_that_leaves(
    upstream: dict[str, Any], pieces: list[bytes], outcome: Outcome
) -> None:
    story = Story(**upstream)
    receiver = await story.begin()
    for piece in pieces:
        receiver.payload(piece)
    story.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await story.task
    assert story.exchange.outcome is outcome
    assert story.upstream.did == ["abort"]
    assert story.client.got == ["flush", *pieces]


@pytest.mark.parametrize(
    ("end", "outcome"), [(None, Outcome.COMPLETED), (ABORTED, Outcome.CLIENT_GONE)]
)
async def test_a_client_that_leaves_in_the_moment_of_the_end(
    end: ProxyError | None, outcome: Outcome
) -> None:
    story = Story(stream=False)
    receiver = await story.begin()
    receiver.payload(b"{}")
    receiver.ended(end)
    story.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await story.task
    assert story.exchange.outcome is outcome


@pytest.mark.parametrize(
    ("code", "outcome"), [("killed", Outcome.KILLED), ("shutting_down", Outcome.SHUTDOWN)]
)
@pytest.mark.parametrize("pieces", [[EVENT], [EVENT, b"data"]])
async def test_an_interruption_ends_as_a_cut(
    code: str, outcome: Outcome, pieces: list[bytes]
) -> None:
    story, error = Story(), ProxyError(code, "Enough.")
    receiver = await story.begin()
    for piece in pieces:
        receiver.payload(piece)
    story.exchange.interrupt(error)
    await story.task
    event = [error.event(story.exchange.dialect, 0)] if pieces == [EVENT] else []
    assert story.client.got == ["flush", *pieces, *event, "cut"]
    assert story.exchange.outcome is outcome
    assert story.upstream.did == ["abort"]


# While nothing comes ------------------------------------------------------------------------------

PING = b": ping\n\n"
EMPTY = b'data: {"choices":[{"delta":{}}]}\n\n'


async def test_a_client_gets_heartbeats_while_nothing_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    story = Story(route={"heartbeat": 15})
    timers = story.with_timers(monkeypatch)
    receiver = await story.begin()
    timers.advance(14.9)
    assert story.client.got == ["flush"]
    timers.advance(0.1)
    assert story.client.got == ["flush", BEAT]
    timers.advance(10)
    receiver.payload(EVENT)
    timers.advance(14.9)
    assert story.client.got == ["flush", BEAT, EVENT]
    timers.advance(30.1)
    assert story.client.got == ["flush", BEAT, EVENT, BEAT, BEAT, BEAT]
    receiver.ended(None)
    await story.task
    assert story.client.got[6:] == ["finish"]
    assert story.exchange.heartbeats == 4
    # They are ours: neither the record nor a decision about the end takes them for the upstream's.
    assert (story.exchange.chunks, story.exchange.bytes_down) == (1, len(EVENT))
    assert timers.running == []


@pytest.mark.parametrize(
    ("upstream", "route", "pieces"),
    [
        ({}, {"heartbeat": 0}, [EVENT]),
        ({}, {}, [EVENT, EVENT[:9]]),  # within an event
        ({}, {}, [EVENT[:-1]]),
        ({"stream": False}, {}, [b"{}"]),
        ({"plain": False}, {}, [EVENT]),
    ],
)
async def test_but_not_where_it_could_do_harm(
    upstream: dict[str, Any],
    route: dict[str, Any],
    pieces: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    story = Story(route={"heartbeat": 15} | route, **upstream)
    timers = story.with_timers(monkeypatch)
    receiver = await story.begin()
    for piece in pieces:
        receiver.payload(piece)
    timers.advance(60)
    assert story.client.got == ["flush", *pieces]
    receiver.ended(None)
    await story.task
    assert (story.exchange.heartbeats, timers.running) == (0, [])


async def test_a_client_that_does_not_read_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(route={"heartbeat": 15})
    timers = story.with_timers(monkeypatch)
    receiver = await story.begin()
    story.client.keeps_up = False
    timers.advance(60)
    assert story.client.got == ["flush"]
    story.client.keeps_up = True
    timers.advance(15)
    assert story.client.got == ["flush", BEAT]
    receiver.ended(None)
    await story.task


async def test_a_beat_between_two_events_is_no_trouble_for_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A failure's event may follow a heartbeat: it stands on a boundary too.
    story = Story(route={"heartbeat": 15})
    timers = story.with_timers(monkeypatch)
    receiver = await story.begin()
    receiver.payload(EVENT)
    timers.advance(15)
    receiver.ended(ABORTED)
    await story.task
    event = ABORTED.event(story.exchange.dialect, 0)
    assert story.client.got == ["flush", EVENT, BEAT, event, "cut"]


@pytest.mark.parametrize(
    ("path", "piece", "stalls"),
    [
        ("/v1/chat/completions", PING, True),
        ("/v1/chat/completions", ROLE, True),
        ("/v1/chat/completions", EMPTY, True),
        ("/v1/chat/completions", EVENT, False),
        (
            "/v1/chat/completions",
            b'data: {"choices":[{"delta":{"reasoning_content":"x"}}]}\n\n',
            False,
        ),
        (
            "/v1/chat/completions",
            b'data: {"choices":[{"delta":{"tool_calls":[{"index":0}]}}]}\n\n',
            False,
        ),
        ("/v1/messages", b'event: ping\ndata: {"type":"ping"}\n\n', True),
        (
            "/v1/messages",
            b'data: {"type":"content_block_delta","delta":{"type":"text_delta","text":"x"}}\n\n',
            False,
        ),
        ("/v1/responses", b'data: {"type":"response.in_progress"}\n\n', True),
        ("/v1/responses", b'data: {"type":"response.output_text.delta","delta":"x"}\n\n', False),
    ],
)
async def test_a_stream_that_says_nothing_is_given_up(
    path: str, piece: bytes, stalls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story(path, route={"heartbeat": 0})
    timers = story.with_timers(monkeypatch)
    receiver = await story.begin()
    for _ in range(20):
        receiver.payload(piece)
        timers.advance(5)
        if story.upstream.did:
            break
    assert story.upstream.did == (["fail"] if stalls else [])
    if not stalls:
        receiver.ended(None)
    await story.task
    if stalls:
        # It has `stall_timeout`, 80 s, and an eighth of that until it is noticed.
        assert 80 <= timers.now - 10 <= 90
        event, cut = story.client.got[-2:]
        assert b"stall timeout of 80 s" in event
        assert (cut, story.exchange.outcome) == ("cut", Outcome.STALL_TIMEOUT)
    else:
        assert story.exchange.outcome is Outcome.COMPLETED
    assert timers.running == []


async def test_the_clock_stands_still_while_the_client_does_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    story = Story(route={"heartbeat": 0})
    timers = story.with_timers(monkeypatch)
    receiver = await story.begin()
    receiver.payload(PING)
    timers.advance(40)
    flow = story.client.flow
    assert flow is not None
    flow.pause()
    timers.advance(1000)
    assert story.upstream.did == ["pause"]
    flow.resume()
    timers.advance(39)
    assert story.upstream.did == ["pause", "resume"]
    timers.advance(11)
    assert story.upstream.did == ["pause", "resume", "fail"]
    await story.task
    assert story.exchange.outcome is Outcome.STALL_TIMEOUT


@pytest.mark.parametrize("upstream", [{"stream": False}, {"plain": False}])
async def test_what_cannot_be_read_is_never_said_to_stall(
    upstream: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story(**upstream)
    timers = story.with_timers(monkeypatch)
    receiver = await story.begin()
    receiver.payload(PING)
    timers.advance(1000)
    assert (story.upstream.did, timers.running) == ([], [])
    receiver.ended(None)
    await story.task


# A client that leaves, and the answer is read to its end ------------------------------------------

FINISH = {"on_disconnect": "finish"}
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":13}}\n\n'


def leave(story: Story) -> None:
    """The client does, and the handler is not cancelled: see ClientConnection.outlive."""
    assert story.client.flow is not None
    story.client.flow.client_lost()


async def test_an_answer_that_is_finished_without_its_client() -> None:
    story = Story(route=FINISH)
    receiver = await story.begin()
    receiver.payload(EVENT)
    leave(story)
    for piece in EVENT, USAGE, DONE:
        receiver.payload(piece)
    receiver.ended(None)
    await story.task
    assert "abort" not in story.upstream.did
    assert story.client.got == ["flush", EVENT]  # what came later goes nowhere
    exchange = story.exchange
    assert (exchange.tokens_in, exchange.tokens_out) == (7, 13)
    assert exchange.tokens_source == "upstream"
    assert exchange.bytes_down == len(EVENT + EVENT + USAGE + DONE)


async def test_it_is_read_on_also_if_the_client_had_held_it() -> None:
    story = Story(route=FINISH)
    receiver = await story.begin()
    assert story.client.flow is not None
    story.client.flow.pause()
    leave(story)
    assert story.upstream.did == ["pause", "resume"]
    receiver.ended(None)
    await story.task


@pytest.mark.parametrize("end", [ABORTED, SILENT])
async def test_and_nobody_is_told_how_it_fails(end: ProxyError) -> None:
    story = Story(route=FINISH)
    receiver = await story.begin()
    receiver.payload(EVENT)
    leave(story)
    receiver.ended(end)
    await story.task
    assert story.client.got == ["flush", EVENT]
    assert story.exchange.outcome is outcome_of(end, Outcome.UPSTREAM_TRUNCATED)


async def test_nobody_gets_heartbeats_who_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(route=FINISH | {"heartbeat": 15})
    timers = story.with_timers(monkeypatch)
    receiver = await story.begin()
    receiver.payload(EVENT)
    leave(story)
    timers.advance(60)
    assert story.client.got == ["flush", EVENT]
    assert story.exchange.heartbeats == 0
    receiver.ended(None)
    await story.task
    assert timers.running == []


async def test_a_stall_is_noticed_without_a_client_too(monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(route=FINISH | {"heartbeat": 0})
    timers = story.with_timers(monkeypatch)
    receiver = await story.begin()
    assert story.client.flow is not None
    story.client.flow.pause()
    leave(story)
    receiver.payload(PING)
    timers.advance(90)
    await story.task
    assert story.exchange.outcome is Outcome.STALL_TIMEOUT


@pytest.mark.parametrize(
    ("pieces", "outcome"),
    [([EVENT], Outcome.CLIENT_GONE), ([EVENT, DONE], Outcome.COMPLETED)],
)
async def test_the_cap_ends_it(pieces: list[bytes], outcome: Outcome) -> None:
    story = Story(route=FINISH)
    receiver = await story.begin()
    for piece in pieces:
        receiver.payload(piece)
    leave(story)
    story.task.cancel()  # as the cap does
    with pytest.raises(asyncio.CancelledError):
        await story.task
    assert story.upstream.did[-1] == "abort"
    assert story.exchange.outcome is outcome


# Outcomes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ABORTED, Outcome.UPSTREAM_ERROR),
        (ProxyError("upstream_timeout", "", clock="stall"), Outcome.STALL_TIMEOUT),
        (SILENT, Outcome.IDLE_TIMEOUT),
        (ProxyError("upstream_timeout", "", clock="first_byte"), Outcome.FIRST_BYTE_TIMEOUT),
        (ProxyError("upstream_timeout", "", clock="connect"), Outcome.UPSTREAM_ERROR),
        (ProxyError("upstream_timeout", "", clock="total"), Outcome.TOTAL_TIMEOUT),
        (ProxyError("upstream_auth", ""), Outcome.UPSTREAM_ERROR),
        (ProxyError("shutting_down", ""), Outcome.SHUTDOWN),
        (ProxyError("killed", ""), Outcome.KILLED),
        (ProxyError("invalid_request", ""), Outcome.CLIENT_GONE),
        (ProxyError("request_too_large", ""), Outcome.CLIENT_GONE),
    ],
)
def test_outcomes_of_errors(error: ProxyError, outcome: Outcome) -> None:
    assert outcome_of(error, Outcome.UPSTREAM_ERROR) is outcome
