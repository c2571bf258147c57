"""F3 observe: what operators see. Metrics and the access line are written from an exchange's record,
at its end, here and nowhere else.

Every label is bounded by the config: a client's or route's name, a model that stands literally in
the config (else `other`), a status. So no caller can grow a metric by what it sends.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics import MetricWrapperBase

from proxy import __version__
from proxy.config import Config
from proxy.errors import ProxyError, Source
from proxy.exchange import Exchange
from proxy.upstreams import Upstream

disable_created_metrics()  # type: ignore[no-untyped-call]  # a time of creation beside each counter, which nobody asks for

access = logging.getLogger("sluice.access")

CLIENT_LEFT = 499  # nginx's status for a client that left before there was an answer
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LAG_INTERVAL = 1.0  # seconds

_LONG = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STREAMS = (0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 1800)
_SPEEDS = (1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)
_SHORT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


def new_id() -> str:
    """An id that nobody can guess."""
    return secrets.token_hex(12)


class Observer:
    """Opens records, keeps those in progress, and writes each down once.

    `clock` gives monotonic seconds.
    """

    def __init__(self, config: Config, clock: Callable[[], float]) -> None:
        self.in_flight: dict[str, Exchange] = {}
        self._clock = clock
        self._metrics = _Metrics()
        self.upstreams: Callable[[], Mapping[str, Upstream]] = dict  # as they are now
        self._up: set[str] = set()  # upstreams whose gauge has been set, and must go when they do
        self._shown: set[str] = set()  # routes whose gauge has been set, and must go back to 0
        self.use(config)

    def use(self, config: Config) -> None:
        """Takes the names that may be labels from `config`."""
        patterns = [pattern for route in config.routes for pattern in route.models]
        patterns += [pattern for client in config.clients for pattern in client.models]
        self._models = {name for name in patterns if not set(name) & set("*?[")}
        self._routes = [route.name for route in config.routes]

    @contextmanager
    def exchange(self, method: str, path: str, request_id: str | None) -> Iterator[Exchange]:
        """The record of one request, written down when it ends, in whatever way."""
        own_id = new_id()
        exchange = Exchange(
            id=own_id,
            request_id=request_id or own_id,
            method=method,
            path=path,
            received=self._clock(),
            task=asyncio.current_task(),
        )
        self.in_flight[own_id] = exchange
        try:
            yield exchange
        finally:
            del self.in_flight[own_id]
            exchange.ended = self._clock()
            exchange.task = None
            self._write(exchange)

    def reloaded(self, result: str) -> None:
        """Counts a reload of the config: `applied` or `rejected`."""
        self._metrics.child(self._metrics.reloads, result).inc()

    def store_failed(self) -> None:
        """Counts a call of the store that failed."""
        self._metrics.store_errors.inc()

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        counts = dict.fromkeys(self._shown, 0) | dict.fromkeys(self._routes, 0)
        for exchange in self.in_flight.values():
            counts[exchange.route] = counts.get(exchange.route, 0) + 1
        for route, count in counts.items():
            self._metrics.child(self._metrics.in_flight, route).set(count)
        self._shown = set(counts)
        upstreams = self.upstreams()
        for name in self._up - upstreams.keys():
            self._metrics.forget(self._metrics.up, name)
        for name, upstream in upstreams.items():
            self._metrics.child(self._metrics.up, name).set(upstream.circuit.is_closed)
        self._up = set(upstreams)
        return generate_latest(self._metrics.registry)

    async def watch_loop(self) -> None:
        """Measures how late the event loop runs its timers, until cancelled."""
        while True:
            due = self._clock() + _LAG_INTERVAL
            await asyncio.sleep(_LAG_INTERVAL)
            self._metrics.loop_lag.set(max(0.0, self._clock() - due))

    def _write(self, exchange: Exchange) -> None:
        self._metrics.observe(exchange, self._model_label(exchange.model))
        if exchange.error is not None:
            _explain(exchange, exchange.error)
        if len(exchange.attempt_results) > 1:
            tried = ", ".join(
                f"{upstream}: {result}" for upstream, result in exchange.attempt_results
            )
            fields = {"request_id": exchange.request_id, "tried": tried}
            access.info("attempts", extra={"fields": fields})
        if access.isEnabledFor(logging.INFO):
            access.info("request", extra={"fields": _access_fields(exchange)})

    def _model_label(self, model: str | None) -> str:
        return model if model in self._models and model is not None else "other"


class _Metrics:
    """The metrics of interface.md §5 that have a source; children are kept, as a lookup by labels
    costs more than the increment."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ("route",), buckets=buckets, registry=registry)

        self.requests = counter(
            "sluice_requests", "Requests, at their end", "client", "route", "model", "code"
        )
        self.outcomes = counter(
            "sluice_outcomes", "How asked upstreams' answers ended", "route", "outcome"
        )
        self.attempts = counter(
            "sluice_upstream_attempts", "Attempts at upstreams", "upstream", "result"
        )
        self.bytes = counter("sluice_bytes", "Body bytes relayed", "direction")
        self.chunks = counter("sluice_chunks", "Pieces of answers relayed")
        self.heartbeats = counter("sluice_heartbeats", "Heartbeats written to clients")
        self.tokens = counter("sluice_tokens", "Tokens used", "client", "model", "type", "source")
        self.limit_rejections = counter(
            "sluice_limit_rejections", "Requests that a limit refused", "client", "limit"
        )
        self.auth_failures = counter("sluice_auth_failures", "Requests without a client's key")
        self.store_errors = counter("sluice_store_errors", "Calls of the store that failed")
        self.reloads = counter("sluice_config_reloads", "Reloads of the config", "result")
        self.in_flight = gauge("sluice_requests_in_flight", "Requests in progress", "route")
        self.up = gauge("sluice_upstream_up", "Whether an upstream's circuit is closed", "upstream")
        self.loop_lag = gauge(
            "sluice_event_loop_lag_seconds", "How late the event loop last ran a timer"
        )
        gauge("sluice_build_info", "The version that runs", "version").labels(__version__).set(1)
        self.first_byte = histogram(
            "sluice_time_to_first_byte_seconds", "From a request to its answer's head", _LONG
        )
        self.first_token = histogram(
            "sluice_time_to_first_token_seconds", "From a request to its first token", _LONG
        )
        self.duration = histogram(
            "sluice_stream_duration_seconds", "From a stream's head to its end", _STREAMS
        )
        self.inter_chunk = histogram(
            "sluice_inter_chunk_seconds", "Mean time between a stream's chunks", _SHORT
        )
        self.tokens_per_second = histogram(
            "sluice_output_tokens_per_second",
            "A stream's tokens from its first to its last",
            _SPEEDS,
        )
        self.overhead = histogram(
            "sluice_overhead_seconds",
            "From a request's last byte read to the upstream's first byte written",
            _SHORT,
        )
        self._children: dict[tuple[MetricWrapperBase, tuple[str, ...]], Any] = {}
        for direction in ("up", "down"):
            self.child(self.bytes, direction)
        for result in ("applied", "rejected"):
            self.child(self.reloads, result)

    def child(self, metric: MetricWrapperBase, *labels: str) -> Any:
        key = (metric, labels)
        found = self._children.get(key)
        if found is None:
            found = self._children[key] = metric.labels(*labels)
        return found

    def forget(self, metric: MetricWrapperBase, *labels: str) -> None:
        del self._children[metric, labels]
        metric.remove(*labels)

    def observe(self, exchange: Exchange, model: str) -> None:
        """Counts one ended exchange."""
        child, route = self.child, exchange.route
        code = str(exchange.status or CLIENT_LEFT)
        child(self.requests, exchange.client, route, model, code).inc()
        for upstream, result in exchange.attempt_results:
            child(self.attempts, upstream, result).inc()
        if exchange.outcome is not None:
            child(self.outcomes, route, exchange.outcome.value).inc()
        if exchange.error is not None:
            self._observe_refusal(exchange.client, exchange.error)
        if exchange.tokens_source is not None:
            self._observe_tokens(exchange, model)
        if exchange.bytes_up:
            child(self.bytes, "up").inc(exchange.bytes_up)
        if exchange.chunks:
            self.chunks.inc(exchange.chunks)
            child(self.bytes, "down").inc(exchange.bytes_down)
        if exchange.heartbeats:
            self.heartbeats.inc(exchange.heartbeats)
        if exchange.first_byte is not None:
            child(self.first_byte, route).observe(exchange.first_byte - exchange.received)
        if exchange.forwarded is not None and exchange.read is not None:
            child(self.overhead, route).observe(exchange.forwarded - exchange.read)
        if exchange.stream:
            self._observe_stream(exchange)

    def _observe_refusal(self, client: str, error: ProxyError) -> None:
        if error.limit is not None:
            self.child(self.limit_rejections, client, error.limit).inc()
        elif error.code == "invalid_api_key":
            self.auth_failures.inc()

    def _observe_tokens(self, exchange: Exchange, model: str) -> None:
        source = exchange.tokens_source or ""
        for kind, count in ("input", exchange.tokens_in), ("output", exchange.tokens_out):
            if count:
                self.child(self.tokens, exchange.client, model, kind, source).inc(count)

    def _observe_stream(self, exchange: Exchange) -> None:
        child, route = self.child, exchange.route
        assert exchange.first_byte is not None and exchange.ended is not None
        child(self.duration, route).observe(exchange.ended - exchange.first_byte)
        if exchange.first_token is not None:
            child(self.first_token, route).observe(exchange.first_token - exchange.received)
        if exchange.chunks > 1 and exchange.last_payload is not None:
            span = exchange.last_payload - exchange.first_byte
            child(self.inter_chunk, route).observe(span / (exchange.chunks - 1))
        if exchange.tokens_out and exchange.first_token is not None:
            span = (exchange.last_payload or exchange.ended) - exchange.first_token
            if span > 0:
                child(self.tokens_per_second, route).observe(exchange.tokens_out / span)


