"""How a configured upstream is asked, which of several is, and what a reload changes."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from proxy import config
from proxy.circuit import Verdict
from proxy.connection import UpstreamConnection
from proxy.errors import ProxyError
from proxy.framing import Header
from proxy.upstreams import Upstream, build, choose, wait_for_any

CERTIFICATES = Path(__file__).parents[1] / "flow" / "certs" / "ca.pem"


async def nowhere() -> UpstreamConnection:
    raise AssertionError("nobody connects here")


def upstream(base_url: str = "https://up.example/v1", **settings: Any) -> Upstream:
    return Upstream("up", config.Upstream(base_url=base_url, **settings), nowhere)


@pytest.mark.parametrize(
    ("base_url", "host", "prefix"),
    [
        ("https://up.example/v1", b"up.example", b"/v1"),
        ("https://up.example/v1/", b"up.example", b"/v1"),
        ("http://up.example", b"up.example", b""),
        ("http://up.example/", b"up.example", b""),
        ("http://up.example:8443/a/b", b"up.example:8443", b"/a/b"),
        ("http://[::1]:11434/v1", b"[::1]:11434", b"/v1"),
    ],
)
def test_where_its_requests_go(base_url: str, host: bytes, prefix: bytes) -> None:
    up = upstream(base_url)
    assert (up.terms.rules.host, up.terms.prefix) == (host, prefix)


@pytest.mark.parametrize(
    ("base_url", "prefix"),
    [
        ("https://up.example/v1", b"/v1"),
        ("http://up.example/v1/", b"http://up.example/v1"),
        ("http://up.example:8080", b"http://up.example:8080"),
        ("http://[::1]:11434/v1", b"http://[::1]:11434/v1"),
    ],
)
def test_a_forward_proxy_is_told_the_whole_url_but_in_a_tunnel(
    base_url: str, prefix: bytes
) -> None:
    up = upstream(base_url, egress="http://proxy.example:3128")
    assert up.terms.prefix == prefix
    assert up.terms.rules.host == upstream(base_url).terms.rules.host


@pytest.mark.parametrize(
    ("base_url", "egress", "looked_up", "place"),
    [
        ("http://up.example", None, ("up.example", 80), "up.example:80"),
        ("https://up.example:8443", None, ("up.example", 8443), "up.example:8443"),
        (
            "https://up.example",
            "http://p.example:3128",
            ("p.example", 3128),
            "up.example:443 through p.example:3128",
        ),
    ],
)
async def test_where_its_connections_go(
    monkeypatch: pytest.MonkeyPatch,
    base_url: str,
    egress: str | None,
    looked_up: tuple[str, int],
    place: str,
) -> None:
    asked = []

    def look_up(host: str, port: int, **_: object) -> Any:
        asked.append((host, port))
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    settings = config.Upstream.model_validate({"base_url": base_url, "egress": egress})
    up = build(config.Config(store="memory", upstreams={"up": settings}), lambda: nowhere, {})["up"]
    with pytest.raises(ProxyError) as caught:
        await up.pool.acquire()
    assert asked == [looked_up]
    assert caught.value.detail == f"{place}: [Errno -2] unknown"


@pytest.mark.parametrize(
    ("settings", "credential"),
    [
        ({}, None),
        ({"api_key": "k"}, (b"Authorization", b"Bearer k")),
        ({"api_key": "k", "auth": "bearer"}, (b"Authorization", b"Bearer k")),
        ({"api_key": "k", "auth": "x-api-key"}, (b"x-api-key", b"k")),
        ({"api_key": "k", "auth": "api-key"}, (b"api-key", b"k")),
        ({"auth": "none"}, None),
    ],
)
def test_its_credential(settings: dict[str, Any], credential: Header | None) -> None:
    terms = upstream(**settings).terms
    assert terms.credential() == credential
    assert terms.settings.injects == (credential is not None)
    assert terms.rules.drops_credentials == terms.settings.injects
    assert (b"authorization" in terms.dropped) == terms.settings.injects


def test_a_key_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("first\n")
    up = upstream(api_key_file=path)
    assert up.terms.credential() == (b"Authorization", b"Bearer first")


def test_fixed_headers() -> None:
    terms = upstream(headers={"X-Org": "ours", "User-Agent": "us"}).terms
    assert terms.rules.fixed == ((b"X-Org", b"ours"), (b"User-Agent", b"us"))
    assert {b"x-org", b"user-agent"} <= terms.dropped
    assert not terms.settings.injects


@pytest.mark.parametrize("name", ["Authorization", "x-api-key", "API-Key"])
def test_a_credential_among_the_fixed_headers_is_one_of_ours(name: str) -> None:
    # interface.md, §3: `with an injected key no client credential goes up`; config agrees.
    settings = config.Upstream.model_validate(
        {"base_url": "http://up.example", "headers": {name: "ours"}}
    )
    assert settings.injects
    up = Upstream("up", settings, nowhere)
    assert {b"authorization", b"x-api-key", b"api-key"} <= up.terms.dropped


def test_no_key_is_shown() -> None:
    up = upstream(api_key="sk-secret", headers={"X": "sk-secret"})
    assert repr(up) == "<Upstream up <Pool idle=0>>"
    assert "sk-secret" not in repr(up.terms)


async def test_the_demo_upstream_is_given_its_connections() -> None:
    asked = []

    def demo() -> Any:
        asked.append(True)
        return nowhere

    settings = {
        "demo": config.Upstream(base_url="demo://"),
        "up": config.Upstream(base_url="http://127.0.0.1:9"),
    }
    built = build(config.Config(store="memory", upstreams=settings), demo, {})
    assert list(built) == ["demo", "up"]
    assert [up.name for up in built.values()] == ["demo", "up"]
    assert len(asked) == 1
    with pytest.raises(AssertionError, match="nobody connects"):
        await built["demo"].pool.acquire()


# Turns --------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def with_circuit(failures: int = 1, rest: float = 30, **settings: Any) -> Upstream:
    return upstream(circuit=config.Circuit(failures=failures, rest=rest), **settings)


def test_a_turn_is_one_of_max_streams() -> None:
    up, clock = upstream(max_streams=2), Clock()
    first, second = up.begin(clock), up.begin(clock)
    assert (up.in_progress, up.is_full) == (2, True)
    first.end()
    assert (up.in_progress, up.is_full) == (1, False)
    first.end()  # it is over already
    assert up.in_progress == 1
    second.end(Verdict.SUCCESS)
    assert up.in_progress == 0


def test_without_max_streams_nothing_is_full() -> None:
    up = upstream()
    for _ in range(1000):
        up.begin(Clock())
    assert not up.is_full


def test_what_ails_it(caplog: pytest.LogCaptureFixture) -> None:
    up, clock = with_circuit(rest=30, max_streams=1), Clock()
    caplog.set_level(logging.INFO, "sluice.upstreams")
    assert up.trouble(clock.now) is None
    turn = up.begin(clock)
    assert up.trouble(clock.now) == "full (1 in progress)"
    up.rest(4.2, clock.now)
    assert up.trouble(clock.now) == "rests for 5 s by its own word (429)"
    turn.end(Verdict.FAILURE, "server_error")
    assert up.trouble(clock.now) == "its circuit is open (server_error)"
    clock.now += 30
    up.begin(clock).end(Verdict.FAILURE, "upstream_aborted")  # in vain: nothing new
    assert up.trouble(clock.now) == "its circuit is open (upstream_aborted)"
    up.begin(clock).end(Verdict.SUCCESS)
    assert up.trouble(clock.now) is None
    said = [(each.message, vars(each)["fields"]) for each in caplog.records]
    assert said == [
        ("circuit_opened", {"upstream": "up", "after": "server_error", "rest": "30 s"}),
        ("circuit_closed", {"upstream": "up"}),
    ]


@pytest.mark.parametrize("verdict", Verdict)
def test_a_turn_is_judged_by_its_end_and_once(verdict: Verdict) -> None:
    up = with_circuit()
    turn = up.begin(Clock())
    turn.end(verdict)
    turn.end(Verdict.FAILURE)
    assert up.circuit.is_closed == (verdict is not Verdict.FAILURE)


def test_a_turn_that_is_no_news() -> None:
    up = with_circuit(max_streams=1)
    turn = up.begin(Clock(), counts=False)
    assert up.is_full
    turn.end(Verdict.FAILURE)
    assert (up.is_full, up.circuit.is_closed) == (False, True)
    # Nor does it take a probe's place, or play one.
    clock = Clock()
    up.begin(clock).end(Verdict.FAILURE)
    clock.now += 30
    turn = up.begin(clock, counts=False)
    assert up.circuit.allows(clock.now)
    turn.end(Verdict.SUCCESS)
    assert not up.circuit.is_closed


def test_a_failure_counts_from_when_it_was_told() -> None:
    up, clock = with_circuit(rest=30), Clock()
    turn = up.begin(clock)
    clock.now = 150.0
    turn.end(Verdict.FAILURE)
    clock.now = 160.0
    turn.end()
    assert not up.circuit.allows(179.9)
    assert up.circuit.allows(180.0)


# Which one is asked -------------------------------------------------------------------------------

NOW = 1000.0


class Candidates:
    """Upstreams in states that a row of a table tells in words, each of them one candidate:

    `ok`; `full`; `rests` by its own word, for 10 s more; `rested` until now; `open` N: its circuit has
    been for N seconds, of the 30 that it rests; `probing`: so for long, and a probe is on its way;
    `gone`: no longer configured.
    """

    def __init__(self, *states: str) -> None:
        named = zip("abcd", states, strict=False)
        self.all = [self._candidate(name, *state.split()) for name, state in named]

    def _candidate(self, name: str, *words: str) -> Upstream:
        up = Upstream(
            name,
            config.Upstream(
                base_url="http://up.example",
                max_streams=1 if "full" in words else None,
                circuit=config.Circuit(failures=1, rest=30),
            ),
            nowhere,
        )
        if "open" in words or "probing" in words:
            since = 40.0 if "probing" in words else float(words[words.index("open") + 1])
            up.begin(lambda: NOW - since).end(Verdict.FAILURE)
        if "probing" in words or "full" in words:
            up.begin(lambda: NOW)
        if "rests" in words:
            up.rest(10, NOW)
        if "gone" in words:
            up.leave()
        if "rested" in words:
            up.rest(10, NOW - 10)
        return up

    def choose(self, tried: str = "") -> str | None:
        found = choose(self.all, [each for each in self.all if each.name in tried], NOW)
        return found.name if found else None


@pytest.mark.parametrize(
    ("states", "tried", "chosen"),
    [
        (["ok", "ok"], "", "a"),  # in their order
        (["ok", "ok"], "a", "b"),
        (["ok", "ok"], "b", "a"),
        (["ok", "ok"], "ab", None),  # never the same twice
        (["ok"], "a", None),
        # Full ones are not available, not even the only one.
        (["full", "ok"], "", "b"),
        (["full"], "", None),
        (["full", "full"], "", None),
        (["full", "ok"], "b", None),
        # One that rests by its own word is left alone where there are others.
        (["rests"], "", "a"),
        (["rests", "ok"], "", "b"),
        (["rests", "ok"], "b", None),
        (["rests", "rests"], "", None),
        (["rests", "full"], "", None),
        (["rested", "ok"], "", "a"),
        # Circuits.
        (["open 5", "ok"], "", "b"),
        (["open 5", "ok"], "b", None),  # b is still in rotation, so a is not the last one
        (["open 30", "ok"], "", "a"),  # a probe
        (["open 30", "ok"], "a", "b"),
        (["probing", "ok"], "", "b"),
        # The last one in rotation stays in it, whatever its circuit says.
        (["open 5"], "", "a"),
        (["probing"], "", "a"),
        (["open 5"], "a", None),
        (["open 9", "open 5"], "", "b"),
        (["open 5", "open 9"], "", "a"),
        (["open 9", "open 5", "open 7"], "", "b"),
        (["open 9", "open 5"], "b", None),
        # And that is one which can be asked: what is full, or rests by its own word, can't.
        (["open 5", "full"], "", "a"),
        (["open 5", "rests"], "", "a"),
        (["open 9", "open 5 full"], "", "a"),
        (["open 9", "open 5 rests"], "", "a"),
        (["open 9", "rests", "full"], "", "a"),
        # What is no longer configured is not asked, whoever else is left.
        (["gone", "ok"], "", "b"),
        (["gone"], "", None),
        (["gone", "open 5"], "", "b"),
        (["open 9", "open 5 gone"], "", "a"),
        (["gone", "rests"], "", None),
        # A probe goes before it.
        (["open 5", "open 31"], "", "b"),
    ],
)
def test_which_candidate_is_asked(states: list[str], tried: str, chosen: str | None) -> None:
    assert Candidates(*states).choose(tried) == chosen


def test_a_failed_probe_does_not_cost_the_last_one_its_place() -> None:
    # b was the last one in rotation, and still is when a's probe has failed.
    candidates = Candidates("open 31", "open 5")
    assert candidates.choose() == "a"
    candidates.all[0].begin(lambda: NOW).end(Verdict.FAILURE)
    assert candidates.choose(tried="a") == "b"
    assert candidates.choose() == "b"


def test_one_probe_at_a_time() -> None:
    candidates = Candidates("open 31", "ok")
    probe = candidates.all[0].begin(lambda: NOW)
    assert candidates.choose() == "b"
    probe.end(Verdict.SUCCESS)
    assert candidates.choose() == "a"


@pytest.mark.parametrize(
    ("states", "wait"),
    [
        (["rests", "rests"], 10),
        (["rests", "full"], 1),  # nobody knows when; a second is what Retry-After says at least
        (["full"], 1),
        (["full", "full"], 1),
        (["rests full", "rests"], 10),
    ],
)
def test_how_long_to_wait_for_one(states: list[str], wait: float) -> None:
    candidates = Candidates(*states)
    assert candidates.choose() is None
    assert wait_for_any(candidates.all, NOW) == wait


def test_the_longer_rest_holds_and_none_holds_for_ever() -> None:
    up = upstream()
    up.rest(60, NOW)
    up.rest(5, NOW + 1)
    assert up.rests_until == NOW + 60
    up.rest(1e9, NOW)
    assert up.rests_until == NOW + 86400


# Reloads ------------------------------------------------------------------------------------------


def built(
    old: Mapping[str, Upstream] | None = None, *, clients: bool = False, **upstreams: Any
) -> dict[str, Upstream]:
    """What a config with these upstreams makes of the old ones."""
    settings = {
        name: config.Upstream.model_validate({"base_url": "http://up.example/v1"} | each)
        for name, each in upstreams.items()
    }
    who = (config.Client(name="web", key_sha256="0" * 64),) if clients else ()
    return build(
        config.Config(store="memory", upstreams=settings, clients=who), lambda: nowhere, old or {}
    )


def test_an_upstream_lives_on_under_new_terms() -> None:
    old = built(up={"api_key": "first"})
    up, pool, circuit = old["up"], old["up"].pool, old["up"].circuit
    up.begin(Clock())
    up.rest(60, NOW)
    up.last_error = "server_error"
    new = built(
        old,
        up={
            "api_key": "second",
            "max_streams": 1,
            "circuit": {"failures": 2},
            "headers": {"X-Org": "ours"},
            "timeouts": {"first_byte": 1},
        },
    )
    assert new["up"] is up
    assert up.terms.credential() == (b"Authorization", b"Bearer second")
    assert up.terms.rules.fixed == ((b"X-Org", b"ours"),)
    assert up.terms.settings.timeouts.first_byte == 1
    # What is known of it, and what is on its way.
    assert (up.pool, up.circuit, up.in_progress) == (pool, circuit, 1)
    assert (up.rests_until, up.last_error) == (NOW + 60, "server_error")
    assert up.is_full
    assert circuit.settings.failures == 2
    assert repr(pool) == "<Pool idle=0>"


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, True),
        ({"auth": "x-api-key"}, True),
        ({"timeouts": {"idle": 1}}, True),
        ({"timeouts": {"connect": 1}}, False),
        ({"base_url": "http://other.example/v1"}, False),
        ({"base_url": "http://up.example:81/v1"}, False),
        ({"egress": "http://proxy.example:3128"}, False),
    ],
)
def test_connections_stay_if_they_lead_to_the_same_place(
    change: dict[str, Any], kept: bool
) -> None:
    old = built(up={"api_key": "k"})
    pool = old["up"].pool
    up = built(old, up={"api_key": "k"} | change)["up"]
    assert (up.pool is pool) == kept
    assert repr(pool) == ("<Pool idle=0>" if kept else "<Pool idle=0 closed>")
    assert repr(up.pool) == "<Pool idle=0>"


def test_a_file_of_certificates_is_read_anew() -> None:
    settings = {"base_url": "https://up.example", "ca_file": str(CERTIFICATES)}
    old = built(up=settings)
    pool = old["up"].pool
    assert built(old, up=settings)["up"].pool is not pool
    assert repr(pool) == "<Pool idle=0 closed>"


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"api_key": "other"}, True),
        ({"timeouts": {"connect": 1}}, True),
        ({"base_url": "http://other.example"}, False),
        ({"egress": "http://proxy.example:3128"}, False),
    ],
)
def test_an_upstream_that_moves_begins_with_a_clean_slate(
    change: dict[str, Any], kept: bool
) -> None:
    old = built(up={"circuit": {"failures": 1}})
    up = old["up"]
    before = up.begin(lambda: NOW)
    up.begin(lambda: NOW).end(Verdict.FAILURE)
    up.rest(60, NOW)
    up.last_error = "server_error"
    assert built(old, up={"circuit": {"failures": 1}} | change)["up"] is up
    assert up.circuit.is_closed != kept
    assert (up.rests_until, up.last_error) == ((NOW + 60, "server_error") if kept else (0, None))
    # What began at the old place says nothing about the new one; but it is still in progress.
    assert up.in_progress == 1
    before.end(Verdict.FAILURE)
    assert (up.circuit.is_closed != kept, up.in_progress) == (True, 0)


def test_where_there_are_clients_now_their_keys_do_not_go_up() -> None:
    up = (old := built(up={}))["up"]
    assert b"authorization" not in up.terms.dropped
    built(old, clients=True, up={})
    assert b"authorization" in up.terms.dropped


def test_what_is_gone_and_what_is_new() -> None:
    old = built(gone={}, up={})
    new = built(old, up={}, fresh={})
    assert list(new) == ["up", "fresh"]
    assert repr(old["gone"].pool) == "<Pool idle=0 closed>"
    assert repr(new["up"].pool) == repr(new["fresh"].pool) == "<Pool idle=0>"


def test_the_embedded_one_can_be_moved_too() -> None:
    old = built(up={"base_url": "demo://"})
    demo = old["up"].pool
    assert built(old, up={"base_url": "demo://"})["up"].pool is demo
    built(old, up={})
    assert old["up"].pool is not demo
    assert repr(demo) == "<Pool idle=0 closed>"


def test_a_reload_that_fails_changes_nothing(tmp_path: Path) -> None:
    old = built(a={"api_key": "first"}, gone={})
    before = old["a"].terms
    path = tmp_path / "key"
    path.write_text("k")
    settings = config.Upstream.model_validate({"base_url": "http://b", "api_key_file": str(path)})
    path.unlink()
    moved = config.Upstream(base_url="http://elsewhere.example")
    broken = config.Config(store="memory", upstreams={"a": moved, "b": settings})
    with pytest.raises(ValueError, match="cannot be read"):
        build(broken, lambda: nowhere, old)
    assert old["a"].terms is before
    assert [repr(each.pool) for each in old.values()] == ["<Pool idle=0>"] * 2


class Transport(asyncio.Transport):
    aborted = False

    def abort(self) -> None:
        self.aborted = True


class Door:
    """Connections that are made one by one, when the test says so."""

    def __init__(self) -> None:
        self.made: list[UpstreamConnection] = []
        self.knocks: list[asyncio.Future[None]] = []

    async def connect(self) -> UpstreamConnection:
        self.knocks.append(asyncio.get_running_loop().create_future())
        await self.knocks[-1]
        connection = UpstreamConnection("up")
        connection.connection_made(Transport())
        self.made.append(connection)
        return connection


async def test_who_waits_for_a_connection_while_its_upstream_moves_gets_one_to_the_new_place() -> (
    None
):
    doors = [Door(), Door()]
    up, moved = (
        Upstream("up", config.Upstream(base_url=f"http://{at}.example"), door.connect)
        for at, door in zip(("old", "new"), doors, strict=True)
    )
    waiting = asyncio.create_task(up.connect(fresh=False))
    await asyncio.sleep(0)
    up.become(moved)
    doors[0].knocks[0].set_result(None)
    async with asyncio.timeout(10):
        while not doors[1].knocks:
            await asyncio.sleep(0)
    [at_the_old_place] = doors[0].made
    assert isinstance(at_the_old_place.transport, Transport)
    assert at_the_old_place.transport.aborted
    doors[1].knocks[0].set_result(None)
    connection, pool = await waiting
    assert (connection, pool) == (doors[1].made[0], up.pool)


async def test_one_who_waits_while_its_upstream_is_removed_gets_none() -> None:
    # Its key may have been revoked, and nothing is left to say where the request should go.
    door = Door()
    up = Upstream("up", config.Upstream(base_url="http://up.example"), door.connect)
    waiting = asyncio.create_task(up.connect(fresh=False))
    await asyncio.sleep(0)
    up.leave()
    door.knocks[0].set_result(None)
    with pytest.raises(ProxyError) as caught:
        await waiting
    assert caught.value.code == "upstream_unreachable"
    [made] = door.made
    assert isinstance(made.transport, Transport)
    assert made.transport.aborted


async def test_and_one_who_waits_while_only_the_key_changes_gets_what_it_waited_for() -> None:
    door = Door()
    up, other = (
        Upstream(
            "up",
            config.Upstream.model_validate({"base_url": "http://up.example", "api_key": key}),
            door.connect,
        )
        for key in ("first", "second")
    )
    waiting = asyncio.create_task(up.connect(fresh=False))
    await asyncio.sleep(0)
    up.become(other)
    door.knocks[0].set_result(None)
    connection, pool = await waiting
    assert (connection, pool) == (door.made[0], up.pool)
    assert up.terms.credential() == (b"Authorization", b"Bearer second")
