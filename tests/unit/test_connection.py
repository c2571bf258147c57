"""The walk of an upstream connection through its states, told by a transport that is none."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pytest

from proxy.connection import Clock, Origin, State, UpstreamConnection, connect
from proxy.errors import ProxyError
from proxy.resolver import Resolver

SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CLOSING = b"HTTP/1.1 200 OK\r\n\r\n"


class Transport(asyncio.Transport):
    """Remembers what is asked of it; like a real one, it gives no bytes while it is paused."""

    def __init__(self, **extra: object) -> None:
        super().__init__(extra)
        self.written = b""
        self.aborted = False
        self.reading = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def abort(self) -> None:
        self.aborted = True

    def pause_reading(self) -> None:
        assert self.reading
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.reading
        self.reading = True


class Loop:
    """A loop without time of its own: `pass_` lets it go by."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._timers: list[tuple[float, asyncio.TimerHandle, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, (), self)  # type: ignore[arg-type]
        self._timers.append((when, handle, callback))
        return handle

    def call_later(self, delay: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, callback)

    def pass_(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [timer for timer in self._timers if timer[0] <= end]:
            timer = min(due, key=lambda each: each[0])
            self._timers.remove(timer)
            when, handle, callback = timer
            self.now = max(self.now, when)
            if not handle.cancelled():
                callback()
        self.now = end

    @property
    def waiting(self) -> int:
        return sum(not handle.cancelled() for _, handle, _ in self._timers)

    # What futures and handles ask of a loop; nothing here waits.

    def get_debug(self) -> bool:
        return False

    def _timer_handle_cancelled(self, handle: object) -> None:
        pass

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)  # type: ignore[arg-type]

    def call_soon(self, callback: Callable[..., None], *args: Any, context: Any = None) -> None:
        raise AssertionError("somebody waits")

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        raise AssertionError(context)


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    loop = Loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    return loop


class Reader:
    """A receiver. `on_payload` is called with each payload, as the relay's writing would be."""

    def __init__(self, on_payload: Callable[[bytes], None] = lambda _: None) -> None:
        self.got: list[bytes] = []
        self.endings: list[ProxyError | None] = []
        self._on_payload = on_payload

    def payload(self, data: bytes) -> None:
        assert data
        assert not self.endings
        self.got.append(data)
        self._on_payload(data)

    def ended(self, error: ProxyError | None) -> None:
        self.endings.append(error)

    @property
    def code(self) -> str | None:
        """How the body ended: `whole`, an error's code, or None while it has not."""
        if not self.endings:
            return None
        assert len(self.endings) == 1
        return self.endings[0].code if self.endings[0] else "whole"


def opened(**extra: object) -> tuple[UpstreamConnection, Transport]:
    connection, transport = UpstreamConnection("up"), Transport(**extra)
    connection.connection_made(transport)
    return connection, transport


def asked(
    method: str = "POST", *, sent: bool = True, total: float | None = None, **extra: object
) -> tuple[UpstreamConnection, Transport]:
    connection, transport = opened(**extra)
    ask(connection, method, sent=sent, total=total)
    return connection, transport


def ask(
    connection: UpstreamConnection,
    method: str = "POST",
    *,
    sent: bool = True,
    total: float | None = None,
) -> None:
    connection.begin(method, first_byte=10, idle=3, total=total)
    connection.write(b"request")
    if sent:
        connection.request_sent()


