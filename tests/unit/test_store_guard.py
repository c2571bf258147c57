"""A store that fails, and what its callers see of it: told on a clock that leaps."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Sequence

import pytest

from proxy.store import Admission, Bucket, Slot, Unavailable
from proxy.store.guard import AT_ONCE, PROBE_EVERY, Guard
from proxy.store.memory import MemoryCounters

BUCKETS = [Bucket("a", 10, 1, 1)]
SLOT = Slot("a", 5, "x")
TIMEOUT = 0.5


class Leaping(asyncio.SelectorEventLoop):
    """Where all wait for a time, it is that time at once."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        select = self._selector.select  # type: ignore[attr-defined]

        def leap(timeout: float | None = None) -> object:
            assert timeout is not None, "everybody waits, and for nothing"
            self._now += timeout
            return select(0)

        self._selector.select = leap  # type: ignore[attr-defined]

    def time(self) -> float:
        return self._now


def leaping(story: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(story)
    def told(**fixtures: object) -> None:
        with asyncio.Runner(loop_factory=Leaping) as runner:
            runner.run(story(**fixtures))  # type: ignore[arg-type]

    return told


def now() -> float:
    return asyncio.get_running_loop().time()


class Store:
    """Answers after `takes` seconds, or raises `fails`; `heard` is what it was asked."""

    last_error = None

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.done: list[str] = []
        self.admits = True
        self.takes = 0.0
        self.fails: Exception | None = None
        self.closed = False

    async def acquire(self, buckets: Sequence[Bucket], slot: Slot | None = None) -> Admission:
        await self._hear("acquire")
        return Admission(self.admits, (9.0,), 1, self)

    async def settle(self, buckets: Sequence[Bucket], slot: Slot | None = None) -> None:
        assert (buckets, slot) == (BUCKETS, SLOT)
        await self._hear("settle")

    async def renew(self, slots: Sequence[Slot]) -> None:
        await self._hear("renew" if SLOT in slots else "probe")

    async def close(self) -> None:
        await self._hear("close")

    async def _hear(self, what: str) -> None:
        self.heard.append(what)
        await asyncio.sleep(self.takes)
        if self.fails:
            raise self.fails
        self.done.append(what)


HANGS = 3_600.0  # seconds


class Stage:
    """A guard over a `Store`, with or without memory to fall back on."""

    def __init__(self, *, allow: bool = True) -> None:
        self.store = Store()
        self.fallback = MemoryCounters(lambda: 0.0) if allow else None
        self.errors = 0
        self.guard = Guard(self.store, self.fallback, TIMEOUT, "redis://here", self._count)

    def _count(self) -> None:
        self.errors += 1

    async def ask(self) -> tuple[object, float]:
        """Who admitted, and after how long."""
        since = now()
        return (await self.guard.acquire(BUCKETS, SLOT)).by, now() - since


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[str, dict[str, object]]]]:
    """The log of the store so far."""
    caplog.set_level(logging.DEBUG, logger="sluice.store")
    return lambda: [
        (record.message, record.__dict__["fields"])
        for record in caplog.records
        if record.name == "sluice.store"
    ]


# While it answers


@leaping
async def test_what_the_store_admits_is_settled_there() -> None:
    stage = Stage()
    admission = await stage.guard.acquire(BUCKETS, SLOT)
    assert (admission.admitted, admission.levels, admission.in_use) == (True, (9.0,), 1)
    assert admission.by is stage.guard
    await admission.by.renew([SLOT])
    await admission.by.settle(BUCKETS, SLOT)
    assert stage.store.done == ["acquire", "renew", "settle"]
    assert stage.guard.last_error is None and stage.errors == 0


@leaping
async def test_a_refusal_is_an_answer() -> None:
    stage = Stage()
    stage.store.admits = False
    admission = await stage.guard.acquire(BUCKETS, SLOT)
    assert not admission.admitted and stage.errors == 0


@leaping
async def test_what_takes_as_long_as_it_may_is_in_time() -> None:
    stage = Stage()
    stage.store.takes = TIMEOUT - 0.001
    assert await stage.ask() == (stage.guard, pytest.approx(0.499))


@leaping
async def test_a_burst_waits_its_turn_and_is_no_failure() -> None:
    stage = Stage()
    stage.store.takes = 0.2
    answers = await asyncio.gather(*(stage.ask() for _ in range(10 * AT_ONCE)))
    assert {by for by, _ in answers} == {stage.guard}
    assert max(waited for _, waited in answers) == pytest.approx(10 * 0.2)
    assert stage.errors == 0


# While it fails


