"""F2 downstream: the client's side of a connection, as far as aiohttp leaves it to us.

aiohttp runs one handler for each request and keeps connections alive. Four things are ours:

- `ClientConnection` reads requests with `requests`, not with aiohttp's parser (docs/decisions/0009):
  one at a time, so that pipelined ones wait as bytes, and what can't be read ends the connection.
- It also passes on what aiohttp keeps to itself: that the client reads too slowly, or has left.
- The clocks for a slow head and for a reader that takes nothing, which aiohttp does not have.
- `Sink` writes relayed answers straight to the transport. aiohttp's own responses add Date, Server
  and a content type, drop the upstream's reason phrase, and write every answer that they *return*
  with its last chunk, also one that was cut.
"""

from __future__ import annotations

import asyncio
import logging
import math
import select
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Protocol, cast

from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import ERROR, _ErrInfo

from proxy.errors import ProxyError
from proxy.framing import (
    LAST_CHUNK,
    Chunked,
    FramingError,
    Header,
    NoBody,
    ResponseHead,
    Sized,
    chunk,
)
from proxy.headers import STREAM_HEADERS, response_headers
from proxy.payload import Payload
from proxy.requests import RequestHead, RequestReader, request_body

_log = logging.getLogger("sluice.downstream")

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
Refuse = Callable[[ProxyError], web.Response]

_MAX_AHEAD = 64 * 1024  # bytes of pipelined requests that wait to be read
_LINGER = 5.0  # seconds in which what a refused client still sends is read and dropped