def result(waiting: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine gives at once; `...` if it would wait."""
    try:
        future = waiting.send(None)
    except StopIteration as stop:
        return stop.value
    except ProxyError as error:
        return error
    future._asyncio_future_blocking = False  # nobody waits for it any more
    waiting.close()
    return ...


def status(connection: UpstreamConnection) -> Any:
    """The head's status, the code of its error, or `...`."""
    found = result(connection.head())
    if isinstance(found, ProxyError):
        return found.code
    return found if found is ... else found.status


# The exchange ---------------------------------------------------------------------------------


def test_one_exchange_after_another(loop: Loop) -> None:
    connection, transport = opened()
    assert (connection.state, connection.reusable, connection.reused) == (State.IDLE, True, False)
    for answer in (SIZED + b"hello", CHUNKED + b"5\r\nhello\r\n0\r\n\r\n"):
        ask(connection)
        assert (connection.state, connection.reusable) == (State.HEAD, False)
        assert (status(connection), connection.answered) == (..., False)
        connection.data_received(answer[:-2])
        assert (connection.state, status(connection)) == (State.BODY, 200)
        reader = Reader()
        connection.deliver_to(reader)
        assert reader.code is None
        connection.data_received(answer[-2:])
        assert (b"".join(reader.got), reader.code) == (b"hello", "whole")
        assert (connection.state, connection.reusable) == (State.IDLE, True)
        assert connection.reused
    assert transport.written == b"requestrequest"
    assert not transport.aborted


def test_it_says_where_it_is(loop: Loop) -> None:
    connection, _ = asked()
    assert repr(connection) == "<UpstreamConnection up waiting for a head>"
    connection.abort()
    assert repr(connection) == "<UpstreamConnection up closed>"


def test_a_head_in_pieces(loop: Loop) -> None:
    connection, _ = asked()
    for at in range(len(SIZED)):
        assert status(connection) is ...
        connection.data_received(SIZED[at : at + 1])
        assert connection.answered
    assert status(connection) == 200
    assert connection.state is State.BODY


def test_interim_answers_are_no_head(loop: Loop) -> None:
    connection, _ = asked()
    connection.data_received(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert status(connection) is ...
    connection.data_received(SIZED)
    assert status(connection) == 200


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        SIZED + b"hello",
        CHUNKED + b"5\r\nhello\r\n0\r\n\r\n",
    ],
)
def test_an_answer_that_came_whole_before_anybody_took_it(loop: Loop, answer: bytes) -> None:
    connection, transport = asked()
    connection.data_received(answer)
    assert status(connection) in {200, 204}
    reader = Reader()
    connection.deliver_to(reader)
    assert (b"".join(reader.got), reader.code) == (b"hello" if b"hello" in answer else b"", "whole")
    assert connection.reusable
    assert not transport.aborted


def test_each_read_is_delivered_in_the_same_call(loop: Loop) -> None:
    connection, _ = asked()
    connection.data_received(CHUNKED + b"2\r\nab\r\n")
    connection.data_received(b"2\r\ncd\r\n")
    reader = Reader()
    connection.deliver_to(reader)
    assert reader.got == [b"abcd"]
    connection.data_received(b"2\r\ne")
    assert reader.got == [b"abcd", b"e"]
    connection.data_received(b"f\r\n")
    connection.data_received(b"0\r\n")  # no payload, no call
    assert reader.got == [b"abcd", b"e", b"f"]


