"""F3 reply: the client's side of a request, from before its head to behind it.

    waiting ── an answer ──► its head goes out, and nothing is retried any more
       └───── commit_after ──► early: a head of our own goes out; the next candidate may still be
                                tried, as no byte of an upstream has reached the client

Early, a stream's client gets heartbeats; and whatever is no stream can then only be said in-band, as
an error event in the protocol of the path.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Self, cast

import msgspec
from aiohttp import web

from proxy import sse
from proxy.answer import Answer
from proxy.config import Route
from proxy.downstream import ClientConnection, Nowhere, Sink
from proxy.errors import ProxyError
from proxy.exchange import Ask, Exchange, Outcome
from proxy.framing import Header, ResponseHead
from proxy.usage import usage_of
from proxy.watch import Heartbeat

_EARLY = ResponseHead(1, 200, b"OK", ((b"Content-Type", sse.MEDIA_TYPE),))
_MAX_ERROR = 64 * 1024  # bytes of an answer that an error object is looked for in
_MAX_BRACKETS = 200  # of that object: nested more deeply than it was read, it could not be written


class Reply:
    """One request's answer to its client. `ours` are headers that it bears; `clock` gives monotonic
    seconds. While it is entered (`async with`) the request is at an upstream.
    """

    def __init__(
        self,
        request: web.BaseRequest,
        ask: Ask,
        exchange: Exchange,
        ours: Iterable[Header],
        route: Route,
        clock: Callable[[], float],
    ) -> None:
        self._request = request
        self._exchange = exchange
        self._ours = tuple(ours)
        self._route = route
        self._clock = clock
        self._may_be_early = ask.stream and ask.method == "POST"
        self._sink: Sink | None = None
        self._committed = False
        self._heartbeat: Heartbeat | None = None
        self._commit_after: asyncio.TimerHandle | None = None
        self._finish_cap: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        if self._may_be_early:
            self._commit_after = loop.call_later(self._route.commit_after, self._commit_early)
        if self._route.on_disconnect == "finish":
            _connection(self._request).outlive(self._client_left)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop_waiting()
        if self._route.on_disconnect == "finish":
            _connection(self._request).outlive(None)
        if self._finish_cap is not None:
            self._finish_cap.cancel()
        if self._exchange.left:
            if not self._exchange.delivered:
                self._exchange.outcome = Outcome.CLIENT_GONE
            raise asyncio.CancelledError("the client has left")

    async def commit(self, answer: Answer) -> Sink:
        """Where the answer goes, with its head. From here on nothing can be taken back.

        Raises ProxyError if an early head promised a stream, and this answer is none.
        """
        if self._commit_after is not None:
            self._commit_after.cancel()
        if self._sink is not None and not (answer.succeeded and answer.is_readable_stream):
            raise await self._too_late_for(answer)
        self._stop_waiting()
        self._committed = True
        self._exchange.stream = answer.is_stream
        if self._exchange.left:
            return Nowhere()
        if self._sink is None:
            self._sink = self._head_out(answer.head, stream=answer.is_stream)
        return self._sink

    def fail(self, error: ProxyError) -> Sink:
        """Says in-band what can no longer be an answer. Raises `error` if it still can."""
        if self._sink is None:
            raise error
        if self._committed:  # and relayed: an interruption comes too late
            return self._sink
        self._exchange.error = error
        self._sink.write(error.event(self._exchange.dialect, 0))
        self._sink.cut()
        return self._sink

    def _head_out(self, head: ResponseHead, *, stream: bool) -> Sink:
        exchange = self._exchange
        exchange.status = head.status
        said = [
            *self._ours,
            *exchange.limits,
            (b"Sluice-Upstream", (exchange.upstream or "").encode()),
            (b"Sluice-Attempts", b"%d" % exchange.attempts),
        ]
        return Sink(self._request, head, said, stream=stream, limited=bool(exchange.limits))

    def _commit_early(self) -> None:
        if self._request.transport is None:
            return  # the client has left just now
        self._sink = self._head_out(_EARLY, stream=True)
        self._sink.flush()
        self._heartbeat = Heartbeat(self._route.heartbeat, self._sink, self._exchange, self._clock)

    def _stop_waiting(self) -> None:
        if self._commit_after is not None:
            self._commit_after.cancel()
        if self._heartbeat is not None:
            self._heartbeat.stop()

    def _client_left(self) -> None:
        self._exchange.left = True
        self._stop_waiting()
        task = self._exchange.task
        assert task is not None
        loop = asyncio.get_running_loop()
        self._finish_cap = loop.call_later(self._route.finish_cap, task.cancel)

    async def _too_late_for(self, answer: Answer) -> ProxyError:
        """An answer that can't follow an early head, as an error: with the upstream's own words, if
        it has such an object."""
        status = answer.head.status
        if 400 <= status < 500 and status != 429:  # the client's doing, and it is told
            self._exchange.outcome = Outcome.COMPLETED
        what = "with a compressed stream" if answer.is_stream else "with what is no event stream"
        if not answer.succeeded:
            what = f"with status {status}"
        body = b""
        if answer.is_plain and not (answer.is_stream and answer.succeeded):
            with suppress(TimeoutError):
                async with asyncio.timeout(answer.stall_timeout):
                    body = await answer.read(_MAX_ERROR)
        if answer.succeeded:
            self._charge(body)
        return ProxyError(
            "upstream_invalid",
            f"Upstream '{answer.upstream.name}' answered {what}, after the head of a stream had "
            "gone out (commit_after).",
            said=_error_object(body),
        )

    def _charge(self, body: bytes) -> None:
        """A generation that is whole, and no stream, was made for who can't be shown it any more."""
        with suppress(*_UNREADABLE):
            _body.decode(body)
            usage = usage_of(self._exchange.endpoint, False, body, body)
            if usage is not None:
                self._exchange.spent(usage)


def _connection(request: web.BaseRequest) -> ClientConnection:
    return cast(ClientConnection, request.protocol)


class _Body(msgspec.Struct):
    error: msgspec.Raw = msgspec.Raw()


_body = msgspec.json.Decoder(_Body)
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def _error_object(body: bytes) -> dict[str, Any] | None:
    """The `error` object of a JSON body, if it is readable and has one that says something."""
    with suppress(*_UNREADABLE):
        raw = bytes(_body.decode(body).error)
        if raw.count(b"[") + raw.count(b"{") > _MAX_BRACKETS:
            return None
        error = msgspec.json.decode(raw)
        if error and isinstance(error, dict):
            return error
        if error and isinstance(error, str):  # some servers have no more to say
            return {"message": error, "type": "upstream_error", "param": None, "code": None}
    return None
