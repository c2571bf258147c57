"""What every store does: buckets and leases, told as dialogues over memory and Redis."""

from __future__ import annotations

import asyncio

import pytest

from proxy.store import LAPSE, Admission, Bucket, Counters, Slot
from tests.contract.conftest import Clock

HOUR = 3600.0


def requests(cost: float = 1, *, size: float = 10, key: str = "a") -> Bucket:
    """Ten an hour: one is back every 360 seconds."""
    return Bucket(f"{key}:requests:1h", size, size / HOUR, cost)


def tokens(cost: float, *, size: float = 60_000) -> Bucket:
    """1,000 are back every second."""
    return Bucket("a:tokens:1m", size, size / 60, cost)


def slot(lease: str, limit: int = 2) -> Slot:
    return Slot("a", limit, lease)


def said(admission: Admission) -> tuple[bool, list[float], int | None]:
    """A decision without who made it, its levels to six digits."""
    return admission.admitted, [round(level, 6) for level in admission.levels], admission.in_use


# Buckets


async def test_a_bucket_starts_full_and_is_taken_from(counters: Counters) -> None:
    assert said(await counters.acquire([requests()])) == (True, [9], None)
    assert said(await counters.acquire([requests(4)])) == (True, [5], None)


async def test_what_is_not_there_is_refused_and_costs_nothing(counters: Counters) -> None:
    assert said(await counters.acquire([requests(8)])) == (True, [2], None)
    assert said(await counters.acquire([requests(3)])) == (False, [2], None)
    assert said(await counters.acquire([requests(2)])) == (True, [0], None)
    assert said(await counters.acquire([requests()])) == (False, [0], None)


async def test_more_than_a_bucket_holds_is_refused_even_by_a_full_one(counters: Counters) -> None:
    assert said(await counters.acquire([requests(11)])) == (False, [10], None)
    assert said(await counters.acquire([requests()])) == (True, [9], None)


async def test_it_refills_evenly_up_to_its_size(counters: Counters, clock: Clock) -> None:
    await counters.acquire([requests(10)])
    clock.now += 180
    assert said(await counters.acquire([requests()])) == (False, [0.5], None)
    clock.now += 180
    assert said(await counters.acquire([requests()])) == (True, [0], None)
    clock.now += 90
    assert said(await counters.acquire([requests(0)])) == (True, [0.25], None)
    clock.now += 10 * HOUR
    assert said(await counters.acquire([requests()])) == (True, [9], None)


@pytest.mark.parametrize("wait", [1 / 3, 7.7, 123.456])
async def test_whoever_waits_exactly_as_long_as_needed_is_admitted(
    counters: Counters, clock: Clock, wait: float
) -> None:
    bucket = Bucket("a", 1, 1 / wait, 1)
    for _ in range(20):
        assert (await counters.acquire([bucket])).admitted
        assert not (await counters.acquire([bucket])).admitted
        clock.now += wait


async def test_many_small_steps_lose_nothing(counters: Counters, clock: Clock) -> None:
    bucket = Bucket("a", 1_000, 1 / 7, 1 / 3)
    for _ in range(200):
        admission = await counters.acquire([bucket])
        clock.now += 1 / 9
    assert admission.levels == pytest.approx([1_000 - 200 / 3 + 199 / 63], abs=1e-6)


async def test_a_large_bucket_counts_small_costs(counters: Counters, clock: Clock) -> None:
    clock.now = 1_800_000_000 + 2**-10  # as large as Redis' own
    bucket = Bucket("a", 1e13, 2**10, 2**-3)
    for taken in (1, 2, 3):
        assert (await counters.acquire([bucket])).levels == (1e13 - taken / 8,)
    clock.now += 2**-13
    assert (await counters.acquire([bucket])).levels == (1e13 - 3 / 8,)


async def test_all_buckets_have_it_or_none_gives(counters: Counters) -> None:
    assert said(await counters.acquire([requests(), tokens(50_000)])) == (True, [9, 10_000], None)
    assert said(await counters.acquire([requests(), tokens(10_001)])) == (False, [9, 10_000], None)
    assert said(await counters.acquire([tokens(1), requests(10)])) == (False, [10_000, 9], None)
    assert said(await counters.acquire([requests(), tokens(10_000)])) == (True, [8, 0], None)


