"""F4 ops: what operators ask the proxy itself: is it alive, is it ready, what is it doing."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from aiohttp import web

from proxy.errors import ProxyError
from proxy.exchange import Exchange
from proxy.limits import Limiter
from proxy.observe import CONTENT_TYPE, Observer
from proxy.upstreams import Upstream

_STREAMS = "/admin/streams"


class Ops:
    """Answers on the proxy's own paths.

    `admin_key` None means that there is no /admin. `draining` and `upstreams` are asked anew for
    every answer, as they change.
    """

    def __init__(
        self,
        observer: Observer,
        admin_key: str | None,
        *,
        draining: Callable[[], bool],
        upstreams: Callable[[], Mapping[str, Upstream]],
        limiter: Limiter,
        clock: Callable[[], float],
    ) -> None:
        self._observer = observer
        self._admin_key = admin_key
        self._draining = draining
        self._upstreams = upstreams
        self._limiter = limiter
        self._clock = clock

    def serves(self, path: str, *, admin: bool) -> bool:
        """Whether a path is one of the proxy's own; /metrics and /admin are with `admin` only, as
        they may have a port of their own."""
        if path in {"/livez", "/readyz"}:
            return True
        is_streams = path == _STREAMS or path.startswith(_STREAMS + "/")
        return admin and (path == "/metrics" or (is_streams and self._admin_key is not None))

    def answer(self, request: web.BaseRequest, path: str) -> web.Response:
        """The answer on a path that it serves. Raises ProxyError."""
        if path.startswith(_STREAMS):
            return self._streams(request, path.removeprefix(_STREAMS))
        _only(request, "GET", "HEAD")
        match path:
            case "/livez":
                return _json({"status": "ok", "reasons": []})
            case "/readyz":
                return self._ready()
        return web.Response(body=self._observer.render(), headers={"Content-Type": CONTENT_TYPE})

    def _streams(self, request: web.BaseRequest, rest: str) -> web.Response:
        self._authorize(request)
        if not rest:
            _only(request, "GET", "HEAD")
            return _json({"data": [self._row(each) for each in self._relayed().values()]})
        _only(request, "DELETE")
        return self._kill(rest.removeprefix("/"))

    def _ready(self) -> web.Response:
        """Upstreams and the store are reported, not judged: they are the same for every replica, and
        a proxy taken out of rotation for them could not even say so."""
        now = self._clock()
        reasons = [
            f"upstream {upstream.name}: {trouble}"
            for upstream in self._upstreams().values()
            if (trouble := upstream.trouble(now)) is not None
        ]
        if self._limiter.trouble is not None:
            reasons.append(f"store: {self._limiter.trouble}")
        if self._draining():
            return _json({"status": "draining", "reasons": ["draining", *reasons]}, status=503)
        return _json({"status": "ready", "reasons": reasons})

    def _authorize(self, request: web.BaseRequest) -> None:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        expected = (self._admin_key or "").encode()
        offered = key.strip().encode("utf-8", "surrogateescape")
        if scheme.lower() != "bearer" or not hmac.compare_digest(offered, expected):
            raise ProxyError(
                "invalid_api_key",
                "The admin key is missing or wrong: send it as `Authorization: Bearer KEY`.",
                extra_headers={"WWW-Authenticate": "Bearer"},
            )

    def _relayed(self) -> dict[str, Exchange]:
        """The requests for which an upstream has been asked."""
        return {key: each for key, each in self._observer.in_flight.items() if each.upstream}

    def _row(self, exchange: Exchange) -> dict[str, Any]:
        now, last = self._clock(), exchange.last_payload
        return {
            "id": exchange.id,
            "client": exchange.client,
            "route": exchange.route,
            "model": exchange.model,
            "upstream": exchange.upstream,
            "age": round(now - exchange.received, 3),
            "phase": exchange.phase.value,
            "tokens": exchange.meter.tokens if exchange.meter else exchange.tokens_out,
            "last_payload": None if last is None else round(now - last, 3),
        }

    def _kill(self, id: str) -> web.Response:
        exchange = self._relayed().get(id)
        if exchange is None:
            raise ProxyError("stream_not_found", "No request with this id is being relayed.")
        exchange.interrupt(ProxyError("killed", "The operator of the proxy ended this request."))
        return web.Response(status=204)


def _only(request: web.BaseRequest, *methods: str) -> None:
    if request.method not in methods:
        raise ProxyError(
            "method_not_allowed",
            f"{request.method} is not possible here, only {' and '.join(methods)}.",
            extra_headers={"Allow": ", ".join(methods)},
        )


def _json(document: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(
        status=status,
        body=msgspec.json.encode(document),
        headers={"Content-Type": "application/json"},
    )
