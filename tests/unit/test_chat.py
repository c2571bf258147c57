"""One relayed request from top to bottom, each phase played by a stand-in."""

from __future__ import annotations

import asyncio
from typing import Any, Self, cast

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from proxy import config
from proxy.answer import Answer
from proxy.auth import Auth
from proxy.catalog import Catalog
from proxy.chat import Chat
from proxy.connection import Receiver
from proxy.downstream import Sink
from proxy.errors import ProxyError
from proxy.exchange import Ask, Exchange, Outcome
from proxy.forward import Forwarder
from proxy.framing import ResponseHead
from proxy.inbound import Bounds
from proxy.limits import Limiter
from proxy.reply import Reply
from proxy.routing import Router
from proxy.store.memory import MemoryCounters


class Upstream:
    """An answer that is all there, or ends with an error."""

    is_plain = succeeded = True
    stall_timeout = 60.0

    def __init__(self, *payload: bytes, stream: bool = True, end: ProxyError | None = None) -> None:
        media_type = b"text/event-stream" if stream else b"text/plain"
        self.head = ResponseHead(1, 200, b"OK", ((b"Content-Type", media_type),))
        self.is_stream = self.is_readable_stream = stream
        self.closed = False
        self._payload, self._end = payload, end

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.closed = True

    def deliver_to(self, receiver: Receiver) -> None:
        for each in self._payload:
            receiver.payload(each)
        receiver.ended(self._end)

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def abort(self) -> None: ...


NOBODY = ProxyError("no_upstream_available", "", retry_after=7)


class Forwards:
    """Opens what it is given, or raises it."""

    def __init__(self, result: Upstream | BaseException) -> None:
        self._result = result
        self.asked: list[tuple[str, Ask]] = []

    async def open(self, route: config.Route, ask: Ask, exchange: Exchange) -> Answer:
        self.asked.append((route.name, ask))
        if not (isinstance(self._result, ProxyError) and self._result.code == NOBODY.code):
            exchange.upstream, exchange.attempts = "up", 2
        if isinstance(self._result, BaseException):
            raise self._result
        return cast(Answer, self._result)


class Lists:
    """A catalog that leaves lists of models to the upstreams."""

    def serves(self, *_: object) -> bool:
        return False


class Story:
    def __init__(
        self, result: Upstream | BaseException, *patterns: str, model: str | None = None
    ) -> None:
        self.forwards = Forwards(result)
        models = patterns or ("*",)
        route = config.Route(models=models, name="route", upstreams=("up",), model=model)
        self.chat = Chat(
            Auth([], config.Limits(), ()),
            Bounds(100, 1),
            Router([route]),
            Limiter(MemoryCounters(lambda: 7.0)),
            cast(Forwarder, self.forwards),
            cast(Catalog, Lists()),
            lambda: 7.0,
        )
        self.exchange = Exchange("id", "id", "GET", "/v1/models", 0.0)
        self.request = make_mocked_request("GET", "/v1/models?a")

    async def play(self) -> web.StreamResponse:
        return await self.chat.answer(self.request, self.exchange, [(b"X-Ours", b"1")])

    @property
    def written(self) -> bytes:
        transport: Any = self.request.transport
        return b"".join(call.args[0] for call in transport.write.call_args_list)


async def test_a_request_and_its_answer() -> None:
    upstream = Upstream(b"data: 1\n\n")
    story = Story(upstream)
    answer = await story.play()
    assert isinstance(answer, Sink)
    assert upstream.closed
    [(route, ask)] = story.forwards.asked
    assert (route, ask.method, ask.target) == ("route", "GET", b"/models?a")
    head, _, body = story.written.partition(b"\r\n\r\n")
    assert body == b"9\r\ndata: 1\n\n\r\n0\r\n\r\n"
    fields = head.split(b"\r\n")[1:]
    assert fields.index(b"X-Ours: 1") < fields.index(b"Sluice-Upstream: up")
    assert b"Sluice-Attempts: 2" in fields
    exchange = story.exchange
    assert (exchange.route, exchange.read, exchange.status) == ("route", 7.0, 200)
    assert (exchange.stream, exchange.outcome) == (True, Outcome.COMPLETED)


