"""F2 downstream: the client's side of a connection, as far as aiohttp leaves it to us.

aiohttp reads requests and keeps connections alive. Three things are ours:

- `Sink` writes relayed answers straight to the transport. aiohttp's own responses add Date, Server
  and a content type, drop the upstream's reason phrase, and write every answer that they *return*
  with its last chunk, also one that was cut.
- `ClientConnection` passes on what aiohttp keeps to itself: that the client reads too slowly, that
  it has left, and that a request could not be parsed.
- the clocks for a slow head and for a reader that takes nothing, which aiohttp does not have.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol, cast

from aiohttp import HttpVersion11, StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import LineTooLong

from proxy.errors import ProxyError
from proxy.framing import LAST_CHUNK, Header, ResponseHead, chunk
from proxy.headers import STREAM_HEADERS, response_headers

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
Refuse = Callable[[ProxyError], web.Response]

# Bytes; they differ so that aiohttp's one error for both tells which was meant.
_MAX_LINE = 16 * 1024
_MAX_FIELD = 32 * 1024

_NO_LINGER = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """`client_timeouts` of the config, in seconds."""

    head: float
    keep_alive: float
    write: float


class Flow(Protocol):
    """Whoever writes to a client, and wants to know how that goes."""

    def pause(self) -> None:
        """The client does not keep up."""

    def resume(self) -> None:
        """It has caught up."""

    def client_lost(self) -> None:
        """It has left."""


class ClientConnection(web.RequestHandler):
    """A client's connection: aiohttp's, plus flow control and clocks."""

    __slots__ = (
        "_arriving",
        "_dripping",
        "_flow",
        "_head_began",
        "_out",
        "_refuse",
        "_taken",
        "_timeouts",
        "_waits_since",
    )

    def __init__(
        self, server: Server, *, timeouts: Timeouts, refuse: Refuse, **options: Any
    ) -> None:
        super().__init__(server, **options)
        self._timeouts = timeouts
        self._refuse = refuse
        self._flow: Flow | None = None
        self._out: asyncio.Transport | None = None  # aiohttp forgets its own when it closes
        self._taken = 0  # how much the client had taken when that last changed
        self._waits_since: float | None = None  # and when that was, while bytes wait for it
        self._arriving: StreamReader | None = None  # the body of the last request
        self._head_began: float | None = None  # since when a head is awaited, if one is
        self._dripping = False  # some of that head has come

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def serve(self, flow: Flow | None) -> None:
        """Says whom to tell about this client; None: nobody any more."""
        self._flow = flow
        if flow is not None and self.writing_paused:
            flow.pause()

    # How the client reads.

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._flow is not None:
            self._flow.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._flow is not None:
            self._flow.resume()

    @property
    def owes(self) -> bool:
        """Whether bytes that were written wait in our buffer, also after the last answer's end."""
        return self._out is not None and self._out.get_write_buffer_size() > 0

    def check_reader(self, now: float) -> None:
        """Ends the connection of a client that has taken nothing for too long of what it is owed."""
        if self._out is None or not self.owes:
            self._waits_since = None
            return
        taken = _taken(self._out)
        if self._waits_since is None or taken != self._taken:
            self._taken, self._waits_since = taken, now
        elif now - self._waits_since > self._timeouts.write:
            self._out.abort()

    # How requests come.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._out = self.transport
        self._head_began = self._loop.time()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._out = None
        if self._flow is not None:
            self._flow.client_lost()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._current_request is None and self._body_is_over:
            self._dripping = True
            if self._head_began is None:
                self._head_began = self._loop.time()
        super().data_received(data)
        self._fail_body()

    @property
    def _body_is_over(self) -> bool:
        """False while the rest of a refused body comes, which aiohttp reads and drops."""
        return self._arriving is None or self._arriving.is_eof()

    def _fail_body(self) -> None:
        """aiohttp queues what is wrong with a body as if it were a next request, and lets whoever
        reads the body wait for ever."""
        if self._body_is_over or not self._messages:
            return
        message, _ = self._messages[-1]
        if not isinstance(message, RawRequestMessage) and self._arriving is not None:
            self._arriving.set_exception(web.RequestPayloadError("malformed"))

    def request_began(self, body: StreamReader) -> None:
        """The head is whole."""
        self._arriving = body
        self._head_began = None
        self._dripping = False

    def check_head(self, now: float) -> None:
        """Refuses a head that has been coming for too long, dripped or not sent at all."""
        if self._head_began is None or now - self._head_began <= self._timeouts.head:
            return
        if self.transport is not None and self._dripping:
            error = ProxyError(
                "request_timeout",
                f"The request's head did not arrive within {self._timeouts.head:g} s.",
                close=True,
            )
            self.transport.write(_rendered(self._refuse(error)))
        self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what aiohttp could not parse; its own would be logged with what came."""
        return self._refuse(_parse_error(exc))


# Where struct tcp_info (linux/tcp.h) has tcpi_bytes_acked, since Linux 4.1.
_BYTES_ACKED = slice(120, 128)


def _taken(transport: asyncio.Transport) -> int:
    """A measure that changes whenever the client takes something: bytes that its TCP acknowledged.

    Our own buffer would not do: Linux lets us write again only when a third of the kernel's, up to
    megabytes, is free. It is all there is elsewhere.
    """
    option = getattr(socket, "TCP_INFO", None)
    if option is None:
        return transport.get_write_buffer_size()
    connection = transport.get_extra_info("socket")
    info: bytes = connection.getsockopt(socket.IPPROTO_TCP, option, _BYTES_ACKED.stop)
    return int.from_bytes(info[_BYTES_ACKED], sys.byteorder)


def _parse_error(exc: BaseException | None) -> ProxyError:
    """aiohttp's parser errors in our vocabulary; its texts quote the request and are dropped."""
    if isinstance(exc, LineTooLong):
        if exc.args[1] == _MAX_LINE:
            return ProxyError("uri_too_long", "The request line is too long.", close=True)
        return ProxyError("headers_too_large", "A header of the request is too long.", close=True)
    if exc is not None and "Too many headers" in str(exc):
        return ProxyError("headers_too_large", "The request has too many headers.", close=True)
    return ProxyError("invalid_request", "The request is not valid HTTP/1.1.", close=True)


