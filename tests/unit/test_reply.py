"""A client's answer before and behind its head: what it gets while it waits, and when it has left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, cast

import pytest
from aiohttp import HttpVersion11, web

from proxy import config
from proxy.answer import Answer
from proxy.downstream import Nowhere, Sink
from proxy.errors import ProxyError
from proxy.exchange import Ask, Exchange, Outcome
from proxy.framing import Header, ResponseHead
from proxy.reply import Reply

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
STREAM = (b"Content-Type", b"text/event-stream")
JSON = (b"Content-Type", b"application/json")
GZIP = (b"Content-Encoding", b"gzip")
THEIRS = {"message": "Too long.", "type": "theirs", "param": "messages", "code": "too_long"}
BEAT = b"2\r\n:\n\r\n"
UNREACHABLE = ProxyError("upstream_unreachable", "Refused.")
KILLED = ProxyError("killed", "Enough.")


class Connection:
    """As much of a client's connection as a reply asks of it."""

    writing_paused = False

    def __init__(self) -> None:
        self.left: Callable[[], None] | None = None

    def outlive(self, left: Callable[[], None] | None) -> None:
        self.left = left


class Transport:
    def __init__(self) -> None:
        self.written = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.written += data

    def close(self) -> None:
        self.closed = True


class Request:
    method = "POST"
    version = HttpVersion11
    keep_alive = True
    writer = None

    def __init__(self) -> None:
        self.protocol = Connection()
        self.transport: Transport | None = Transport()


class Upstream:
    """An answer; `body` is what can be read of it."""

    def __init__(self, *fields: Header, status: int = 200, body: bytes = b"") -> None:
        self.upstream = self
        self.name = "up"
        self.head = ResponseHead(1, status, b"OK", fields or (STREAM,))
        self.succeeded = status < 300
        self.is_stream = self.head.content_type == b"text/event-stream"
        self.is_plain = GZIP not in fields
        self.is_readable_stream = self.is_stream and self.is_plain
        self.stall_timeout = 300.0
        self._body = body

    async def read(self, most: int) -> bytes:
        assert most == 64 * 1024
        return self._body


class Story:
    """One request, and the loop's clock, which is moved by hand."""

    def __init__(
        self, path: str = CHAT, *, method: str = "POST", stream: bool = True, **route: Any
    ) -> None:
        self.now = asyncio.get_running_loop().time()
        self.request = Request()
        assert self.request.transport is not None
        self.client = self.request.transport
        self.exchange = Exchange("id", "id", method, path, 0.0)
        self.exchange.upstream, self.exchange.attempts = "first", 1
        self.exchange.task = asyncio.current_task()
        self.reply = Reply(
            cast(web.BaseRequest, self.request),
            Ask(method, b"/", (), stream=stream),
            self.exchange,
            [(b"Sluice-Request-Id", b"id")],
            config.Route(models=("*",), name="all", upstreams=("first", "second"), **route),
            lambda: self.now,
        )

    async def commit(self, *fields: Header, **answer: Any) -> Sink:
        return await self.reply.commit(cast(Answer, Upstream(*fields, **answer)))

    async def passes(self, seconds: float) -> bytes:
        """What the client gets in so much time."""
        before, until = len(self.client.written), self.now + seconds
        while self.now < until:
            self.now = min(self.now + 1.0, until)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        return self.client.written[before:]

    def leaves(self) -> None:
        """The client does."""
        self.request.transport = None
        if self.request.protocol.left is not None:
            self.request.protocol.left()

    async def ends(self, does: Awaitable[object]) -> None:
        """Does something while the request is at its upstream, and says how that ended."""
        async with self.reply:
            await does


Tells = Callable[..., Story]


@pytest.fixture
async def tells(monkeypatch: pytest.MonkeyPatch) -> Tells:
    def tell(*path: str, **kind: Any) -> Story:
        story = Story(*path, **kind)
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: story.now)
        return story

    return tell


EARLY = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    b"Cache-Control: no-cache, no-transform\r\nX-Accel-Buffering: no\r\n"
    b"Sluice-Request-Id: id\r\nSluice-Upstream: first\r\nSluice-Attempts: 1\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


