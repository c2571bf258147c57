"""What the store in memory keeps, and for how long. What it decides: tests/contract."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from proxy.store import memory
from proxy.store.memory import MemoryCounters
from proxy.store.ports import LAPSE, Bucket, Slot


@dataclass(slots=True)
class Clock:
    now: float = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def counters(clock: Clock) -> MemoryCounters:
    return MemoryCounters(clock)


def debt(key: str, seconds: float) -> Bucket:
    """What is full again after so many seconds."""
    return Bucket(key, 1_000_000, 1, seconds)


async def level(counters: MemoryCounters, key: str) -> float:
    return (await counters.acquire([debt(key, 0)])).levels[0]


async def test_buckets_that_are_full_again_leave(counters: MemoryCounters, clock: Clock) -> None:
    for number in range(100):
        await counters.acquire([debt(f"{number}", 60)])
    await counters.acquire([debt("long", 1_000)])
    assert repr(counters) == "<MemoryCounters 101 buckets, 0 slots>"
    clock.now += 60
    for _ in range(100):  # nobody has to wait until all have left
        await counters.acquire([debt("new", 1)])
    assert repr(counters) == "<MemoryCounters 2 buckets, 0 slots>"
    assert await level(counters, "long") == 1_000_000 - 940


async def test_one_that_was_used_again_stays_for_as_long_as_that_takes(
    counters: MemoryCounters, clock: Clock
) -> None:
    await counters.acquire([debt("a", 10)])
    await counters.acquire([debt("a", 90)])
    clock.now += 99
    assert await level(counters, "a") == 999_999
    clock.now += 1
    await counters.acquire([debt("b", 1)])
    assert repr(counters) == "<MemoryCounters 1 buckets, 0 slots>"


async def test_one_that_was_given_back_leaves(counters: MemoryCounters, clock: Clock) -> None:
    await counters.acquire([debt("a", 90)])
    await counters.settle([debt("a", 90)])
    clock.now += 90
    await counters.acquire([debt("b", 1)])
    assert repr(counters) == "<MemoryCounters 1 buckets, 0 slots>"


async def test_slots_leave_with_their_last_lease(counters: MemoryCounters, clock: Clock) -> None:
    await counters.acquire([], Slot("ended", 9, "x"))
    await counters.settle([], Slot("ended", 9, "x"))
    await counters.acquire([], Slot("lapses", 9, "x"))
    await counters.acquire([], Slot("renewed", 9, "x"))
    clock.now += LAPSE - 1
    await counters.renew([Slot("renewed", 9, "x")])
    clock.now += 1
    await counters.acquire([], Slot("new", 9, "x"))
    assert repr(counters) == "<MemoryCounters 0 buckets, 2 slots>"
    assert (await counters.acquire([], Slot("renewed", 9, "y"))).in_use == 2


async def test_of_too_many_buckets_those_go_that_would_be_full_soonest(
    counters: MemoryCounters, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "MOST_BUCKETS", 100)
    counters = MemoryCounters(clock)
    await counters.acquire([debt("victim", 1)])
    await counters.acquire([debt("victim", 3_600)])  # queued when it was a small one
    for number in range(10_000):
        await counters.acquire([debt(f"flood {number}", 60 + number / 1_000)])
        clock.now += 0.001
    assert repr(counters) == "<MemoryCounters 100 buckets, 0 slots>"
    assert await level(counters, "victim") == pytest.approx(1_000_000 - 3_601 + 10)
    assert await level(counters, "flood 0") == 1_000_000  # forgotten
    assert await level(counters, "flood 9999") < 1_000_000


async def test_no_call_looks_at_many_of_those_that_may_leave(
    counters: MemoryCounters, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1_000):
        await counters.acquire([debt(f"{number}", 60)])
    clock.now += 60
    await counters.acquire([debt("new", 1)])
    assert repr(counters) == f"<MemoryCounters {1_001 - memory._LOOKS} buckets, 0 slots>"