def test_an_answer_in_crumbs_is_read_in_turns(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[Callable[[], None]] = []
    monkeypatch.setattr(loop, "call_soon", lambda turn, *body: turns.append(partial(turn, *body)))
    connection, transport = asked()
    reader = Reader()
    connection.deliver_to(reader)
    connection.data_received(CHUNKED + b"1\r\nx\r\n" * 1200 + b"0\r\n\r\n")
    assert len(reader.got[0]) == 500
    assert not transport.reading
    while turns:
        turns.pop()()
    assert (b"".join(reader.got), reader.code) == (b"x" * 1200, "whole")
    assert transport.reading


def test_an_end_that_comes_while_crumbs_are_read_comes_last(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "call_soon", lambda *_: None)
    connection, _ = asked()
    reader = Reader()
    connection.deliver_to(reader)
    connection.data_received(CHUNKED + b"1\r\nx\r\n" * 1200 + b"0\r\n\r\n")
    connection.connection_lost(None)
    assert (b"".join(reader.got), reader.code) == (b"x" * 1200, "whole")


def test_a_body_until_close(loop: Loop) -> None:
    connection, transport = asked()
    connection.data_received(CLOSING + b"hel")
    reader = Reader()
    connection.deliver_to(reader)
    connection.data_received(b"lo")
    connection.eof_received()
    assert (b"".join(reader.got), reader.code) == (b"hello", "whole")
    assert (connection.state, transport.aborted) == (State.CLOSED, True)


class Tls:
    """What TLS still holds when the connection has ended, and then how that ended."""

    def __init__(self, *held: bytes, end: Exception | None) -> None:
        self._held = list(held)
        self._end = end

    def read(self, size: int) -> bytes:
        if self._held:
            return self._held.pop(0)
        if self._end:
            raise self._end
        return b""


@pytest.mark.parametrize("told", ["eof", "loss", "reset"])
@pytest.mark.parametrize(
    ("end", "code"),
    [
        (None, "whole"),
        (ssl.SSLZeroReturnError(), "whole"),  # the same, once our own alert has gone out
        (ssl.SSLWantReadError(), "upstream_aborted"),
        (ssl.SSLEOFError(), "upstream_aborted"),
    ],
)
def test_a_body_until_close_ends_by_close_notify(
    loop: Loop, told: str, end: Exception | None, code: str
) -> None:
    """However the event loop tells of the end: RFC 9112 9.8."""
    connection, _ = asked(ssl_object=Tls(b"l", b"o", end=end))
    connection.data_received(CLOSING + b"hel")
    reader = Reader()
    connection.deliver_to(reader)
    if told == "eof":
        connection.eof_received()
    connection.connection_lost(ConnectionResetError() if told == "reset" else None)
    assert (b"".join(reader.got), reader.code) == (b"hello", code)


def test_what_tls_holds_completes_a_body_that_states_its_length(loop: Loop) -> None:
    connection, _ = asked(ssl_object=Tls(b"lo", b"surplus", end=ssl.SSLWantReadError()))
    connection.data_received(SIZED + b"hel")
    reader = Reader()
    connection.deliver_to(reader)
    connection.pause()
    connection.connection_lost(None)
    assert (b"".join(reader.got), reader.code) == (b"hello", "whole")
    assert connection.state is State.CLOSED


# When a connection is not used again ----------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "method", "sent"),
    [
        (SIZED + b"hello!", "POST", True),
        (SIZED + b"hello" + SIZED + b"smugg", "POST", True),
        (CHUNKED + b"0\r\n\r\nHTTP/1.1 200 OK\r\n", "POST", True),
        (SIZED + b"hello", "HEAD", True),
        (b"HTTP/1.1 204 No Content\r\n\r\nx", "POST", True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello", "POST", True),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", "POST", True),
        (SIZED + b"hello", "POST", False),  # the rest of the request is still to come
    ],
)
def test_only_a_clean_exchange_is_followed_by_another(
    loop: Loop, answer: bytes, method: str, sent: bool
) -> None:
    connection, transport = asked(method, sent=sent)
    reader = Reader()
    connection.data_received(answer)
    connection.deliver_to(reader)
    assert reader.code == "whole"
    assert (connection.reusable, connection.state) == (False, State.CLOSED)
    assert transport.aborted


def test_surplus_that_comes_later_closes_it_too(loop: Loop) -> None:
    connection, transport = asked()
    connection.data_received(SIZED + b"hello")
    connection.deliver_to(Reader())
    assert connection.reusable
    connection.data_received(b"HTTP/1.1 200 OK\r\n\r\n")
    assert (connection.reusable, connection.state) == (False, State.CLOSED)
    assert transport.aborted


@pytest.mark.parametrize("what", ["bytes", "eof", "loss", "reset"])
def test_what_happens_while_idle_closes_it(loop: Loop, what: str) -> None:
    connection, _ = opened()
    match what:
        case "bytes":
            connection.data_received(b"H")
        case "eof":
            connection.eof_received()
        case "loss":
            connection.connection_lost(None)
        case "reset":
            connection.connection_lost(ConnectionResetError())
    assert (connection.reusable, connection.state) == (False, State.CLOSED)


def test_a_body_that_nobody_took_is_not_the_next_ones(loop: Loop) -> None:
    connection, _ = asked()
    connection.data_received(SIZED + b"hello")
    # Its owner lets go of it here, as when the client's connection was lost meanwhile.
    if connection.reusable:
        ask(connection)
        reader = Reader()
        connection.deliver_to(reader)
        assert (reader.got, reader.code) == ([], None)
        connection.data_received(SIZED + b"world")
        assert (reader.got, reader.code) == ([b"world"], "whole")


