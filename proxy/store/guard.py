"""F2 store.guard: a store that may fail, and what holds while it does.

A breaker. Closed, calls go to the store, each with the same short time. The first that fails, in
whatever way, opens it: from then on nobody waits. Whoever asks is admitted by the fallback, or by
nobody if there is none, and one task alone tries the store every PROBE_EVERY seconds, until it
answers, which closes the breaker again.

What the fallback admitted is settled there. What the store admitted before it failed is settled with
the store, or not at all: such a settlement is lost, though counted as an error. The reservation
then stands until time has paid it back; the lease lapses. A call that ran out of time may have been
heard all the same, or be heard later (a paused Redis reads on from its sockets as it wakes): then
it counts twice, there and in the fallback. So nothing is asked again on the chance.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from proxy.store.ports import Admission, Bucket, Counters, Slot, Unavailable

PROBE_EVERY = 1.0  # seconds
# Calls under way at once, so connections too: more would only wait in Redis, which runs one script
# after the other. Whoever waits here is not on the clock: a burst of ours is no failure of Redis.
AT_ONCE = 16

# To renew a lease that nobody asks for takes what an admission takes: a script that writes. A ping
# would be answered while a full or a read-only Redis refuses every admission.
_PROBE = (Slot("probe", 1, "probe"),)

_log = logging.getLogger("sluice.store")

T = TypeVar("T")


class Guard:
    """`primary` while it answers within `timeout` seconds, else `fallback`.

    Without a fallback `acquire` raises Unavailable meanwhile. `name` says in logs which store it
    is. `on_error` is called for each call that the store did not answer, tried or not.
    """

    def __init__(
        self,
        primary: Counters,
        fallback: Counters | None,
        timeout: float,
        name: str,
        on_error: Callable[[], object],
    ) -> None:
        self._primary = primary
        self._fallback = fallback
        self._timeout = timeout
        self._name = name
        self._on_error = on_error
        self._last_error: str | None = None  # the breaker: open while there is one
        self._probing: asyncio.Task[None] | None = None
        self._renewing: asyncio.Task[None] | None = None
        self._places = asyncio.Semaphore(AT_ONCE)
        self._calls: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        return f"<Guard {self._name} {self._last_error or 'answers'}>"

    @property
    def last_error(self) -> str | None:
        return self._last_error

    async def acquire(self, buckets: Sequence[Bucket], slot: Slot | None = None) -> Admission:
        try:
            call = self._start(self._primary.acquire, buckets, slot)
            try:
                admission = await asyncio.shield(call)
            except asyncio.CancelledError:
                self._own(self._undo(call, buckets, slot))
                raise
        except Unavailable:
            if self._fallback is None:
                raise
            return await self._fallback.acquire(buckets, slot)
        return replace(admission, by=self)

    async def settle(self, buckets: Sequence[Bucket], slot: Slot | None = None) -> None:
        await asyncio.shield(self._own(self._settle(buckets, slot)))

    async def renew(self, slots: Sequence[Slot]) -> None:
        with suppress(Unavailable):  # the next renewal enters them again
            self._renewing = self._start(self._primary.renew, slots)
            await asyncio.shield(self._renewing)

    async def close(self) -> None:
        while self._calls:
            await asyncio.wait(self._calls)  # settlements too; none takes longer than a timeout
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait({self._probing})
        with suppress(Exception):  # whatever ails it, it is let go of
            async with asyncio.timeout(self._timeout):
                await self._primary.close()

    async def _settle(self, buckets: Sequence[Bucket], slot: Slot | None) -> None:
        if slot is not None and self._renewing is not None:
            # On another connection it could come second, and enter again the lease that ends here.
            await asyncio.wait({self._renewing})
        with suppress(Unavailable):
            await self._start(self._primary.settle, buckets, slot)

    async def _undo(
        self, call: asyncio.Task[Admission], buckets: Sequence[Bucket], slot: Slot | None
    ) -> None:
        """Gives back what was admitted for somebody who has left while the store decided."""
        with suppress(Unavailable):
            if (await call).admitted:
                await self._settle(buckets, slot)

    def _start(self, verb: Callable[..., Awaitable[T]], *arguments: object) -> asyncio.Task[T]:
        """Calls the store, in a task of its own: whoever waits for it may leave, it is not torn off.

        Raises Unavailable while the breaker is open; so does the task if the store fails.
        """
        self._check()
        return self._own(self._in_turn(verb, *arguments))

    def _check(self) -> None:
        if self._last_error is not None:
            self._on_error()
            raise Unavailable(self._last_error)

    def _own(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        call = asyncio.create_task(work)
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return call

    async def _in_turn(self, verb: Callable[..., Awaitable[T]], *arguments: object) -> T:
        async with self._places:
            self._check()  # those before have found out meanwhile
            return await self._timed(verb, *arguments)

    async def _timed(self, verb: Callable[..., Awaitable[T]], *arguments: object) -> T:
        try:
            async with asyncio.timeout(self._timeout):
                return await verb(*arguments)
        except Exception as error:  # a client library raises all sorts, and none may fail a request
            self._failed(error)
            raise Unavailable(self._last_error) from error

    def _failed(self, error: Exception) -> None:
        self._on_error()
        opens = self._last_error is None
        self._last_error = _reason(error)
        if opens:
            self._probing = asyncio.create_task(self._probe())
            fields = {"store": self._name, "reason": self._last_error}
            _log.warning("store_unavailable", extra={"fields": fields})

    async def _probe(self) -> None:
        """Tries the store until it answers; then the breaker closes."""
        loop = asyncio.get_running_loop()
        since = loop.time()
        while self._last_error is not None:
            await asyncio.sleep(PROBE_EVERY)
            with suppress(Unavailable):
                await self._timed(self._primary.renew, _PROBE)
                self._last_error = None
        fields = {"store": self._name, "seconds": round(loop.time() - since, 3)}
        _log.info("store_recovered", extra={"fields": fields})


def _reason(error: Exception) -> str:
    """Redis' own word for it, as in `WRONGTYPE Operation against …`, else the exception's name.

    The rest of the text is left out: it may quote what was sent.
    """
    code = re.match(r"[A-Z]{2,}\b", str(error))
    return code[0] if code else type(error).__name__
