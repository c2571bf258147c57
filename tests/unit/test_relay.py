"""Moving an answer: what the client gets in every ending, and what the record says."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from proxy.connection import Receiver
from proxy.downstream import Flow, Sink
from proxy.errors import ProxyError
from proxy.exchange import Exchange, Outcome, Phase
from proxy.forward import Answer
from proxy.framing import ResponseHead
from proxy.relay import outcome_of, relay

EVENT = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
DONE = b"data: [DONE]\n\n"
ABORTED = ProxyError("upstream_aborted", "cut")
SILENT = ProxyError("upstream_timeout", "silent", clock="idle")


class Upstream:
    """An answer whose body the test speaks."""

    def __init__(self, *, stream: bool = True, plain: bool = True, status: int = 200) -> None:
        self.head = ResponseHead(1, status, b"", ())
        self.is_stream = stream
        self.is_plain = plain
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


class Client:
    """A sink that writes down what it is told."""

    def __init__(self) -> None:
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


class Story:
    def __init__(self, path: str = "/v1/chat/completions", **upstream: Any) -> None:
        self.upstream = Upstream(**upstream)
        self.client = Client()
        self.exchange = Exchange("id", "id", "POST", path, 0.0)
        self.now = 10.0
        self.task: asyncio.Task[None]

    async def begin(self) -> Receiver:
        """Relays up to the head."""
        self.task = asyncio.create_task(
            relay(
                cast(Answer, self.upstream),
                cast(Sink, self.client),
                self.exchange,
                lambda: self.now,
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


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ABORTED, Outcome.UPSTREAM_ERROR),
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
