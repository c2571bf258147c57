"""What a client may spend: admission, settlement, and what it is told."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from proxy import config
from proxy.auth import Client
from proxy.errors import ProxyError
from proxy.exchange import Exchange
from proxy.limits import Lease, Limiter, _duration
from proxy.store import LAPSE, Admission, Unavailable
from proxy.store.memory import MemoryCounters
from proxy.usage import Usage

HUNDRED: dict[str, Any] = {"tokens_": "100/100s"}  # the limit, beside what is reserved


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """A limiter and its clock; `ask` is one request of a client with these limits."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.limiter = Limiter(MemoryCounters(self.clock))
        self.asked = 0
        self.exchange = self.record()

    def record(self) -> Exchange:
        self.asked += 1
        return Exchange(f"id{self.asked}", "r", "POST", "/v1/x", 0.0)

    async def ask(self, scope: str = "web", tokens: int = 0, **limits: Any) -> Lease:
        """One request, for which `tokens` are reserved, of a client with these limits."""
        limits = {key.removesuffix("_"): value for key, value in limits.items()}
        client = Client("web", scope, config.Limits.model_validate(limits))
        self.exchange = self.record()
        self.exchange.prompt = Usage(tokens, 0) if tokens else None
        return await self.limiter.admit(client, self.exchange)

    async def refused(self, scope: str = "web", tokens: int = 0, **limits: Any) -> ProxyError:
        with pytest.raises(ProxyError) as caught:
            await self.ask(scope, tokens, **limits)
        return caught.value

    async def spend(self, used: int, tokens: int = 0, **limits: Any) -> None:
        """One request, for which `tokens` are reserved."""
        async with await self.ask(tokens=tokens, **limits):
            self.exchange.tokens_in = used

    def told(self) -> dict[str, str]:
        return {key.decode(): value.decode() for key, value in self.exchange.limits}


@pytest.fixture
def desk() -> Desk:
    return Desk()


async def test_without_limits_nothing_is_counted_and_nothing_told(desk: Desk) -> None:
    for _ in range(100):
        await desk.spend(1000)
    assert desk.told() == {}


async def test_so_many_requests_at_once_and_then_evenly(desk: Desk) -> None:
    for left in (2, 1, 0):
        await desk.ask(requests="3/minute")
        assert desk.told() == {
            "x-ratelimit-limit-requests": "3",
            "x-ratelimit-remaining-requests": str(left),
            "x-ratelimit-reset-requests": {2: "20s", 1: "40s", 0: "1m0s"}[left],
        }
    error = await desk.refused(requests="3/minute")
    assert (error.code, error.kind.status, error.limit) == ("rate_limit_exceeded", 429, "requests")
    assert error.as_object()["type"] == "requests"
    assert error.headers()["Retry-After"] == "20"
    desk.clock.now += 20
    await desk.ask(requests="3/minute")
    await desk.refused(requests="3/minute")


async def test_a_refused_client_is_told_what_is_left_too(desk: Desk) -> None:
    await desk.ask(requests="1/hour")
    error = await desk.refused(requests="1/hour")
    assert desk.told()["x-ratelimit-remaining-requests"] == "0"
    assert error.headers()["x-should-retry"] == "false"


async def test_clients_do_not_share(desk: Desk) -> None:
    await desk.ask("a", requests="1/hour")
    await desk.ask("b", requests="1/hour")
    await desk.refused("a", requests="1/hour")


async def test_all_windows_must_hold_and_the_tightest_is_told(desk: Desk) -> None:
    both = ["2/second", "3/hour"]
    await desk.ask(requests=both)
    assert desk.told()["x-ratelimit-limit-requests"] == "2"
    await desk.ask(requests=both)
    desk.clock.now += 1
    await desk.ask(requests=both)
    assert desk.told()["x-ratelimit-limit-requests"] == "3"
    desk.clock.now += 1
    error = await desk.refused(requests=both)
    assert error.retry_after == pytest.approx(1198)


async def test_what_one_limit_refuses_costs_nothing_of_the_others(desk: Desk) -> None:
    async with await desk.ask(tokens=60, requests="10/hour", streams=1, **HUNDRED):
        ask: dict[str, Any] = {"requests": "10/hour", "streams": 1, **HUNDRED}
        assert (await desk.refused(tokens=60, **ask)).limit == "tokens"
        assert (await desk.refused(tokens=10, **ask)).limit == "streams"
        assert desk.told()["x-ratelimit-remaining-requests"] == "9"
        assert desk.told()["x-ratelimit-remaining-tokens"] == "40"


