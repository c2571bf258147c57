"""F3 forward: asks a route's candidates, one after another, up to the first answer.

Whatever happens in here can still become any answer, for the client has not seen a byte of an
upstream yet. What is tried again elsewhere, and why that may buy nothing twice, is decision 0012;
in short:

| an attempt ends in | next |
|---|---|
| any response but those below | it is the answer |
| 401 to our key, 429, 5xx, a stream whose first event is an error | the next candidate; without one, it is relayed |
| no connection; one that breaks off before a byte could be relayed | the next candidate; without one, 502, or 504 |
| a timeout behind the request, or what is no HTTP | 504, 502: it may be at work, and be paid |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from proxy.answer import Answer, Call
from proxy.auth import ANONYMOUS
from proxy.circuit import Verdict
from proxy.config import Route
from proxy.errors import ProxyError, Source
from proxy.exchange import Ask, Exchange, Phase, Upload
from proxy.framing import Header
from proxy.headers import CREDENTIALS, request_headers, retry_after
from proxy.upstreams import Turn, Upstream, choose, wait_for_any

_ANSWER = "answer"


class Forwarder:
    """Opens answers. `clock` gives monotonic seconds."""

    def __init__(self, upstreams: Mapping[str, Upstream], clock: Callable[[], float]) -> None:
        self._upstreams = upstreams
        self._clock = clock

    async def open(self, route: Route, ask: Ask, exchange: Exchange) -> Answer:
        """The answer to `ask`. Raises ProxyError if there is none to relay."""
        exchange.phase = Phase.WAITING
        attempts = _Attempts([self._upstreams[name] for name in route.upstreams], route, ask)
        last: Answer | None = None  # the last response, though it is no answer
        failure: ProxyError | None = None
        try:
            while not exchange.left and (upstream := attempts.next(self._clock())):
                try:
                    response, result = await self._attempt(upstream, ask, exchange, attempts)
                except ProxyError as error:
                    if not _is_tried_elsewhere(error):
                        raise
                    failure = error
                    continue
                kept, last = last, response
                if kept is not None:
                    await kept.close()
                if result == _ANSWER:
                    break
                last.hold()
            if last is None:
                raise failure or _none_available(attempts.candidates, self._clock())
            exchange.upstream = last.upstream.name
            if _refuses_our_key(last):
                # Its text is not shown: it can quote the key.
                raise ProxyError(
                    "upstream_auth",
                    f"Upstream '{exchange.upstream}' refused the key that this proxy is configured "
                    "with. Its operator must correct it; the caller can't.",
                )
        except BaseException:
            if last is not None:
                await last.close()
            raise
        return last

    async def fetch(self, upstream: Upstream, ask: Ask, exchange: Exchange) -> Answer:
        """One upstream's response, whatever it is: for what says nothing of how it generates, so that
        it neither probes a circuit nor opens one. Raises ProxyError."""
        if upstream.is_full:
            raise _none_available([upstream], self._clock())
        turn = upstream.begin(self._clock, counts=False)
        try:
            return await self._ask(upstream, turn, ask, exchange)
        except BaseException:
            turn.end()
            raise

    async def _attempt(
        self, upstream: Upstream, ask: Ask, exchange: Exchange, attempts: _Attempts
    ) -> tuple[Answer, str]:
        """One candidate's response, and what it is: an answer, or why not. Raises ProxyError."""
        exchange.upstream = upstream.name
        exchange.attempts += 1
        turn, result = upstream.begin(self._clock), "cancelled"
        response: Answer | None = None
        try:
            response = await self._ask(upstream, turn, ask, exchange)
            result = await self._result(response, attempts)
            if result == "rate_limited":
                turn.end(Verdict.NEITHER)
                wait = retry_after(response.head, datetime.now(UTC))
                upstream.rest(wait or 0.0, self._clock())
            elif result != _ANSWER:  # it may be kept while others are asked, but takes no place
                turn.end(Verdict.FAILURE, result)
            return response, result
        except BaseException as error:
            if isinstance(error, ProxyError) and error.kind.source is Source.UPSTREAM:
                result = error.code
                verdict = Verdict.NEITHER if error.clock == "total" else Verdict.FAILURE
                turn.end(verdict, result)
            if response is not None:
                response.abort()
                await response.close()
            turn.end()
            raise
        finally:
            exchange.attempt_results.append((upstream.name, result))

    async def _result(self, response: Answer, attempts: _Attempts) -> str:
        """Whether a response is an answer (interface, §3). A stream is looked into only if another
        candidate could be asked: otherwise its head goes out at once."""
        status = response.head.status
        if status == 429:
            return "rate_limited"
        if status >= 500:
            return "server_error"
        if _refuses_our_key(response):
            return "upstream_auth"
        looks = response.succeeded and response.is_readable_stream
        if looks and attempts.next_is_there(self._clock()) and await response.begins_with_error():
            return "error_event"
        return _ANSWER

    async def _ask(self, upstream: Upstream, turn: Turn, ask: Ask, exchange: Exchange) -> Answer:
        """Asks on a pooled connection, and once more on a fresh one if that one was dead.

        A reused connection that ends before any byte came was, in all likelihood, closed while
        idle, and the request never read (RFC 9112 9.3.1). A body that streams can't be sent again,
        so it gets a fresh connection at once.
        """
        connection, pool = await upstream.connect(fresh=isinstance(ask.body, Upload))
        call = Call(connection, pool)
        try:
            return await self._send(call, upstream, turn, ask, exchange)
        except ProxyError as error:
            stale = connection.reused and not connection.answered
            if not stale or error.code != "upstream_aborted":
                raise
        connection, pool = await upstream.connect(fresh=True)
        return await self._send(Call(connection, pool), upstream, turn, ask, exchange)

    async def _send(
        self, call: Call, upstream: Upstream, turn: Turn, ask: Ask, exchange: Exchange
    ) -> Answer:
        connection, settings = call.connection, upstream.terms.settings
        try:
            timeouts = settings.timeouts
            connection.begin(
                ask.method,
                first_byte=timeouts.first_byte,
                idle=timeouts.idle,
                total=timeouts.total,
            )
            if exchange.forwarded is None:
                exchange.forwarded = self._clock()
            call.send(_request_head(upstream, ask, exchange), ask.body, exchange)
            head = await connection.head()
            exchange.first_byte = self._clock()
        except BaseException:
            connection.abort()
            await call.close()
            raise
        return Answer(head, call, upstream, turn, exchange, bears_our_key=settings.injects)