@leaping
async def test_the_fallback_counts_and_settles_what_it_admitted() -> None:
    stage = Stage()
    stage.store.fails = ConnectionError()
    admission = await stage.guard.acquire(BUCKETS, SLOT)
    assert admission.by is stage.fallback
    assert (admission.admitted, admission.levels, admission.in_use) == (True, (9,), 1)
    assert stage.guard.last_error == "ConnectionError"
    stage.store.fails = None
    await admission.by.settle(BUCKETS, SLOT)
    assert "settle" not in stage.store.heard
    await stage.guard.close()


@leaping
async def test_without_a_fallback_nobody_is_admitted() -> None:
    stage = Stage(allow=False)
    stage.store.fails = ConnectionError()
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"^ConnectionError$"):
            await stage.guard.acquire(BUCKETS, SLOT)
    assert stage.store.heard == ["acquire"]
    await stage.guard.close()


@leaping
async def test_of_a_thousand_callers_of_a_hung_store_one_waits() -> None:
    stage = Stage()
    stage.store.takes = HANGS
    waited = [(await stage.ask())[1] for _ in range(1_000)]
    assert waited == [pytest.approx(TIMEOUT)] + [0] * 999
    assert stage.store.heard == ["acquire"]
    assert stage.errors == 1_000
    await stage.guard.close()


@leaping
async def test_those_who_come_at_once_wait_for_one_timeout_together() -> None:
    stage = Stage()
    stage.store.takes = HANGS
    answers = await asyncio.gather(*(stage.ask() for _ in range(10 * AT_ONCE)))
    assert answers == [(stage.fallback, pytest.approx(TIMEOUT))] * 10 * AT_ONCE
    assert stage.store.heard == ["acquire"] * AT_ONCE
    await stage.guard.close()


@leaping
async def test_nobody_waits_for_what_tries_the_store() -> None:
    stage = Stage()
    stage.store.takes = HANGS
    await stage.ask()
    for _ in range(100):
        assert (await stage.ask())[1] == 0
        await asyncio.sleep(0.1)
    assert stage.store.heard == ["acquire"] + ["probe"] * 6  # a second, then half of one, each
    await stage.guard.close()


@leaping
async def test_its_return_is_seen_without_any_traffic(
    said: Callable[[], list[tuple[str, dict[str, object]]]],
) -> None:
    stage = Stage()
    stage.store.fails = ConnectionError()
    await stage.ask()
    await asyncio.sleep(20.5)
    stage.store.fails = None
    gone = now()
    while stage.guard.last_error:
        await asyncio.sleep(0.01)
    assert now() - gone <= PROBE_EVERY + TIMEOUT
    assert stage.errors == 21  # the call, and each try
    assert (await stage.ask())[0] is stage.guard
    assert said() == [
        ("store_unavailable", {"store": "redis://here", "reason": "ConnectionError"}),
        ("store_recovered", {"store": "redis://here", "seconds": pytest.approx(21)}),
    ]
    assert stage.store.heard == ["acquire"] + ["probe"] * 21 + ["acquire"]


@leaping
async def test_each_change_is_one_line_however_often_it_comes_and_goes(
    said: Callable[[], list[tuple[str, dict[str, object]]]],
) -> None:
    stage = Stage()
    for _ in range(3):
        stage.store.fails = ConnectionError()
        await asyncio.gather(*(stage.ask() for _ in range(40)))
        stage.store.fails = None
        await asyncio.sleep(2)
    assert [event for event, _ in said()] == ["store_unavailable", "store_recovered"] * 3


@leaping
async def test_its_state_names_the_newest_reason() -> None:
    stage = Stage()
    stage.store.fails = ConnectionError()
    await stage.ask()
    stage.store.fails = ValueError("READONLY You can't write against a read only replica.")
    await asyncio.sleep(1.5)
    assert stage.guard.last_error == "READONLY"
    assert repr(stage.guard) == "<Guard redis://here READONLY>"
    await stage.guard.close()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("WRONGTYPE Operation against a key holding the wrong kind"), "WRONGTYPE"),
        (ConnectionError("Error 111 connecting to ::1:6379."), "ConnectionError"),
        (TimeoutError(), "TimeoutError"),
        (ValueError("AUTHsecret"), "ValueError"),
        (ValueError("S3CRET is no password"), "ValueError"),
    ],
)
def test_a_reason_is_a_word_and_quotes_nothing(error: Exception, reason: str) -> None:
    @leaping
    async def story() -> None:
        stage = Stage(allow=False)
        stage.store.fails = error
        with pytest.raises(Unavailable, match=f"^{reason}$"):
            await stage.guard.acquire(BUCKETS)
        await stage.guard.close()

    story()


# Settlements and renewals


