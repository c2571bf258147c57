"""F3 relay: moves an answer's bytes to the client: read, remember, write.

The upstream connection calls `Lane.payload` from within its `data_received`, and the lane writes to
the client's transport in the same call: no task switch, no parsing and no timer for a chunk. What
looks into the stream (`Tap`, `FirstToken`) lives in `sse`; what decides about its end is here, once,
after the last byte.

Backpressure runs the other way: when the client's write buffer passes its high-water mark, its
transport tells the lane, which stops reading from the upstream until the buffer has drained. So one
slow reader costs at most that mark and one read, however fast its upstream is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from proxy.answer import Answer
from proxy.config import Route
from proxy.downstream import Nowhere, Sink
from proxy.errors import ProxyError, Source, timed_out
from proxy.exchange import Exchange, Outcome, Phase
from proxy.sse import FirstToken, Tap
from proxy.usage import Endpoint, Meter, UsageStripper, usage_of
from proxy.usage.words import tokens_of
from proxy.watch import Heartbeat, Stall

_LONG_TAIL = 16 * 1024  # bytes
_OUTCOMES = {
    "idle": Outcome.IDLE_TIMEOUT,
    "stall": Outcome.STALL_TIMEOUT,
    "total": Outcome.TOTAL_TIMEOUT,
    "first_byte": Outcome.FIRST_BYTE_TIMEOUT,
    "shutting_down": Outcome.SHUTDOWN,
    "killed": Outcome.KILLED,
}


class Lane:
    """Between one answer and one client. `ending` becomes what went wrong, or None if nothing did;
    `whole` says the latter also when nobody waits any more."""

    def __init__(
        self,
        answer: Answer,
        sink: Sink,
        exchange: Exchange,
        route: Route,
        clock: Callable[[], float],
    ) -> None:
        # Behind the usage of Responses stands what the client has said of itself, up to 8 KiB and more.
        self.tap = Tap(_LONG_TAIL) if exchange.endpoint is Endpoint.RESPONSES else Tap()
        self.whole = False
        self.ending: asyncio.Future[ProxyError | None] = asyncio.get_running_loop().create_future()
        self.sink = sink
        self._answer = answer
        self._write: Callable[[bytes], None] = sink.write
        self._remember = self.tap.remember
        self._exchange = exchange
        self._clock = clock
        self._finishes = route.on_disconnect == "finish"
        readable = answer.is_readable_stream
        self._opening = self._first_token = FirstToken() if readable else None
        if answer.is_plain and exchange.endpoint is not Endpoint.NONE:
            exchange.meter = Meter(exchange.endpoint, answer.is_stream)
        self._count = exchange.meter.feed if exchange.meter else None
        self._stripper = UsageStripper() if readable and exchange.hides_usage else None
        if self._stripper is not None:
            self._write = self._write_stripped
        self._heartbeat: Heartbeat | None = None
        self._stall: Stall | None = None
        if readable:
            self._heartbeat = Heartbeat(route.heartbeat, sink, exchange, clock, self.tap)
            self._stall = Stall(answer.stall_timeout, exchange, self.tap, clock, self._stalled)

    # What the upstream connection calls.

    def payload(self, data: bytes) -> None:
        self._write(data)
        self._remember(data)
        if self._count is not None:
            self._count(data)
        exchange = self._exchange
        exchange.chunks += 1
        exchange.bytes_down += len(data)
        exchange.last_payload = self._clock()
        if self._first_token is not None and self._first_token.seen_in(data):
            exchange.first_token = exchange.last_payload
            self._first_token = None

    def _write_stripped(self, data: bytes) -> None:
        assert self._stripper is not None
        if data := self._stripper.feed(data):
            self.sink.write(data)

    def ended(self, error: ProxyError | None) -> None:
        if self._stripper is not None and (left := self._stripper.flush()):
            self.sink.write(left)
        self.whole = error is None
        if not self.ending.done():
            self.ending.set_result(error)

    @property
    def gave_all(self) -> bool:
        """Whether the client has had the whole answer."""
        return self.whole or (self._answer.is_stream and self.tap.saw_last_event)

    @property
    def began_with_error(self) -> bool:
        """Whether the stream's first event is an error: no answer, though its status is 200."""
        return self._opening is not None and self._opening.began_with_error

    # What the client's connection calls.

    def pause(self) -> None:
        self._answer.pause()
        if self._stall is not None:
            self._stall.pause()

    def resume(self) -> None:
        self._answer.resume()
        if self._stall is not None:
            self._stall.resume()

    def client_lost(self) -> None:
        """The client has left: the upstream is told in the same moment, unless the answer is to be
        read to its end all the same."""
        if not self._finishes:
            self._answer.abort()
            return
        self._exchange.delivered = self.gave_all
        if self._heartbeat is not None:
            self._heartbeat.stop()
        self.sink = Nowhere()
        self._write = self.sink.write
        self._stripper = None
        self.resume()

    # And what the watches do.

    def _stalled(self) -> None:
        self._answer.fail(
            timed_out(self._answer.upstream.name, "stall", self._answer.stall_timeout)
        )

    def stop_watching(self) -> None:
        for watch in self._heartbeat, self._stall:
            if watch is not None:
                watch.stop()


