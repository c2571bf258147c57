"""What operators see of a request, once it has ended: metrics and one line."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy import __version__, config
from proxy.circuit import Verdict
from proxy.connection import UpstreamConnection
from proxy.errors import ProxyError
from proxy.exchange import Exchange, Outcome
from proxy.observe import CONTENT_TYPE, Observer, new_id
from proxy.upstreams import Upstream

# interface.md, §5
COUNTERS = {
    "sluice_requests": {"client", "route", "model", "code"},
    "sluice_outcomes": {"route", "outcome"},
    "sluice_limit_rejections": {"client", "limit"},
    "sluice_auth_failures": set[str](),
    "sluice_tokens": {"client", "model", "type", "source"},
    "sluice_bytes": {"direction"},
    "sluice_chunks": set[str](),
    "sluice_upstream_attempts": {"upstream", "result"},
    "sluice_resumes": {"result"},
    "sluice_heartbeats": set[str](),
    "sluice_store_errors": set[str](),
    "sluice_config_reloads": {"result"},
}
GAUGES = {
    "sluice_requests_in_flight": {"route"},
    "sluice_upstream_up": {"upstream"},
    "sluice_event_loop_lag_seconds": set[str](),
    "sluice_build_info": {"version"},
}
HISTOGRAMS = {
    "sluice_time_to_first_byte_seconds",
    "sluice_time_to_first_token_seconds",
    "sluice_stream_duration_seconds",
    "sluice_output_tokens_per_second",
    "sluice_inter_chunk_seconds",
    "sluice_overhead_seconds",
}
FIELDS = [
    "request_id",
    "client",
    "method",
    "path",
    "route",
    "model",
    "upstream",
    "attempts",
    "status",
    "outcome",
    "ttfb",
    "ttft",
    "duration",
    "bytes_up",
    "bytes_down",
    "tokens_in",
    "tokens_out",
]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def configured(*routes: tuple[str, ...]) -> config.Config:
    return config.Config(
        store="memory",
        upstreams={"up": config.Upstream(base_url="http://up.example")},
        routes=tuple(
            config.Route(models=models, name=models[0], upstreams=("up",)) for models in routes
        )
        or (config.Route(models=("*",), name="default", upstreams=("up",)),),
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def observer(clock: Clock) -> Observer:
    observer = Observer(configured(("gpt-4o", "gpt-*"), ("claude-[34]", "x?")), clock)
    upstreams = named("up")
    observer.upstreams = lambda: upstreams
    return observer


async def nowhere() -> UpstreamConnection:
    raise AssertionError("nobody connects here")


def named(*names: str) -> dict[str, Upstream]:
    """Upstreams that are taken out by one failure."""
    settings = config.Upstream(base_url="http://up.example", circuit=config.Circuit(failures=1))
    return {name: Upstream(name, settings, nowhere) for name in names}


def samples(observer: Observer) -> dict[str, float]:
    """A scrape: `name{label=value,…}`, labels sorted."""
    found = {}
    for family in text_string_to_metric_families(observer.render().decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def play(observer: Observer, clock: Clock, **facts: object) -> Exchange:
    """One request of 10 s about which these facts are learnt."""
    with observer.exchange("POST", "/v1/x", None) as exchange:
        for name, value in facts.items():
            setattr(exchange, name, value)
        clock.now += 10
    return exchange


async def test_metrics_are_those_of_the_interface(observer: Observer, clock: Clock) -> None:
    play(
        observer, clock, route="gpt-4o", model="gpt-4o", upstream="up", status=200, stream=True,
        outcome=Outcome.COMPLETED, attempt_results=[("up", "answer")], first_byte=101.0, read=100.0,
        forwarded=100.5, first_token=102.0, last_payload=105.0, chunks=5, bytes_down=9, bytes_up=4,
        tokens_in=3, tokens_out=4, tokens_source="upstream",
        error=ProxyError("rate_limit_exceeded", "", limit="tokens"),
    )  # fmt: skip
    for family in text_string_to_metric_families(observer.render().decode()):
        if not family.name.startswith("sluice_"):
            assert family.name.startswith(("process_", "python_"))
            continue
        if family.name.endswith("_created"):  # prometheus_client's own addition
            continue
        labels = {name for sample in family.samples for name in sample.labels}
        match family.type:
            case "counter":
                assert labels == COUNTERS[family.name]
            case "gauge":
                assert labels == GAUGES[family.name]
            case "histogram":
                assert family.name in HISTOGRAMS
                assert labels == {"route", "le"}
            case other:
                raise AssertionError(f"{family.name} is a {other}")
        assert family.documentation
        assert family.samples


async def test_tokens_refusals_and_failures(observer: Observer, clock: Clock) -> None:
    play(
        observer, clock, client="web", model="gpt-4o", tokens_in=30, tokens_out=12,
        tokens_source="estimated", stream=True, status=200, first_byte=101.0, first_token=102.0,
        last_payload=105.0, chunks=3,
    )  # fmt: skip
    for kind in ("requests", "streams"):
        error = ProxyError("rate_limit_exceeded", "", limit=kind)
        play(observer, clock, client="web", status=429, error=error)
    play(observer, clock, status=401, error=ProxyError("invalid_api_key", ""))
    play(observer, clock, client="web", tokens_in=0, tokens_out=0, tokens_source="upstream")
    observer.store_failed()
    found = samples(observer)
    for name, value in {
        "sluice_tokens_total{client=web,model=gpt-4o,source=estimated,type=input}": 30,
        "sluice_tokens_total{client=web,model=gpt-4o,source=estimated,type=output}": 12,
        "sluice_limit_rejections_total{client=web,limit=requests}": 1,
        "sluice_limit_rejections_total{client=web,limit=streams}": 1,
        "sluice_auth_failures_total": 1,
        "sluice_store_errors_total": 1,
        "sluice_output_tokens_per_second_sum{route=none}": 4,
    }.items():
        assert found[name] == value, name
    assert sum("sluice_tokens_total" in name for name in found) == 2


async def test_a_streams_numbers(observer: Observer, clock: Clock) -> None:
    play(
        observer, clock, route="gpt-4o", model="gpt-4o", upstream="up", status=200, stream=True,
        outcome=Outcome.COMPLETED, attempt_results=[("up", "server_error"), ("up", "answer")],
        read=100.25, forwarded=100.5, first_byte=101.0, first_token=102.0, last_payload=105.0,
        chunks=5, bytes_down=900, bytes_up=40,
    )  # fmt: skip
    found = samples(observer)
    for name, value in {
        "sluice_requests_total{client=anonymous,code=200,model=gpt-4o,route=gpt-4o}": 1,
        "sluice_outcomes_total{outcome=completed,route=gpt-4o}": 1,
        "sluice_upstream_attempts_total{result=answer,upstream=up}": 1,
        "sluice_upstream_attempts_total{result=server_error,upstream=up}": 1,
        "sluice_bytes_total{direction=up}": 40,
        "sluice_bytes_total{direction=down}": 900,
        "sluice_chunks_total": 5,
        "sluice_time_to_first_byte_seconds_sum{route=gpt-4o}": 1,
        "sluice_time_to_first_token_seconds_sum{route=gpt-4o}": 2,
        "sluice_stream_duration_seconds_sum{route=gpt-4o}": 9,
        "sluice_stream_duration_seconds_bucket{le=1800.0,route=gpt-4o}": 1,
        "sluice_inter_chunk_seconds_sum{route=gpt-4o}": 1,
        "sluice_overhead_seconds_sum{route=gpt-4o}": 0.25,
        f"sluice_build_info{{version={__version__}}}": 1,
    }.items():
        assert found[name] == pytest.approx(value), name


async def test_what_did_not_happen_is_not_counted(observer: Observer, clock: Clock) -> None:
    play(observer, clock)
    found = samples(observer)
    assert found["sluice_requests_total{client=anonymous,code=499,model=other,route=none}"] == 1
    for name in found:
        assert not name.startswith(("sluice_outcomes", "sluice_upstream_attempts", "sluice_time_"))
        assert not name.startswith(("sluice_stream_duration", "sluice_overhead", "sluice_inter"))
    assert found["sluice_bytes_total{direction=up}"] == 0
    assert found["sluice_chunks_total"] == 0


async def test_a_stream_of_one_chunk_has_no_time_between(observer: Observer, clock: Clock) -> None:
    play(observer, clock, stream=True, first_byte=101.0, last_payload=101.0, chunks=1)
    assert not [name for name in samples(observer) if name.startswith("sluice_inter_chunk")]


@pytest.mark.parametrize(
    ("model", "label"),
    [
        ("gpt-4o", "gpt-4o"),  # stands in the config
        ("gpt-4o-mini", "other"),
        ("gpt-*", "other"),  # stands there as a pattern
        ("claude-[34]", "other"),
        ("x?", "other"),
        ("other", "other"),
        ("", "other"),
        (None, "other"),
        ('"} 1\nevil{a="', "other"),
    ],
)
async def test_callers_cannot_grow_a_label(
    observer: Observer, clock: Clock, model: str | None, label: str
) -> None:
    play(observer, clock, model=model, route="gpt-4o", status=200)
    name = f"sluice_requests_total{{client=anonymous,code=200,model={label},route=gpt-4o}}"
    assert samples(observer)[name] == 1


async def test_a_reload_changes_which_models_are_labels(observer: Observer, clock: Clock) -> None:
    observer.use(configured(("claude-4",)))
    play(observer, clock, model="gpt-4o", route="claude-4", status=200)
    play(observer, clock, model="claude-4", route="claude-4", status=200)
    found = samples(observer)
    for model in ("other", "claude-4"):
        name = f"sluice_requests_total{{client=anonymous,code=200,model={model},route=claude-4}}"
        assert found[name] == 1


async def test_requests_in_flight(observer: Observer) -> None:
    def in_flight() -> dict[str, float]:
        prefix = "sluice_requests_in_flight{route="
        found = samples(observer)
        return {n[len(prefix) : -1]: v for n, v in found.items() if n.startswith(prefix)}

    assert in_flight() == {"gpt-4o": 0, "claude-[34]": 0}
    with observer.exchange("GET", "/v1/x", None):
        assert in_flight().get("none") == 1
        with observer.exchange("GET", "/v1/x", None) as second:
            second.route = "gpt-4o"
            assert in_flight()["gpt-4o"] == 1
            observer.use(configured(("claude-4",)))
            assert (in_flight()["gpt-4o"], in_flight()["claude-4"]) == (1, 0)
    # Nothing is in flight any more, on no route of whatever config.
    assert sum(in_flight().values()) == 0
    assert observer.in_flight == {}


async def test_which_upstreams_are_in_rotation(observer: Observer) -> None:
    def up() -> dict[str, float]:
        prefix = "sluice_upstream_up{upstream="
        found = samples(observer)
        return {n[len(prefix) : -1]: v for n, v in found.items() if n.startswith(prefix)}

    upstreams = named("a", "b")
    observer.upstreams = lambda: upstreams
    assert up() == {"a": 1, "b": 1}
    upstreams["a"].begin(lambda: 0.0).end(Verdict.FAILURE)
    assert up() == {"a": 0, "b": 1}
    probe = upstreams["a"].begin(lambda: 100.0)
    assert up() == {"a": 0, "b": 1}  # not before it has ended well
    probe.end(Verdict.SUCCESS)
    assert up() == {"a": 1, "b": 1}
    # A reload takes one away, and brings another; a third brings the first back.
    upstreams["c"] = named("c")["c"]
    gone = upstreams.pop("a")
    assert up() == {"b": 1, "c": 1}
    assert up() == {"b": 1, "c": 1}
    gone.begin(lambda: 0.0).end(Verdict.FAILURE)
    assert up() == {"b": 1, "c": 1}
    upstreams["a"] = gone
    assert up() == {"a": 0, "b": 1, "c": 1}


async def test_heartbeats(observer: Observer, clock: Clock) -> None:
    assert samples(observer)["sluice_heartbeats_total"] == 0
    play(observer, clock, stream=True, status=200, first_byte=101.0, heartbeats=3)
    play(observer, clock, status=200, heartbeats=2)  # none but ours: nothing came of its upstream
    found = samples(observer)
    assert found["sluice_heartbeats_total"] == 5
    # They are no bytes of the answer.
    assert found["sluice_bytes_total{direction=down}"] == 0
    assert found["sluice_chunks_total"] == 0


@pytest.mark.parametrize("outcome", Outcome)
async def test_every_outcome_is_counted_by_its_name(
    observer: Observer, clock: Clock, outcome: Outcome
) -> None:
    play(observer, clock, route="gpt-4o", upstream="up", status=200, outcome=outcome)
    name = f"sluice_outcomes_total{{outcome={outcome.value},route=gpt-4o}}"
    assert samples(observer)[name] == 1
    assert outcome.value in {
        "completed", "client_gone", "upstream_error", "upstream_truncated", "first_byte_timeout",
        "idle_timeout", "stall_timeout", "total_timeout", "shutdown", "stopped", "abandoned", "killed",
    }  # fmt: skip


async def test_each_attempt_is_counted_for_its_upstream(observer: Observer, clock: Clock) -> None:
    results = [("a", "upstream_unreachable"), ("b", "rate_limited"), ("c", "answer")]
    play(observer, clock, upstream="c", attempts=3, status=200, attempt_results=results)
    play(observer, clock, upstream="c", attempts=1, status=200, attempt_results=results[2:])
    found = samples(observer)
    prefix = "sluice_upstream_attempts_total"
    assert {name: value for name, value in found.items() if name.startswith(prefix)} == {
        f"{prefix}{{result=upstream_unreachable,upstream=a}}": 1,
        f"{prefix}{{result=rate_limited,upstream=b}}": 1,
        f"{prefix}{{result=answer,upstream=c}}": 2,
    }


async def test_reloads_are_counted(observer: Observer) -> None:
    assert samples(observer)["sluice_config_reloads_total{result=rejected}"] == 0
    observer.reloaded("applied")
    observer.reloaded("rejected")
    observer.reloaded("rejected")
    found = samples(observer)
    assert found["sluice_config_reloads_total{result=applied}"] == 1
    assert found["sluice_config_reloads_total{result=rejected}"] == 2


async def test_the_record_of_a_request(observer: Observer, clock: Clock) -> None:
    with observer.exchange("GET", "/v1/x", "theirs") as exchange:
        assert observer.in_flight == {exchange.id: exchange}
        assert (exchange.request_id, exchange.received) == ("theirs", 100.0)
        assert exchange.task is asyncio.current_task()
        clock.now = 103.0
    assert (exchange.ended, exchange.task) == (103.0, None)
    with observer.exchange("GET", "/v1/x", None) as exchange:
        assert exchange.request_id == exchange.id


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError])
async def test_it_is_written_down_in_every_ending(
    observer: Observer, error: type[BaseException]
) -> None:
    with pytest.raises(error), observer.exchange("GET", "/v1/x", None):
        raise error
    assert observer.in_flight == {}
    assert (
        samples(observer)["sluice_requests_total{client=anonymous,code=499,model=other,route=none}"]
        == 1
    )


def test_ids_are_not_repeated() -> None:
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert {len(each) for each in ids} == {24}


def test_the_content_type_is_the_one_prometheus_asks_for() -> None:
    assert CONTENT_TYPE.startswith("text/plain; version=0.0.4")


# The access line ------------------------------------------------------------------------------


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def lines() -> Iterator[Lines]:
    lines, access = Lines(), logging.getLogger("sluice.access")
    access.addHandler(lines)
    access.setLevel(logging.INFO)
    yield lines
    access.setLevel(logging.NOTSET)
    access.removeHandler(lines)


async def test_the_access_line(observer: Observer, clock: Clock, lines: Lines) -> None:
    play(
        observer, clock, request_id="r", route="gpt-4o", model="gpt-4o-mini", upstream="up",
        attempts=2, status=200, outcome=Outcome.COMPLETED, first_byte=100.1234567,
        first_token=101.5, bytes_up=1, bytes_down=2, tokens_in=3, tokens_out=4,
    )  # fmt: skip
    [record] = lines.records
    fields = record.fields  # type: ignore[attr-defined]
    assert record.getMessage() == "request"
    assert list(fields) == FIELDS
    assert fields == {
        "request_id": "r",
        "client": "anonymous",
        "method": "POST",
        "path": "/v1/x",
        "route": "gpt-4o",
        "model": "gpt-4o-mini",
        "upstream": "up",
        "attempts": 2,
        "status": 200,
        "outcome": "completed",
        "ttfb": 0.123457,
        "ttft": 1.5,
        "duration": 10.0,
        "bytes_up": 1,
        "bytes_down": 2,
        "tokens_in": 3,
        "tokens_out": 4,
    }


async def test_who_was_asked(observer: Observer, clock: Clock, lines: Lines) -> None:
    tried = [("a", "upstream_aborted"), ("b", "answer")]
    play(observer, clock, request_id="r", upstream="b", attempts=2, attempt_results=tried)
    said, _ = lines.records
    assert said.getMessage() == "attempts"
    assert said.fields == {  # type: ignore[attr-defined]
        "request_id": "r",
        "tried": "a: upstream_aborted, b: answer",
    }


async def test_the_line_of_what_came_to_nothing(
    observer: Observer, clock: Clock, lines: Lines
) -> None:
    play(observer, clock)
    [record] = lines.records
    fields = record.fields  # type: ignore[attr-defined]
    assert list(fields) == FIELDS
    assert (fields["status"], fields["outcome"], fields["upstream"]) == (499, None, None)
    assert (fields["ttfb"], fields["ttft"], fields["duration"]) == (None, None, 10.0)


async def test_no_line_where_nobody_reads_it(
    observer: Observer, clock: Clock, lines: Lines
) -> None:
    logging.getLogger("sluice.access").setLevel(logging.WARNING)
    play(observer, clock)
    assert lines.records == []


async def test_the_loops_lag(
    observer: Observer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = []

    async def sleep(seconds: float) -> None:
        rounds.append(seconds)
        if len(rounds) > 1:
            raise asyncio.CancelledError
        clock.now += seconds + 0.25

    monkeypatch.setattr(asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await observer.watch_loop()
    assert samples(observer)["sluice_event_loop_lag_seconds"] == pytest.approx(0.25)
