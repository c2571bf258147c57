"""F3 watch: what is done about a stream while nothing comes.

The client gets a heartbeat, so that nobody on the way takes the connection for dead; the upstream
that sends, but says nothing, is given up. Neither costs a chunk anything. Each has one timer, which
looks at what the record and the tap have noted anyway, and sleeps on for what is left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from proxy.downstream import Sink
from proxy.exchange import Exchange
from proxy.sse import HEARTBEAT, Tap, has_data, has_payload
from proxy.usage import Endpoint

_LOOKS = 8  # at a stream within its stall timeout: so much of it is how late the end may come


class _Watch:
    """A timer, and what it does; `clock` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_in(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        raise NotImplementedError


class Heartbeat(_Watch):
    """Writes a comment when nothing was written for `every` seconds, between two events: `tap` knows
    where those end; without one nothing has come yet. `every` 0: never."""

    def __init__(
        self,
        every: float,
        sink: Sink,
        exchange: Exchange,
        clock: Callable[[], float],
        tap: Tap | None = None,
    ) -> None:
        super().__init__(clock)
        self._every = every
        self._sink = sink
        self._exchange = exchange
        self._tap = tap
        if exchange.last_own is None:  # the head goes out now
            exchange.last_own = clock()
        if every:
            self._look_in(max(0.0, exchange.last_own + every - clock()))

    def _look(self) -> None:
        now, last = self._clock(), self._exchange.last_own or 0.0
        left = max(last, self._exchange.last_payload or 0.0) + self._every - now
        if left <= 0:
            left = self._every
            if self._sink.keeps_up and (self._tap is None or self._tap.is_between_events):
                self._sink.write(HEARTBEAT)
                self._exchange.heartbeats += 1
                self._exchange.last_own = now
        self._look_in(left)


class Stall(_Watch):
    """Calls `stalled` when no payload has come for `after` seconds, whatever else has. It stands still
    between `pause` and `resume`."""

    def __init__(
        self,
        after: float,
        exchange: Exchange,
        tap: Tap,
        clock: Callable[[], float],
        stalled: Callable[[], None],
    ) -> None:
        super().__init__(clock)
        self._after = after
        self._exchange = exchange
        self._tap = tap
        self._stalled = stalled
        self._bytes = self._characters = 0  # at the last look
        self._since = clock()  # there was payload, or the stream began
        self._paused: float | None = None
        self._look_in(after / _LOOKS)

    def pause(self) -> None:
        self._paused = self._clock()

    def resume(self) -> None:
        if self._paused is not None:
            self._since += self._clock() - self._paused
            self._paused = None

    def _look(self) -> None:
        now = self._clock() if self._paused is None else self._paused
        if self._has_come():
            self._since = now
        if now - self._since >= self._after:
            self._stalled()
        else:
            self._look_in(self._after / _LOOKS)

    def _has_come(self) -> bool:
        """Whether there was payload since the last look: text that the meter has counted, else what
        stands in the events that the tap remembers."""
        exchange = self._exchange
        new, self._bytes = exchange.bytes_down - self._bytes, exchange.bytes_down
        if not new:
            return False
        if exchange.meter is not None:
            before, self._characters = self._characters, exchange.meter.characters
            if self._characters > before:
                return True
        tail = self._tap.tail
        if exchange.endpoint is Endpoint.NONE:  # nothing that we know: whatever it says is payload
            return has_data(tail[-new:])
        return has_payload(tail[-new:], cut=new > len(tail))