async def test_buckets_of_other_keys_are_others(counters: Counters) -> None:
    await counters.acquire([requests(10)])
    assert said(await counters.acquire([requests(10, key="b")])) == (True, [0], None)
    assert said(await counters.acquire([requests(10, key="a b\r\n{:")])) == (True, [0], None)
    assert not (await counters.acquire([requests()])).admitted


async def test_a_new_size_leaves_the_level(counters: Counters, clock: Clock) -> None:
    await counters.acquire([requests(4)])  # 6 of 10
    assert said(await counters.acquire([requests(0, size=100)])) == (True, [6], None)
    clock.now += 36
    assert said(await counters.acquire([requests(0, size=100)])) == (True, [7], None)
    assert said(await counters.acquire([requests(1, size=5)])) == (True, [4], None)


# Settlement


async def test_what_was_not_used_comes_back(counters: Counters) -> None:
    await counters.acquire([requests(), tokens(5_000)])
    await counters.settle([tokens(4_000)])
    assert said(await counters.acquire([requests(0), tokens(0)])) == (True, [9, 59_000], None)


async def test_nothing_comes_back_beyond_the_size(counters: Counters, clock: Clock) -> None:
    await counters.acquire([tokens(5_000)])
    clock.now += 3
    await counters.settle([tokens(5_000)])
    assert said(await counters.acquire([tokens(60_000)])) == (True, [0], None)
    await counters.settle([Bucket("never seen", 10, 1, 5)])
    assert said(await counters.acquire([Bucket("never seen", 10, 1, 0)])) == (True, [10], None)


async def test_more_than_was_reserved_is_a_debt_that_time_pays(
    counters: Counters, clock: Clock
) -> None:
    await counters.acquire([tokens(60_000)])
    await counters.settle([tokens(-30_000)])
    assert said(await counters.acquire([tokens(0)])) == (False, [-30_000], None)
    clock.now += 30
    assert said(await counters.acquire([tokens(0)])) == (True, [0], None)
    clock.now += 1
    assert said(await counters.acquire([tokens(1_000)])) == (True, [0], None)


async def test_a_debt_may_begin_with_a_full_bucket(counters: Counters) -> None:
    await counters.settle([requests(-12)])
    assert said(await counters.acquire([requests()])) == (False, [-2], None)


# Leases


async def test_a_slot_has_so_many_places(counters: Counters) -> None:
    assert said(await counters.acquire([], slot("x"))) == (True, [], 1)
    assert said(await counters.acquire([], slot("y"))) == (True, [], 2)
    assert said(await counters.acquire([], slot("z"))) == (False, [], 2)
    await counters.settle([], slot("x"))
    assert said(await counters.acquire([], slot("z"))) == (True, [], 2)
    assert said(await counters.acquire([], Slot("b", 1, "x"))) == (True, [], 1)


async def test_a_limit_of_none_at_all(counters: Counters) -> None:
    assert said(await counters.acquire([], slot("x", limit=0))) == (False, [], 0)


async def test_a_lower_limit_holds_for_those_who_come(counters: Counters) -> None:
    await counters.acquire([], slot("x"))
    await counters.acquire([], slot("y"))
    assert said(await counters.acquire([], slot("z", limit=1))) == (False, [], 2)


async def test_a_lease_ends_once(counters: Counters) -> None:
    await counters.acquire([], slot("x"))
    await counters.acquire([], slot("y"))
    await counters.settle([], slot("x"))
    await counters.settle([], slot("x"))
    await counters.settle([], slot("never taken"))
    assert said(await counters.acquire([], slot("z"))) == (True, [], 2)


