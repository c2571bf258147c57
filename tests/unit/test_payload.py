"""A body on its way in: fed by one side, taken by the other."""

from __future__ import annotations

import asyncio

import pytest

from proxy.errors import ProxyError
from proxy.payload import MAX_UNREAD, Payload

MALFORMED = ProxyError("invalid_request", "malformed")


@pytest.fixture
def payload() -> Payload:
    return Payload(lambda: None)


async def test_what_has_come_is_taken_at_once(payload: Payload) -> None:
    payload.feed(b"ab")
    payload.feed(b"cd")
    assert payload.take_nowait() == b"abcd"
    assert payload.take_nowait() == b""
    assert not payload.is_taken


async def test_what_has_not_is_waited_for(payload: Payload) -> None:
    waiting = asyncio.ensure_future(payload.take())
    await asyncio.sleep(0)
    payload.feed(b"ab")
    assert await waiting == b"ab"
    waiting = asyncio.ensure_future(payload.take())
    await asyncio.sleep(0)
    payload.end()
    assert await waiting == b""
    assert payload.is_taken and payload.is_eof()


async def test_the_end_waits_for_what_came_before(payload: Payload) -> None:
    payload.feed(b"ab")
    payload.end()
    assert payload.is_eof() and not payload.is_taken
    assert await payload.take() == b"ab"
    assert payload.is_taken


async def test_so_does_a_failure(payload: Payload) -> None:
    payload.feed(b"ab")
    payload.fail(MALFORMED)
    assert await payload.take() == b"ab"
    with pytest.raises(ProxyError) as caught:
        await payload.take()
    assert caught.value is MALFORMED
    assert not payload.is_taken


async def test_whoever_waits_is_told_of_a_failure(payload: Payload) -> None:
    waiting = asyncio.ensure_future(payload.take())
    await asyncio.sleep(0)
    payload.fail(MALFORMED)
    with pytest.raises(ProxyError):
        await waiting


async def test_a_lost_connection_cuts_a_body_short_and_says_no_more(payload: Payload) -> None:
    payload.set_exception(ConnectionResetError("secret"))
    with pytest.raises(ProxyError) as caught:
        await payload.take()
    assert (caught.value.code, caught.value.close) == ("invalid_request", True)
    assert "secret" not in caught.value.message


async def test_the_first_failure_counts_and_none_behind_the_end(payload: Payload) -> None:
    payload.fail(MALFORMED)
    payload.set_exception(RuntimeError())
    with pytest.raises(ProxyError) as caught:
        await payload.take()
    assert caught.value is MALFORMED
    whole = Payload(lambda: None)
    whole.end()
    whole.set_exception(RuntimeError())
    assert await whole.take() == b""


async def test_it_is_full_until_it_is_taken() -> None:
    told: list[bool] = []

    def taken() -> None:
        told.append(filling.is_full)

    filling = Payload(taken)
    filling.feed(b"x" * MAX_UNREAD)
    assert not filling.is_full
    filling.feed(b"x")
    assert filling.is_full
    assert len(await filling.take()) == MAX_UNREAD + 1
    assert told == [False]


async def test_what_is_malformed_can_be_dropped(payload: Payload) -> None:
    payload.fail(MALFORMED)
    dropping = asyncio.ensure_future(payload.readany())
    await asyncio.sleep(0)
    assert not dropping.done()  # the client may still send; aiohttp waits for it, with a timeout
    payload.end()
    assert await dropping == b""