async def test_what_was_reserved_is_settled_with_what_was_used(desk: Desk) -> None:
    spent = 0
    for used in (30, 0, 10):
        async with await desk.ask(tokens=10, **HUNDRED):
            assert desk.told()["x-ratelimit-remaining-tokens"] == str(100 - spent - 10)
            desk.exchange.tokens_in, desk.exchange.tokens_out = used - used // 2, used // 2
        spent += used


async def test_a_balance_may_go_below_zero_and_time_pays_it_back(desk: Desk) -> None:
    async with await desk.ask(tokens=10, **HUNDRED):
        desk.exchange.tokens_out = 149
    error = await desk.refused(tokens=1, **HUNDRED)
    assert desk.told()["x-ratelimit-remaining-tokens"] == "0"
    assert error.limit == "tokens" and error.as_object()["type"] == "tokens"
    assert error.retry_after == pytest.approx(50)  # one token a second
    desk.clock.now += 50
    await desk.ask(tokens=1, **HUNDRED)


async def test_more_than_a_bucket_holds_is_never_asked_of_it(desk: Desk) -> None:
    async with await desk.ask(tokens=100_000, **HUNDRED):
        assert desk.told()["x-ratelimit-remaining-tokens"] == "0"
        desk.exchange.tokens_in = 40
    await desk.ask(tokens=60, **HUNDRED)


async def test_requests_that_generate_nothing_need_no_tokens(desk: Desk) -> None:
    async with await desk.ask(tokens=10, **HUNDRED):
        desk.exchange.tokens_in = 500
    await desk.ask(**HUNDRED)
    assert desk.told() == {}


async def test_a_check_takes_nothing(desk: Desk) -> None:
    client = Client(
        "web", "web", config.Limits.model_validate({"requests": "1/hour", "streams": 1})
    )
    for _ in range(3):
        await desk.limiter.check(client, desk.record())
    async with await desk.limiter.admit(client, desk.record()):
        with pytest.raises(ProxyError):
            await desk.limiter.check(client, desk.record())


async def test_a_reload_keeps_the_level_also_for_what_is_in_progress(desk: Desk) -> None:
    async with await desk.ask(tokens=10, **HUNDRED):
        larger = config.Limits.model_validate({"tokens": "1000/100s"})
        desk.limiter.limits_of = lambda name: larger if name == "web" else None
        desk.clock.now += 50  # 90 and half of 1000
        desk.exchange.tokens_in = 40
    await desk.ask(tokens=1, tokens_="1000/100s")
    assert desk.told()["x-ratelimit-remaining-tokens"] == str(90 + 500 + 10 - 40 - 1)


async def test_slots_are_for_requests_in_progress(desk: Desk) -> None:
    async with await desk.ask(streams=2), await desk.ask(streams=2):
        error = await desk.refused(streams=2)
        assert (error.code, error.status) == ("concurrency_limit_exceeded", 429)
        assert error.headers()["Retry-After"] == "1"
    await desk.ask(streams=1)


async def test_a_lease_is_settled_in_every_ending(desk: Desk) -> None:
    for ending in (RuntimeError, asyncio.CancelledError, GeneratorExit):
        with pytest.raises(ending):
            async with await desk.ask(streams=1):
                raise ending
    assert not desk.limiter._open


async def test_open_leases_are_renewed_and_others_lapse(desk: Desk) -> None:
    async with await desk.ask(streams=1):
        for _ in range(5):
            desk.clock.now += LAPSE - 1
            await desk.limiter.renew()
            await desk.refused(streams=1)
        desk.clock.now += LAPSE + 1  # nobody renews: its process was killed
        await desk.ask(streams=1)


class Broken(MemoryCounters):
    async def acquire(self, *_: object) -> Admission:
        raise Unavailable("hung")


async def test_a_store_that_is_out_of_reach() -> None:
    desk = Desk()
    desk.limiter = Limiter(Broken(desk.clock))
    error = await desk.refused(requests="1/hour")
    assert (error.code, error.status, error.headers()["Retry-After"]) == (
        "store_unavailable",
        503,
        "1",
    )
    await desk.ask()  # nobody who has no limits needs it


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0ms"),
        (0.1199, "120ms"),
        (0.9991, "1s"),
        (1, "1s"),
        (1.2, "2s"),
        (59.5, "1m0s"),
        (360, "6m0s"),
        (3600, "1h0m0s"),
        (90061, "25h1m1s"),
    ],
)
def test_durations_as_clients_know_them(seconds: float, shown: str) -> None:
    assert _duration(seconds) == shown