# An answer in time ----------------------------------------------------------------------------


async def test_an_answer_in_time_brings_its_own_head(tells: Tells) -> None:
    story = tells()
    async with story.reply:
        assert await story.passes(29.9) == b""
        story.exchange.upstream, story.exchange.attempts = "second", 2
        sink = await story.commit(STREAM, (b"X-Theirs", b"1"))
        assert await story.passes(300) == b""  # from here on the relay sees to the client
        sink.flush()
    head, _, _ = story.client.written.partition(b"\r\n\r\n")
    fields = head.split(b"\r\n")
    assert b"X-Theirs: 1" in fields
    assert b"Sluice-Upstream: second" in fields
    assert b"Sluice-Attempts: 2" in fields
    assert (story.exchange.status, story.exchange.stream) == (200, True)


@pytest.mark.parametrize("status", [200, 400, 429, 503])
async def test_in_time_any_answer_is_relayed_as_it_is(tells: Tells, status: int) -> None:
    story = tells()
    async with story.reply:
        sink = await story.commit(JSON, (b"Content-Length", b"2"), status=status)
        sink.write(b"{}")
        sink.finish()
    assert story.client.written.startswith(b"HTTP/1.1 %d OK\r\n" % status)
    assert story.client.written.endswith(b"\r\n\r\n{}")
    assert (story.exchange.status, story.exchange.stream) == (status, False)


async def test_limits_are_told_with_the_head(tells: Tells) -> None:
    story = tells()
    story.exchange.limits = ((b"x-ratelimit-limit-requests", b"5"),)
    async with story.reply:
        theirs = (b"x-ratelimit-limit-requests", b"9999")
        (await story.commit(STREAM, theirs)).flush()
    assert b"x-ratelimit-limit-requests: 5\r\n" in story.client.written
    assert b"9999" not in story.client.written


async def test_a_failure_in_time_can_still_be_an_answer(tells: Tells) -> None:
    story = tells()
    async with story.reply:
        await story.passes(29)
    with pytest.raises(ProxyError) as raised:
        story.reply.fail(UNREACHABLE)
    assert raised.value is UNREACHABLE
    assert await story.passes(300) == b""
    assert story.exchange.status is None


# The early head -------------------------------------------------------------------------------


async def test_the_head_goes_out_before_there_is_an_answer(tells: Tells) -> None:
    story = tells()
    async with story.reply:
        assert await story.passes(29.9) == b""
        assert await story.passes(0.2) == EARLY
        assert await story.passes(14.8) == b""
        assert await story.passes(30) == BEAT * 2
        assert story.exchange.heartbeats == 2
        # The next candidate answers: its head comes too late, its body does not.
        story.exchange.upstream, story.exchange.attempts = "second", 2
        sink = await story.commit(STREAM, (b"X-Theirs", b"1"))
        sink.flush()
        sink.write(b"data: 1\n\n")
        sink.finish()
    assert story.client.written == EARLY + BEAT * 2 + b"9\r\ndata: 1\n\n\r\n0\r\n\r\n"
    assert (story.exchange.status, story.exchange.stream) == (200, True)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"commit_after": 5.0}, EARLY + BEAT * 3),
        ({"commit_after": 5.0, "heartbeat": 0.0}, EARLY),
        ({"commit_after": 5.0, "heartbeat": 50.0}, EARLY + BEAT),
        ({"commit_after": 60.0}, b""),
    ],
)
async def test_the_route_says_when(
    tells: Tells, settings: dict[str, float], expected: bytes
) -> None:
    story = tells(**settings)
    async with story.reply:
        assert await story.passes(55.5) == expected
    assert await story.passes(300) == b""


@pytest.mark.parametrize("kind", [{"stream": False}, {"method": "GET"}, {"method": "PUT"}])
async def test_only_who_asked_for_a_stream_gets_an_early_head(
    tells: Tells, kind: dict[str, Any]
) -> None:
    story = tells(**kind)
    async with story.reply:
        assert await story.passes(300) == b""


