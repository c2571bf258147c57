"""F4 chat: one relayed request, from top to bottom."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from aiohttp import web

from proxy.auth import Auth, Client
from proxy.catalog import Catalog
from proxy.errors import ProxyError
from proxy.exchange import Ask, Exchange, Outcome
from proxy.forward import Forwarder
from proxy.framing import Header
from proxy.inbound import Bounds, read_ask
from proxy.limits import Limiter, metered
from proxy.relay import outcome_of, relay
from proxy.reply import Reply
from proxy.routing import Router, aliased

MAX_MODEL = 128  # characters of a model's name that logs and /admin show


@dataclass(frozen=True, slots=True)
class Chat:
    """What a request is relayed with. `clock` gives monotonic seconds."""

    auth: Auth
    bounds: Bounds
    router: Router
    limiter: Limiter
    forwarder: Forwarder
    catalog: Catalog
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
        if self.catalog.serves(ask, client):
            return await self._models(ask, client, exchange, ours)
        exchange.model = ask.model and ask.model[:MAX_MODEL]
        client.check_model(ask)
        route = self.router.resolve(ask)
        exchange.route = route.name
        ask = aliased(ask, route)
        if client.limits.tokens is not None:
            ask = metered(ask, exchange)
        reply = Reply(request, ask, exchange, ours, route, self.clock)
        try:
            async with (
                await self.limiter.admit(client, exchange),
                reply,
                await self.forwarder.open(route, ask, exchange) as answer,
            ):
                del ask  # it is sent; its body may be megabytes, and the answer may take minutes
                sink = await reply.commit(answer)
                await relay(answer, sink, exchange, route, self.clock)
                return sink
        except ProxyError as error:
            return self._failed(reply, exchange, error)
        except asyncio.CancelledError:
            interruption = exchange.interrupted()
            if interruption is None:  # the client has left
                if exchange.upstream is not None:
                    exchange.outcome = exchange.outcome or Outcome.CLIENT_GONE
                raise
            return self._failed(reply, exchange, interruption)

    async def _models(
        self, ask: Ask, client: Client, exchange: Exchange, ours: Iterable[Header]
    ) -> web.Response:
        """A list of models that no single upstream could give."""
        async with await self.limiter.admit(client, exchange):
            body = await self.catalog.models(ask, client, exchange)
        fields = [(b"Server", b"sluice"), *ours, *exchange.limits]
        headers = {name.decode(): value.decode() for name, value in fields}
        return web.Response(body=body, content_type="application/json", headers=headers)

    def _failed(self, reply: Reply, exchange: Exchange, error: ProxyError) -> web.StreamResponse:
        if exchange.upstream is not None:
            exchange.outcome = exchange.outcome or outcome_of(error, Outcome.UPSTREAM_ERROR)
        return reply.fail(error)
