"""F4 chat: one relayed request, from top to bottom."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from aiohttp import web

from proxy.auth import Auth
from proxy.downstream import Sink
from proxy.errors import ProxyError
from proxy.exchange import Exchange, Outcome
from proxy.forward import Answer, Forwarder
from proxy.framing import Header
from proxy.inbound import Bounds, read_ask
from proxy.limits import Limiter, metered
from proxy.relay import outcome_of, relay
from proxy.routing import Router

MAX_MODEL = 128  # characters of a model's name that logs and /admin show


@dataclass(frozen=True, slots=True)
class Chat:
    """What a request is relayed with. `clock` gives monotonic seconds."""

    auth: Auth
    bounds: Bounds
    router: Router
    limiter: Limiter
    forwarder: Forwarder
    clock: Callable[[], float]

    async def answer(
        self, request: web.BaseRequest, exchange: Exchange, ours: Iterable[Header]
    ) -> web.StreamResponse:
        """Relays one request; `ours` are the headers that every answer of ours bears.

        Raises ProxyError while the head has not gone out. Afterwards a failure ends the answer in
        the way that its client can see.
        """
        client = self.auth.identify(request.headers, request.remote or "")
        exchange.client = client.name
        if "Expect" in request.headers:  # the body is not on its way yet, and need not be
            await self.limiter.check(client, exchange)
        ask = await read_ask(request, self.bounds)
        exchange.read = self.clock()
        exchange.model = ask.model and ask.model[:MAX_MODEL]
        client.check_model(ask)
        route = self.router.resolve(ask.model)
        exchange.route = route.name
        if client.limits.tokens is not None:
            ask = metered(ask, exchange)
        try:
            async with (
                await self.limiter.admit(client, exchange),
                await self.forwarder.open(route, ask, exchange) as answer,
            ):
                del ask  # it is sent; its body may be megabytes, and the answer may take minutes
                sink = commit(request, answer, exchange, ours)
                await relay(answer, sink, exchange, self.clock)
                return sink
        except ProxyError as error:
            if exchange.upstream is not None:
                exchange.outcome = outcome_of(error, Outcome.UPSTREAM_ERROR)
            raise
        except asyncio.CancelledError:
            if exchange.upstream is not None:
                exchange.outcome = exchange.outcome or Outcome.CLIENT_GONE
            raise


def commit(
    request: web.BaseRequest, answer: Answer, exchange: Exchange, ours: Iterable[Header]
) -> Sink:
    """From here on nothing can be taken back: the client's answer has this upstream's head."""
    exchange.status = answer.head.status
    exchange.stream = answer.is_stream
    said = [
        *ours,
        *exchange.limits,
        (b"Sluice-Upstream", (exchange.upstream or "").encode()),
        (b"Sluice-Attempts", b"%d" % exchange.attempts),
    ]
    return Sink(request, answer.head, said, stream=answer.is_stream, limited=bool(exchange.limits))
