"""F2 payload: a request's body on its way in: fed by its connection, taken by whoever reads it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from proxy.errors import ProxyError

MAX_UNREAD = 256 * 1024  # bytes that wait to be taken; beyond, the client is not read from


class Payload:
    """One body. It ends (`end`), or fails (`fail`) and then never ends.

    `taken` is called whenever something was taken, so that a connection that stopped reading can go
    on. aiohttp sees the part of a stream reader that it needs to read and drop what is left of a
    body when its answer is out.
    """

    def __init__(self, taken: Callable[[], None]) -> None:
        self._taken = taken
        self._pieces: list[bytes] = []
        self._unread = 0
        self._ended = False
        self._error: ProxyError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_taken(self) -> bool:
        """Whether all of it has come, and has been taken."""
        return self._ended and not self._pieces

    @property
    def is_full(self) -> bool:
        return self._unread > MAX_UNREAD

    def feed(self, data: bytes) -> None:
        self._pieces.append(data)
        self._unread += len(data)
        self._wake()

    def end(self) -> None:
        self._ended = True
        self._wake()

    def fail(self, error: ProxyError) -> None:
        if not self._ended and self._error is None:
            self._error = error
            self._wake()

    def check(self) -> None:
        """Raises what it has failed with, if it has."""
        if self._error is not None:
            raise self._error

    async def take(self) -> bytes:
        """What has come, waiting for it if need be; empty at the end. Raises what it failed with."""
        while not self._pieces and not self._ended:
            self.check()
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self.take_nowait()

    def take_nowait(self) -> bytes:
        """What has come; empty if nothing has."""
        pieces, self._pieces, self._unread = self._pieces, [], 0
        self._taken()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # What aiohttp asks of it.

    def is_eof(self) -> bool:
        """Whether there is nothing left to read and drop."""
        return self._ended

    async def readany(self) -> bytes:
        """For reading and dropping, also what is malformed: the client is told first."""
        self._error = None
        return await self.take()

    def set_exception(self, error: BaseException, cause: BaseException | None = None) -> None:
        """Nothing more comes: the connection was lost, or is not read from any more."""
        self.fail(ProxyError("invalid_request", "The request's body was cut short.", close=True))
