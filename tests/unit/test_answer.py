"""An upstream's answer: what can be known of it, how it is handed on, and what it says of its upstream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy import config
from proxy.answer import Answer, Call
from proxy.connection import UpstreamConnection
from proxy.errors import ProxyError
from proxy.exchange import Exchange, Outcome, Upload
from proxy.framing import LAST_CHUNK, Header, ResponseHead, chunk
from proxy.pool import Pool
from proxy.upstreams import Upstream

HELLO = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
REFUSED = b'data: {"error":{"message":"m"}}\n\n'
PING = b": ping\n\n"
STREAM = (b"Content-Type", b"text/event-stream; charset=utf-8")
KILLED = ProxyError("killed", "Enough.")


class Transport(asyncio.Transport):
    """Of an upstream that says what a test wants."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.held = self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def pause_reading(self) -> None:
        self.held = True

    def resume_reading(self) -> None:
        self.held = False

    def abort(self) -> None:
        self.aborted = True


class Receiver:
    """Whoever takes the body; with `reads` False it asks for a pause at the first byte."""

    def __init__(self, answer: Answer | None = None, *, reads: bool = True) -> None:
        self.got = b""
        self.endings: list[str] = []
        self._answer = answer
        self._reads = reads

    def payload(self, data: bytes) -> None:
        assert data
        assert not self.endings
        self.got += data
        if self._answer is not None and not self._reads:
            self._answer.pause()

    def ended(self, error: ProxyError | None) -> None:
        self.endings.append(error.code if error else "whole")


class Story:
    """One exchange with an upstream, whose head has come."""

    def __init__(self, *fields: Header, failures: int = 2, stall: float = 300.0) -> None:
        self.connection = UpstreamConnection("up")
        self.transport = Transport()
        self.connection.connection_made(self.transport)
        self.pool = Pool(self._connect)
        self.upstream = Upstream(
            "up",
            config.Upstream(
                base_url="http://up.example/v1",
                circuit=config.Circuit(failures=failures),
                timeouts=config.Timeouts(stall=stall),
            ),
            self._connect,
        )
        self.exchange = Exchange("id", "id", "POST", "/v1/chat/completions", 0.0)
        self.turn = self.upstream.begin(lambda: 0.0)
        self.call = Call(self.connection, self.pool)
        self.connection.begin("POST", first_byte=60, idle=60, total=None)
        self.call.send(b"POST / HTTP/1.1\r\n\r\n", b"{}", self.exchange)
        head = ResponseHead(1, 200, b"OK", (*(fields or (STREAM,)),))
        lines = [*head.headers, (b"Transfer-Encoding", b"chunked")]
        self.connection.data_received(
            b"HTTP/1.1 200 OK\r\n" + b"".join(b"%b: %b\r\n" % each for each in lines) + b"\r\n"
        )
        self.answer = Answer(head, self.call, self.upstream, self.turn, self.exchange)

    async def _connect(self) -> UpstreamConnection:
        return self.connection

    def says(self, body: bytes) -> None:
        self.connection.data_received(chunk(body))

    def ends(self, how: str) -> None:
        if how == "whole":
            self.connection.data_received(LAST_CHUNK)
        elif how == "upstream_aborted":
            self.connection.connection_lost(None)
        elif how == "killed":
            self.connection.fail(KILLED)

    def received(self) -> Receiver:
        receiver = Receiver()
        self.answer.deliver_to(receiver)
        return receiver


# What is known of it --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "stream", "plain"),
    [
        ([STREAM], True, True),
        ([(b"content-type", b"TEXT/Event-Stream")], True, True),
        ([(b"Content-Type", b"application/json")], False, True),
        ([(b"X", b"text/event-stream")], False, True),
        ([STREAM, (b"Content-Encoding", b"identity")], True, True),
        ([STREAM, (b"Content-Encoding", b"Identity")], True, True),
        ([STREAM, (b"Content-Encoding", b"gzip")], True, False),
        ([STREAM, (b"content-encoding", b"identity"), (b"Content-Encoding", b"br")], True, False),
    ],
)
async def test_what_can_be_read(fields: list[Header], stream: bool, plain: bool) -> None:
    answer = Story(*fields).answer
    assert (answer.is_stream, answer.is_plain) == (stream, plain)
    assert answer.is_readable_stream == (stream and plain)
    assert answer.stall_timeout == 300
    answer.abort()


@pytest.mark.parametrize("status", [199, 200, 204, 299, 300, 304, 400, 429, 500])
async def test_what_succeeded(status: int) -> None:
    story = Story()
    head = ResponseHead(1, status, b"", ())
    answer = Answer(head, story.call, story.upstream, story.turn, story.exchange)
    assert answer.succeeded == (200 <= status <= 299)
    answer.abort()