# What breaks the walk ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "code", "words"),
    [
        (b"", "upstream_aborted", "without an answer"),
        (b"H", "upstream_aborted", "in the middle of its head"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "upstream_aborted", "in the middle of its head"),
    ],
)
@pytest.mark.parametrize("reset", [False, True])
def test_a_close_before_the_head(
    loop: Loop, before: bytes, code: str, words: str, reset: bool
) -> None:
    connection, _ = asked()
    if before:
        connection.data_received(before)
    if reset:
        connection.connection_lost(ConnectionResetError())
    else:
        connection.eof_received()
        connection.connection_lost(None)
    error = result(connection.head())
    assert error.code == code
    assert words in error.message
    assert "'up'" in error.message
    assert connection.answered == bool(before)
    assert loop.waiting == 0


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.9\r\n",
    ],
)
def test_a_bad_head(loop: Loop, answer: bytes) -> None:
    connection, transport = asked()
    connection.data_received(answer)
    assert status(connection) == "upstream_invalid"
    assert (connection.state, transport.aborted, loop.waiting) == (State.CLOSED, True, 0)
    connection.data_received(SIZED)  # what the transport had read already
    assert status(connection) == "upstream_invalid"


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize(
    ("answer", "payload", "how", "code"),
    [
        (CHUNKED + b"5\r\nhel", b"hel", "eof", "upstream_aborted"),
        (CHUNKED + b"5\r\nhello\r\n", b"hello", "eof", "upstream_aborted"),
        (CHUNKED + b"5\r\nhello\r\n0\r\n", b"hello", "eof", "upstream_aborted"),
        (SIZED + b"hel", b"hel", "eof", "upstream_aborted"),
        (SIZED + b"hel", b"hel", "reset", "upstream_aborted"),
        (CLOSING + b"hel", b"hel", "reset", "upstream_aborted"),
        (CHUNKED + b"3\r\nhel\r\n", b"hel", "+5\r\n", "upstream_invalid"),
        (CHUNKED + b"3\r\nhel\r\n", b"hel", "silence", "upstream_timeout"),
        (CLOSING + b"hel", b"hel", "silence", "upstream_timeout"),
    ],
)
def test_a_cut_body(
    loop: Loop, answer: bytes, payload: bytes, how: str, code: str, taken: bool
) -> None:
    connection, transport = asked()
    reader = Reader()
    connection.data_received(answer)
    if taken:
        connection.deliver_to(reader)
    match how:
        case "eof":
            connection.eof_received()
            connection.connection_lost(None)
        case "reset":
            connection.connection_lost(ConnectionResetError())
        case "silence":
            loop.pass_(3)
        case _:
            connection.data_received(how.encode())
    if not taken:
        connection.deliver_to(reader)
    assert (b"".join(reader.got), reader.code) == (payload, code)
    assert (connection.state, transport.aborted, loop.waiting) == (State.CLOSED, True, 0)


def test_the_payload_before_a_bad_chunk_is_not_lost(loop: Loop) -> None:
    # In one read or in two: what came well-formed has come.
    connection, _ = asked()
    reader = Reader()
    connection.data_received(CHUNKED)
    connection.deliver_to(reader)
    connection.data_received(b"3\r\nhel\r\n+5\r\n")
    assert reader.code == "upstream_invalid"
    assert b"".join(reader.got) in {b"hel", b""}


def test_abort_closes_at_once_and_tells_nobody(loop: Loop) -> None:
    connection, transport = asked()
    reader = Reader()
    connection.data_received(CHUNKED + b"5\r\nhel")
    connection.deliver_to(reader)
    connection.abort()
    assert (reader.code, transport.aborted, connection.state) == (None, True, State.CLOSED)
    connection.data_received(b"lo\r\n")
    connection.connection_lost(None)
    connection.abort()
    assert (reader.got, reader.code, loop.waiting) == ([b"hel"], None, 0)


def test_abort_while_the_head_is_awaited(loop: Loop) -> None:
    connection, _ = asked()
    connection.abort()
    assert status(connection) == "upstream_aborted"
    assert loop.waiting == 0


def test_a_receiver_may_abort_from_within_its_payload(loop: Loop) -> None:
    connection, _ = asked()
    reader = Reader(lambda _: connection.abort())
    connection.data_received(SIZED)
    connection.deliver_to(reader)
    connection.data_received(b"hello")
    assert (reader.got, reader.code) == ([b"hello"], None)
    assert (connection.state, connection.reusable) == (State.CLOSED, False)


