"""F2 store.memory: buckets and leases of this process alone."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from proxy.store.ports import LAPSE, SLACK, Admission, Bucket, Slot

# Buckets kept, some 40 MB of them. For one more, the one that would be full soonest is forgotten,
# which makes it full at once. So whoever wants a debt forgotten needs this many others that take
# longer to pay back: that many addresses, which have all spent more than the debtor. Leases have no
# such bound: each is a request in progress.
MOST_BUCKETS = 100_000

_LOOKS = 16  # entries of a shelf that one call looks at: no call takes long


class _Level(NamedTuple):
    """What a bucket held `at` a moment. From `until` on it is full, and need not be known.

    What is given back may lift it above its size: that counts no more than a full one.
    """

    level: float
    at: float
    until: float


class _Leases(dict[str, float]):
    """When each lease of a slot lapses: in this order, since what is renewed goes to the end."""

    __slots__ = ()

    @property
    def until(self) -> float:
        """When the last one lapses."""
        return self[next(reversed(self))] if self else -math.inf

    def hold(self, lease: str, now: float) -> None:
        self.pop(lease, None)
        self[lease] = now + LAPSE

    def drop_lapsed(self, now: float) -> None:
        while self and self[lease := next(iter(self))] <= now:
            del self[lease]


class _Passing(Protocol):
    @property
    def until(self) -> float: ...


V = TypeVar("V", bound=_Passing)


class _Shelf(Generic[V]):
    """Values by key that leave after their `until`; of more than `most` the first to leave go early.

    Each key stands once in a queue (a heap), under the `until` that its value had then. If that has
    moved on when its turn comes, it is queued again.
    """

    def __init__(self, most: float = math.inf) -> None:
        self._most = most
        self._values: dict[str, V] = {}
        self._queue: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> V | None:
        return self._values.get(key)

    def put(self, key: str, value: V, now: float) -> None:
        if key not in self._values:
            heapq.heappush(self._queue, (value.until, key))
        self._values[key] = value
        self._tidy(now)

    def _tidy(self, now: float) -> None:
        for _ in range(min(_LOOKS, len(self._queue))):
            turn, key = self._queue[0]
            if turn > now and len(self._values) <= self._most:
                return
            until = self._values[key].until
            if until > turn:
                heapq.heapreplace(self._queue, (until, key))
            else:
                heapq.heappop(self._queue)
                del self._values[key]


class MemoryCounters:
    """`Counters` of one process. `clock` gives seconds and never goes back."""

    last_error = None

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._levels: _Shelf[_Level] = _Shelf(MOST_BUCKETS)
        self._slots: _Shelf[_Leases] = _Shelf()  # without a bound: see MOST_BUCKETS

    def __repr__(self) -> str:
        return f"<MemoryCounters {len(self._levels)} buckets, {len(self._slots)} slots>"

    async def acquire(self, buckets: Sequence[Bucket], slot: Slot | None = None) -> Admission:
        now = self._clock()
        levels = [self._level(bucket, now) for bucket in buckets]
        admitted = all(
            level + SLACK >= bucket.cost for level, bucket in zip(levels, buckets, strict=True)
        )
        leases = None
        if slot is not None:
            leases = self._leases(slot, now)
            admitted = admitted and len(leases) < slot.limit
        if admitted:
            for index, bucket in enumerate(buckets):
                levels[index] -= bucket.cost
                self._keep(bucket, levels[index], now)
            if slot is not None and leases is not None:
                leases.hold(slot.lease, now)
                self._slots.put(slot.key, leases, now)
        in_use = None if leases is None else len(leases)
        return Admission(admitted, tuple(levels), in_use, self)

    async def settle(self, buckets: Sequence[Bucket], slot: Slot | None = None) -> None:
        now = self._clock()
        for bucket in buckets:
            self._keep(bucket, self._level(bucket, now) + bucket.cost, now)
        if slot is not None:
            self._leases(slot, now).pop(slot.lease, None)

    async def renew(self, slots: Sequence[Slot]) -> None:
        now = self._clock()
        for slot in slots:
            leases = self._leases(slot, now)
            leases.hold(slot.lease, now)
            self._slots.put(slot.key, leases, now)

    async def close(self) -> None:
        """Nothing runs, nothing is open."""

    def _level(self, bucket: Bucket, now: float) -> float:
        kept = self._levels.get(bucket.key)
        if kept is None:
            return bucket.size
        return min(bucket.size, kept.level + (now - kept.at) * bucket.refill)

    def _keep(self, bucket: Bucket, level: float, now: float) -> None:
        until = now + (bucket.size - level) / bucket.refill
        self._levels.put(bucket.key, _Level(level, now, until), now)

    def _leases(self, slot: Slot, now: float) -> _Leases:
        """Those of the slot that hold; to be put on the shelf if one is added."""
        leases = self._slots.get(slot.key) or _Leases()
        leases.drop_lapsed(now)
        return leases
