"""F5 app: every object is built here, once; and every error becomes an answer here, once.

What a config decides is one value, `Setup`, which a reload swaps whole: requests that have begun
keep the one they began with.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from aiohttp import web

from proxy import store, upstreams
from proxy.auth import Auth
from proxy.catalog import Catalog
from proxy.chat import Chat
from proxy.config import Config, Limits
from proxy.cors import Cors, is_preflight
from proxy.demo import Demo
from proxy.downstream import LastAnswer, Server, Timeouts
from proxy.errors import IN_BAND_ONLY, Dialect, ProxyError
from proxy.exchange import Exchange
from proxy.forward import Forwarder
from proxy.headers import client_address, request_id
from proxy.inbound import Bounds, path_of, unknown_url
from proxy.limits import RENEW_EVERY, Limiter
from proxy.observe import Observer, new_id
from proxy.ops import Ops
from proxy.routing import Router
from proxy.upstreams import Upstream

log = logging.getLogger("sluice.app")


@dataclass(frozen=True, slots=True)
class Setup:
    """All that follows from one config."""

    config: Config
    upstreams: Mapping[str, Upstream]
    cors: Cors
    chat: Chat

    @classmethod
    def of(
        cls,
        config: Config,
        limiter: Limiter,
        demo: Demo,
        clock: Callable[[], float],
        old: Mapping[str, Upstream],
    ) -> Setup:
        """`old` are the upstreams up to now: those that are still there go on under their new terms."""
        auth = Auth(config.clients, config.limits, config.trusted_proxies)
        bounds = Bounds(config.max_body, config.client_timeouts.body)
        router, cors = Router(config.routes), Cors(config.cors.origins)
        # Last, as it changes the old ones: what fails must fail before.
        built = upstreams.build(config, lambda: demo.connect, old)
        forwarder = Forwarder(built, clock)
        catalog = Catalog(router, config.routes, forwarder, built, clock)
        chat = Chat(auth, bounds, router, limiter, forwarder, catalog, clock)
        return cls(config, built, cors, chat)

    def close(self) -> None:
        """Closes idle upstream connections; those in use close when they come back."""
        for upstream in self.upstreams.values():
            upstream.pool.close()


class App:
    """The proxy without its sockets. To be built on a running event loop."""

    def __init__(self, config: Config) -> None:
        self._clock = time.monotonic
        self._demo = Demo()
        self.observer = Observer(config, self._clock)
        counters = store.build(
            config.store,
            failure=config.store_failure,
            timeout=config.store_timeout,
            clock=self._clock,
            on_error=self.observer.store_failed,
        )
        self._limiter = Limiter(counters)
        self._setup = Setup.of(config, self._limiter, self._demo, self._clock, {})
        self.observer.upstreams = lambda: self._setup.upstreams
        admin_key = config.admin.key.get_secret_value() if config.admin.key else None
        self._limiter.limits_of = self._limits_of
        self._ops = Ops(
            self.observer,
            admin_key,
            draining=lambda: self.draining,
            upstreams=lambda: self._setup.upstreams,
            limiter=self._limiter,
            clock=self._clock,
        )
        self._admin_apart = config.admin.port is not None
        self.draining = False  # /readyz says so
        self.refusing = False  # and new work is refused

    def server(self, *, admin: bool = False, most: float = math.inf) -> Server:
        """A protocol factory for a listening socket: the main one's, or the admin port's; it takes
        `most` connections at a time."""
        return Server(
            self._handle_admin if admin else self._handle,
            timeouts=lambda: _client_timeouts(self._setup.config),
            refuse=self._refuse,
            most=most,
        )

    def reload(self, config: Config) -> None:
        """Lets `config` hold for new requests; those in progress go on untouched, but what they have
        yet to send upstream goes there with the key that is valid now."""
        old = self._setup.upstreams
        self._setup = Setup.of(config, self._limiter, self._demo, self._clock, old)
        self.observer.use(config)

    def sweep(self) -> None:
        """What needs a look once a second: upstream connections that have been idle for long."""
        for upstream in self._setup.upstreams.values():
            upstream.pool.sweep()

    def _limits_of(self, name: str) -> Limits | None:
        return self._setup.chat.auth.limits_of(name)

    async def keep_leases(self) -> None:
        """Renews the leases of open requests, until cancelled."""
        while True:
            await asyncio.sleep(RENEW_EVERY)
            await self._limiter.renew()

    async def close(self) -> None:
        """Lets go of upstream connections, of the store and of the embedded upstream."""
        self._setup.close()
        await self._limiter.close()
        await self._demo.close()

    # The error boundary.

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answers a request on the main port: on the proxy's own paths, or by relaying it."""
        path = path_of(request.raw_path)
        if self._ops.serves(path, admin=not self._admin_apart):
            return self._own(request, path)
        offered = request_id(request.headers.get("X-Request-Id"))
        with self.observer.exchange(request.method, path, offered) as exchange:
            self._trace(request, exchange)
            try:
                answer = await self._story(request, exchange)
            except ProxyError as error:
                answer = self._failed(request, exchange, error)
            except asyncio.CancelledError:
                interruption = exchange.interrupted()
                if interruption is None:
                    raise
                answer = self._failed(request, exchange, interruption)
            except Exception:
                log.exception("internal_error", extra={"fields": {"id": exchange.request_id}})
                answer = self._failed(request, exchange, _internal_error())
            exchange.status = answer.status
            return answer

    async def _story(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        setup = self._setup
        if self.refusing:
            raise _shutting_down()
        preflight = self._from_a_page(request)
        if preflight is not None:
            return self._signed(preflight, request, exchange.request_id)
        ours = self._ours(request, exchange.request_id)
        return await setup.chat.answer(
            request, exchange, [(key.encode(), value.encode()) for key, value in ours.items()]
        )

    def _from_a_page(self, request: web.BaseRequest) -> web.Response | None:
        """The answer to a preflight, else None. Raises ProxyError (origin_not_allowed)."""
        cors = self._setup.cors
        if is_preflight(request.method, request.headers):
            return web.Response(status=204, headers=cors.preflight(request.headers))
        cors.judge(request.headers)
        return None

    async def _handle_admin(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answers a request on the admin port."""
        path = path_of(request.raw_path)
        if self._ops.serves(path, admin=True):
            return self._own(request, path)
        return self._error(request, new_id(), unknown_url())

    def _own(self, request: web.BaseRequest, path: str) -> web.Response:
        """The answer on one of the proxy's own paths."""
        try:
            preflight = self._from_a_page(request)
            answer = self._ops.answer(request, path) if preflight is None else preflight
        except ProxyError as error:
            return self._error(request, new_id(), error)
        return self._signed(answer, request, new_id())

    def _refuse(self, error: ProxyError) -> web.Response:
        """The answer to what never became a request; it counts like one."""
        with self.observer.exchange("-", "-", None) as exchange:
            exchange.status, exchange.error = error.status, error
            headers = {"Sluice-Request-Id": exchange.request_id, "Server": "sluice"}
            body = error.body(Dialect.CHAT)
            return LastAnswer(status=error.status, body=body, headers=error.headers() | headers)

    # What answers of ours bear.

    def _failed(
        self, request: web.BaseRequest, exchange: Exchange, error: ProxyError
    ) -> web.Response:
        """An error as the answer, if there is none yet; else, and for what is said in-band only, the
        connection ends."""
        exchange.error = error
        if exchange.status is None and error.code not in IN_BAND_ONLY:
            answer = self._error(request, exchange.request_id, error)
            for name, value in exchange.limits:
                answer.headers[name.decode()] = value.decode()
            return answer
        if request.transport is not None:
            request.transport.abort()
        raise asyncio.CancelledError

    def _error(self, request: web.BaseRequest, request_id: str, error: ProxyError) -> web.Response:
        """The one rendering of an error as an HTTP answer."""
        body = error.body(Dialect.of(path_of(request.raw_path)))
        # Behind a refusal the body of one who waits for 100 Continue may come, or not: nobody could
        # tell it from a next request (RFC 9110 10.1.1).
        undecided = "Expect" in request.headers and not request.content.is_eof()
        kind = LastAnswer if error.close or undecided else web.Response
        answer = kind(status=error.status, body=body, headers=error.headers())
        return self._signed(answer, request, request_id)

    def _signed(
        self, answer: web.Response, request: web.BaseRequest, request_id: str
    ) -> web.Response:
        answer.headers["Server"] = "sluice"
        answer.headers.update(self._ours(request, request_id))
        return answer

    def _ours(self, request: web.BaseRequest, request_id: str) -> dict[str, str]:
        """The headers of every answer, relayed or our own."""
        return {"Sluice-Request-Id": request_id, **self._setup.cors.headers(request.headers)}

    def _trace(self, request: web.BaseRequest, exchange: Exchange) -> None:
        if log.isEnabledFor(logging.DEBUG):
            address = client_address(
                request.remote or "",
                request.headers.getall("X-Forwarded-For", []),
                self._setup.config.trusted_proxies,
            )
            fields = {"request_id": exchange.request_id, "address": address}
            log.debug("received", extra={"fields": fields})


def _client_timeouts(config: Config) -> Timeouts:
    timeouts = config.client_timeouts
    return Timeouts(timeouts.head, timeouts.keep_alive, timeouts.write)


def _shutting_down() -> ProxyError:
    return ProxyError(
        "shutting_down",
        "The proxy is shutting down. Try again on a new connection.",
        close=True,
    )


def _internal_error() -> ProxyError:
    return ProxyError(
        "internal_error", "The proxy itself failed; its log says why, under this request's id."
    )