@pytest.mark.parametrize("answer", [b"", CHUNKED + b"5\r\nhel"])
def test_fail_ends_the_exchange_with_a_word_from_outside(loop: Loop, answer: bytes) -> None:
    connection, transport = asked(sent=False)
    if answer:
        connection.data_received(answer)
    connection.fail(ProxyError("request_timeout", ""))
    if answer:
        reader = Reader()
        connection.deliver_to(reader)
        assert (reader.got, reader.code) == ([b"hel"], "request_timeout")
    else:
        assert status(connection) == "request_timeout"
    assert (transport.aborted, loop.waiting) == (True, 0)


# The clocks -----------------------------------------------------------------------------------


def message(connection: UpstreamConnection) -> str:
    found = result(connection.head())
    assert isinstance(found, ProxyError)
    assert found.clock is not None
    return f"{found.code} {found.clock} {found.message}"


def test_first_byte(loop: Loop) -> None:
    connection, _ = asked()
    loop.pass_(9.9)
    assert status(connection) is ...
    loop.pass_(0.2)
    assert "upstream_timeout first_byte" in message(connection)
    assert "10 s" in message(connection)


def test_a_dripping_head_does_not_help(loop: Loop) -> None:
    connection, _ = asked()
    for byte in b"HTTP/1.1 2":
        loop.pass_(0.9)
        connection.data_received(bytes([byte]))
        assert status(connection) is ...
    loop.pass_(1.1)
    assert "upstream_timeout first_byte" in message(connection)


def test_writing_the_request_does(loop: Loop) -> None:
    connection, _ = asked(sent=False)
    for _ in range(5):
        loop.pass_(9)
        connection.write(b"more")
    loop.pass_(9.9)
    assert status(connection) is ...
    loop.pass_(0.2)
    assert status(connection) == "upstream_timeout"


def test_idle_is_the_time_between_two_reads(loop: Loop) -> None:
    connection, _ = asked()
    loop.pass_(9)
    reader = Reader()
    connection.data_received(CHUNKED)
    connection.deliver_to(reader)
    for _ in range(10):
        loop.pass_(2.9)
        connection.data_received(b"1\r\nx\r\n")
    assert reader.code is None
    loop.pass_(2.9)
    assert reader.code is None
    loop.pass_(0.2)
    assert reader.code == "upstream_timeout"
    assert reader.endings[0] is not None
    assert (reader.endings[0].clock, "3 s" in reader.endings[0].message) == ("idle", True)


def test_idle_stands_still_while_paused(loop: Loop) -> None:
    connection, transport = asked()
    reader = Reader()
    connection.data_received(CHUNKED + b"1\r\nx\r\n")
    connection.deliver_to(reader)
    loop.pass_(2)
    connection.pause()
    connection.pause()
    assert not transport.reading
    loop.pass_(1000)
    assert reader.code is None
    connection.resume()
    connection.resume()
    assert transport.reading
    loop.pass_(2.9)
    assert reader.code is None
    loop.pass_(0.2)
    assert reader.code == "upstream_timeout"


def test_a_client_that_takes_its_time_is_no_silence_of_the_upstreams(loop: Loop) -> None:
    # An upstream may answer before it has the whole request; then it waits for our client.
    connection, _ = asked(sent=False)
    reader = Reader()
    connection.client_pauses()
    connection.data_received(CHUNKED)
    connection.deliver_to(reader)
    for _ in range(3):
        loop.pass_(100)
        connection.write(b"more")
        loop.pass_(2.9)  # which it may take its time to read
        connection.client_pauses()
    assert reader.code is None
    connection.request_sent()
    loop.pass_(3.1)
    assert reader.code == "upstream_timeout"


def test_total_goes_on_whatever_happens(loop: Loop) -> None:
    connection, _ = asked(total=20)
    reader = Reader()
    connection.data_received(CHUNKED)
    connection.deliver_to(reader)
    for _ in range(9):
        loop.pass_(2)
        connection.data_received(b"1\r\nx\r\n")
    connection.pause()
    loop.pass_(1.9)
    assert reader.code is None
    loop.pass_(0.2)
    assert reader.code == "upstream_timeout"
    assert reader.endings[0] is not None
    assert reader.endings[0].clock == "total"


def test_total_also_ends_the_wait_for_a_head(loop: Loop) -> None:
    connection, _ = asked(total=5)
    loop.pass_(5)
    assert "upstream_timeout total" in message(connection)