def _explain(exchange: Exchange, error: ProxyError) -> None:
    """Why a request failed: a warning if it was an upstream's doing or ours, else for whoever asks
    for details."""
    level = logging.DEBUG if error.kind.source is Source.DOWNSTREAM else logging.WARNING
    if access.isEnabledFor(level):
        fields = {
            "request_id": exchange.request_id,
            "upstream": exchange.upstream,
            "code": error.code,
            "message": error.message,
            "detail": error.detail,
        }
        access.log(level, "error", extra={"fields": fields})


def _access_fields(exchange: Exchange) -> dict[str, Any]:
    """The access line's fields. Never prompts, completions, keys; the path is without its query."""
    ended = exchange.ended or exchange.received
    return {
        "request_id": exchange.request_id,
        "client": exchange.client,
        "method": exchange.method,
        "path": exchange.path,
        "route": exchange.route,
        "model": exchange.model,
        "upstream": exchange.upstream,
        "attempts": exchange.attempts,
        "status": exchange.status or CLIENT_LEFT,
        "outcome": exchange.outcome.value if exchange.outcome else None,
        "ttfb": _since(exchange.received, exchange.first_byte),
        "ttft": _since(exchange.received, exchange.first_token),
        "duration": round(ended - exchange.received, 6),
        "bytes_up": exchange.bytes_up,
        "bytes_down": exchange.bytes_down,
        "tokens_in": exchange.tokens_in,
        "tokens_out": exchange.tokens_out,
    }


def _since(start: float, moment: float | None) -> float | None:
    return None if moment is None else round(moment - start, 6)