# The look at its first event --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "error"),
    [(HELLO, False), (REFUSED, True), (PING + REFUSED + HELLO, True), (HELLO + REFUSED, False)],
)
async def test_what_was_looked_at_is_delivered(body: bytes, error: bool) -> None:
    story = Story()
    look = asyncio.create_task(story.answer.begins_with_error())
    await asyncio.sleep(0)
    story.says(body[:9])
    await asyncio.sleep(0)
    assert not look.done()
    story.says(body[9:])
    assert await look is error
    assert story.transport.held  # whatever comes next can wait
    receiver = story.received()
    assert (receiver.got, receiver.endings) == (body, [])
    assert not story.transport.held
    story.says(HELLO)
    story.ends("whole")
    assert (receiver.got, receiver.endings) == (body + HELLO, ["whole"])
    await story.answer.close()


@pytest.mark.parametrize("body", [b"", PING, REFUSED[:-1]])
async def test_a_stream_that_ends_before_its_first_event_is_no_error(body: bytes) -> None:
    # llama_cpp.server: a prompt that is too long gives an empty stream
    story = Story()
    if body:
        story.says(body)
    story.ends("whole")
    assert not await story.answer.begins_with_error()
    receiver = story.received()
    assert (receiver.got, receiver.endings) == (body, ["whole"])
    await story.answer.close()


@pytest.mark.parametrize("body", [b"", PING, HELLO[:-1]])
@pytest.mark.parametrize("how", ["upstream_aborted", "killed"])
@pytest.mark.parametrize("early", [True, False])
async def test_a_stream_that_breaks_off_before_its_first_event(
    body: bytes, how: str, early: bool
) -> None:
    story = Story()
    if body:
        story.says(body)
    if early:
        story.ends(how)
    look = asyncio.create_task(story.answer.begins_with_error())
    await asyncio.sleep(0)
    if not early:
        story.ends(how)
    with pytest.raises(ProxyError) as raised:
        await look
    assert raised.value.code == how
    await story.answer.close()


async def test_a_stream_that_says_nothing_is_not_looked_at_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    now = loop.time()
    monkeypatch.setattr(loop, "time", lambda: now)
    story = Story(stall=100.0)
    look = asyncio.create_task(story.answer.begins_with_error())
    await asyncio.sleep(0)
    for _ in range(9):
        now += 11
        story.says(PING)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert not look.done()
    now += 2
    with pytest.raises(ProxyError) as raised:
        await look
    assert (raised.value.code, raised.value.clock) == ("upstream_timeout", "stall")
    await story.answer.close()


async def test_a_long_first_event_is_no_error_and_not_held_for_ever() -> None:
    story = Story()
    look = asyncio.create_task(story.answer.begins_with_error())
    await asyncio.sleep(0)
    story.says(b"data: " + b"x" * 70_000)
    assert await look is False
    assert story.transport.held
    assert len(story.received().got) == 70_006
    story.answer.abort()


async def test_a_client_that_is_slow_from_the_beginning_holds_its_upstream() -> None:
    story = Story()
    story.says(HELLO)
    await story.answer.begins_with_error()
    receiver = Receiver(story.answer, reads=False)
    story.answer.deliver_to(receiver)
    assert receiver.got == HELLO
    assert story.transport.held
    story.answer.resume()
    assert not story.transport.held
    story.answer.abort()


async def test_a_client_that_was_slow_before_the_delivery_holds_its_upstream() -> None:
    story = Story()
    story.says(HELLO)
    await story.answer.begins_with_error()
    story.answer.pause()  # behind an early head, it has not taken what it got
    receiver = story.received()
    assert receiver.got == HELLO
    assert story.transport.held
    story.answer.resume()
    assert not story.transport.held
    story.answer.abort()


PIECES = st.lists(
    st.sampled_from([PING, HELLO, REFUSED, HELLO[:7], HELLO[7:], b"\n", b"x"]), max_size=4
)


@settings(deadline=None, max_examples=300)
@given(
    before=PIECES,
    during=st.lists(PIECES, max_size=3),
    between=PIECES,
    behind=PIECES,
    how=st.sampled_from(["whole", "upstream_aborted", "killed"]),
    when=st.sampled_from(["before", "during", "between", "behind"]),
)
def test_nothing_is_lost_or_doubled_whenever_it_comes(
    before: list[bytes],
    during: list[list[bytes]],
    between: list[bytes],
    behind: list[bytes],
    how: str,
    when: str,
) -> None:
    """`before` the look, while it waits, `between` the look and the delivery, and behind them;
    `when` the stream ends, nothing more comes."""
    order = ["before", "during", "between", "behind"]
    later = order[order.index(when) + 1 :]
    story: Story
    sent = b""

    def come(name: str, pieces: list[bytes]) -> None:
        nonlocal sent
        for piece in () if name in later else pieces:
            story.says(piece)
            sent += piece
        if name == when:
            story.ends(how)

    async def play() -> tuple[Receiver | None, bool | None]:
        nonlocal story
        story = Story()
        come("before", before)
        look = asyncio.create_task(story.answer.begins_with_error())
        await asyncio.sleep(0)
        for turn in during if when != "before" else ():
            come("", turn)
            await asyncio.sleep(0)
        if when == "during":
            story.ends(how)
        if not look.done() and when not in ("before", "during"):
            come("", [b"\n\n" + HELLO])  # it has been waited for for long enough
        await asyncio.wait([look])
        if (failure := look.exception()) is not None:
            assert isinstance(failure, ProxyError)
            assert failure.code == how
            await story.answer.close()
            return None, None
        come("between", between)
        receiver = story.received()
        come("behind", behind)
        await story.answer.close()
        return receiver, look.result()

    receiver, error = asyncio.run(play())
    first = first_data(sent)
    if receiver is None:
        assert first is None
        assert how != "whole"
        return
    assert receiver.got == sent
    assert receiver.endings == [how]
    assert error == (first is not None and first.startswith(b'{"error"'))


