"""F2 resolver: the addresses of one host, looked up without waiting on anybody else's name.

Event loops look names up in a handful of shared threads: one upstream whose name server hangs
would hold them all, and with them every other upstream, and the end of the process too. So each
host has a thread of its own while it is looked up, which nobody waits for at exit.
"""

from __future__ import annotations

import asyncio
import socket
import threading
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
        self._found_at = 0.0

    async def addresses(self) -> Addresses:
        """All addresses, in the system's order of preference. Raises OSError."""
        loop = asyncio.get_running_loop()
        lookup = self._lookup
        if lookup is None or (lookup.done() and not self._is_fresh(lookup, loop.time())):
            lookup = self._lookup = loop.create_future()
            threading.Thread(target=self._look_up, args=(loop, lookup), daemon=True).start()
        return await asyncio.shield(lookup)

    def _is_fresh(self, lookup: asyncio.Future[Addresses], now: float) -> bool:
        return lookup.exception() is None and now - self._found_at < _KEEP

    def _look_up(self, loop: asyncio.AbstractEventLoop, lookup: asyncio.Future[Addresses]) -> None:
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError as error:
            self._tell(loop, lookup.set_exception, error)
        else:
            self._tell(loop, self._found, lookup, found)

    @staticmethod
    def _tell(loop: asyncio.AbstractEventLoop, tell: Any, *arguments: Any) -> None:
        try:
            loop.call_soon_threadsafe(tell, *arguments)
        except RuntimeError:
            """The loop has closed meanwhile, and nobody waits any more."""

    def _found(self, lookup: asyncio.Future[Addresses], found: Any) -> None:
        self._found_at = asyncio.get_running_loop().time()
        lookup.set_result(found)