async def relay(
    answer: Answer, sink: Sink, exchange: Exchange, route: Route, clock: Callable[[], float]
) -> None:
    """Relays the whole body, and ends the client's answer as the upstream's ended.

    A cut never looks complete: see `_end`. Raises CancelledError if the client has left.
    """
    exchange.phase = Phase.RELAYING
    lane = Lane(answer, sink, exchange, route, clock)
    sink.serve(lane)
    try:
        answer.deliver_to(lane)
        sink.flush()
        error = await lane.ending
    except asyncio.CancelledError:
        answer.abort()
        error = exchange.interrupted()
        if error is None:
            # A client that leaves right after the last byte of a whole answer has had it all.
            exchange.outcome = Outcome.COMPLETED if lane.gave_all else Outcome.CLIENT_GONE
            raise
    finally:
        lane.stop_watching()
        sink.serve(None)
        _count(answer, lane, exchange)
    _end(answer, lane, exchange, error)


def _end(answer: Answer, lane: Lane, exchange: Exchange, error: ProxyError | None) -> None:
    """Finishes the client's answer: whole, or visibly not.

    A failure behind the head is an event of the path's protocol if that can stand there, and then,
    in any case, the connection ends without the last chunk: so also a client that ignores error
    events sees the cut. An upstream that said `[DONE]` has finished, whatever its framing lacks.
    """
    sink, tap, readable = lane.sink, lane.tap, answer.is_readable_stream
    if error is None or (readable and tap.saw_last_event):
        sink.finish()
        exchange.outcome = _outcome_of_whole(answer, lane)
        return
    exchange.error = error
    exchange.outcome = outcome_of(error, Outcome.UPSTREAM_TRUNCATED)
    if readable and tap.on_event_boundary:
        sink.write(error.event(exchange.dialect, tap.next_sequence_number))
    sink.cut()


def _count(answer: Answer, lane: Lane, exchange: Exchange) -> None:
    """What the generation used: by the upstream's own count, else by an estimate of what was
    relayed. An answer that is an error used nothing (§3)."""
    tap, meter, stream = lane.tap, exchange.meter, answer.is_stream
    exchange.meter = None
    failed = not 200 <= answer.head.status < 300 or lane.began_with_error
    if exchange.endpoint is Endpoint.NONE or failed:
        return
    usage = None
    if answer.is_plain and (stream or lane.whole):
        usage = usage_of(exchange.endpoint, stream, tap.head, tap.tail[-tap.keep :])
    if usage is not None:
        exchange.spent(usage)
        return
    exchange.tokens_source = "estimated"
    prompt = exchange.prompt
    if prompt is not None:  # of a body of unknown length, what has gone up of it
        exchange.tokens_in = prompt.input or tokens_of(exchange.bytes_up)
    if exchange.endpoint is Endpoint.EMBEDDINGS:
        exchange.tokens_out = 0
    elif meter is not None:
        exchange.tokens_out = meter.tokens
    elif prompt is not None:
        exchange.tokens_out = tokens_of(exchange.bytes_down)


def _outcome_of_whole(answer: Answer, lane: Lane) -> Outcome:
    """A relayed 429 or 5xx, or a stream that begins with an error, is no answer (§3)."""
    status = answer.head.status
    if status == 429 or status >= 500 or lane.began_with_error:
        return Outcome.UPSTREAM_ERROR
    return Outcome.COMPLETED


def outcome_of(error: ProxyError, otherwise: Outcome) -> Outcome:
    """The outcome of a request that ended with `error`; `otherwise` if an upstream just failed."""
    if error.kind.source is Source.DOWNSTREAM:
        return Outcome.CLIENT_GONE
    return _OUTCOMES.get(error.clock or error.code, otherwise)
