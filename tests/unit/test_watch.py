"""What is done while nothing comes: heartbeats to the client, and an end to what says nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, cast

import pytest

from proxy.downstream import Sink
from proxy.exchange import Exchange
from proxy.sse import Tap
from proxy.usage import Endpoint, Meter
from proxy.watch import Heartbeat, Stall

CHAT = "/v1/chat/completions"
HELLO = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
PING = b": ping\n\n"
BEAT = b":\n"


class Client:
    """A sink that writes down what it is told."""

    def __init__(self) -> None:
        self.keeps_up = True
        self.got: list[bytes] = []

    def write(self, payload: bytes) -> None:
        self.got.append(payload)


class Story:
    """A stream, its client, and the loop's clock, which is moved by hand."""

    def __init__(self, path: str = CHAT) -> None:
        self.now = asyncio.get_running_loop().time()
        self.client = Client()
        self.exchange = Exchange("id", "id", "POST", path, 0.0)
        self.tap = Tap()
        if self.exchange.endpoint is not Endpoint.NONE:
            self.exchange.meter = Meter(self.exchange.endpoint, stream=True)
        self.stalls = 0

    def clock(self) -> float:
        return self.now

    def heartbeat(self, every: float = 15.0, *, begun: bool = True) -> Heartbeat:
        """`begun`: an answer is being relayed; else there is none yet."""
        sink, tap = cast(Sink, self.client), self.tap if begun else None
        return Heartbeat(every, sink, self.exchange, self.clock, tap)

    def stall(self, after: float = 80.0) -> Stall:
        return Stall(after, self.exchange, self.tap, self.clock, self._stalled)

    def _stalled(self) -> None:
        self.stalls += 1

    def comes(self, data: bytes) -> None:
        """Some bytes of the stream, as the relay notes them."""
        self.tap.remember(data)
        if self.exchange.meter is not None:
            self.exchange.meter.feed(data)
        self.exchange.bytes_down += len(data)
        self.exchange.last_payload = self.now

    async def passes(self, seconds: float, says: bytes = b"") -> None:
        """Time, in steps; `says` comes in every second."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(self.now + 1.0, until)
            if says:
                self.comes(says)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def beats_in(self, seconds: float) -> int:
        """How many heartbeats the client gets, and nothing else."""
        before, counted = len(self.client.got), self.exchange.heartbeats
        await self.passes(seconds)
        new = self.client.got[before:]
        assert set(new) <= {BEAT}
        assert self.exchange.heartbeats - counted == len(new)
        return len(new)


@pytest.fixture
async def story(monkeypatch: pytest.MonkeyPatch) -> Story:
    story = Story()
    monkeypatch.setattr(asyncio.get_running_loop(), "time", story.clock)
    return story


# The heartbeat --------------------------------------------------------------------------------


async def test_a_heartbeat_when_nothing_was_written(story: Story) -> None:
    heartbeat = story.heartbeat()
    assert await story.beats_in(14.9) == 0
    assert await story.beats_in(0.2) == 1
    assert await story.beats_in(14) == 0
    assert await story.beats_in(1) == 1
    assert await story.beats_in(150) == 10
    heartbeat.stop()


async def test_before_an_answer_is_there(story: Story) -> None:
    heartbeat = story.heartbeat(begun=False)
    assert await story.beats_in(60.5) == 4
    heartbeat.stop()


async def test_an_answer_does_not_break_the_rhythm(story: Story) -> None:
    early = story.heartbeat(begun=False)
    assert await story.beats_in(25) == 1
    early.stop()
    heartbeat = story.heartbeat()  # its head has come, and nothing else
    assert await story.beats_in(4.9) == 0
    assert await story.beats_in(0.2) == 1
    heartbeat.stop()


async def test_no_heartbeat_while_there_are_bytes(story: Story) -> None:
    heartbeat = story.heartbeat()
    for _ in range(20):
        story.comes(HELLO)
        assert await story.beats_in(14) == 0
    story.comes(HELLO)
    assert await story.beats_in(14.9) == 0
    assert await story.beats_in(0.2) == 1
    heartbeat.stop()


async def test_never_within_an_event(story: Story) -> None:
    heartbeat = story.heartbeat()
    for begun in HELLO[:9], HELLO[9:-1]:
        story.comes(begun)
        assert await story.beats_in(100) == 0
    story.comes(HELLO[-1:])
    assert await story.beats_in(14.9) == 0
    assert await story.beats_in(0.2) == 1
    story.comes(b": a comment")
    assert await story.beats_in(100) == 0
    story.comes(b"\n")
    assert await story.beats_in(15.1) == 1
    heartbeat.stop()


async def test_not_to_a_client_that_does_not_keep_up(story: Story) -> None:
    heartbeat = story.heartbeat()
    story.client.keeps_up = False
    assert await story.beats_in(100) == 0
    story.client.keeps_up = True
    assert await story.beats_in(15) == 1
    heartbeat.stop()


async def test_0_is_off(story: Story) -> None:
    heartbeat = story.heartbeat(0.0)
    assert await story.beats_in(1000) == 0
    heartbeat.stop()


@pytest.mark.parametrize("watch", [Story.heartbeat, Story.stall])
async def test_a_watch_that_was_stopped_does_nothing(
    story: Story, watch: Callable[[Story], Heartbeat | Stall]
) -> None:
    watch(story).stop()
    later = watch(story)
    await story.passes(5)
    later.stop()
    later.stop()
    assert await story.beats_in(1000) == story.stalls == 0


# Stalling -------------------------------------------------------------------------------------

SAYS_NOTHING = [
    b"",
    PING,
    BEAT,
    ROLE,
    b'event: ping\ndata: {"type":"ping"}\n\n',
    b'data: {"choices":[{"delta":{}}]}\n\n',
    b'data: {"choices":[],"usage":null}\n\n',
    b": OPENROUTER PROCESSING\n" * 300,  # in a second: more than the tap remembers
    PING * 1000,
]


@pytest.mark.parametrize("says", SAYS_NOTHING)
async def test_a_stream_that_says_nothing_is_given_up(story: Story, says: bytes) -> None:
    story.stall()
    await story.passes(79, says)
    assert story.stalls == 0
    await story.passes(12, says)  # it is looked at 8 times in 80 s
    assert story.stalls == 1
    await story.passes(500)
    assert story.stalls == 1  # that is said once


def event(document: Any) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (CHAT, HELLO),
        (CHAT, event({"choices": [{"delta": {"reasoning_content": "x"}}]})),
        (CHAT, event({"choices": [{"delta": {"tool_calls": [{"function": {"name": "f"}}]}}]})),
        (CHAT, event({"choices": [{"delta": {"audio": {"data": "x"}}}]})),
        ("/v1/completions", event({"choices": [{"text": "x"}]})),
        ("/v1/messages", event({"type": "content_block_delta", "delta": {"text": "x"}})),
        ("/v1/messages", event({"type": "content_block_delta", "delta": {"thinking": "x"}})),
        ("/v1/responses", event({"type": "response.output_text.delta", "delta": "x"})),
        ("/v1/responses", event({"type": "partial_image", "b64": "x" * 100_000})),
        # Nothing is known of what these say.
        ("/v1/audio/speech", event({"type": "speech.audio.delta", "audio": "x"})),
        ("/v1/images/edits", b"data: 1\n\n"),
    ],
)
@pytest.mark.parametrize("behind", [b"", PING, PING * 100])
async def test_any_payload_keeps_it(
    monkeypatch: pytest.MonkeyPatch, path: str, says: bytes, behind: bytes
) -> None:
    story = Story(path)
    monkeypatch.setattr(asyncio.get_running_loop(), "time", story.clock)
    stall = story.stall()
    for _ in range(10):
        story.comes(says)
        await story.passes(60)
        story.comes(PING)
        await story.passes(10)
        story.comes(behind or PING)
    assert story.stalls == 0
    await story.passes(90)
    assert story.stalls == 1
    stall.stop()


async def test_payload_that_comes_byte_by_byte(story: Story) -> None:
    stall = story.stall()
    for byte in b'data: {"choices":[{"delta":{"content":"' + b"x" * 1000:
        await story.passes(1, bytes([byte]))
    assert story.stalls == 0
    await story.passes(90)
    assert story.stalls == 1
    stall.stop()


async def test_it_stands_still_while_the_client_does_not_read(story: Story) -> None:
    stall = story.stall()
    await story.passes(75)
    stall.pause()
    await story.passes(1000)
    assert story.stalls == 0
    stall.resume()
    stall.resume()
    await story.passes(4)
    assert story.stalls == 0
    await story.passes(12)
    assert story.stalls == 1


async def test_payload_before_a_pause_counts(story: Story) -> None:
    stall = story.stall()
    await story.passes(75)
    story.comes(HELLO)
    stall.pause()
    await story.passes(1000)
    stall.resume()
    await story.passes(75)
    assert story.stalls == 0
    await story.passes(16)
    assert story.stalls == 1