@leaping
async def test_a_settlement_that_fails_is_lost_and_counted() -> None:
    stage = Stage(allow=False)
    admission = await stage.guard.acquire(BUCKETS, SLOT)
    stage.store.fails = ConnectionError()
    await admission.by.settle(BUCKETS, SLOT)
    await admission.by.settle(BUCKETS, SLOT)  # the breaker is open: it is not even tried
    assert stage.store.heard == ["acquire", "settle"]
    assert stage.errors == 2
    await stage.guard.close()


@leaping
async def test_a_renewal_that_fails_is_no_error_of_its_caller() -> None:
    stage = Stage(allow=False)
    stage.store.fails = ConnectionError()
    await stage.guard.renew([SLOT])
    await stage.guard.renew([SLOT])
    stage.store.fails = None
    await asyncio.sleep(2)
    await stage.guard.renew([SLOT])
    assert stage.store.done == ["probe", "renew"]


@leaping
async def test_a_settlement_waits_for_the_renewal_under_way() -> None:
    # The store may hear the two in the other order: then the lease would be entered again.
    stage = Stage()
    stage.store.takes = 0.2
    renewal = asyncio.create_task(stage.guard.renew([SLOT]))
    await asyncio.sleep(0.1)
    await stage.guard.settle(BUCKETS, SLOT)
    assert renewal.done()
    assert now() == pytest.approx(0.4)
    assert stage.store.done == ["renew", "settle"]


@leaping
async def test_a_settlement_does_not_wait_for_a_hung_renewal_for_long() -> None:
    stage = Stage()
    stage.store.takes = HANGS
    renewal = asyncio.create_task(stage.guard.renew([SLOT]))
    await asyncio.sleep(0.1)
    await stage.guard.settle(BUCKETS, SLOT)
    assert now() == pytest.approx(TIMEOUT)
    await renewal
    await stage.guard.close()


# Callers who leave


async def leave(call: Awaitable[object], after: float) -> None:
    task = asyncio.ensure_future(call)
    await asyncio.sleep(after)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@leaping
async def test_what_is_admitted_for_somebody_who_has_left_is_given_back() -> None:
    stage = Stage()
    stage.store.takes = 0.2
    await leave(stage.guard.acquire(BUCKETS, SLOT), after=0.1)
    await asyncio.sleep(1)
    assert stage.store.done == ["acquire", "settle"]


@leaping
async def test_even_if_the_answer_and_the_leaving_come_together() -> None:
    stage = Stage()
    stage.store.takes = 0.1
    task = asyncio.create_task(stage.guard.acquire(BUCKETS, SLOT))
    await asyncio.sleep(0.1)
    while not stage.store.done:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(1)
    assert stage.store.done == ["acquire", "settle"]


@leaping
async def test_what_was_refused_is_not_given_back() -> None:
    stage = Stage()
    stage.store.takes, stage.store.admits = 0.2, False
    await leave(stage.guard.acquire(BUCKETS, SLOT), after=0.1)
    await asyncio.sleep(1)
    assert stage.store.done == ["acquire"]


@leaping
async def test_nor_what_failed() -> None:
    stage = Stage()
    stage.store.takes = HANGS
    await leave(stage.guard.acquire(BUCKETS, SLOT), after=0.1)
    await asyncio.sleep(TIMEOUT)
    assert stage.store.heard == ["acquire"] and stage.errors == 1
    await stage.guard.close()


@leaping
async def test_a_settlement_is_made_though_its_caller_has_left() -> None:
    stage = Stage()
    stage.store.takes = 0.2
    await leave(stage.guard.settle(BUCKETS, SLOT), after=0.1)
    await asyncio.sleep(1)
    assert stage.store.done == ["settle"]


# The end


@leaping
async def test_closing_waits_for_settlements_under_way() -> None:
    stage = Stage()
    stage.store.takes = 0.2
    await leave(stage.guard.settle(BUCKETS, SLOT), after=0.1)
    await stage.guard.close()
    assert stage.store.done == ["settle", "close"]


@leaping
async def test_closing_does_not_wait_for_a_hung_store_for_long() -> None:
    stage = Stage()
    stage.store.takes = HANGS
    await leave(stage.guard.settle(BUCKETS, SLOT), after=0.1)
    await stage.guard.close()
    assert now() == pytest.approx(2 * TIMEOUT)  # the settlement's, the store's own end
    assert asyncio.all_tasks() == {asyncio.current_task()}


@leaping
async def test_nothing_tries_a_store_that_is_closed() -> None:
    stage = Stage()
    stage.store.fails = ConnectionError()
    await stage.ask()
    await stage.guard.close()
    await asyncio.sleep(10)
    assert stage.store.heard == ["acquire", "close"]
