"""The record of one request, and how one is interrupted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from proxy.errors import Dialect, ProxyError
from proxy.exchange import Ask, Exchange, Outcome, Phase
from proxy.usage import Endpoint

KILLED = ProxyError("killed", "")

Make = Callable[..., Exchange]


@pytest.fixture
def make() -> Make:
    def make(path: str = "/v1/chat/completions") -> Exchange:
        return Exchange("id", "request-id", "POST", path, 0.0)

    return make


def test_what_is_known_at_the_start(make: Make) -> None:
    exchange = make("/v1/messages")
    assert exchange.dialect is Dialect.MESSAGES
    assert (exchange.client, exchange.route) == ("anonymous", "none")
    assert (exchange.phase, exchange.status, exchange.outcome) == (Phase.READING, None, None)
    assert exchange.attempt_results == []
    assert make().attempt_results is not exchange.attempt_results


def test_outcomes_are_those_of_the_interface() -> None:
    interface = (
        "completed client_gone upstream_error upstream_truncated first_byte_timeout idle_timeout "
        "stall_timeout total_timeout shutdown stopped abandoned killed"
    )
    assert {outcome.value for outcome in Outcome} <= set(interface.split())


def test_an_ask_cannot_change() -> None:
    ask = Ask("GET", b"/models", ())
    assert (ask.body, ask.model, ask.stream) == (None, None, False)
    with pytest.raises(AttributeError):
        ask.stream = True  # type: ignore[misc]


def test_an_ask_shows_nothing_of_what_it_holds() -> None:
    canary = b"sk-canary"
    for body in (canary, None):
        ask = Ask("POST", b"/x?key=" + canary, ((b"Authorization", canary),), body, model="m")
        assert repr(ask) == "Ask(method='POST', model='m', stream=False, identity=False)"


@pytest.mark.parametrize(
    ("path", "recorded"),
    [
        ("/v1/sk-short/models", "/v1/***/models"),
        ("/v1/files/file-0123456789abcdef", "/v1/files/file-0123456789abcdef"),
        ("/v1/models;key=sk-short", "/v1/***"),
        ("/v1/Bearer%20sk-short", "/v1/***"),
        ("/sk-1/x/sk-2", "/***/x/***"),
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/models/ft:claude-3-5-sonnet-20241022", "/v1/models/ft:claude-3-5-sonnet-20241022"),
        ("/v1/fine_tuning/jobs/risk-2", "/v1/fine_tuning/jobs/risk-2"),
        ("/v1/messages/sk-x", "/v1/messages/***"),
        ("-", "-"),
    ],
)
def test_a_path_is_recorded_without_what_may_be_a_key(make: Make, path: str, recorded: str) -> None:
    exchange = make(path)
    assert exchange.path == recorded
    assert exchange.dialect is Dialect.of(path)


async def tell(exchange: Exchange, started: asyncio.Event) -> ProxyError | str | None:
    """A request that runs until it is cancelled, and says why."""
    exchange.task = asyncio.current_task()
    started.set()
    try:
        await asyncio.get_running_loop().create_future()
    except asyncio.CancelledError:
        found = exchange.interrupted()
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == (0 if found else 1)
        return found or "left"
    return None


async def test_an_interruption_is_told_from_a_client_that_left(make: Make) -> None:
    for end, expected in (
        (lambda exchange, task: exchange.interrupt(KILLED), KILLED),
        (lambda exchange, task: task.cancel(), "left"),
    ):
        exchange, started = make(), asyncio.Event()
        task = asyncio.create_task(tell(exchange, started))
        await started.wait()
        end(exchange, task)
        assert await task == expected


async def test_only_the_first_interruption_counts(make: Make) -> None:
    exchange, started = make(), asyncio.Event()
    task = asyncio.create_task(tell(exchange, started))
    await started.wait()
    exchange.interrupt(KILLED)
    exchange.interrupt(ProxyError("shutting_down", ""))
    assert await task is KILLED


async def test_what_has_ended_is_not_interrupted(make: Make) -> None:
    exchange = make()
    exchange.interrupt(KILLED)  # it never had a task
    exchange.task = asyncio.create_task(asyncio.sleep(0))
    await exchange.task
    exchange.interrupt(KILLED)
    assert exchange.interrupted() is None


async def test_one_whose_client_has_left_is_told_nothing_more(make: Make) -> None:
    exchange, started = make(), asyncio.Event()
    exchange.left = True
    task = asyncio.create_task(tell(exchange, started))
    await started.wait()
    exchange.interrupt(KILLED)
    assert await task == "left"


def test_a_key_in_the_path_does_not_hide_what_answers() -> None:
    exchange = Exchange("id", "id", "POST", "/v1/chat/completions;sk-1", 0.0)
    assert (exchange.path, exchange.endpoint) == ("/v1/chat/***", Endpoint.CHAT)
    assert Exchange("id", "id", "GET", "/v1/chat/completions", 0.0).endpoint is Endpoint.NONE
