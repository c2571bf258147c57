"""F2 store.redis: buckets and leases in Redis (or Valkey), for all processes that share it.

Each call is one script, so one round trip, and nobody sees half of it. A failure of any kind comes
out as whatever redis-py raises: `guard` sorts that out, and sees to it that a call ends in time.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from itertools import chain

from redis.asyncio import ConnectionPool, Redis

from proxy.store.ports import LAPSE, SLACK, Admission, Bucket, Slot


class RedisCounters:
    """`Counters` in the Redis at `url`: redis://, rediss:// or unix://, with db, user, password.

    Time is Redis' own, as the clocks of those who share it differ; a test may bring its `clock`.
    """

    last_error = None

    def __init__(self, url: str, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock
        # Without timeouts, retries (the default here) and a bound of its own: the guard gives each
        # call one time for all it does, and makes only so many at once. RESP2: with RESP3 the pool
        # keeps connections that have unread input, and the next call would read another's answer.
        pool = ConnectionPool.from_url(
            url,
            socket_timeout=None,
            socket_connect_timeout=None,
            protocol=2,
            driver_info=None,
        )
        self._redis = Redis.from_pool(pool)
        self._acquire = self._redis.register_script(_source("acquire"))
        self._settle = self._redis.register_script(_source("settle"))
        self._renew = self._redis.register_script(_source("renew"))

    async def acquire(self, buckets: Sequence[Bucket], slot: Slot | None = None) -> Admission:
        wanted = [(each.size, each.refill, each.cost) for each in buckets]
        arguments: list[float | str] = [self._time(), LAPSE, SLACK, *chain.from_iterable(wanted)]
        if slot is not None:
            arguments += [slot.limit, slot.lease]
        admitted, in_use, *levels = await self._acquire(_keys(buckets, slot), arguments)
        return Admission(
            bool(admitted), tuple(map(float, levels)), in_use if slot is not None else None, self
        )

    async def settle(self, buckets: Sequence[Bucket], slot: Slot | None = None) -> None:
        wanted = [(each.size, each.refill, each.cost) for each in buckets]
        arguments: list[float | str] = [self._time(), *chain.from_iterable(wanted)]
        if slot is not None:
            arguments.append(slot.lease)
        await self._settle(_keys(buckets, slot), arguments)

    async def renew(self, slots: Sequence[Slot]) -> None:
        leases: dict[str, list[str]] = {}
        for slot in slots:
            leases.setdefault(_slot_key(slot), []).append(slot.lease)
        # Joined: redis-py takes 5 µs of the event loop for each argument, and these may be thousands.
        arguments: list[float | str] = [self._time(), LAPSE, *map(" ".join, leases.values())]
        await self._renew(list(leases), arguments)

    async def close(self) -> None:
        await self._redis.aclose()

    def _time(self) -> float | str:
        return "" if self._clock is None else self._clock()


def _keys(buckets: Sequence[Bucket], slot: Slot | None) -> list[str]:
    keys = [f"sluice:bucket:{bucket.key}" for bucket in buckets]
    return keys if slot is None else [*keys, _slot_key(slot)]


def _slot_key(slot: Slot) -> str:
    return f"sluice:slot:{slot.key}"


def _source(name: str) -> str:
    """A script, as it lies beside this module, after what all of them share."""
    parts = [pkgutil.get_data("proxy.store", f"lua/{part}.lua") for part in ("common", name)]
    return "\n".join(part.decode() for part in parts if part is not None)