async def test_no_head_for_a_client_that_has_left_just_now(tells: Tells) -> None:
    story = tells()
    async with story.reply:
        story.leaves()
        assert await story.passes(300) == b""
    assert story.exchange.status is None


def error_of(event: bytes, path: str) -> Any:
    """The error in the one chunk that holds it, in the protocol of the path."""
    size, _, rest = event.partition(b"\r\n")
    event, _, nothing = rest.rpartition(b"\r\n")
    assert (int(size, 16), nothing) == (len(event), b"")  # and no last chunk
    lines = event.removesuffix(b"\n\n").split(b"\n")
    data = json.loads(lines.pop().removeprefix(b"data: "))
    assert lines == ([] if path == CHAT else [b"event: error"])
    if path == CHAT:
        return data.pop("error")
    assert data.pop("type") == "error"
    if path == MESSAGES:
        return data.pop("error")
    assert data.pop("sequence_number") == 0
    return data


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
@pytest.mark.parametrize("error", [UNREACHABLE, KILLED])
async def test_behind_an_early_head_a_failure_is_an_event(
    tells: Tells, path: str, error: ProxyError
) -> None:
    story = tells(path)
    async with story.reply:
        await story.passes(30.5)
    sink = story.reply.fail(error)
    told = error_of(story.client.written.removeprefix(EARLY), path)
    assert (told["code"], told["message"]) == (error.code, error.message)
    assert story.client.closed
    assert sink.status == 200
    assert story.exchange.error is error
    assert await story.passes(300) == b""


async def too_late(story: Story, *fields: Header, **answer: Any) -> ProxyError:
    """The error that an answer becomes behind an early head."""
    with pytest.raises(ProxyError) as raised:
        async with story.reply:
            await story.passes(30.5)
            await story.commit(*fields, **answer)
    return raised.value


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
async def test_an_upstreams_error_is_told_in_its_own_words(tells: Tells, path: str) -> None:
    # interface.md, §6: `becomes the error event with the upstream's own error object`
    story = tells(path)
    body = json.dumps({"type": "error", "error": THEIRS}).encode()
    story.reply.fail(await too_late(story, JSON, status=400, body=body))
    told = error_of(story.client.written.removeprefix(EARLY), path)
    assert told == {key: THEIRS[key] for key in told}
    assert told["message"] == "Too long."


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"error":{"message":"m"}}', {"message": "m"}),
        (b'{"error":"m"}', {"message": "m", "type": "upstream_error", "param": None, "code": None}),
        (b'{"error":{"message":"m","deep":[[{}]]}}', {"message": "m", "deep": [[{}]]}),
    ],
)
async def test_error_objects_of_all_sorts(tells: Tells, body: bytes, told: object) -> None:
    story = tells()
    assert (await too_late(story, JSON, status=500, body=body)).as_object() == told


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"null", b"[]", b'"error"', b"Bad Gateway", b"\xff", b'{"detail":["d"]}'),
        *(b'{"error":null}', b'{"error":1}', b'{"error":["e"]}', b'{"error":{"m":1}'),
        *(b'{"error":{}}', b'{"error":""}'),  # an SDK would take no notice of it
        b'{"error":' + b"[" * 60_000,
        b'{"error":{"n":1e999999}}',
    ],
)
async def test_without_an_error_object_ours_says_what_came(tells: Tells, body: bytes) -> None:
    story = tells()
    error = await too_late(story, JSON, status=502, body=body)
    assert (error.as_object()["code"], error.status) == ("upstream_invalid", 502)
    assert "'up' answered with status 502" in error.message


async def test_an_error_object_nested_as_deeply_as_can_be_read_can_be_told(tells: Tells) -> None:
    for depth in range(900, 1000, 5):
        story = tells()
        body = b'{"error":{"message":"m","n":' + b"[" * depth + b"]" * depth + b"}}"
        error = await too_late(story, JSON, status=500, body=body)
        story.reply.fail(error)
        assert story.client.closed


