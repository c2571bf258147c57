"""F3 forward: asks an upstream, up to the point where its answer is there.

Whatever happens in here can still become any answer, for the client has not seen a byte yet. An
`Answer` is a head that has come and a body that is coming. It owns the connection below it, and
whoever opened it closes it (`async with`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Self

from proxy import sse
from proxy.config import Route
from proxy.connection import Receiver, UpstreamConnection
from proxy.errors import ProxyError, Source
from proxy.exchange import Ask, Exchange, Phase, Upload
from proxy.framing import LAST_CHUNK, Header, ResponseHead, chunk
from proxy.headers import request_headers
from proxy.pool import Pool
from proxy.upstreams import Upstream

_JOINED = 64 * 1024  # bytes: a larger body is written by itself, to spare the copy


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
    """An upstream's answer: its head, and its body as it comes."""

    def __init__(self, head: ResponseHead, call: Call) -> None:
        self.head = head
        self.is_stream = head.content_type == sse.MEDIA_TYPE
        self._call = call

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._call.close()

    @property
    def is_plain(self) -> bool:
        """Whether its bytes can be read and added to, as they are not compressed."""
        return all(each.lower() == b"identity" for each in self.head.values(b"content-encoding"))

    def deliver_to(self, receiver: Receiver) -> None:
        """Hands the body to `receiver`, from its first byte, as it comes."""
        self._call.connection.deliver_to(receiver)

    def pause(self) -> None:
        self._call.connection.pause()

    def resume(self) -> None:
        self._call.connection.resume()

    def abort(self) -> None:
        """Hangs up: the upstream stops generating."""
        self._call.connection.abort()


class Forwarder:
    """Opens answers. `clock` gives monotonic seconds."""

    def __init__(self, upstreams: Mapping[str, Upstream], clock: Callable[[], float]) -> None:
        self._upstreams = upstreams
        self._clock = clock

    async def open(self, route: Route, ask: Ask, exchange: Exchange) -> Answer:
        """The answer to `ask`. Raises ProxyError if there is none to relay."""
        upstream = self._upstreams[route.upstreams[0]]
        exchange.phase = Phase.WAITING
        exchange.upstream = upstream.name
        exchange.attempts += 1
        result = "cancelled"
        try:
            answer = await self._attempt(upstream, ask, exchange)
            result = _result(answer.head.status)
            return answer
        except ProxyError as error:
            if error.kind.source is Source.UPSTREAM:
                result = error.code
            raise
        finally:
            exchange.attempt_results.append((upstream.name, result))
            if result != "cancelled":
                upstream.last_error = None if result == "answer" else result

    async def _attempt(self, upstream: Upstream, ask: Ask, exchange: Exchange) -> Answer:
        """Asks on a pooled connection, and once more on a fresh one if that one was dead.

        A reused connection that ends before any byte came was, in all likelihood, closed while
        idle, and the request never read: the one case in which a POST may be sent again (RFC 9112
        9.3.1). A body that streams can't be sent again, so it gets a fresh connection at once.
        """
        connection = await upstream.pool.acquire(fresh=isinstance(ask.body, Upload))
        try:
            return await self._ask(connection, upstream, ask, exchange)
        except ProxyError as error:
            stale = connection.reused and not connection.answered
            if not stale or error.code != "upstream_aborted":
                raise
        connection = await upstream.pool.acquire(fresh=True)
        return await self._ask(connection, upstream, ask, exchange)

    async def _ask(
        self, connection: UpstreamConnection, upstream: Upstream, ask: Ask, exchange: Exchange
    ) -> Answer:
        call = Call(connection, upstream.pool)
        try:
            timeouts = upstream.timeouts
            connection.begin(
                ask.method,
                first_byte=timeouts.first_byte,
                idle=timeouts.idle,
                total=timeouts.total,
            )
            exchange.forwarded = self._clock()
            call.send(_request_head(upstream, ask), ask.body, exchange)
            head = await connection.head()
            exchange.first_byte = self._clock()
            if head.status == 401 and upstream.injects:
                # Its text is not shown: it can quote the key.
                raise ProxyError(
                    "upstream_auth",
                    f"Upstream '{upstream.name}' refused the key that this proxy is configured "
                    "with. Its operator must correct it; the caller can't.",
                )
        except BaseException:
            connection.abort()
            await call.close()
            raise
        return Answer(head, call)


def _request_head(upstream: Upstream, ask: Ask) -> bytes:
    fields = request_headers(
        ask.headers,
        upstream.rules,
        dropped=upstream.dropped,
        credential=upstream.credential(),
        framing=_framing(ask.body),
        identity=ask.identity,
    )
    lines = [b"%b %b%b HTTP/1.1" % (ask.method.encode(), upstream.prefix, ask.target)]
    lines += [name + b": " + value for name, value in fields]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _framing(body: bytes | Upload | None) -> Header | None:
    if body is None:
        return None
    length = len(body) if isinstance(body, bytes) else body.length
    if length is None:
        return (b"Transfer-Encoding", b"chunked")
    return (b"Content-Length", b"%d" % length)


def _result(status: int) -> str:
    """The label of an attempt that got a response; 429 and 5xx are no answer (interface, §3)."""
    if status == 429:
        return "rate_limited"
    return "server_error" if status >= 500 else "answer"
