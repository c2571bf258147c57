"""What becomes of a generation whose client has left: hung up on, or read on so that usage is true."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from proxy.errors import ProxyError
from proxy.exchange import Outcome
from tests.flow.several import (
    DONE,
    USAGE,
    USED,
    Begin,
    Several,
    after,
    paced,
    refusal,
    said,
    several_upstreams,  # noqa: F401  # the fixture `several`
    source_of,
    stream_of,
)
from tests.flow.wire import (
    LAST,
    PATIENCE,
    STREAM,
    Client,
    Close,
    Step,
    Until,
    UntilGone,
    chunked,
    json_answer,
    post,
)

FINISH = "attempts: 1, on_disconnect: finish"
BUSY = refusal(b"503 Busy", "from a")
OK = json_answer(b'{"choices":[]}')
MANY = "limits: {tokens: 1000000/87600h}"
ASKING = post(b'{"model":"m","stream":true,"messages":[{"role":"user","content":"12345678"}]}')


async def begin(three: Several, request: bytes = ASKING) -> Client:
    """Sends a request and waits until a has it."""
    three.a.got_request.clear()
    client = await three.connect()
    await client.send(request)
    await three.a.has_request()
    return client


async def reading(three: Several, text: bytes, request: bytes = ASKING) -> Client:
    """A client that has read so far."""
    client = await begin(three, request)
    await client.until(text)
    return client


# Hanging up ----------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["", "attempts: 3, on_disconnect: cancel"])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(
    "steps",
    [(), (STREAM, chunked(b": hi\n\n")), (STREAM, chunked(said("one")))],
    ids=["before its head", "while that is held", "amid the stream"],
)
async def test_cancel_hangs_up_at_once(
    several: Begin, route: str, reset: bool, steps: tuple[Step, ...]
) -> None:
    three = await several(route)
    three.a.plays(*steps, UntilGone())
    three.b.plays(OK)
    client = await begin(three)
    if said("one") in b"".join(step for step in steps if isinstance(step, bytes)):
        await client.until(said("one"))
    client.abort() if reset else client.close()
    await three.a.is_left()
    record = await three.record()
    assert (record.outcome, record.attempts) == (Outcome.CLIENT_GONE, 1)
    assert three.asked == {"a": 1}


async def test_it_does_so_behind_an_early_head(several: Begin) -> None:
    three = await several("commit_after: 50ms, heartbeat: 50ms")
    three.a.plays(UntilGone())
    client = await reading(three, chunked(b":\n", b":\n"))
    client.close()
    await three.a.is_left()
    record = await three.record()
    assert (record.outcome, record.status) == (Outcome.CLIENT_GONE, 200)
    assert three.asked == {"a": 1}


# Reading on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("tries", ["attempts: 1", "attempts: 3"])
async def test_finish_reads_on_before_the_head(several: Begin, tries: str, reset: bool) -> None:
    three = await several(f"{tries}, on_disconnect: finish", settings=MANY)
    gate = asyncio.Event()
    three.a.plays(Until(gate), STREAM, stream_of("a"), LAST)
    client = await begin(three)
    await three.leave(client, reset=reset)
    assert not three.a.gone.is_set()
    assert three.app.observer.in_flight
    gate.set()
    record = await three.record()
    assert (record.outcome, record.tokens_in, record.tokens_out) == (Outcome.CLIENT_GONE, 7, 13)
    assert record.tokens_source == "upstream"
    assert await charged(three) == 20


@pytest.mark.parametrize("tries", ["attempts: 1", "attempts: 3"])
async def test_finish_reads_on_while_the_head_is_held(several: Begin, tries: str) -> None:
    three = await several(f"{tries}, on_disconnect: finish")
    gate = asyncio.Event()
    three.a.plays(STREAM, chunked(b": hi\n\n"), Until(gate), stream_of("a"), LAST)
    client = await begin(three)
    await asyncio.sleep(0.1)
    await three.leave(client)
    gate.set()
    record = await three.record()
    assert (record.outcome, record.tokens_in, record.tokens_out) == (Outcome.CLIENT_GONE, 7, 13)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("settings", ["", MANY])
async def test_finish_reads_on_amid_the_stream(several: Begin, settings: str, reset: bool) -> None:
    three = await several(FINISH, settings=settings)
    gate, end = asyncio.Event(), asyncio.Event()
    # What might be the usage that only we asked for is held back until more comes.
    begun = chunked(said("one"), b":\n\n")
    three.a.plays(STREAM, begun, Until(gate), stream_of("a"), Until(end), LAST)
    client = await reading(three, said("one"))
    await three.leave(client, reset=reset)
    gate.set()
    await asyncio.sleep(0.1)
    assert three.app.observer.in_flight  # it has not ended yet
    end.set()
    record = await three.record()
    assert (record.outcome, record.status) == (Outcome.CLIENT_GONE, 200)
    assert (record.tokens_in, record.tokens_out, record.tokens_source) == (7, 13, "upstream")
    if settings:
        assert await charged(three) == 20
    assert three.a.connections == 1  # which was kept, as its exchange ended cleanly


async def charged(three: Several) -> int:
    """The tokens that are missing; the next request takes one itself."""
    await three.settled()
    three.a.plays(json_answer(b'{"usage":{"prompt_tokens":0}}'))
    reply = await three.ask(post(b'{"input":"x"}', path="/v1/embeddings"))
    return 999_999 - int(reply.values("x-ratelimit-remaining-tokens")[0])


@pytest.mark.parametrize("half", ["before", "within"])
async def test_finish_reads_bodies_that_are_no_streams(several: Begin, half: str) -> None:
    three = await several(FINISH)
    gate = asyncio.Event()
    answer = json_answer(b'{"choices":[],"usage":' + USED + b"}")
    at = answer.index(b'"usage"') if half == "within" else 0
    three.a.plays(answer[:at], Until(gate), answer[at:])
    client = await begin(three, post(b'{"model":"m"}'))
    if at:
        await client.until(b'{"choices"')
    await three.leave(client)
    gate.set()
    record = await three.record()
    assert (record.outcome, record.tokens_in, record.tokens_out) == (Outcome.CLIENT_GONE, 7, 13)


async def test_finish_reads_on_behind_an_early_head(several: Begin) -> None:
    three = await several(f"{FINISH}, commit_after: 50ms, heartbeat: 50ms")
    gate = asyncio.Event()
    three.a.plays(Until(gate), STREAM, stream_of("a"), LAST)
    client = await reading(three, chunked(b":\n", b":\n"))
    await three.leave(client)
    beats = three.app.observer.in_flight  # still there
    assert beats
    await asyncio.sleep(0.2)  # no heartbeat hurts
    gate.set()
    record = await three.record()
    assert (record.outcome, record.tokens_in, record.tokens_out) == (Outcome.CLIENT_GONE, 7, 13)


async def test_finish_reads_on_for_a_client_that_did_not_read(several: Begin) -> None:
    """Nobody is there any more for whom the upstream would have to wait."""
    three = await several(FINISH)
    chunk = chunked(said("x" * 500) * 200)
    three.a.plays(STREAM, *[chunk] * 200, stream_of("a"), LAST)
    client = await three.connect(limit=1024)
    await client.send(ASKING)
    await client.until(b"\r\n\r\n")
    stood = await _until_still(lambda: three.a.sent)
    assert stood < len(chunk) * 200
    await three.leave(client, reset=True)
    record = await three.record()
    assert (record.outcome, record.tokens_in, record.tokens_out) == (Outcome.CLIENT_GONE, 7, 13)


async def _until_still(measure: Callable[[], int]) -> int:
    stood = -1
    while stood != (now := measure()):
        stood = now
        await asyncio.sleep(0.2)
    return stood


@pytest.mark.parametrize("steps", [(), (STREAM, chunked(said("one")))], ids=["before", "amid"])
async def test_finish_has_a_cap(several: Begin, steps: tuple[Step, ...]) -> None:
    three = await several(f"{FINISH}, finish_cap: 300ms")
    three.a.plays(*steps, UntilGone())
    client = await (reading(three, said("one")) if steps else begin(three))
    await three.leave(client)
    assert not three.a.gone.is_set()
    await three.a.is_left()
    record = await three.record()
    assert record.outcome is Outcome.CLIENT_GONE
    if steps:
        assert (record.tokens_out, record.tokens_source) == (1, "estimated")


async def test_the_cap_counts_from_the_leaving(several: Begin) -> None:
    three = await several(f"{FINISH}, finish_cap: 1s")
    gate = asyncio.Event()
    three.a.plays(STREAM, chunked(said("one")), after(1.2), Until(gate), stream_of("a"), LAST)
    client = await reading(three, said("one"))
    await asyncio.sleep(1.2)
    await three.leave(client)
    gate.set()
    record = await three.record()
    assert (record.tokens_in, record.tokens_out) == (7, 13)


async def test_a_speaker_without_end_is_capped_too(several: Begin) -> None:
    three = await several(f"{FINISH}, finish_cap: 300ms")
    three.a.plays(STREAM, *paced([said("one")] * 1000, 0.02))
    client = await reading(three, said("one"))
    await three.leave(client)
    await three.a.is_left()
    assert (await three.record()).outcome is Outcome.CLIENT_GONE


@pytest.mark.parametrize("timeouts", ["idle: 200ms", "stall: 200ms", "total: 300ms"])
async def test_the_clocks_go_on(several: Begin, timeouts: str) -> None:
    three = await several(FINISH, each=f"timeouts: {{{timeouts}}}")
    three.a.plays(STREAM, chunked(said("one")), UntilGone())
    client = await reading(three, said("one"))
    await three.leave(client)
    await three.a.is_left()
    assert (await three.record()).outcome is Outcome.CLIENT_GONE


@pytest.mark.parametrize(
    "ends", [(Close(),), (chunked(b'data: {"error":{"message":"x"}}\n\n'), LAST)]
)
async def test_however_it_ends_the_client_had_left(several: Begin, ends: Sequence[Step]) -> None:
    three = await several("attempts: 3, on_disconnect: finish")
    gate = asyncio.Event()
    three.a.plays(STREAM, chunked(said("one")), Until(gate), *ends)
    client = await reading(three, said("one"))
    await three.leave(client)
    gate.set()
    record = await three.record()
    assert (record.outcome, three.asked) == (Outcome.CLIENT_GONE, {"a": 1})


async def test_what_it_reads_on_keeps_its_slots(several: Begin) -> None:
    three = await several(
        "attempts: 2, on_disconnect: finish", settings="limits: {streams: 1}", a="max_streams: 1"
    )
    gate = asyncio.Event()
    three.a.plays(STREAM, chunked(said("one")), Until(gate), stream_of("a"), LAST)
    three.b.plays(OK)
    client = await reading(three, said("one"))
    await three.leave(client)
    assert (await three.ask(post(b"{}"))).status == 429
    gate.set()
    await three.settled()
    three.a.plays(OK)
    assert source_of(await three.ask(post(b"{}"))) == ("a", 1)


async def test_it_takes_up_its_upstream_until_the_end(several: Begin) -> None:
    three = await several("attempts: 2, on_disconnect: finish", a="max_streams: 1")
    gate = asyncio.Event()
    three.a.plays(STREAM, chunked(said("one")), Until(gate), stream_of("a"), LAST)
    three.b.plays(OK)
    client = await reading(three, said("one"))
    await three.leave(client)
    assert source_of(await three.ask(post(b"{}"))) == ("b", 1)
    gate.set()
    await three.settled()
    three.a.plays(OK)
    assert source_of(await three.ask(post(b"{}"))) == ("a", 1)


async def test_a_read_out_answer_is_a_success_of_its_upstream(several: Begin) -> None:
    three = await several(
        "attempts: 2, on_disconnect: finish", each="circuit: {failures: 2, rest: 1h}"
    )
    three.b.plays(OK)
    for _ in range(3):
        gate = asyncio.Event()
        three.a.plays(Close())
        assert source_of(await three.ask(post(b"{}"))) == ("b", 2)
        await _no_connections(three)
        three.a.plays(STREAM, chunked(said("one")), Until(gate), stream_of("a"), LAST)
        client = await reading(three, said("one"))
        await three.leave(client)
        gate.set()
        await three.settled()
    assert three.up["a"] == 1


async def _no_connections(three: Several) -> None:
    while three.server.connections:
        await asyncio.sleep(0.001)


async def test_a_kill_ends_it(several: Begin) -> None:
    three = await several(FINISH)
    three.a.plays(STREAM, chunked(said("one")), UntilGone())
    client = await reading(three, said("one"))
    await three.leave(client)
    (exchange,) = three.app.observer.in_flight.values()
    exchange.interrupt(ProxyError("killed", "An operator has ended this request."))
    await three.a.is_left()
    await three.record()


@pytest.mark.parametrize("steps", [(), (STREAM, chunked(said("one")))], ids=["before", "amid"])
async def test_the_end_of_a_drain_ends_it(several: Begin, steps: tuple[Step, ...]) -> None:
    three = await several(FINISH)
    three.a.plays(*steps, UntilGone())
    client = await (reading(three, said("one")) if steps else begin(three))
    await three.leave(client)
    for exchange in list(three.app.observer.in_flight.values()):
        exchange.interrupt(ProxyError("shutting_down", "The proxy is shutting down."))
    await three.a.is_left()
    await three.record()


async def test_whoever_stays_notices_nothing_of_finish(several: Begin) -> None:
    three = await several(FINISH)
    three.a.plays(STREAM, stream_of("a"), LAST)
    reply = await three.ask(ASKING)
    assert reply.whole
    assert (await three.record()).outcome is Outcome.COMPLETED


@pytest.mark.parametrize("route", ["attempts: 1", FINISH])
async def test_right_behind_the_last_byte_it_had_everything(several: Begin, route: str) -> None:
    three = await several(route, settings=MANY)
    gate = asyncio.Event()
    three.a.plays(STREAM, chunked(said("one"), USAGE, DONE), Until(gate), LAST)
    client = await reading(three, DONE)
    client.close()
    if route == FINISH:
        gate.set()
    record = await three.record()
    gate.set()
    assert (record.outcome, record.tokens_in, record.tokens_out) == (Outcome.COMPLETED, 7, 13)
    assert await charged(three) == 20


async def test_half_an_upload_is_not_read_on(several: Begin) -> None:
    """It will never be whole."""
    three = await several(FINISH)
    three.a.plays(OK)
    client = await three.connect()
    head = post(b"", "Transfer-Encoding: chunked", content_type="audio/wav")
    await client.send(head + chunked(b"a part"))
    await asyncio.wait_for(three.a.got_head.wait(), PATIENCE)
    client.close()
    await three.a.is_left()
    assert (await three.record()).outcome is Outcome.CLIENT_GONE
    assert not three.a.requests[0].complete


async def test_who_leaves_while_nobody_is_asked_yet_buys_nothing(several: Begin) -> None:
    three = await several(FINISH)
    client = await three.connect()
    await client.send(ASKING[:-5])
    await asyncio.sleep(0.05)
    client.close()
    record = await three.record()
    assert (record.outcome, three.asked) == (None, {})


async def test_nobody_new_is_asked_for_a_client_that_has_left(several: Begin) -> None:
    """Reading on makes the bill of what was bought true; it buys nothing more."""
    three = await several("attempts: 3, on_disconnect: finish")
    gate = asyncio.Event()
    three.a.plays(Until(gate), BUSY)
    three.b.plays(OK)
    client = await begin(three)
    await three.leave(client)
    gate.set()
    record = await three.record()
    assert (record.outcome, three.asked) == (Outcome.CLIENT_GONE, {"a": 1})
