"""F2 store.ports: what a limiter asks of a store, whichever store it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

# Seconds that a lease holds after it was taken or last renewed: so long a killed process keeps it.
LAPSE = 10.0

# A bucket that lacks less than this admits: time times rate is a sum of floats, and whoever waited
# exactly as long as told would find it short by a rounding error.
SLACK = 1e-6


@dataclass(frozen=True, slots=True)
class Bucket:
    """A token bucket, and what one call wants of it.

    It starts full, holds `size` at most and gains `refill` a second; below 0, time pays it back.
    `key` names it: whose it is, what it counts, over which window. It is kept as it stands, so it
    bears no client's key. `acquire` takes `cost`; `settle` gives it back, or takes more if it is
    negative.
    """

    key: str
    size: float
    refill: float
    cost: float


@dataclass(frozen=True, slots=True)
class Slot:
    """One place of the `limit` that `key` names, held by the request with the unique id `lease`.

    No spaces in the id.
    """

    key: str
    limit: int
    lease: str


@dataclass(frozen=True, slots=True)
class Admission:
    """What a store decided.

    `levels` are those of the buckets in their order, after the taking if it is admitted, else as
    they stand. `in_use` counts the slot's leases, its own included if admitted; None without a
    slot. `by` is who counted it: there it is renewed and settled.
    """

    admitted: bool
    levels: tuple[float, ...]
    in_use: int | None
    by: Counters


class Unavailable(Exception):
    """The store is out of reach, and nothing may be admitted without it. Its text says why."""


class Counters(Protocol):
    """Buckets and leases, in one process or shared by several."""

    @property
    def last_error(self) -> str | None:
        """Why the store is out of reach; None while it answers."""

    async def acquire(self, buckets: Sequence[Bucket], slot: Slot | None = None) -> Admission:
        """Takes every cost and the slot, if every bucket has it and the slot is free; else nothing.

        No key stands twice among the buckets. Raises Unavailable.
        """

    async def settle(self, buckets: Sequence[Bucket], slot: Slot | None = None) -> None:
        """Gives costs back, no bucket above its size, and ends the lease. Never raises."""

    async def renew(self, slots: Sequence[Slot]) -> None:
        """Makes the leases last for another LAPSE, one call at a time. Never raises.

        One that has lapsed, or was lost, is entered again whatever the limit: its request goes on.
        """

    async def close(self) -> None:
        """Ends what runs in the background and closes connections."""