def test_no_clock_runs_while_idle(loop: Loop) -> None:
    connection, _ = asked(total=5)
    connection.data_received(SIZED + b"hello")
    connection.deliver_to(Reader())
    loop.pass_(1000)
    assert connection.reusable


# Backpressure ---------------------------------------------------------------------------------


def test_a_backlog_is_bounded_until_somebody_takes_it(loop: Loop) -> None:
    connection, transport = asked()
    connection.data_received(CLOSING)
    while transport.reading:
        connection.data_received(b"x" * 1024)
    loop.pass_(1000)  # nobody reads: no silence of the upstream's
    reader = Reader()
    connection.deliver_to(reader)
    assert 64 * 1024 < sum(map(len, reader.got)) <= 65 * 1024
    assert transport.reading
    loop.pass_(3)
    assert reader.code == "upstream_timeout"


@pytest.mark.parametrize("backlog", [1000, 100_000])
def test_a_receiver_that_pauses_while_it_takes_the_backlog_stays_paused(
    loop: Loop, backlog: int
) -> None:
    connection, transport = asked()
    connection.data_received(CLOSING + b"x" * backlog)
    reader = Reader(lambda _: connection.pause())
    connection.deliver_to(reader)
    assert len(reader.got[0]) == backlog
    assert not transport.reading


@pytest.mark.parametrize("backlog", [1000, 100_000])
def test_a_receiver_that_had_paused_before_stays_paused(loop: Loop, backlog: int) -> None:
    connection, transport = asked()
    connection.data_received(CLOSING + b"x" * backlog)
    connection.pause()  # as Sink.serve asks, if the client does not keep up already
    connection.deliver_to(Reader())
    assert not transport.reading


def test_a_receiver_that_pauses_over_a_whole_body_leaves_a_connection_that_reads(
    loop: Loop,
) -> None:
    connection, transport = asked()
    connection.data_received(SIZED + b"hello")
    reader = Reader(lambda _: connection.pause())
    connection.deliver_to(reader)
    connection.pause()
    assert (reader.code, connection.reusable, transport.reading) == ("whole", True, True)


def test_a_paused_body_that_ends_leaves_a_connection_that_reads(loop: Loop) -> None:
    connection, transport = asked()
    reader = Reader(lambda _: connection.pause())
    connection.data_received(SIZED)
    connection.deliver_to(reader)
    connection.data_received(b"hello")
    assert (reader.code, connection.reusable, transport.reading) == ("whole", True, True)


def test_the_upload_waits_for_an_upstream_that_does_not_take_it(loop: Loop) -> None:
    connection, _ = asked(sent=False)
    assert result(connection.drain()) is None
    connection.pause_writing()
    assert result(connection.drain()) is ...
    connection.resume_writing()
    assert result(connection.drain()) is None


async def test_whoever_waits_to_write_is_woken_by_the_end() -> None:
    connection, _ = asked(sent=False)
    connection.pause_writing()
    waiting = asyncio.create_task(connection.drain())
    await asyncio.sleep(0)
    assert not waiting.done()
    connection.connection_lost(ConnectionResetError())
    await waiting
    await connection.drain()
    assert status(connection) == "upstream_aborted"


def test_nothing_is_written_to_a_closed_connection(loop: Loop) -> None:
    connection, transport = asked()
    connection.abort()
    connection.write(b"more")
    connection.connection_lost(None)
    connection.write(b"more")
    assert transport.written == b"request"


# Clock ----------------------------------------------------------------------------------------


@pytest.fixture
def rung() -> list[float]:
    return []


@pytest.fixture
def clock(loop: Loop, rung: list[float]) -> Clock:
    return Clock(loop, lambda: rung.append(loop.now))  # type: ignore[arg-type]


def test_a_clock_is_touched_without_a_new_timer(
    loop: Loop, clock: Clock, rung: list[float]
) -> None:
    clock.start(10)
    for _ in range(100):
        loop.pass_(1)
        clock.touch()
        assert loop.waiting == 1
    assert rung == []
    loop.pass_(9)
    assert rung == []
    loop.pass_(1)
    assert rung == [1110.0]
    loop.pass_(100)
    assert (len(rung), loop.waiting) == (1, 0)


