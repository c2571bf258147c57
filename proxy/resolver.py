"""F2 resolver: the addresses of one host, looked up without waiting on anybody else's name.

Event loops look names up in a handful of shared threads: one upstream whose name server hangs
would hold them all, and with them every other upstream, and the end of the process too. So each
host has a thread of its own while it is looked up, which nobody waits for at exit.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import suppress
from typing import Any

# Seconds for which an answer holds: a burst of connections costs one lookup, and a changed answer
# is followed soon.
_KEEP = 5.0

Addresses = list[tuple[Any, ...]]  # as socket.getaddrinfo gives them


class Resolver:
    """Looks up one host and port; whoever asks meanwhile shares the lookup."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._lookup: asyncio.Future[Addresses] | None = None
        self._told_at = 0.0  # when the last lookup ended, well or not
        self._newest: Addresses = []

    async def addresses(self) -> Addresses:
        """All addresses, in the system's order of preference. Raises OSError."""
        loop = asyncio.get_running_loop()
        lookup = self._lookup
        if lookup is None or (lookup.done() and (lookup.exception() or self.is_stale(_KEEP))):
            lookup = loop.create_future()
            threading.Thread(target=self._look_up, args=(loop, lookup), daemon=True).start()
            self._lookup = lookup  # now that somebody will answer it
        return await asyncio.shield(lookup)

    def is_stale(self, after: float) -> bool:
        """Whether the last lookup is older than `after` seconds, and none is under way."""
        if self._lookup is not None and not self._lookup.done():
            return False
        return asyncio.get_running_loop().time() - self._told_at >= after

    def leads_to(self, address: tuple[object, ...]) -> bool:
        """Whether the newest answer has this address."""
        return any(address[:2] == found[4][:2] for found in self._newest)

    def _look_up(self, loop: asyncio.AbstractEventLoop, lookup: asyncio.Future[Addresses]) -> None:
        found: Addresses | OSError
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError as error:
            found = error
        with suppress(RuntimeError):  # the loop has closed meanwhile, and nobody waits any more
            loop.call_soon_threadsafe(self._told, lookup, found)

    def _told(self, lookup: asyncio.Future[Addresses], found: Addresses | OSError) -> None:
        self._told_at = asyncio.get_running_loop().time()
        if isinstance(found, OSError):
            lookup.set_exception(found)
        else:
            self._newest = found
            lookup.set_result(found)