class _Attempts:
    """A route's candidates, as far as one request may ask them: each once, `attempts` of them. What
    streams up can't be sent twice."""

    def __init__(self, candidates: list[Upstream], route: Route, ask: Ask) -> None:
        self.candidates = candidates
        self._left = 1 if isinstance(ask.body, Upload) else route.attempts
        self._tried: list[Upstream] = []

    def next(self, now: float) -> Upstream | None:
        """The next one to ask; None if there is none."""
        if not self._left:
            return None
        found = choose(self.candidates, self._tried, now)
        if found is not None:
            self._left -= 1
            self._tried.append(found)
        return found

    def next_is_there(self, now: float) -> bool:
        return self._left > 0 and choose(self.candidates, self._tried, now) is not None


def _is_tried_elsewhere(error: ProxyError) -> bool:
    """Whether the next candidate may be asked. A timeout behind the request means that it was
    read; and what is no HTTP may be an answer all the same: either may have been paid for."""
    return error.code in {"upstream_unreachable", "upstream_aborted"} or error.clock == "connect"


def _refuses_our_key(response: Answer) -> bool:
    return response.head.status == 401 and response.bears_our_key


def _none_available(candidates: list[Upstream], now: float) -> ProxyError:
    return ProxyError(
        "no_upstream_available",
        "No upstream for this model takes requests now: all are full, or have said (429) that they "
        "want to be left alone. Try again later.",
        detail="; ".join(f"{each.name}: {each.trouble(now)}" for each in candidates),
        retry_after=wait_for_any(candidates, now),
    )


def _request_head(upstream: Upstream, ask: Ask, exchange: Exchange) -> bytes:
    terms = upstream.terms
    dropped = terms.dropped
    if exchange.client != ANONYMOUS and not terms.rules.drops_credentials:
        # A reload has removed all clients: this one's key stays here all the same.
        dropped = dropped | CREDENTIALS
    fields = request_headers(
        ask.headers,
        terms.rules,
        dropped=dropped,
        credential=terms.credential(),
        framing=_framing(ask.body),
        identity=ask.identity,
    )
    lines = [b"%b %b%b HTTP/1.1" % (ask.method.encode(), terms.prefix, ask.target)]
    lines += [name + b": " + value for name, value in fields]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _framing(body: bytes | Upload | None) -> Header | None:
    if body is None:
        return None
    length = len(body) if isinstance(body, bytes) else body.length
    if length is None:
        return (b"Transfer-Encoding", b"chunked")
    return (b"Content-Length", b"%d" % length)