def test_a_clock_can_be_stopped_and_started_anew(
    loop: Loop, clock: Clock, rung: list[float]
) -> None:
    clock.stop()
    clock.start(10)
    loop.pass_(9)
    clock.stop()
    clock.touch()
    loop.pass_(100)
    assert (rung, loop.waiting) == ([], 0)
    clock.start(5)
    clock.start(7)
    assert (clock.after, loop.waiting) == (7, 1)
    loop.pass_(6.9)
    assert rung == []
    loop.pass_(0.1)
    assert rung == [pytest.approx(1116.0)]


def test_a_shorter_timeout_does_not_wait_for_the_longer_one(
    loop: Loop, clock: Clock, rung: list[float]
) -> None:
    clock.start(600)
    loop.pass_(1)
    clock.start(3)
    loop.pass_(3)
    assert rung == [1004.0]


def test_starting_and_stopping_costs_no_timer_each(loop: Loop, clock: Clock) -> None:
    for _ in range(1000):
        clock.start(600)
        clock.stop()
        loop.pass_(0.01)
        assert loop.waiting <= 1


def test_a_closed_clock_leaves_nothing_behind(loop: Loop, clock: Clock, rung: list[float]) -> None:
    clock.start(10)
    clock.close()
    clock.close()
    assert loop.waiting == 0
    loop.pass_(100)
    assert rung == []


# Connecting -----------------------------------------------------------------------------------


def origin(host: str, port: int) -> Origin:
    return Origin(host, port, None, "up", Resolver(host, port))


async def test_connecting_to_nobody() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        with pytest.raises(ProxyError) as caught:
            await connect(origin("127.0.0.1", port), 5)
    assert caught.value.code == "upstream_unreachable"
    assert caught.value.message == "Upstream 'up' could not be reached: connection refused."


def tls_error(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, "secret")
    error.reason = reason
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EHOSTUNREACH, "secret"), "no route to the host"),
        (OSError(errno.ENOTCONN, "secret"), "ENOTCONN"),
        (socket.gaierror(socket.EAI_NONAME, "secret"), "its name could not be resolved"),
        (tls_error("WRONG_VERSION_NUMBER"), "TLS failed: is https right for it?"),
        (ConnectionResetError(), "it closed the connection during the TLS handshake"),
        (OSError("Multiple exceptions: secret"), "none of its addresses answered"),
    ],
)
async def test_what_is_said_of_failures(
    monkeypatch: pytest.MonkeyPatch, error: OSError, words: str
) -> None:
    async def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Resolver, "addresses", fails)
    with pytest.raises(ProxyError) as caught:
        await connect(origin("internal.example", 80), 5)
    assert caught.value.code == "upstream_unreachable"
    assert words in caught.value.message
    assert "internal.example" not in caught.value.message
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("host", "egress", "authority", "place"),
    [
        ("up.example", None, "up.example:443", "up.example:443"),
        ("::1", None, "[::1]:443", "[::1]:443"),
        ("up.example", "p:3128", "up.example:443", "up.example:443 through p:3128"),
    ],
)
def test_how_an_origin_is_named(host: str, egress: str | None, authority: str, place: str) -> None:
    origin = Origin(host, 443, None, "up", Resolver(host, 443), egress)
    assert (origin.authority, origin.place) == (authority, place)


async def test_connecting_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object, **__: object) -> None:
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(Resolver, "addresses", never)
    with pytest.raises(ProxyError) as caught:
        await connect(origin("up.example", 80), 0.01)
    assert (caught.value.code, caught.value.clock) == ("upstream_timeout", "connect")


async def test_connecting_to_a_name() -> None:
    hung_up = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        hung_up.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    connection = await connect(origin("localhost", server.sockets[0].getsockname()[1]), 5)
    assert connection.reusable
    connection.abort()
    await asyncio.wait_for(hung_up.wait(), 5)
    server.close()


async def test_the_next_address_is_tried_when_one_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    alive = server.sockets[0].getsockname()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.2", 0))
        dead = nobody.getsockname()

        async def both(_: Resolver) -> list[tuple[Any, ...]]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", each) for each in (dead, alive)]

        monkeypatch.setattr(Resolver, "addresses", both)
        connection = await connect(origin("up.example", 80), 5)
    assert connection.peer == alive
    connection.abort()
    await asyncio.sleep(0.01)
    server.close()
