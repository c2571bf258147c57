"""F2 pool: idle upstream connections of one origin, most recently used first."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Awaitable, Callable

from proxy.connection import UpstreamConnection
from proxy.errors import ProxyError
from proxy.resolver import Resolver

MAX_IDLE = 256  # connections kept
KEEP_IDLE = 25.0  # seconds one is kept: below most servers' own limit
# Seconds for which a lookup speaks for the connections that are there already. A busy one would be
# used on for ever, whatever becomes of the name: so a changed answer is followed within 30 s.
LOOKUP_HOLDS = 25.0

Connect = Callable[[], Awaitable[UpstreamConnection]]


class Pool:
    """Hands out connections; whoever takes one gives it back with `release`, in every ending.

    `resolver` is the one that `connect` asks; without one, all connections lead to one place.
    """

    def __init__(self, connect: Connect, resolver: Resolver | None = None) -> None:
        self._connect = connect
        self._resolver = resolver
        self._idle: list[tuple[float, UpstreamConnection]] = []
        self._closed = False

    def __repr__(self) -> str:
        return f"<Pool idle={len(self._idle)}{' closed' if self._closed else ''}>"

    async def acquire(self, *, fresh: bool = False) -> UpstreamConnection:
        """An idle connection, else a new one; always a new one with `fresh`.

        Now and then a new one all the same: its lookup says whether the idle ones still lead to
        where the name does.
        """
        asks_anew = self._resolver is not None and self._resolver.is_stale(LOOKUP_HOLDS)
        if not (fresh or asks_anew) and (idle := self._take_idle()):
            return idle
        try:
            return await self._connect()
        except ProxyError:
            # No answer is no news of the name: what worked a moment ago still may.
            if asks_anew and not fresh and (idle := self._take_idle()):
                return idle
            raise

    def _take_idle(self) -> UpstreamConnection | None:
        while self._idle:
            since, connection = self._idle.pop()
            age = asyncio.get_running_loop().time() - since
            if connection.reusable and age < KEEP_IDLE and self._is_sound(connection):
                return connection
            connection.abort()
        return None

    def release(self, connection: UpstreamConnection) -> None:
        """Takes a connection back: kept if its exchange ended cleanly, else closed."""
        now = asyncio.get_running_loop().time()
        if connection.reusable and not self._closed and len(self._idle) < MAX_IDLE:
            self._idle.append((now, connection))
        else:
            connection.abort()

    def sweep(self) -> None:
        """Closes what has been idle for too long; to be called now and then."""
        now = asyncio.get_running_loop().time()
        while self._idle and now - self._idle[0][0] >= KEEP_IDLE:
            self._idle.pop(0)[1].abort()

    def close(self) -> None:
        """Closes what is idle; what is in use is closed when it comes back."""
        self._closed = True
        while self._idle:
            self._idle.pop()[1].abort()

    def _is_sound(self, connection: UpstreamConnection) -> bool:
        leads_there = self._resolver is None or self._resolver.leads_to(connection.peer)
        return leads_there and not _has_input(connection)


def _has_input(connection: UpstreamConnection) -> bool:
    """Whether bytes, or the upstream's close, wait in the socket unread.

    The event loop has not seen them yet, so the connection still looks idle: what an upstream
    pushed there would be read as the answer to the next request (aiohttp #13656).
    """
    assert connection.transport is not None
    socket = connection.transport.get_extra_info("socket")
    poll = select.poll()
    poll.register(socket.fileno(), select.POLLIN)
    return bool(poll.poll(0))
