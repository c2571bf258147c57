"""When an upstream is taken out, and how it comes back: the table of `circuit`, line by line, and
then any story at all beside a model that remembers everything."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
)

from proxy import config
from proxy.circuit import Circuit, Verdict

FAILURES, REST = 3, 30.0
SUCCESS, FAILURE, NEITHER = Verdict.SUCCESS, Verdict.FAILURE, Verdict.NEITHER


class Story:
    """One circuit, and the clock beside it."""

    def __init__(self, failures: int = FAILURES) -> None:
        self.circuit = Circuit(config.Circuit(failures=failures, rest=REST))
        self.now = 1000.0

    @property
    def allows(self) -> bool:
        return self.circuit.allows(self.now)

    def begins(self) -> Request:
        return Request(self, self.circuit.begin())

    def plays(self, *verdicts: Verdict) -> None:
        """Requests one after another."""
        for verdict in verdicts:
            self.begins().ends(verdict)


@dataclass
class Request:
    story: Story
    period: int

    def ends(self, verdict: Verdict) -> None:
        self.story.circuit.end(verdict, self.story.now, period=self.period)


def opened() -> Story:
    story = Story()
    story.plays(FAILURE, FAILURE, FAILURE)
    assert not story.circuit.is_closed
    return story


# Closed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failures", "verdicts", "closed"),
    [
        (3, [], True),
        (3, [FAILURE, FAILURE], True),
        (3, [FAILURE, FAILURE, FAILURE], False),
        (3, [FAILURE, FAILURE, SUCCESS, FAILURE, FAILURE], True),  # not in a row
        (3, [FAILURE, FAILURE, SUCCESS, FAILURE, FAILURE, FAILURE], False),
        (3, [FAILURE, NEITHER, FAILURE, NEITHER, FAILURE], False),  # no news is no success
        (3, [NEITHER] * 9, True),
        (1, [FAILURE], False),
        (1, [SUCCESS, NEITHER], True),
    ],
)
def test_failures_in_a_row_open_it(failures: int, verdicts: list[Verdict], closed: bool) -> None:
    story = Story(failures)
    story.plays(*verdicts)
    assert (story.circuit.is_closed, story.allows) == (closed, closed)


def test_requests_at_a_time_count_as_they_end() -> None:
    story = Story()
    first, second, third, fourth = (story.begins() for _ in range(4))
    second.ends(FAILURE)
    first.ends(FAILURE)
    assert story.allows
    fourth.ends(FAILURE)
    assert not story.allows
    third.ends(FAILURE)
    assert not story.allows


# Open -------------------------------------------------------------------------------------------


def test_it_rests_and_is_tried_by_one_request_at_a_time() -> None:
    story = opened()
    story.now += REST - 0.1
    assert not story.allows
    story.now += 0.1
    assert story.allows
    probe = story.begins()
    assert not story.allows
    story.now += 10 * REST
    assert not story.allows
    probe.ends(SUCCESS)
    assert story.allows
    assert story.circuit.is_closed


def test_behind_a_success_failures_are_counted_from_0() -> None:
    story = opened()
    story.now += REST
    story.plays(SUCCESS, FAILURE, FAILURE)
    assert story.circuit.is_closed
    story.plays(FAILURE)
    assert not story.circuit.is_closed


def test_a_probe_that_fails_lets_it_rest_anew() -> None:
    story = opened()
    story.now += REST + 5
    probe = story.begins()
    story.now += 7
    probe.ends(FAILURE)
    story.now += REST - 0.1
    assert not story.allows
    story.now += 0.1
    assert story.allows
    assert not story.circuit.is_closed


def test_a_probe_without_news_makes_room_for_the_next() -> None:
    story = opened()
    story.now += REST
    story.begins().ends(NEITHER)
    assert story.allows
    assert not story.circuit.is_closed


@pytest.mark.parametrize("verdict", Verdict)
def test_what_began_before_it_opened_is_no_news(verdict: Verdict) -> None:
    story = Story()
    early = story.begins()
    story.plays(FAILURE, FAILURE, FAILURE)
    story.now += REST - 1
    early.ends(verdict)
    assert not story.circuit.is_closed
    story.now += 1
    assert story.allows  # it has not begun to rest anew


def test_the_last_one_in_rotation_is_asked_though_it_is_open() -> None:
    story = opened()
    story.plays(SUCCESS)  # without a look at `allows`
    assert story.circuit.is_closed


def test_a_request_for_lack_of_others_does_not_make_room_for_a_second_probe() -> None:
    story = opened()
    story.now += REST
    probe = story.begins()
    story.plays(NEITHER)  # there was no other upstream left for it
    assert not story.allows
    probe.ends(NEITHER)
    assert story.allows


def test_what_began_before_it_opened_is_no_news_when_it_is_closed_again() -> None:
    story = Story()
    early = [story.begins() for _ in range(FAILURES)]
    story.plays(FAILURE, FAILURE, FAILURE)
    story.now += REST
    story.plays(SUCCESS)
    for each in early:
        each.ends(FAILURE)
    assert story.circuit.is_closed


def test_a_probe_that_comes_second_is_no_news() -> None:
    story = opened()
    late = story.begins()
    story.plays(SUCCESS)
    late.ends(FAILURE)
    assert story.circuit.is_closed


def test_other_settings_hold_at_once() -> None:
    story = opened()
    story.circuit.settings = config.Circuit(failures=1, rest=5.0)
    story.now += 5
    assert story.allows
    story.plays(SUCCESS, FAILURE)
    assert not story.circuit.is_closed


# Any story --------------------------------------------------------------------------------------


@dataclass
class Played:
    """A request, as the model sees it."""

    request: Request
    period: int  # how often the circuit had changed when it began
    allowed: bool  # or was there nobody else?


class AnyStory(RuleBasedStateMachine):
    """The circuit beside a model: periods, closed and open in turn. In each, only requests that
    began in it are heard."""

    requests: Bundle[Played] = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.story = Story()
        self.period = 0  # odd: open
        self.heard: list[Verdict] = []  # in this period
        self.rested_since = 0.0
        self.on_their_way: list[Played] = []

    @property
    def open(self) -> bool:
        return self.period % 2 == 1

    @property
    def probes(self) -> list[Played]:
        return [each for each in self.on_their_way if self.open and each.period == self.period]

    def allows(self) -> bool:
        rested = self.story.now - self.rested_since >= REST
        return not self.open or (rested and not self.probes)

    @rule(target=requests)
    def begin(self) -> Played:
        """Whoever there is begins, for lack of others even where it is not allowed."""
        played = Played(self.story.begins(), self.period, self.allows())
        self.on_their_way.append(played)
        return played

    @rule(played=consumes(requests), verdict=st.sampled_from(Verdict))
    def end(self, played: Played, verdict: Verdict) -> None:
        self.on_their_way.remove(played)
        played.request.ends(verdict)
        if played.period != self.period or verdict is NEITHER:
            return
        self.heard.append(verdict)
        if self.open:
            self.rested_since = self.story.now
            if verdict is SUCCESS:
                self._turn()
        elif self.heard[-FAILURES:] == [FAILURE] * FAILURES:
            self.rested_since = self.story.now
            self._turn()

    def _turn(self) -> None:
        self.period += 1
        self.heard = []

    @rule(seconds=st.sampled_from([1.0, REST / 2, REST]))
    def wait(self, seconds: float) -> None:
        self.story.now += seconds

    @invariant()
    def they_agree(self) -> None:
        assert self.story.circuit.is_closed == (not self.open)
        assert self.story.allows == self.allows()

    @invariant()
    def one_probe_at_a_time_by_permission(self) -> None:
        assert sum(each.allowed for each in self.probes) <= 1


TestAnyStory = AnyStory.TestCase
TestAnyStory.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