_MOST_LOOKED_AT = 100  # connections, in search of an idle one
_GONE = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR
_MAX_UNSENT = 128 * 1024  # bytes that the kernel takes for a client beyond what is on its way
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
    """A client's connection: aiohttp's, with our reader, flow control and clocks.

    A request's way: bytes → `_ahead` → `_reader`, then its body → `_payload`; the message waits in
    aiohttp's queue until the one before it is answered. `_ahead` holds what came behind it.
    """

    __slots__ = (
        "_ahead",
        "_body",
        "_flow",
        "_head_since",
        "_held",
        "_left",
        "_out",
        "_payload",
        "_reader",
        "_refuse",
        "_refused",
        "_server",
        "_taken",
        "_timeouts",
        "_waits_since",
    )

    def __init__(
        self, server: Server, *, timeouts: Timeouts, refuse: Refuse, **options: Any
    ) -> None:
        super().__init__(server, **options)
        self._parser = _Consumed(self)  # type: ignore[assignment]  # all that is left of aiohttp's
        self._server = server
        self._timeouts = timeouts
        self._refuse = refuse
        self._flow: Flow | None = None
        self._left: Callable[[], None] | None = None
        self._out: asyncio.Transport | None = None  # aiohttp forgets its own when it closes
        self._taken = 0  # how much the client had taken when that last changed
        self._waits_since: float | None = None  # and when that was, while bytes wait for it
        self._reader = RequestReader()
        self._body: Sized | Chunked | None = None  # of the request that is arriving
        self._payload = Payload(self._regulate)  # and where it goes
        self._ahead = b""  # what has come behind a request that nobody has begun to answer
        self._refused = False  # nothing is read any more
        self._held = False  # the client is not read from, as too much waits
        self._head_since: float | None = None  # since when a head is awaited, if one is

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def abort(self) -> None:
        self._server.silent.pop(self, None)
        if self._out is not None:
            self._out.abort()

    def serve(self, flow: Flow | None) -> None:
        """Says whom to tell about this client; None: nobody any more."""
        self._flow = flow
        if flow is not None and self.writing_paused:
            flow.pause()

    def outlive(self, left: Callable[[], None] | None) -> None:
        """Lets the handler go on when the client leaves; `left` is called then, instead of its being
        cancelled. None: no more."""
        self._left = left

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
            _reset(self._out)

    # How requests come.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._out = self.transport
        self._head_since = self._loop.time()
        if self._out is not None:
            _bound_unsent(self._out)
            self._server.silent[self] = None
            if self._server.is_full:
                self._server.make_room_for(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._server.silent.pop(self, None)
        self._out = None
        if self._left is not None:
            self._task_handler = None  # aiohttp would cancel it
            self._left()
        if self._flow is not None:
            self._flow.client_lost()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._server.silent.pop(self, None)
        if self._refused or self._close or self._force_close:
            return  # read and dropped: a close with unread bytes is a reset (RFC 9112 9.6)
        if self._body is not None:
            data = self._read_body(self._body, data)
        if data:
            self._ahead = self._ahead + data if self._ahead else data
            self.read_on()
        self._regulate()

    def read_on(self) -> None:
        """Reads what has come, at most one request ahead of the one that is being answered."""
        while self._ahead and self._body is None and not self._messages:
            ahead, self._ahead = self._ahead, b""
            try:
                found = self._reader.feed(ahead)
                if found is None:
                    self._await_head()
                    return
                head, self._ahead = found
                self._begin(head, request_body(head))
            except ProxyError as error:
                self._refuse_rest(error)

    def _begin(self, head: RequestHead, body: NoBody | Sized | Chunked) -> None:
        self._head_since = None
        if body.done or isinstance(body, NoBody):
            self._queue(_message(head), EMPTY_PAYLOAD)
            return
        self._payload = Payload(self._regulate)
        self._queue(_message(head), self._payload)
        self._body = body
        ahead, self._ahead = self._ahead, b""
        self._ahead = self._read_body(body, ahead)

    def _read_body(self, body: Sized | Chunked, data: bytes) -> bytes:
        """Passes a part of a body on; returns what is behind it."""
        try:
            piece = body.feed(data)
        except FramingError as error:
            self._refused, self._body = True, None
            message = f"The request's body is malformed: {error}."
            self._payload.fail(ProxyError("invalid_request", message, close=True))
            return b""
        if piece:
            self._payload.feed(piece)
        if body.behind:
            self._loop.call_soon(self.data_received, b"")
        if not body.done:
            return b""
        self._body = None
        self._payload.end()
        return body.surplus

    def _refuse_rest(self, error: ProxyError) -> None:
        """Ends the reading: requests before are answered, then `error` is, then all is over."""
        self._refused, self._ahead = True, b""
        self._queue(_ErrInfo(400, error, ""), Payload(self._regulate))

    def _queue(self, message: RawRequestMessage | _ErrInfo, payload: Any) -> None:
        self._messages.append((message, payload))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _regulate(self) -> None:
        """Reads from the client only while little of what it sent waits."""
        full = self._body is not None and (self._body.behind or self._payload.is_full)
        hold = full or len(self._ahead) > _MAX_AHEAD
        if hold != self._held and self._out is not None and not self._out.is_closing():
            self._held = hold
            (self._out.pause_reading if hold else self._out.resume_reading)()

    def _await_head(self) -> None:
        """Starts the clock of a head, once nothing is left to answer before it."""
        if self._head_since is None and self._waiter is not None and self._reader.begun:
            self._head_since = self._loop.time()

    def check_presence(self) -> None:
        """Looks whether a client that is not read from has left: nothing else would tell."""
        if self._held and self._out is not None and _has_left(self._out):
            self._out.abort()

    @property
    def is_idle(self) -> bool:
        """Whether it waits for a request of which nothing has come."""
        out, waits = self._out, self._waiter is not None and not self._reader.begun
        return waits and out is not None and not out.is_closing()

    def check_head(self, now: float) -> None:
        """Refuses a head that has been coming for too long, dripped or not sent at all.

        Between requests aiohttp's keep-alive clock runs, until something has come.
        """
        self._await_head()
        if self._head_since is not None and now - self._head_since > self._timeouts.head:
            if self._reader.begun and not self._refused:
                message = f"The request's head did not arrive within {self._timeouts.head:g} s."
                self._refuse_rest(ProxyError("request_timeout", message, close=True))
            else:
                self.force_close()

    def _process_keepalive(self) -> None:
        """aiohttp's end of an idle connection; where a head is awaited, `check_head` decides."""
        self._await_head()
        if self._head_since is None:
            super()._process_keepalive()
        else:
            self._keepalive_handle = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what could not be read; aiohttp's own would be logged with what came."""
        assert isinstance(exc, ProxyError)
        return self._refuse(exc)


class _Consumed:
    """What is left of aiohttp's parser: it is told when the next request begins to be answered."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection

    def message_consumed(self) -> None:
        self._connection.read_on()
        self._connection._regulate()


def _message(head: RequestHead) -> RawRequestMessage:
    """A head in aiohttp's terms."""
    return RawRequestMessage(
        method=head.method,
        path=head.target,
        version=HttpVersion11 if head.minor else HttpVersion10,
        headers=head.fields,
        raw_headers=head.headers,
        should_close=not head.keeps_alive,
        compression=None,
        upgrade=False,
        chunked=False,
        url=ERROR.url,  # nobody asks: what is forwarded is the target as it came
    )


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


def _has_left(transport: asyncio.Transport) -> bool:
    """Whether the client has closed its side, though nothing was read that says so."""
    connection = transport.get_extra_info("socket")
    poll = select.poll()
    poll.register(connection.fileno(), _GONE)
    return bool(poll.poll(0))


def _bound_unsent(transport: asyncio.Transport) -> None:
    """Lets the kernel take little beyond what is on its way. Linux would take megabytes for a client
    that reads nothing, and as much would be read from each one's upstream before it is held back."""
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    connection = transport.get_extra_info("socket")
    if option is not None and connection is not None:
        connection.setsockopt(socket.IPPROTO_TCP, option, _MAX_UNSENT)


def _reset(transport: asyncio.Transport) -> None:
    """Ends a connection with a reset. After a mere close the kernel would go on offering what was
    written, up to megabytes, to a client that takes nothing."""
    connection = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    transport.abort()


def _head_bytes(status: int, reason: bytes, fields: Iterable[Header]) -> bytes:
    lines = [b"HTTP/1.1 %d %b" % (status, reason)]
    lines += [name + b": " + value for name, value in fields]
    return b"\r\n".join(lines) + b"\r\n\r\n"


class Server(web.Server):
    """aiohttp's server of plain handlers, with our connections. `timeouts` is asked for each new
    connection, so that a reload holds for it. More than `most` connections are not taken.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        timeouts: Callable[[], Timeouts],
        refuse: Refuse,
        most: float = math.inf,
    ) -> None:
        super().__init__(handler, request_factory=_begin_request, handler_cancellation=True)
        self._timeouts = timeouts
        self._refuse = refuse
        self._most = most
        self._quiet_until = 0.0
        self.silent: dict[ClientConnection, None] = {}  # nothing has come of them yet; oldest first

    def __call__(self) -> ClientConnection:
        timeouts = self._timeouts()
        return ClientConnection(
            self,
            timeouts=timeouts,
            refuse=self._refuse,
            loop=self._loop,
            keepalive_timeout=timeouts.keep_alive,
            access_log=None,
            lingering_time=_LINGER,
        )

    def sweep(self) -> None:
        """One look at every connection, for once a second: no timer for each head or answer."""
        now = self._loop.time()
        for connection in self._clients:
            connection.check_head(now)
            connection.check_reader(now)
            connection.check_presence()

    @property
    def is_full(self) -> bool:
        """Whether there are more connections than can be served."""
        return len(self._connections) > self._most

    def make_room_for(self, newcomer: ClientConnection) -> None:
        """Ends the connection that has been silent since it began for the longest time; else one of
        the oldest that is idle; else the new one."""
        silent = (each for each in self.silent if each is not newcomer)
        oldest = cast(Iterable[ClientConnection], islice(self._connections, _MOST_LOOKED_AT))
        leaving = next(chain(silent, (each for each in oldest if each.is_idle)), newcomer)
        leaving.abort()
        now = self._loop.time()
        if now >= self._quiet_until:
            self._quiet_until = now + 60
            _log.warning("connections_full", extra={"fields": {"most": self._most}})

    @property
    def owes(self) -> bool:
        """Whether a client has yet to take bytes that were written for it."""
        return any(connection.owes for connection in self._clients)

    @property
    def _clients(self) -> list[ClientConnection]:
        return [cast(ClientConnection, connection) for connection in self.connections]


# aiohttp's stand-in for what could not be read is HTTP/1.0; the sender rather speaks 1.1.
_UNREAD = ERROR._replace(version=HttpVersion11)


def _begin_request(
    message: RawRequestMessage,
    payload: Any,
    protocol: web.RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
) -> web.BaseRequest:
    connection = cast(ClientConnection, protocol)
    message = _UNREAD if message is ERROR else message
    return web.BaseRequest(message, payload, protocol, writer, task, connection.loop)


class LastAnswer(web.Response):
    """An answer after which the connection ends: our side at once, so that the client sees it, and
    the client's when it has stopped sending, or after `_LINGER`. Closed at once, with bytes unread,
    TCP would reset it, and take the answer from the client's hands (RFC 9112 9.6)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.force_close()

    async def write_eof(self, data: bytes = b"") -> None:
        request = self._req
        await super().write_eof(data)
        if request is not None and request.transport and not request.transport.is_closing():
            request.transport.write_eof()


class Sink(web.StreamResponse):
    """The client's side of a relayed answer: a head of its own, then the body's bytes.

    The head goes out with the first bytes of the body if those are there already, so that a small
    answer is one packet; `flush` sends it alone. `finish` ends the answer as whole; `cut` ends the
    connection so that nobody can take the answer for whole.
    """

    def __init__(
        self,
        request: web.BaseRequest,
        head: ResponseHead,
        ours: Iterable[Header],
        *,
        stream: bool,
        limited: bool = False,
    ) -> None:
        super().__init__(status=head.status)
        self._connection = cast(ClientConnection, request.protocol)
        transport = request.transport
        if transport is None:
            raise asyncio.CancelledError("the client has left")
        self._out = transport
        self._writer = request.writer
        fields = response_headers(head.headers, status=head.status, stream=stream, limited=limited)
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

    @property
    def keeps_up(self) -> bool:
        """Whether the client takes what is written."""
        return not self._connection.writing_paused

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
            _reset(self._out)
        else:
            self._out.close()

    # What aiohttp calls when the handler has returned. Everything is written by then.

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        return request.writer

    async def write_eof(self, data: bytes = b"") -> None:
        """Waits for a reader that does not keep up, before the next pipelined request is answered:
        small answers that nobody reads would pile up, each below the high-water mark."""
        await self._writer.drain()


class Nowhere(Sink):
    """Where an answer goes that is read to its end though its client has left."""

    keeps_up = False

    def __init__(self) -> None: ...

    def serve(self, flow: Flow | None) -> None: ...

    def write(self, payload: bytes) -> None: ...  # type: ignore[override]

    def flush(self) -> None: ...

    def finish(self) -> None: ...

    def cut(self) -> None: ...
