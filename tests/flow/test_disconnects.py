"""A client that leaves frees its upstream at once, in whatever phase it leaves."""

from __future__ import annotations

import asyncio
import time

import pytest

from proxy.exchange import Outcome
from tests.flow.conftest import Sluice
from tests.flow.wire import LAST, STREAM, Client, Until, UntilGone, chunked, json_answer, post

EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
SOON = 0.2  # seconds


async def leave(sluice: Sluice, client: Client, how: str) -> None:
    """Closes the client's connection; the upstream must see its own end within SOON."""
    left = time.monotonic()
    client.abort() if how == "reset" else client.close()
    await asyncio.wait_for(sluice.upstream.gone.wait(), 5)
    assert sluice.upstream.gone_at is not None
    assert sluice.upstream.gone_at - left < SOON


@pytest.mark.parametrize("how", ["closed", "reset"])
@pytest.mark.parametrize("body", [b'{"stream":true}', b'{"stream":false}'])
async def test_before_the_first_byte(sluice: Sluice, how: str, body: bytes) -> None:
    sluice.upstream.plays(UntilGone())
    client = await sluice.connect()
    await client.send(post(body))
    await asyncio.wait_for(sluice.upstream.got_request.wait(), 5)
    await leave(sluice, client, how)
    record = await sluice.record()
    assert (record.outcome, record.status) == (Outcome.CLIENT_GONE, None)
    assert record.attempt_results == [("up", "cancelled")]


@pytest.mark.parametrize("how", ["closed", "reset"])
async def test_between_two_events(sluice: Sluice, how: str) -> None:
    sluice.upstream.plays(STREAM, chunked(EVENT), UntilGone())
    client = await sluice.connect()
    await client.send(post())
    await client.until(EVENT)
    await leave(sluice, client, how)
    record = await sluice.record()
    assert (record.outcome, record.status) == (Outcome.CLIENT_GONE, 200)


async def test_inside_a_body_of_known_length(sluice: Sluice) -> None:
    sluice.upstream.plays(json_answer(b'{"a":1}')[:-2], UntilGone())
    client = await sluice.connect()
    await client.send(post(b"{}"))
    await client.until(b'{"a"')
    await leave(sluice, client, "closed")
    assert (await sluice.record()).outcome is Outcome.CLIENT_GONE


async def test_inside_an_upload(sluice: Sluice) -> None:
    sluice.upstream.plays(json_answer(b"{}"))
    client = await sluice.connect()
    head = post(b"", "Transfer-Encoding: chunked", content_type="audio/wav")
    await client.send(head + chunked(b"a part"))
    await asyncio.wait_for(sluice.upstream.got_head.wait(), 5)
    await leave(sluice, client, "closed")
    assert (await sluice.record()).outcome is Outcome.CLIENT_GONE
    assert not sluice.upstream.requests[0].complete


async def test_inside_a_json_body_nobody_was_asked(sluice: Sluice) -> None:
    client = await sluice.connect()
    await client.send(post(b'{"a":').replace(b"Content-Length: 5", b"Content-Length: 9"))
    await asyncio.sleep(0.02)
    client.close()
    record = await sluice.record()
    assert (record.outcome, record.upstream) == (None, None)


async def test_while_it_reads_too_slowly(sluice: Sluice) -> None:
    sluice.upstream.plays(STREAM, *[chunked(b"x" * 1_000_000)] * 40, LAST)
    client = await sluice.connect(limit=1024)
    await client.send(post())
    await client.until(b"\r\n\r\n")
    await asyncio.sleep(0.3)
    await leave(sluice, client, "reset")
    assert (await sluice.record()).outcome is Outcome.CLIENT_GONE


@pytest.mark.parametrize("framing", ["sized", "chunked"])
async def test_right_after_the_last_byte_it_had_everything(sluice: Sluice, framing: str) -> None:
    gate = asyncio.Event()
    if framing == "sized":
        sluice.upstream.plays(json_answer(b"{}"), Until(gate))
    else:
        sluice.upstream.plays(STREAM, chunked(EVENT, b"data: [DONE]\n\n"), Until(gate), LAST)
    client = await sluice.connect()
    await client.send(post())
    await client.until(b"{}" if framing == "sized" else b"[DONE]\n\n")
    client.close()
    assert (await sluice.record()).outcome is Outcome.COMPLETED
    gate.set()


async def test_nobody_else_notices(sluice: Sluice) -> None:
    sluice.upstream.plays(STREAM, chunked(EVENT), UntilGone())
    leaver, stayer = await sluice.connect(), await sluice.connect()
    gate = asyncio.Event()
    await leaver.send(post())
    await leaver.until(EVENT)
    sluice.upstream.plays(STREAM, chunked(EVENT), Until(gate), chunked(EVENT), LAST)
    await stayer.send(post())
    await stayer.until(EVENT)
    leaver.abort()
    await sluice.record()
    gate.set()
    reply = await stayer.reply()
    assert (reply.body, reply.whole) == (EVENT * 2, True)
    assert not sluice.app.observer.in_flight