def first_data(stream: bytes) -> bytes | None:
    """The data of the first whole event that has some; the streams here end their lines in LF."""
    *events, _ = stream.split(b"\n\n")
    for each in events:
        lines = [line[6:] for line in each.split(b"\n") if line.startswith(b"data: ")]
        if data := b"\n".join(lines):
            return data
    return None


# Reading it whole -------------------------------------------------------------------------------


async def test_a_small_body_is_read_whole() -> None:
    story = Story()
    story.says(b"hel")
    reading = asyncio.create_task(story.answer.read(100))
    await asyncio.sleep(0)
    story.says(b"lo")
    await asyncio.sleep(0)
    assert not reading.done()
    story.ends("whole")
    assert await reading == b"hello"
    await story.answer.close()
    assert not story.transport.aborted  # the connection may be used again


@pytest.mark.parametrize("how", ["upstream_aborted", "killed"])
async def test_a_body_that_breaks_off_is_read_as_far_as_it_came(how: str) -> None:
    story = Story()
    story.says(b"hel")
    story.ends(how)
    assert await story.answer.read(100) == b"hel"
    await story.answer.close()


async def test_no_more_is_read_than_was_asked_for() -> None:
    story = Story()
    reading = asyncio.create_task(story.answer.read(100))
    await asyncio.sleep(0)
    for _ in range(10):
        story.says(b"x" * 30)
    assert len(await reading) >= 100
    await story.answer.close()
    assert story.transport.aborted


async def test_what_was_looked_at_can_be_read_whole() -> None:
    story = Story()
    story.says(REFUSED)
    assert await story.answer.begins_with_error()
    reading = asyncio.create_task(story.answer.read(100))
    await asyncio.sleep(0)
    story.ends("whole")
    assert await reading == REFUSED
    await story.answer.close()


# Its end ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "opens"),
    [
        (None, False),
        (Outcome.COMPLETED, False),
        (Outcome.CLIENT_GONE, False),
        (Outcome.UPSTREAM_ERROR, True),
        (Outcome.UPSTREAM_TRUNCATED, True),
        (Outcome.IDLE_TIMEOUT, True),
        (Outcome.STALL_TIMEOUT, True),
        (Outcome.TOTAL_TIMEOUT, False),
        (Outcome.SHUTDOWN, False),
        (Outcome.KILLED, False),
    ],
)
async def test_how_an_answer_ended_is_news_of_its_upstream(
    outcome: Outcome | None, opens: bool
) -> None:
    story = Story(failures=1)
    assert story.upstream.in_progress == 1
    async with story.answer as answer:
        assert answer is story.answer
        story.exchange.outcome = outcome
    assert story.upstream.in_progress == 0
    assert story.upstream.circuit.is_closed != opens


@pytest.mark.parametrize(("outcome", "closed"), [(Outcome.COMPLETED, True), (None, False)])
async def test_only_a_whole_answer_makes_good_for_failures(
    outcome: Outcome | None, closed: bool
) -> None:
    story = Story(failures=2)
    for each in Outcome.UPSTREAM_ERROR, outcome, Outcome.UPSTREAM_ERROR:
        turn = story.upstream.begin(lambda: 0.0)
        story.exchange.outcome = each
        await Answer(story.answer.head, story.call, story.upstream, turn, story.exchange).close()
    assert story.upstream.circuit.is_closed == closed
    await story.answer.close()


async def test_an_upload_ends_with_its_answer() -> None:
    story = Story()
    waits = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield b"one"
        await waits.wait()
        raise AssertionError

    story.call.send(b"", Upload(None, pieces()), story.exchange)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert story.transport.written.endswith(chunk(b"one"))
    await story.answer.close()
    assert story.transport.aborted  # half a request can't be followed by another
    assert story.upstream.in_progress == 0


async def test_whoever_hangs_up_may_say_why() -> None:
    story = Story()
    receiver = story.received()
    story.answer.fail(KILLED)
    assert receiver.endings == ["killed"]
    assert story.transport.aborted

    story = Story()
    receiver = story.received()
    story.answer.abort()
    assert receiver.endings == []
    assert story.transport.aborted