async def test_no_answer() -> None:
    error = ProxyError("upstream_unreachable", "")
    story = Story(error)
    with pytest.raises(ProxyError) as caught:
        await story.play()
    assert caught.value is error
    assert story.exchange.outcome is Outcome.UPSTREAM_ERROR
    assert story.written == b""


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ProxyError("upstream_timeout", "", clock="first_byte"), Outcome.FIRST_BYTE_TIMEOUT),
        (ProxyError("request_timeout", ""), Outcome.CLIENT_GONE),
        (ProxyError("upstream_auth", ""), Outcome.UPSTREAM_ERROR),
        (ProxyError("upstream_timeout", "", clock="stall"), Outcome.STALL_TIMEOUT),
        (ProxyError("upstream_timeout", "", clock="idle"), Outcome.IDLE_TIMEOUT),
        (ProxyError("upstream_timeout", "", clock="connect"), Outcome.UPSTREAM_ERROR),
    ],
)
async def test_why_there_is_none(error: ProxyError, outcome: Outcome) -> None:
    story = Story(error)
    with pytest.raises(ProxyError):
        await story.play()
    assert story.exchange.outcome is outcome


@pytest.mark.parametrize(
    ("result", "outcome"), [(asyncio.CancelledError(), Outcome.CLIENT_GONE), (ValueError(), None)]
)
async def test_what_ends_before_the_head_otherwise(
    result: BaseException, outcome: Outcome | None
) -> None:
    story = Story(result)
    with pytest.raises(type(result)):
        await story.play()
    assert story.exchange.outcome is outcome


async def test_no_upstream_is_asked_for_what_no_route_takes() -> None:
    story = Story(Upstream(), "gpt-*")
    with pytest.raises(ProxyError) as caught:
        await story.play()
    assert caught.value.code == "model_not_found"
    assert story.forwards.asked == []
    # §5: outcomes are of requests for which an upstream was asked.
    assert (story.exchange.route, story.exchange.outcome) == ("none", None)


async def test_no_upstream_was_asked_where_none_was_available() -> None:
    story = Story(NOBODY)
    with pytest.raises(ProxyError) as caught:
        await story.play()
    assert caught.value.headers()["Retry-After"] == "7"
    # Refused, though by a route: nothing was asked, so there is no outcome.
    assert (story.exchange.route, story.exchange.upstream) == ("route", None)
    assert story.exchange.outcome is None


async def test_a_cut_is_no_error_of_ours_any_more() -> None:
    upstream = Upstream(b"data: 1\n\n", end=ProxyError("upstream_aborted", "cut"))
    story = Story(upstream)
    await story.play()
    assert story.exchange.outcome is Outcome.UPSTREAM_TRUNCATED
    assert b'data: {"error":{"message":"cut"' in story.written
    assert not story.written.endswith(b"0\r\n\r\n")
    assert upstream.closed


async def test_a_client_that_left_in_the_moment_of_the_head() -> None:
    upstream = Upstream(b"data: 1\n\n")
    story = Story(upstream)
    story.request.protocol.transport = None
    with pytest.raises(asyncio.CancelledError):
        await story.play()
    assert upstream.closed
    assert story.exchange.outcome is Outcome.CLIENT_GONE


@pytest.mark.parametrize("stream", [True, False])
async def test_commit(stream: bool) -> None:
    exchange = Exchange("id", "id", "GET", "/v1/models", 0.0, upstream="up", attempts=1)
    request = make_mocked_request("GET", "/v1/models")
    route = config.Route(models=("*",), name="route", upstreams=("up",))
    reply = Reply(request, Ask("GET", b"/models", ()), exchange, [], route, lambda: 7.0)
    await reply.commit(cast(Answer, Upstream(stream=stream)))
    assert (exchange.status, exchange.stream) == (200, stream)
