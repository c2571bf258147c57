"""F2 circuit: takes an upstream out that keeps failing, and finds out when it is back.

| circuit | a request ends in | then |
|---|---|---|
| closed | success | closed; failures are counted from 0 again |
| closed | failure, the `failures`th in a row | open |
| open | (`rest` is over) | the next request is let through, one at a time: a probe |
| open | a probe's success | closed |
| open | a probe's failure | open, and rests anew |
| any | neither | as it was |

What began before the circuit last opened or closed is no news. Where there is nobody else to ask, an open
circuit's upstream is asked all the same, and those requests are probes too.
"""

from __future__ import annotations

from enum import Enum

from proxy import config


class Verdict(Enum):
    """What the end of one request says about its upstream."""

    SUCCESS = "success"  # an answer that ended whole
    FAILURE = "failure"  # none, or one that the upstream cut or left hanging
    NEITHER = "neither"  # its client has left, or it was ended here


class Circuit:
    """One upstream's circuit. `now` is in monotonic seconds everywhere."""

    def __init__(self, settings: config.Circuit) -> None:
        self.settings = settings
        self.opened: float | None = None  # since when it has been open, failed probes or not
        self._rests_from = 0.0
        self._failures = 0  # in a row
        self._period = 0  # how often it has opened and closed
        self._probes = 0  # in progress

    @property
    def is_closed(self) -> bool:
        return self.opened is None

    def allows(self, now: float) -> bool:
        """Whether a request may be sent."""
        if self.opened is None:
            return True
        return not self._probes and now - self._rests_from >= self.settings.rest

    def begin(self) -> int:
        """Says that a request is sent. Returns the period it belongs to."""
        if self.opened is not None:
            self._probes += 1
        return self._period

    def end(self, verdict: Verdict, now: float, *, period: int) -> None:
        """Says how a request of that period ended."""
        if period != self._period:
            return
        if self.opened is not None:
            self._probes -= 1
        if verdict is Verdict.SUCCESS:
            self._failures = 0
            if self.opened is not None:
                self._turn(None)
        elif verdict is Verdict.FAILURE:
            self._failures += 1
            self._rests_from = now
            if self.opened is None and self._failures >= self.settings.failures:
                self._turn(now)

    def _turn(self, opened: float | None) -> None:
        self.opened = opened
        self._period += 1
        self._probes = 0
