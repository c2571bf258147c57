"""F3 catalog: the list of models, where one upstream's own would not be true: with several of them,
and for a client that may not use them all (`GET /v1/models`, interface §3).

A name is listed if a request for it would be answered: this client may use it, a route takes it,
and one of that route's upstreams lists the model that it goes up as. Under an alias that is another
one; its entry is shown under the name that the client has to send. Names are those that any upstream
lists, and those that stand literally in a route: so an alias with a wildcard adds none of its own.

What an upstream said is kept for a moment, and those who ask meanwhile share it, but only where no
client's credential goes up. There nothing else of a client's request does, either: what one is told
must not depend on what another one sent.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import msgspec

from proxy.auth import Client
from proxy.config import Route
from proxy.errors import ProxyError, Source, timed_out
from proxy.exchange import Ask, Exchange, Outcome, Phase
from proxy.forward import Forwarder
from proxy.framing import Header
from proxy.relay import outcome_of
from proxy.routing import Router
from proxy.upstreams import Upstream

log = logging.getLogger("sluice.catalog")

_TARGET = b"/models"  # behind /v1, and behind an upstream's base URL
_PATIENCE = 5.0  # seconds: a slower upstream is left out
_KEPT = 10.0  # seconds
_FAILURE_KEPT = 1.0
_MAX_BODY = 2**20  # bytes
_MAX_MODELS = 2000  # of one upstream
_MAX_NAME = 4096  # characters: a request with a longer one is taken for one without a model
_ACCEPT = (b"Accept", b"application/json")
_WILD = frozenset("*?[")
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

Listing = dict[str, dict[str, Any]]  # an upstream's models by their ids, in its order


class Catalog:
    """What the upstreams of `routes` list. `clock` gives monotonic seconds."""

    def __init__(
        self,
        router: Router,
        routes: Sequence[Route],
        forwarder: Forwarder,
        upstreams: Mapping[str, Upstream],
        clock: Callable[[], float],
    ) -> None:
        self._router = router
        self._forwarder = forwarder
        self._clock = clock
        names = dict.fromkeys(name for route in routes for name in route.upstreams)
        self._sources = [_Source(upstreams[name]) for name in names]
        patterns = [pattern for route in routes for pattern in route.models]
        self._literal = [pattern for pattern in patterns if _WILD.isdisjoint(pattern)]
        # Without a route for requests that name no model, none could be relayed.
        self._always = len(names) > 1 or "*" not in patterns

    def serves(self, ask: Ask, client: Client) -> bool:
        """Whether a request is answered here; else it is relayed like any other."""
        wanted = ask.method == "GET" and ask.target.partition(b"?")[0] == _TARGET
        return wanted and (self._always or client.models is not None)

    async def models(self, ask: Ask, client: Client, exchange: Exchange) -> bytes:
        """The list for `client`, in JSON. What became of it is written to the record.

        An upstream that fails is left out. Raises ProxyError if all do.
        """
        exchange.phase = Phase.WAITING
        try:
            async with asyncio.TaskGroup() as group:
                asked = [
                    group.create_task(self._listing(source, ask.headers, exchange))
                    for source in self._sources
                ]
        except asyncio.CancelledError:
            why = exchange.interruption
            exchange.outcome = outcome_of(why, Outcome.KILLED) if why else Outcome.CLIENT_GONE
            raise
        finally:
            exchange.attempts = len(exchange.attempt_results)
        listings: dict[str, Listing] = {}
        failures: list[ProxyError] = []
        for source, task in zip(self._sources, asked, strict=True):
            match task.result():
                case ProxyError() as error:
                    failures.append(error)
                case listing:
                    listings[source.upstream.name] = listing
        if not listings:
            # One that was not asked, because it is full, has less to say than one that failed.
            error = min(failures, key=lambda each: each.kind.source is not Source.UPSTREAM)
            if error.kind.source is Source.UPSTREAM:
                exchange.outcome = outcome_of(error, Outcome.UPSTREAM_ERROR)
            raise error.with_traceback(None)  # others are told the same one
        exchange.outcome = Outcome.COMPLETED
        document = {"object": "list", "data": list(self._merged(listings, client))}
        return msgspec.json.encode(document)

    def _merged(self, listings: Mapping[str, Listing], client: Client) -> Iterator[dict[str, Any]]:
        for name in dict.fromkeys(chain(*listings.values(), self._literal)):
            if client.models is None or client.models.match(name):
                entry = self._entry(name, listings)
                if entry is not None:
                    yield entry

    def _entry(self, name: str, listings: Mapping[str, Listing]) -> dict[str, Any] | None:
        """What there is to say of the model that is called `name` here: as the first candidate of
        its route says that has it. None if there is none."""
        try:
            route = self._router.resolve(Ask("GET", _TARGET, (), model=name))
        except ProxyError:
            return None
        for upstream in route.upstreams:
            entry = listings.get(upstream, {}).get(route.model or name)
            if entry is not None:
                return entry | {"id": name}
        return None

    # What an upstream lists, or why it is left out.

    async def _listing(
        self, source: _Source, headers: Sequence[Header], exchange: Exchange
    ) -> Listing | ProxyError:
        if not source.upstream.terms.rules.drops_credentials:
            return await self._fetch(source, _unconditional(headers), exchange)
        try:
            # Whoever comes first asks, and the others wait for what it is told. If it leaves, the
            # next one asks anew; but nobody waits for ever behind those who come and leave.
            async with asyncio.timeout(2 * _PATIENCE), source.lock:
                if self._clock() >= source.until:
                    source.said = await self._fetch(source, (_ACCEPT,), exchange)
                    failed = isinstance(source.said, ProxyError)
                    source.until = self._clock() + (_FAILURE_KEPT if failed else _KEPT)
                return source.said
        except TimeoutError:
            return timed_out(source.upstream.name, "total", 2 * _PATIENCE)

    async def _fetch(
        self, source: _Source, headers: Sequence[Header], exchange: Exchange
    ) -> Listing | ProxyError:
        upstream, result = source.upstream, "cancelled"
        own = Exchange(
            exchange.id,
            exchange.request_id,
            "GET",
            exchange.path,
            self._clock(),
            client=exchange.client,
        )
        ask = Ask("GET", _TARGET, tuple(headers), identity=True)
        try:
            async with (
                asyncio.timeout(_PATIENCE),
                await self._forwarder.fetch(upstream, ask, own) as answer,
            ):
                if not answer.succeeded:
                    raise _no_list(upstream.name, f"it answered with status {answer.head.status}")
                listing = _listing_of(await answer.read(_MAX_BODY))
                if listing is None:
                    why = "what it sent is none, was cut off, or is too large"
                    raise _no_list(upstream.name, why)
                result = "answer"
                return listing
        except TimeoutError:
            failure = timed_out(upstream.name, "total", _PATIENCE)
            result = failure.code
        except ProxyError as error:
            failure = error.with_traceback(None)  # it may be kept, and its frames hold a request
            result = failure.code
        finally:
            exchange.attempt_results.append((upstream.name, result))
        fields = {"upstream": upstream.name, "code": failure.code, "message": failure.message}
        log.info("models_left_out", extra={"fields": fields | {"detail": failure.detail}})
        return failure


@dataclass(slots=True)
class _Source:
    """An upstream that lists models. What it said last holds `until` then, in monotonic seconds."""

    upstream: Upstream
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    said: Listing | ProxyError = field(default_factory=dict)
    until: float = -math.inf


def _unconditional(headers: Sequence[Header]) -> list[Header]:
    """A client's headers without those that ask for a part of the answer, or for none if it is as it
    was (RFC 9110 13.1, 14.2): what they compare is one upstream's answer, and ours is another."""
    return [
        each
        for each in headers
        if not each[0].lower().startswith(b"if-") and each[0].lower() != b"range"
    ]


class _Document(msgspec.Struct):
    data: list[dict[str, Any]]


_document = msgspec.json.Decoder(_Document)


def _listing_of(body: bytes) -> Listing | None:
    """The models of a list in JSON, as OpenAI and Anthropic write it; None if it is none."""
    try:
        entries = _document.decode(body).data[:_MAX_MODELS]
    except _UNREADABLE:
        return None
    if not all(isinstance(entry.get("id"), str) for entry in entries):
        return None
    return {entry["id"]: entry for entry in entries if len(entry["id"]) <= _MAX_NAME}


def _no_list(upstream: str, why: str) -> ProxyError:
    return ProxyError("upstream_invalid", f"Upstream '{upstream}' gave no list of models: {why}.")