@pytest.mark.parametrize(
    ("fields", "status", "outcome"),
    [
        ([JSON], 400, Outcome.COMPLETED),  # the client's own doing
        ([JSON], 404, Outcome.COMPLETED),
        ([STREAM], 422, Outcome.COMPLETED),
        ([JSON], 429, None),  # whoever catches the error decides
        ([JSON], 500, None),
        ([STREAM], 503, None),
        ([JSON], 200, None),
        ([JSON], 302, None),
        ([STREAM, GZIP], 200, None),  # nothing can be added to it
    ],
)
async def test_what_cannot_follow_an_early_head(
    tells: Tells, fields: list[Header], status: int, outcome: Outcome | None
) -> None:
    story = tells()
    error = await too_late(story, *fields, status=status, body=b"x" * 100)
    assert error.code == "upstream_invalid"
    assert story.exchange.outcome is outcome
    assert story.client.written == EARLY
    assert story.exchange.status == 200


# Leaving --------------------------------------------------------------------------------------


async def test_by_default_nothing_outlives_a_client(tells: Tells) -> None:
    story = tells()
    async with story.reply:
        assert story.request.protocol.left is None


@pytest.mark.parametrize("after", [1.0, 31.0])
async def test_a_request_that_is_finished_without_its_client(tells: Tells, after: float) -> None:
    story = tells(on_disconnect="finish")
    sink: Sink | None = None
    with pytest.raises(asyncio.CancelledError):
        async with story.reply:
            before = await story.passes(after)
            story.leaves()
            await story.passes(200)  # no early head any more, and no heartbeat
            sink = await story.commit()
            story.exchange.outcome = Outcome.COMPLETED  # says the relay
    assert story.exchange.left
    assert isinstance(sink, Nowhere)
    assert story.client.written == before
    assert story.exchange.outcome is Outcome.CLIENT_GONE
    assert story.request.protocol.left is None


async def test_who_left_with_a_whole_answer_is_not_gone(tells: Tells) -> None:
    story = tells(on_disconnect="finish")
    with suppress(asyncio.CancelledError):
        async with story.reply:
            await story.commit()
            story.leaves()
            story.exchange.delivered, story.exchange.outcome = True, Outcome.COMPLETED
    assert story.exchange.outcome is Outcome.COMPLETED


async def test_nobody_is_told_of_an_error_who_has_left(tells: Tells) -> None:
    story = tells(on_disconnect="finish")
    with pytest.raises(asyncio.CancelledError):
        async with story.reply:
            await story.passes(31)
            story.leaves()
            await story.commit(JSON, status=500)
    assert story.client.written == EARLY
    assert story.exchange.outcome is Outcome.CLIENT_GONE


@pytest.mark.parametrize("cap", [20.0, 300.0])
async def test_it_is_finished_for_so_long_and_no_longer(tells: Tells, cap: float) -> None:
    story = tells(on_disconnect="finish", finish_cap=cap)
    upstream = asyncio.Event()
    story.exchange.task = task = asyncio.create_task(story.ends(upstream.wait()))
    await story.passes(10)
    story.leaves()
    await story.passes(cap - 0.1)
    assert not task.done()
    await story.passes(0.2)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert story.exchange.outcome is Outcome.CLIENT_GONE


async def test_the_cap_holds_only_until_the_end(tells: Tells) -> None:
    story = tells(on_disconnect="finish", finish_cap=20.0)
    with suppress(asyncio.CancelledError):
        async with story.reply:
            story.leaves()
    await story.passes(60)  # whatever this task does next, such as to settle, is not cancelled


# Endings from outside -------------------------------------------------------------------------


async def test_what_was_relayed_is_not_failed_again(tells: Tells) -> None:
    # A kill, or the end of a drain, may come while the limits are settled behind it.
    story = tells()
    async with story.reply:
        sink = await story.commit(JSON, (b"Content-Length", b"2"))
        sink.write(b"{}")
        sink.finish()
        story.exchange.outcome = Outcome.COMPLETED
    written = story.client.written
    assert story.reply.fail(KILLED) is sink
    assert story.client.written == written
    assert not story.client.closed
    assert story.exchange.error is None
