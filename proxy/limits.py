"""F2 limits: what each client may spend: one admission before, one settlement behind each request.

A request is admitted by all of its client's limits at once, or by none: then nothing was taken
anywhere. What it will use is reserved by an estimate, and what it has used is settled when its
generation ends, however it ends, by the upstream's own count where there is one. So a stream that
turns out longer than it said leaves a balance below zero, which time pays back; and no client gets
more by asking for much at once.

The slots of requests in progress are leases: they lapse when nobody renews them, so that a process
that was killed holds none for long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from proxy.auth import Client
from proxy.config import Limits, Rate
from proxy.errors import ProxyError
from proxy.exchange import Ask, Exchange
from proxy.members import with_usage
from proxy.store import SLACK, Admission, Bucket, Counters, Slot, Unavailable
from proxy.usage import Endpoint, Usage, reserved
from proxy.usage.words import tokens_of

RENEW_EVERY = 3.0  # seconds

Windows = Mapping[str, Sequence[Bucket]]  # by what they count: requests, tokens

_UNITS = (("h", 3600), ("m", 60))


class Limiter:
    """Admits requests. `counters` hold the balances of all clients."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._open: set[Lease] = set()
        # The limits of a client of that name as they are now: a reload may have changed them.
        self.limits_of: Callable[[str], Limits | None] = lambda _: None

    @property
    def trouble(self) -> str | None:
        """What ails the store, if anything does."""
        return self._counters.last_error

    async def admit(self, client: Client, exchange: Exchange) -> Lease:
        """Takes one request, a slot, and the tokens that the request may use, as `metered` says.

        Raises ProxyError: rate_limit_exceeded, concurrency_limit_exceeded, store_unavailable.
        """
        if not client.limits.any:
            return Lease(self, client, exchange)
        windows, slot = _wanted(client, exchange)
        admission = await self._acquire(windows, slot, exchange)
        return Lease(self, client, exchange, windows["tokens"], slot, admission.by)

    async def _acquire(self, windows: Windows, slot: Slot | None, exchange: Exchange) -> Admission:
        buckets = [*windows["requests"], *windows["tokens"]]
        try:
            admission = await self._counters.acquire(buckets, slot)
        except Unavailable as error:
            raise _store_unavailable() from error
        levels = dict(zip((each.key for each in buckets), admission.levels, strict=True))
        exchange.limits = _headers(windows, levels)
        if not admission.admitted:
            raise _refusal(windows, levels)
        return admission

    async def check(self, client: Client, exchange: Exchange) -> None:
        """Refuses whom `admit` would surely refuse, and takes nothing: for who asks before it sends
        its body (Expect). Raises what `admit` raises."""
        if not client.limits.any:
            return
        generates = exchange.endpoint is not Endpoint.NONE
        windows, slot = _wanted(client, exchange, least=int(generates))
        admission = await self._acquire(windows, slot, exchange)
        await admission.by.settle([*windows["requests"], *windows["tokens"]], slot)
        exchange.limits = ()  # that was before it was given back

    async def renew(self) -> None:
        """Keeps the slots of all open requests; to be called every RENEW_EVERY seconds."""
        held: dict[Counters, list[Slot]] = {}
        for lease in self._open:
            if lease.slot is not None and lease.counters is not None:
                held.setdefault(lease.counters, []).append(lease.slot)
        for counters, slots in held.items():
            await counters.renew(slots)

    async def close(self) -> None:
        """Waits for settlements on their way, and lets go of the store."""
        await self._counters.close()


class Lease:
    """What one request was admitted with; settled when it is left (`async with`), from its record."""

    def __init__(
        self,
        limiter: Limiter,
        client: Client,
        exchange: Exchange,
        tokens: Sequence[Bucket] = (),
        slot: Slot | None = None,
        counters: Counters | None = None,
    ) -> None:
        self.slot = slot
        self.counters = counters
        self._client = client
        self._exchange = exchange
        self._tokens = tokens
        self._limiter = limiter
        self._open = limiter._open

    async def __aenter__(self) -> Self:
        self._open.add(self)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._open.discard(self)
        if self.counters is None:
            return
        await self.counters.settle(self._given_back(), self.slot)

    def _given_back(self) -> list[Bucket]:
        """What was reserved less what was used, for buckets of today's size."""
        if not self._tokens:
            return []
        limits = self._limiter.limits_of(self._client.name) or self._client.limits
        today = {b.key: b for b in _buckets(f"{self._client.scope}:tokens", limits.tokens, 0)}
        used, back = self._exchange.tokens, []
        for each in self._tokens:
            now = today.get(each.key, each)
            back.append(Bucket(each.key, now.size, now.refill, each.cost - used))
        return back