def _rendered(response: web.Response) -> bytes:
    """A response as bytes, for a connection on which aiohttp has no request to answer."""
    assert isinstance(response.body, bytes)
    fields = [(key.encode(), value.encode()) for key, value in response.headers.items()]
    fields.append((b"Content-Length", b"%d" % len(response.body)))
    reason = HTTPStatus(response.status).phrase.encode()
    return _head_bytes(response.status, reason, fields) + response.body


def _head_bytes(status: int, reason: bytes, fields: Iterable[Header]) -> bytes:
    lines = [b"HTTP/1.1 %d %b" % (status, reason)]
    lines += [name + b": " + value for name, value in fields]
    return b"\r\n".join(lines) + b"\r\n\r\n"


class Server(web.Server):
    """aiohttp's server of plain handlers, with our connections.

    Bodies are not inflated: what the client sent is what the upstream gets. `timeouts` is asked for
    each new connection, so that a reload holds for it.
    """

    def __init__(
        self, handler: Handler, *, timeouts: Callable[[], Timeouts], refuse: Refuse
    ) -> None:
        super().__init__(handler, request_factory=_begin_request, handler_cancellation=True)
        self._timeouts = timeouts
        self._refuse = refuse

    def __call__(self) -> ClientConnection:
        timeouts = self._timeouts()
        return ClientConnection(
            self,
            timeouts=timeouts,
            refuse=self._refuse,
            loop=self._loop,
            keepalive_timeout=timeouts.keep_alive,
            access_log=None,
            auto_decompress=False,
            max_line_size=_MAX_LINE,
            max_field_size=_MAX_FIELD,
        )

    def sweep(self) -> None:
        """One look at every connection, for once a second: no timer for each head or answer."""
        now = self._loop.time()
        for connection in self._clients:
            connection.check_head(now)
            connection.check_reader(now)

    @property
    def owes(self) -> bool:
        """Whether a client has yet to take bytes that were written for it."""
        return any(connection.owes for connection in self._clients)

    @property
    def _clients(self) -> list[ClientConnection]:
        return [cast(ClientConnection, connection) for connection in self.connections]


