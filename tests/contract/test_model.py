"""Memory and Redis beside a model that is too simple to be wrong, under sequences found at random."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.store import LAPSE, Bucket, Counters, Slot
from proxy.store.memory import MemoryCounters
from proxy.store.redis import RedisCounters
from tests.contract.conftest import Clock
from tests.redis_server import RedisServer

Decision = tuple[bool, list[float], int | None]


@dataclass(slots=True)
class Model:
    """Exact numbers, everything kept for ever, nothing done ahead of time."""

    now: Fraction
    levels: dict[str, tuple[Fraction, Fraction]] = field(default_factory=dict)  # level, since
    leases: dict[str, dict[str, Fraction]] = field(default_factory=dict)  # until

    def level(self, bucket: Bucket) -> Fraction:
        level, since = self.levels.get(bucket.key, (Fraction(bucket.size), self.now))
        level += (self.now - since) * Fraction(bucket.refill)
        return min(level, Fraction(bucket.size))

    def holding(self, slot: Slot) -> int:
        return sum(until > self.now for until in self.leases.get(slot.key, {}).values())

    def acquire(self, buckets: Sequence[Bucket], slot: Slot | None) -> Decision:
        # A level may lack a rounding error: what the stores call SLACK.
        admitted = all(self.level(each) - Fraction(each.cost) > -1e-5 for each in buckets)
        if slot is not None and self.holding(slot) >= slot.limit:
            admitted = False
        if admitted:
            for each in buckets:
                self.levels[each.key] = (self.level(each) - Fraction(each.cost), self.now)
            if slot is not None:
                self.renew([slot])
        levels = [float(self.level(each)) for each in buckets]
        return admitted, levels, None if slot is None else self.holding(slot)

    def settle(self, buckets: Sequence[Bucket], slot: Slot | None) -> None:
        for each in buckets:
            level = min(self.level(each) + Fraction(each.cost), Fraction(each.size))
            self.levels[each.key] = (level, self.now)
        if slot is not None:
            self.leases.get(slot.key, {}).pop(slot.lease, None)

    def renew(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            self.leases.setdefault(slot.key, {})[slot.lease] = self.now + Fraction(LAPSE)


@dataclass(frozen=True, slots=True)
class Acquire:
    buckets: list[Bucket]
    slot: Slot | None


@dataclass(frozen=True, slots=True)
class Settle:
    buckets: list[Bucket]
    slot: Slot | None


@dataclass(frozen=True, slots=True)
class Renew:
    slots: list[Slot]


@dataclass(frozen=True, slots=True)
class Wait:
    seconds: float


# Few keys, so that they meet.
BUCKETS = {
    "a": (10, 10 / 3_600),
    "b": (5_000, 5_000 / 86_400),
    "c": (100_000, 100_000 / 60),
    "d": (1, 1 / 3),
    "e": (4, 2.5),
}
COSTS = st.sampled_from([0, 0.1, 1, 1, 1, 3, 10, 500, 4_096])
CHANGES = COSTS | COSTS.map(lambda cost: -cost)
SLOTS = st.builds(Slot, st.sampled_from("abc"), st.integers(0, 3), st.sampled_from("uvwxyz"))


def buckets(costs: st.SearchStrategy[float]) -> st.SearchStrategy[list[Bucket]]:
    each = st.builds(
        lambda key, cost: Bucket(key, *BUCKETS[key], cost), st.sampled_from([*BUCKETS]), costs
    )
    return st.lists(each, max_size=3, unique_by=lambda bucket: bucket.key)


STEPS = st.lists(
    st.one_of(
        st.builds(Acquire, buckets(COSTS), st.none() | SLOTS),
        st.builds(Acquire, buckets(COSTS), st.none() | SLOTS),
        st.builds(Settle, buckets(CHANGES), st.none() | SLOTS),
        st.builds(Renew, st.lists(SLOTS, max_size=4)),
        # Sums of these are exact: whether a lease has lapsed is no matter of rounding.
        st.builds(Wait, st.sampled_from([0.25, 1, 2.5, 9.75, 10, 360, 3_600, 86_400])),
    ),
    max_size=40,
)


async def _tell(steps: list[Acquire | Settle | Renew | Wait], url: str) -> None:
    clock = Clock()
    model = Model(Fraction(clock.now))
    stores: list[Counters] = [MemoryCounters(clock), RedisCounters(url, clock)]
    try:
        for step in steps:
            match step:
                case Wait(seconds):
                    clock.now += seconds
                    model.now += Fraction(seconds)
                case Renew(slots):
                    model.renew(slots)
                    for store in stores:
                        await store.renew(slots)
                case Settle(buckets, slot):
                    model.settle(buckets, slot)
                    for store in stores:
                        await store.settle(buckets, slot)
                case Acquire(buckets, slot):
                    meant = model.acquire(buckets, slot)
                    for store in stores:
                        await _compare(store, buckets, slot, meant)
    finally:
        await stores[1].close()


async def _compare(
    store: Counters, buckets: list[Bucket], slot: Slot | None, meant: Decision
) -> None:
    admitted, levels, in_use = meant
    found = await store.acquire(buckets, slot)
    assert found.admitted is admitted
    assert found.levels == pytest.approx(tuple(levels), abs=1e-6)
    assert found.in_use == in_use


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=STEPS)
def test_the_stores_decide_as_the_model_does(
    redis: RedisServer, steps: list[Acquire | Settle | Renew | Wait]
) -> None:
    redis.command("FLUSHALL")
    asyncio.run(_tell(steps, redis.url))