def metered(ask: Ask, exchange: Exchange) -> Ask:
    """A request under a limit of tokens: what it may use is estimated, and its answer is to say what
    it used, in a form that can be read."""
    endpoint = exchange.endpoint
    if endpoint is Endpoint.NONE:
        return replace(ask, identity=True)
    body = ask.body
    if not isinstance(body, bytes):  # it streams up unread, whatever it is
        length = body.length if body is not None else 0
        exchange.prompt = Usage(tokens_of(length or 0), reserved(endpoint, b"").output)
    else:
        exchange.prompt = reserved(endpoint, body)
        if ask.stream and endpoint in {Endpoint.CHAT, Endpoint.COMPLETIONS}:
            body, asked = with_usage(body)
            exchange.hides_usage = not asked
    return replace(ask, body=body, identity=True)


def _wanted(client: Client, exchange: Exchange, least: int = 0) -> tuple[Windows, Slot | None]:
    """The buckets by their kind, and the slot. Requests that use no tokens ask for none, so that an
    empty balance is not in their way."""
    limits, key = client.limits, client.scope
    tokens = max(least, exchange.prompt.total if exchange.prompt else 0)
    slot = Slot(f"{key}:streams", limits.streams, exchange.id) if limits.streams else None
    return {
        "requests": _buckets(f"{key}:requests", limits.requests, 1),
        "tokens": _buckets(f"{key}:tokens", limits.tokens, tokens) if tokens else (),
    }, slot


def _buckets(key: str, rates: Sequence[Rate] | None, cost: float) -> tuple[Bucket, ...]:
    """A bucket for each window; named after its length, so that it keeps its level when a reload
    changes its size. More than a bucket holds is never asked of it: it could never be had."""
    return tuple(
        Bucket(f"{key}:{rate.per!r}", rate.count, rate.count / rate.per, min(cost, rate.count))
        for rate in rates or ()
    )


def _headers(windows: Windows, levels: Mapping[str, float]) -> tuple[tuple[bytes, bytes], ...]:
    """x-ratelimit-*, for the window of each kind with the least left of its size."""
    fields = []
    for kind, buckets in windows.items():
        if buckets:
            tightest = min(buckets, key=lambda each: levels[each.key] / each.size)
            level = levels[tightest.key]
            for name, value in (
                ("limit", f"{tightest.size:.0f}"),
                ("remaining", f"{max(0, math.floor(level)):d}"),
                ("reset", _duration((tightest.size - level) / tightest.refill)),
            ):
                fields.append((f"x-ratelimit-{name}-{kind}".encode(), value.encode()))
    return tuple(fields)


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 120ms, 1s, 6m0s; rounded up, since a client told too little comes in vain."""
    if (milliseconds := math.ceil(seconds * 1000)) < 1000:
        return f"{milliseconds}ms"
    left, text = math.ceil(seconds), ""
    for unit, length in _UNITS:
        if text or left >= length:
            text += f"{left // length}{unit}"
            left %= length
    return f"{text}{left}s"


def _refusal(windows: Windows, levels: Mapping[str, float]) -> ProxyError:
    """The first limit that is in the way names the error; the last one to give way the wait."""
    wait, found, why = 0.0, "", ""
    for kind, buckets in windows.items():
        for each in buckets:
            level = levels[each.key]
            if each.cost - level > SLACK:
                left = max(0, math.floor(level))
                why = why or f"has {left} of {each.size:.0f} left, and this needs {each.cost:.0f}"
                found = found or kind
                wait = max(wait, (each.cost - level) / each.refill)
    if not found:
        return ProxyError(
            "concurrency_limit_exceeded",
            "As many requests of this client are in progress as it may have at once. Wait for one "
            "to end.",
            limit="streams",
        )
    return ProxyError(
        "rate_limit_exceeded",
        f"This client's limit of {found} {why}. Try again in {_duration(wait)}.",
        limit=found,
        retry_after=wait,
    )


def _store_unavailable() -> ProxyError:
    return ProxyError(
        "store_unavailable",
        "The store of this proxy's limits can't be reached, and without it nobody is admitted. Try "
        "again soon.",
        retry_after=1,
    )