async def test_buckets_and_slot_are_one_decision(counters: Counters) -> None:
    assert said(await counters.acquire([requests(9)], slot("x", limit=1))) == (True, [1], 1)
    assert said(await counters.acquire([requests()], slot("y", limit=1))) == (False, [1], 1)
    assert said(await counters.acquire([requests(2)], slot("y", limit=2))) == (False, [1], 1)
    assert said(await counters.acquire([requests()], slot("y", limit=2))) == (True, [0], 2)
    await counters.settle([requests(3)], slot("x"))
    assert said(await counters.acquire([requests(0)], slot("z", limit=2))) == (True, [3], 2)


async def test_a_lease_that_nobody_renews_lapses(counters: Counters, clock: Clock) -> None:
    await counters.acquire([], slot("x"))
    clock.now += LAPSE - 1
    await counters.acquire([], slot("y"))
    assert said(await counters.acquire([], slot("z"))) == (False, [], 2)
    clock.now += 1
    assert said(await counters.acquire([], slot("z"))) == (True, [], 2)
    assert said(await counters.acquire([], slot("w"))) == (False, [], 2)


async def test_a_renewed_lease_holds_on(counters: Counters, clock: Clock) -> None:
    await counters.acquire([], slot("x"))
    await counters.acquire([], slot("y"))
    clock.now += LAPSE - 1
    await counters.renew([slot("x")])
    clock.now += 1
    assert said(await counters.acquire([], slot("z"))) == (True, [], 2)
    assert said(await counters.acquire([], slot("w"))) == (False, [], 2)
    for _ in range(5):
        clock.now += LAPSE - 1
        await counters.renew([slot("x")])
    assert said(await counters.acquire([], slot("w"))) == (True, [], 2)
    clock.now += LAPSE
    assert said(await counters.acquire([], slot("v"))) == (True, [], 1)


async def test_one_renewal_is_for_all_leases(counters: Counters, clock: Clock) -> None:
    held = [Slot(key, 2, lease) for key in ("a", "b") for lease in ("x", "y")]
    for each in held:
        await counters.acquire([], each)
    clock.now += LAPSE - 1
    await counters.renew(held)
    clock.now += LAPSE - 1
    assert said(await counters.acquire([], Slot("a", 2, "z"))) == (False, [], 2)
    assert said(await counters.acquire([], Slot("b", 2, "z"))) == (False, [], 2)


async def test_a_lapsed_lease_is_entered_again_as_its_stream_goes_on(
    counters: Counters, clock: Clock
) -> None:
    await counters.acquire([], slot("x", limit=1))
    clock.now += LAPSE
    await counters.acquire([], slot("y", limit=1))
    await counters.renew([slot("x", limit=1)])
    assert said(await counters.acquire([], slot("z", limit=2))) == (False, [], 2)
    await counters.settle([], slot("x", limit=1))
    assert said(await counters.acquire([], slot("z", limit=2))) == (True, [], 2)


# Many at once


async def test_of_40_at_once_10_are_admitted(counters: Counters) -> None:
    admissions = await asyncio.gather(*(counters.acquire([requests()]) for _ in range(40)))
    assert sum(each.admitted for each in admissions) == 10


async def test_of_40_at_once_as_many_as_there_are_tokens_for(counters: Counters) -> None:
    wanted = [requests(size=100), tokens(9_000)]
    admissions = await asyncio.gather(*(counters.acquire(wanted) for _ in range(40)))
    assert sum(each.admitted for each in admissions) == 6
    assert said(await counters.acquire([requests(0, size=100), tokens(0)])) == (
        True,
        [94, 6_000],
        None,
    )


async def test_of_40_at_once_as_many_as_there_are_places(counters: Counters) -> None:
    asked = (counters.acquire([requests(size=100)], slot(f"{n}", limit=7)) for n in range(40))
    admissions = await asyncio.gather(*asked)
    assert sum(each.admitted for each in admissions) == 7
    assert sorted(each.in_use or 0 for each in admissions)[:7] == [1, 2, 3, 4, 5, 6, 7]
    assert said(await counters.acquire([requests(0, size=100)])) == (True, [93], None)


# Who counted it


async def test_an_admission_names_who_settles_it(counters: Counters) -> None:
    admission = await counters.acquire([requests()])
    assert admission.by is counters
    assert counters.last_error is None