def _begin_request(
    message: RawRequestMessage,
    payload: StreamReader,
    protocol: web.RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
) -> web.BaseRequest:
    connection = cast(ClientConnection, protocol)
    connection.request_began(payload)
    if message.method == "UNKNOWN":
        # aiohttp's stand-in for what it could not parse, as HTTP/1.0; the sender rather speaks 1.1.
        message = message._replace(version=HttpVersion11)
    return web.BaseRequest(message, payload, protocol, writer, task, connection.loop)


class Sink(web.StreamResponse):
    """The client's side of a relayed answer: a head of its own, then the body's bytes.

    The head goes out with the first bytes of the body if those are there already, so that a small
    answer is one packet; `flush` sends it alone. `finish` ends the answer as whole; `cut` ends the
    connection so that nobody can take the answer for whole.
    """

    def __init__(
        self, request: web.BaseRequest, head: ResponseHead, ours: Iterable[Header], *, stream: bool
    ) -> None:
        super().__init__(status=head.status)
        self._connection = cast(ClientConnection, request.protocol)
        transport = request.transport
        if transport is None:
            raise asyncio.CancelledError("the client has left")
        self._out = transport
        self._writer = request.writer
        fields = response_headers(head.headers, stream=stream)
        if stream:
            fields.extend(STREAM_HEADERS)
        fields.extend(ours)
        empty = request.method == "HEAD" or head.status in (204, 304)
        sized = not stream and bool(head.values(b"content-length"))
        modern = request.version >= HttpVersion11
        self._chunked = modern and not sized and not empty
        if self._chunked:
            fields.append((b"Transfer-Encoding", b"chunked"))
        self._until_close = not (modern or sized or empty)
        self._keep_alive = request.keep_alive and modern
        if not self._keep_alive:
            fields.append((b"Connection", b"close"))
        self._head = _head_bytes(head.status, head.reason, fields)

    def serve(self, flow: Flow | None) -> None:
        """Says whom to tell that the client reads too slowly, or has left."""
        self._connection.serve(flow)

    def write(self, payload: bytes) -> None:  # type: ignore[override]  # never waits: see Flow
        if self._chunked:
            payload = chunk(payload)
        if self._head:
            payload, self._head = self._head + payload, b""
        self._out.write(payload)

    def flush(self) -> None:
        """Sends the head, if it has not gone out with the body's first bytes."""
        if self._head:
            head, self._head = self._head, b""
            self._out.write(head)

    def finish(self) -> None:
        """The answer is whole."""
        self.flush()
        if self._chunked:
            self._out.write(LAST_CHUNK)

    def cut(self) -> None:
        """The answer is not whole, and does not look so: no last chunk, and the connection ends.

        A body until close has no other end than that; only a reset tells it from a whole one.
        """
        self.flush()
        self._keep_alive = False
        if self._until_close:
            linger = self._out.get_extra_info("socket")
            linger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            self._out.abort()
        else:
            self._out.close()

    # What aiohttp calls when the handler has returned. Everything is written by then.

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        return request.writer

    async def write_eof(self, data: bytes = b"") -> None:
        """Waits for a reader that does not keep up, before the next pipelined request is answered:
        small answers that nobody reads would pile up, each below the high-water mark."""
        await self._writer.drain()
