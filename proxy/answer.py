"""F3 answer: an upstream's answer: a head that has come, and a body that is coming.

It owns what is below it, the connection and the turn at the upstream, and whoever opened it closes
it (`async with`). An upstream is judged by how its answer ended, in the words of the record.
"""

from __future__ import annotations

import asyncio
from typing import Self

from proxy import sse
from proxy.circuit import Verdict
from proxy.connection import Receiver, UpstreamConnection
from proxy.errors import ProxyError, timed_out
from proxy.exchange import Exchange, Outcome, Upload
from proxy.framing import LAST_CHUNK, ResponseHead, chunk
from proxy.pool import Pool
from proxy.upstreams import Turn, Upstream

_JOINED = 64 * 1024  # bytes: a larger body is written by itself, to spare the copy
# Outcomes that are news of the upstream. Clients that leave say nothing, nor does what the operator
# ended, be it by a limit on the length of answers.
_FAILURES = (
    Outcome.UPSTREAM_ERROR,
    Outcome.UPSTREAM_TRUNCATED,
    Outcome.IDLE_TIMEOUT,
    Outcome.STALL_TIMEOUT,
)


class Call:
    """A request on its way on one connection, which goes back to its pool in every ending."""

    def __init__(self, connection: UpstreamConnection, pool: Pool) -> None:
        self.connection = connection
        self._pool = pool
        self._uploading: asyncio.Task[None] | None = None

    def send(self, head: bytes, body: bytes | Upload | None, exchange: Exchange) -> None:
        """Writes the request; a body that streams goes up beside the answer's coming down, as an
        upstream may answer before it has read everything."""
        if isinstance(body, Upload):
            self.connection.write(head)
            self._uploading = asyncio.create_task(self._upload(body, exchange))
            return
        body = body or b""
        exchange.bytes_up = len(body)
        if len(body) <= _JOINED:
            self.connection.write(head + body)
        else:
            self.connection.write(head)
            self.connection.write(body)
        self.connection.request_sent()

    async def _upload(self, body: Upload, exchange: Exchange) -> None:
        try:
            self.connection.client_pauses()
            async for piece in body.pieces:
                exchange.bytes_up += len(piece)
                self.connection.write(piece if body.length is not None else chunk(piece))
                await self.connection.drain()
                self.connection.client_pauses()
            if body.length is None:
                self.connection.write(LAST_CHUNK)
            self.connection.request_sent()
        except ProxyError as error:  # the client's doing: what went up must not look complete
            self.connection.fail(error)

    async def close(self) -> None:
        try:
            if self._uploading is not None:
                self._uploading.cancel()
                await asyncio.wait([self._uploading])
        finally:
            self._pool.release(self.connection)


class Answer:
    """An upstream's answer to one request.

    `bears_our_key`: so did its request. `is_plain`: its bytes can be read, as they are not compressed.
    `is_readable_stream`: events can be read from it, and added between them.
    """

    def __init__(
        self,
        head: ResponseHead,
        call: Call,
        upstream: Upstream,
        turn: Turn,
        exchange: Exchange,
        *,
        bears_our_key: bool = False,
    ) -> None:
        self.head = head
        self.upstream = upstream
        self.bears_our_key = bears_our_key
        encodings = head.values(b"content-encoding")
        self.is_plain = not encodings or all(each.lower() == b"identity" for each in encodings)
        self.is_stream = head.content_type == sse.MEDIA_TYPE
        self.is_readable_stream = self.is_stream and self.is_plain
        self._call = call
        self._turn = turn
        self._exchange = exchange
        self._opening: _Opening | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Gives back what it owns, and says how its upstream did."""
        outcome = self._exchange.outcome
        verdict = Verdict.FAILURE if outcome in _FAILURES else Verdict.NEITHER
        try:
            await self._call.close()
        finally:
            verdict = Verdict.SUCCESS if outcome is Outcome.COMPLETED else verdict
            self._turn.end(verdict, outcome and outcome.value)

    @property
    def stall_timeout(self) -> float:
        """How long a stream may go on without payload, in seconds."""
        return self.upstream.terms.settings.timeouts.stall

    @property
    def succeeded(self) -> bool:
        """Whether its status says that what was asked for follows."""
        return 200 <= self.head.status < 300

    async def begins_with_error(self) -> bool:
        """Whether the stream's first event is an error. Waits for that event; what came of the
        stream is delivered later. Raises ProxyError if the stream breaks off before."""
        opening = self._opening = _Opening(self._call.connection)
        stall = self.stall_timeout
        self._call.connection.deliver_to(opening)
        try:
            async with asyncio.timeout(stall):
                await opening.clear
        except TimeoutError:  # there were bytes, or `idle` would have run out
            raise timed_out(self.upstream.name, "stall", stall) from None
        return opening.event.is_error

    async def read(self, most: int) -> bytes:
        """The body, or as much of it as comes, up to about `most` bytes."""
        whole = _Whole(most)
        self.deliver_to(whole)
        await whole.done
        return bytes(whole.body)

    def deliver_to(self, receiver: Receiver) -> None:
        """Hands the body to `receiver`, from its first byte, as it comes."""
        opening, self._opening = self._opening, None
        if opening is not None:
            if held := bytes(opening.event.held):
                receiver.payload(held)
            if opening.endings:
                receiver.ended(opening.endings.pop())
                return
        self._call.connection.deliver_to(receiver)

    def pause(self) -> None:
        self._call.connection.pause()

    def resume(self) -> None:
        self._call.connection.resume()

    def hold(self) -> None:
        """Stops reading until the body is delivered, so that no silence counts."""
        self._call.connection.hold()

    def abort(self) -> None:
        """Hangs up: the upstream stops generating."""
        self._call.connection.abort()

    def fail(self, error: ProxyError) -> None:
        """Hangs up, and tells whoever receives the body why."""
        self._call.connection.fail(error)


class _Opening:
    """Receives a stream's beginning, until it is clear whether it is an error; what comes behind
    that is left to whoever receives it next."""

    def __init__(self, connection: UpstreamConnection) -> None:
        self.event = sse.FirstEvent()
        self.clear: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.endings: list[ProxyError | None] = []  # how the body has ended, if it has
        self._connection = connection

    def payload(self, data: bytes) -> None:
        if self.event.seen_in(data):
            self._connection.hold()
            if not self.clear.done():
                self.clear.set_result(None)

    def ended(self, error: ProxyError | None) -> None:
        self.endings.append(error)
        if self.clear.done():
            return
        if error is None:
            self.clear.set_result(None)
        else:
            self.clear.set_exception(error)


class _Whole:
    """Receives a small body whole."""

    def __init__(self, most: int) -> None:
        self.body = bytearray()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._most = most

    def payload(self, data: bytes) -> None:
        self.body += data
        if len(self.body) >= self._most:
            self.ended(None)

    def ended(self, error: ProxyError | None) -> None:
        if not self.done.done():
            self.done.set_result(None)
