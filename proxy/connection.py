"""F2 connection: one TCP connection to an upstream, which serves one exchange after another.

Why not aiohttp's client: bytes that an upstream pushes on an idle pooled connection become the next
request's answer there (aiohttp #13656), a head that drips byte by byte never times out, its parser
is lenient in production, and it costs more than everything else in a relayed request together.

An exchange walks through these states; whatever breaks the walk goes to whoever waits, the caller
of `head` or the receiver of the body, as one ProxyError:

    IDLE ── begin ──► HEAD ── final head read ──► BODY ── its own end ──► IDLE (or CLOSED)
      └────── any byte, or the upstream's close ──────────────────────────► CLOSED

The body is pushed, not pulled: in BODY each `data_received` hands its payload to the receiver in
the same call, without a task switch. Two clocks watch: `first_byte` until the head is whole, and
`idle` between two reads of the body, which stands still while reading is paused.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, cast

from aiohappyeyeballs import AddrInfoType, start_connection

from proxy.errors import ProxyError, timed_out
from proxy.framing import MAX_HEAD, Body, FramingError, HeadReader, ResponseHead, body_of
from proxy.resolver import Resolver

_BACKLOG = 64 * 1024  # bytes of a body held while nobody receives it yet
_TLS_RECORD = 16 * 1024  # bytes of payload that one holds at most (RFC 8446 5.1)
_HAPPY_EYEBALLS_DELAY = 0.25  # seconds until the next address is tried too (RFC 8305 5)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where connections go: host and port, `tls` for https, `label` for messages.

    `egress` is the host:port of the forward proxy on the way, if there is one; `resolver` finds
    whoever comes first.
    """

    host: str
    port: int
    tls: ssl.SSLContext | None
    label: str
    resolver: Resolver
    egress: str | None = None

    @property
    def authority(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def place(self) -> str:
        """For the log: a client has no business with addresses."""
        return self.authority + (f" through {self.egress}" if self.egress else "")


class Receiver(Protocol):
    """Whoever takes an answer's body."""

    def payload(self, data: bytes) -> None:
        """Some bytes of the body, never none."""

    def ended(self, error: ProxyError | None) -> None:
        """The body is whole, or `error` says why it never will be. Called once."""


class State(Enum):
    IDLE = "idle"
    HEAD = "waiting for a head"
    BODY = "in a body"
    CLOSED = "closed"


class UpstreamConnection(asyncio.Protocol):
    """One connection. `label` names the upstream in messages.

    `reused` is true once an exchange has ended on it and another begins: only then may its death
    before the first byte be nobody's fault (RFC 9112 9.3.1).
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.state = State.IDLE
        self.reused = False
        self.answered = False  # a byte has come in this exchange
        self.transport: asyncio.Transport | None = None
        self.peer: tuple[object, ...] = ()  # the address at the other end
        self._tls: ssl.SSLObject | None = None
        self._loop = asyncio.get_running_loop()
        self._method = ""
        self._reader = HeadReader()
        self._head: asyncio.Future[ResponseHead] | None = None
        self._body: Body | None = None
        self._keeps_alive = False
        self._request_sent = False
        self._client_pauses = False
        self._receiver: Receiver | None = None
        self._backlog: list[bytes] = []
        self._backlog_size = 0
        self._ending: list[ProxyError | None] = []  # how the body ended, until someone is told
        self._writable: asyncio.Future[None] | None = None
        self._write_paused = False
        self._held = False  # reading stands still, as nobody receives yet,
        self._paused = False  # or as the receiver does not keep up,
        self._behind = False  # or as what was read comes in too many chunks for one turn
        self._stands = False
        self._silence = Clock(self._loop, self._fell_silent)
        self._total = Clock(self._loop, self._took_too_long)
        self._first_byte_timeout = self._idle_timeout = 0.0

    def __repr__(self) -> str:
        return f"<UpstreamConnection {self.label} {self.state.value}>"

    # The exchange, as its owner drives it.

    def begin(self, method: str, *, first_byte: float, idle: float, total: float | None) -> None:
        """Starts an exchange. The timeouts are in seconds."""
        assert self.state is State.IDLE
        self.state = State.HEAD
        self._method = method
        self._reader = HeadReader()
        self._head = self._loop.create_future()
        self._body = None
        self._receiver = None
        self._request_sent = self._client_pauses = False
        self._backlog, self._backlog_size, self._ending = [], 0, []
        self.answered = False
        self._first_byte_timeout = first_byte
        self._idle_timeout = idle
        if total is not None:
            self._total.start(total)

    def write(self, data: bytes) -> None:
        """Sends a part of the request; the wait for the answer begins anew."""
        if self.transport is not None and self.state is not State.CLOSED:
            self.transport.write(data)
            self._client_pauses = False
            self._listen()

    def client_pauses(self) -> None:
        """Says that the request's next part has not come: nothing for the upstream to be late for."""
        self._client_pauses = True
        self._silence.stop()

    def request_sent(self) -> None:
        """Says that the request is whole: without it the connection is not used again."""
        self._request_sent, self._client_pauses = True, False
        self._listen()

    def _listen(self) -> None:
        """From now on silence counts, unless it is ours or the client's."""
        if self.state is State.HEAD:
            self._silence.start(self._first_byte_timeout)
        elif self.state is State.BODY and not (self._client_pauses or self._stands):
            self._silence.start(self._idle_timeout)

    async def drain(self) -> None:
        """Waits while the upstream does not take what was written; returns when it is lost too."""
        if self._write_paused and self.state is not State.CLOSED:
            self._writable = self._loop.create_future()
            await self._writable

    async def head(self) -> ResponseHead:
        """The final response head. Raises ProxyError: aborted, invalid, timeout."""
        assert self._head is not None
        return await self._head

    def deliver_to(self, receiver: Receiver) -> None:
        """Hands the body to `receiver`: at once what has come already, then as it comes."""
        self._receiver = receiver
        backlog, self._backlog, self._backlog_size = self._backlog, [], 0
        if backlog:
            receiver.payload(backlog[0] if len(backlog) == 1 else b"".join(backlog))
        if self._ending:
            receiver.ended(self._ending.pop())
        if self._receiver is receiver:  # or has it had enough already?
            self._regulate(held=False, paused=self._paused)

    def hold(self) -> None:
        """Delivers nothing more, and stops reading, until there is another receiver."""
        if self.state is State.BODY:
            self._receiver = None
            self._regulate(held=True, paused=self._paused)

    def pause(self) -> None:
        """Stops reading, as the client does not keep up; a body that is over is not held up, as its
        connection may be another's by the time the client has caught up."""
        if self.state is State.BODY:
            self._regulate(held=self._held, paused=True)

    def resume(self) -> None:
        """Reads on; the time spent paused does not count as silence."""
        self._regulate(held=self._held, paused=False)

    def _regulate(self, *, held: bool, paused: bool) -> None:
        """Reads only while there is no reason not to."""
        self._held, self._paused = held, paused
        stood, self._stands = self._stands, held or paused or self._behind
        if self.transport is None or stood == self._stands:
            return
        if self._stands:
            self._silence.stop()
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()
            if self.state is State.BODY:
                self._listen()

    @property
    def reusable(self) -> bool:
        """Whether its exchange ended so that another may follow."""
        return self.state is State.IDLE and self.transport is not None

    def abort(self) -> None:
        """Closes at once and tells nobody: the upstream sees it, and stops generating."""
        self._receiver = None
        self._close(None)

    def fail(self, error: ProxyError) -> None:
        """Ends the exchange with `error`, for whoever waits for its head or receives its body."""
        self._close(error)
        self._tell(error)

    # What the transport tells.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._tls = transport.get_extra_info("ssl_object")
        self.peer = tuple(transport.get_extra_info("peername") or ())

    def data_received(self, data: bytes) -> None:
        body = self._body
        if body is None:
            self._head_received(data)
            return
        self._silence.touch()
        try:
            payload = body.feed(data)
        except FramingError as error:
            self.fail(self._invalid(error))
            return
        if payload:
            if self._receiver is not None:
                self._receiver.payload(payload)
            else:
                self._hold(payload)
        if self.state is not State.BODY:
            return  # the receiver has closed it
        if body.behind or self._behind:
            self._behind = body.behind
            self._regulate(held=self._held, paused=self._paused)
        if body.behind:
            self._loop.call_soon(self._catch_up, body)
        elif body.done:
            self._complete(body)

    def _catch_up(self, body: Body) -> None:
        if self._body is body:
            self.data_received(b"")

    def eof_received(self) -> bool:
        self._lost(cleanly=self._tls is None or self._ends_by_close_notify(self._tls))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost(cleanly=self._tls is not None and self._ends_by_close_notify(self._tls))
        self.transport = None

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        self._wake_writer()

    def _ends_by_close_notify(self, tls: ssl.SSLObject) -> bool:
        """Takes what TLS still holds, and says whether the upstream itself has ended there.

        A FIN can be anybody's on the way; only the upstream can have sent the alert (RFC 9112 9.8,
        RFC 8446 6.1). The loops don't tell: asyncio calls `eof_received` for either, and uvloop
        throws away, on a FIN, what came while reading stood still.
        """
        try:
            while data := tls.read(_TLS_RECORD):
                self.data_received(data)
        except ssl.SSLZeroReturnError:
            return True
        except ssl.SSLError:  # there is no more, and no alert
            return False
        return True

    # How states change: here and nowhere else.

    def _head_received(self, data: bytes) -> None:
        if self.state is not State.HEAD or self._head is None:
            # Nobody asked: were it kept, the next request would get it as its answer.
            self._close(None)
            return
        self.answered = True
        try:
            found = self._reader.feed(data)
            if found is None:
                return
            head, rest = found
            body = body_of(head, self._method)
        except FramingError as error:
            self.fail(self._invalid(error))
            return
        self.state = State.BODY
        self._body = body
        self._keeps_alive = head.keeps_alive
        self._silence.stop()
        self._listen()
        if not self._head.done():
            self._head.set_result(head)
        if rest:
            self.data_received(rest)
        elif body.done:
            self._complete(body)

    def _hold(self, payload: bytes) -> None:
        self._backlog.append(payload)
        self._backlog_size += len(payload)
        if self._backlog_size > _BACKLOG:
            self._regulate(held=True, paused=self._paused)

    def _complete(self, body: Body) -> None:
        self._silence.stop()
        self._total.stop()
        reusable = body.reusable and self._keeps_alive and self._request_sent and not body.surplus
        self._body = None
        if reusable:
            self.state = State.IDLE
            self.reused = True
            self._regulate(held=False, paused=False)
        else:
            self._close(None)
        self._tell(None)

    def _lost(self, *, cleanly: bool) -> None:
        """The upstream closed: the end of a body until close, else of whatever was going on."""
        while self._body is not None and self._body.behind:  # it has come, and is not read yet
            self.data_received(b"")
        if self.state is State.HEAD:
            when = "in the middle of its head" if self.answered else "without an answer"
            self.fail(self._aborted(f"closed the connection {when}"))
        elif self.state is State.BODY and self._body is not None:
            body = self._body
            try:
                if not cleanly:  # that ends no body, not even one until close
                    raise FramingError("the connection broke off")
                body.eof()
            except FramingError as error:
                self.fail(self._aborted(f"cut its answer short: {error}"))
            else:
                self._complete(body)
        else:
            self._close(None)

    def _fell_silent(self) -> None:
        clock = "first_byte" if self.state is State.HEAD else "idle"
        self.fail(timed_out(self.label, clock, self._silence.after))

    def _took_too_long(self) -> None:
        self.fail(timed_out(self.label, "total", self._total.after))

    def _close(self, error: ProxyError | None) -> None:
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        self._silence.close()
        self._total.close()
        self._body = None
        if self._head is not None and not self._head.done():
            self._head.set_exception(error or self._aborted("was let go"))
            self._head.exception()  # an owner that has left is no reason to log
        if self.transport is not None:
            self.transport.abort()
        self._wake_writer()

    def _tell(self, ending: ProxyError | None) -> None:
        if self._receiver is not None:
            receiver, self._receiver = self._receiver, None
            receiver.ended(ending)
        else:
            self._ending.append(ending)

    def _wake_writer(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    # What can be said of it.

    def _invalid(self, error: FramingError) -> ProxyError:
        return ProxyError(
            "upstream_invalid",
            f"Upstream '{self.label}' sent an answer that is not valid HTTP/1.1: {error}.",
        )

    def _aborted(self, what: str) -> ProxyError:
        return ProxyError("upstream_aborted", f"Upstream '{self.label}' {what}.")


class Clock:
    """Calls back when `after` seconds have passed since it was started or last touched.

    Starting, touching and stopping store a time; the timer looks at it when it fires, and sleeps on
    for what is left. So neither a chunk nor, in the long run, a request costs a timer.
    """

    __slots__ = ("_callback", "_fires", "_handle", "_loop", "_running", "_touched", "after")

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None
        self._fires = 0.0
        self._running = False
        self._touched = 0.0
        self.after = 0.0

    def start(self, after: float) -> None:
        """Starts anew with a timeout of `after` seconds."""
        self.after = after
        self._running = True
        self._touched = now = self._loop.time()
        if self._handle is None or self._fires > now + after:
            self._fire_at(now + after)

    def touch(self) -> None:
        self._touched = self._loop.time()

    def stop(self) -> None:
        """Leaves the timer to find that there is nothing to do; `close` takes it away."""
        self._running = False

    def close(self) -> None:
        self._running = False
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _fire_at(self, when: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._fires = when
        self._handle = self._loop.call_at(when, self._look)

    def _look(self) -> None:
        self._handle = None
        if not self._running:
            return
        due = self._touched + self.after
        if due > self._loop.time():
            self._fire_at(due)
        else:
            self._running = False
            self._callback()


async def connect(origin: Origin, timeout: float) -> UpstreamConnection:
    """A new connection, through a forward proxy and with TLS verified where the origin has them.

    `timeout` in seconds covers the name, TCP, the tunnel and TLS. Raises ProxyError:
    upstream_unreachable, upstream_timeout (connect).
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout):
            sock = await _reach(origin)
            _, connection = await loop.create_connection(
                lambda: UpstreamConnection(origin.label),
                sock=sock,
                ssl=origin.tls,
                server_hostname=origin.host if origin.tls else None,
            )
            if not connection.reusable:
                raise _Explained("it spoke or hung up before it was asked", "closed at once")
            return connection
    except TimeoutError:
        raise timed_out(origin.label, "connect", timeout, origin.place) from None
    except OSError as error:
        raise ProxyError(
            "upstream_unreachable",
            f"Upstream '{origin.label}' could not be reached: {_reason(error)}.",
            detail=f"{origin.place}: {error}",
        ) from error


class _Explained(OSError):
    """A failure with `words` of its own for clients; its text is for the log."""

    def __init__(self, words: str, detail: object) -> None:
        super().__init__(str(detail))
        self.words = words


async def _reach(origin: Origin) -> socket.socket:
    """A socket that leads to the origin: by TCP, or in a forward proxy's tunnel. Raises OSError.

    Several addresses are tried as RFC 8305 says.
    """
    try:
        addresses = await origin.resolver.addresses()
        sock = await start_connection(
            cast(list[AddrInfoType], addresses), happy_eyeballs_delay=_HAPPY_EYEBALLS_DELAY
        )
        if origin.egress and origin.tls:
            await _open_tunnel(sock, origin.authority)
        return sock
    except (OSError, FramingError) as error:
        if origin.egress:
            raise _Explained(f"its forward proxy failed: {_reason(error)}", error) from error
        raise


async def _open_tunnel(sock: socket.socket, authority: str) -> None:
    """Asks the forward proxy at the other end of `sock` to connect it on (RFC 9110 9.3.6).

    It is told where to and nothing else: the request and its key travel inside, under TLS.
    """
    loop = asyncio.get_running_loop()
    reader, found = HeadReader(), None
    try:
        request = f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n"
        await loop.sock_sendall(sock, request.encode("ascii"))
        while found is None:
            data = await loop.sock_recv(sock, MAX_HEAD)
            if not data:
                raise _Explained("it closed the connection without an answer", "end of file")
            found = reader.feed(data)
        head, surplus = found
        if not 200 <= head.status < 300:
            said = f"{head.status} {head.reason.decode('latin-1')}"
            raise _Explained(f"it refused with status {head.status}", said)
        if surplus:  # TLS servers wait for their client to begin: these are not the upstream's
            raise _Explained("it sent bytes of its own into the tunnel", "surplus bytes")
    except BaseException:
        sock.close()
        raise


def _reason(error: OSError | FramingError) -> str:
    """Why there is no connection, without addresses, which are nothing for a client to know."""
    match error:
        case _Explained():
            return error.words
        case FramingError():
            return f"it sent an answer that is not valid HTTP/1.1: {error}"
        case ssl.SSLCertVerificationError():
            what, _, _names = error.verify_message.partition(",")
            return f"its certificate was refused: {what}"
        case ssl.SSLError():
            return "TLS failed: is https right for it?"
        case socket.gaierror():
            return "its name could not be resolved"
        case OSError(errno=int(number)):
            return _OS_WORDS.get(number, errno.errorcode.get(number, "unknown error"))
        case ConnectionError():  # so the event loops call an end of file in a TLS handshake
            return "it closed the connection during the TLS handshake: is https right for it?"
    return "none of its addresses answered"


_OS_WORDS = {
    errno.ECONNREFUSED: "connection refused",
    errno.EHOSTUNREACH: "no route to the host",
    errno.ENETUNREACH: "the network is unreachable",
    errno.ECONNRESET: "connection reset",
    errno.EMFILE: "this process has no file descriptors left",
}
