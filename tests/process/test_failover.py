"""Upstreams that die, hang and come back, as real processes: every prompt is answered, once.

The upstreams keep journals (`tests.process.mortal`), the clients keep what they saw, the proxy
counts: at the end the three must agree.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from pathlib import Path
from random import Random
from typing import Any

import pytest
import uvloop
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.flow.wire import PATIENCE, Client, Reply, get, post
from tests.process.mortal import Ask, Script
from tests.real.processes import Process, free_port, running

ROOT = Path(__file__).parents[2]


# ---------------------------------------------------------------- the parties


class Upstream:
    """The lives of a `tests.process.mortal`.

    Its port stays reserved while it is dead: or the kernel might give that port to a connection of
    somebody else, and the next life could not listen.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self._journal = folder / name
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self.port: int = self._reserved.getsockname()[1]
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Until it listens."""
        argv = [sys.executable, "-m", "tests.process.mortal", str(self.port), str(self._journal)]
        self._child = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=ROOT)
        assert self._child.stdout is not None
        assert self._child.stdout.readline() == b"listening\n"

    def tell(self, number: signal.Signals) -> None:
        assert self._child is not None
        self._child.send_signal(number)

    def kill(self) -> None:
        """In the middle of whatever it does."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def close(self) -> None:
        self.kill()
        self._reserved.close()

    def noted(self, word: str) -> list[str]:
        """The prompts behind that word in its journal, in order."""
        lines = [line.split() for line in self._journal.read_text().splitlines()]
        return [prompt for noted, prompt in lines if noted == word]


class Metrics:
    """One scrape."""

    def __init__(self, text: str) -> None:
        families = text_string_to_metric_families(text)
        self._samples = [sample for family in families for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """The sum over all samples of that name with these labels."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def up(self, upstream: Upstream) -> bool:
        return self.total("sluice_upstream_up", upstream=upstream.name) == 1


@dataclass(frozen=True, slots=True)
class Proxy:
    """`python -m proxy`, as its clients see it."""

    port: int

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Client]:
        client = await Client.connect(self.port)
        try:
            yield client
        finally:
            client.close()

    async def answer(self, ask: Ask) -> Reply:
        async with self.connection() as client:
            await client.send(post(ask.body()))
            return await client.reply()

    async def metrics(self) -> Metrics:
        async with self.connection() as client:
            await client.send(get("/metrics"))
            return Metrics((await client.reply("GET")).body.decode())

    async def shows(self, holds: Callable[[Metrics], bool]) -> Metrics:
        """Its metrics, as soon as that holds for them."""
        async with asyncio.timeout(PATIENCE):
            while not holds(metrics := await self.metrics()):
                await asyncio.sleep(0.02)
        return metrics


Start = Callable[..., Proxy]


@pytest.fixture
def upstreams(tmp_path: Path) -> Iterator[tuple[Upstream, Upstream]]:
    with ExitStack() as owned:
        pair = Upstream("a", tmp_path), Upstream("b", tmp_path)
        for each in pair:
            owned.callback(each.close)
            each.start()
        yield pair


@pytest.fixture
def start(tmp_path: Path, upstreams: tuple[Upstream, Upstream]) -> Iterator[Start]:
    """Starts the proxy in front of both, with the same settings for each; without `routes`, all
    requests go to `a` first. Whatever a test did, it stops with exit code 0."""
    started: list[Process] = []
    with ExitStack() as owned:

        def start(routes: list[dict[str, Any]] | None = None, **settings: Any) -> Proxy:
            port = free_port()
            config = {
                "listen": {"port": port},
                "drain_timeout": "1s",
                "upstreams": {
                    each.name: {"base_url": f"http://127.0.0.1:{each.port}/v1", **settings}
                    for each in upstreams
                },
                "routes": routes or [{"models": ["*"], "upstreams": ["a", "b"]}],
            }
            file = tmp_path / "config.yaml"
            file.write_text(yaml.safe_dump(config))
            argv: list[str | Path] = [sys.executable, "-m", "proxy", "--config", file]
            url, log = f"http://127.0.0.1:{port}", tmp_path / "proxy.log"
            started.append(owned.enter_context(running(argv, url, "/livez", log)))
            return Proxy(port)

        yield start
    for process in started:
        assert process.child.returncode == 0, process.log.read_text()[-2000:]


def giver(reply: Reply) -> tuple[str, int]:
    """Whose answer it is, and how many upstreams were asked for it."""
    assert reply.status == 200, reply
    [name], [attempts] = reply.values("Sluice-Upstream"), reply.values("Sluice-Attempts")
    return name.decode(), int(attempts)


# ---------------------------------------------------------------- one after another


async def test_a_dead_one_is_left_out_until_a_probe_brings_it_back(
    upstreams: tuple[Upstream, Upstream], start: Start
) -> None:
    rest = 1.0
    proxy = start(circuit={"failures": 3, "rest": rest})
    a, b = upstreams
    ids = map(str, count())

    async def ask() -> tuple[str, int]:
        return giver(await proxy.answer(Ask("m", Script(next(ids)))))

    a.kill()
    assert [await ask() for _ in range(3)] == [("b", 2)] * 3
    assert not (await proxy.metrics()).up(a)
    assert await ask() == ("b", 1)
    await asyncio.sleep(rest)
    assert [await ask(), await ask()] == [("b", 2), ("b", 1)]  # a probe failed, out it stays

    a.start()
    await asyncio.sleep(rest)
    async with proxy.connection() as probe:
        await probe.send(post(Ask("m", Script("probe", pieces=50, between=0.01)).body()))
        await probe.until(b'"upstream":"a"')
        a.tell(signal.SIGSTOP)  # the probe takes its time
        assert [await ask() for _ in range(5)] == [("b", 1)] * 5
        assert not (await proxy.metrics()).up(a)
        a.tell(signal.SIGCONT)
        assert (await probe.reply()).whole
    await proxy.shows(lambda metrics: metrics.up(a))
    assert a.noted("received") == ["probe"]
    assert await ask() == ("a", 1)
    assert len(b.noted("answered")) == 3 + 1 + 2 + 5


async def test_one_that_hangs_is_left_out_but_what_it_was_asked_is_not_asked_again(
    upstreams: tuple[Upstream, Upstream], start: Start
) -> None:
    proxy = start(timeouts={"first_byte": "300ms"}, circuit={"failures": 2, "rest": "1s"})
    a, b = upstreams
    a.tell(signal.SIGSTOP)  # the kernel still accepts for it
    for prompt in "hung-1", "hung-2":
        reply = await proxy.answer(Ask("m", Script(prompt)))
        error = json.loads(reply.body)["error"]
        assert (reply.status, error["code"]) == (504, "upstream_timeout")
        assert "first_byte" in error["message"]
    assert not (await proxy.metrics()).up(a)
    assert giver(await proxy.answer(Ask("m", Script("next")))) == ("b", 1)
    assert b.noted("received") == ["next"]

    a.tell(signal.SIGCONT)
    async with asyncio.timeout(PATIENCE):
        while giver(await proxy.answer(Ask("m", Script("later")))) != ("a", 1):
            await asyncio.sleep(0.05)
    metrics = await proxy.shows(lambda metrics: metrics.up(a))
    assert metrics.total("sluice_outcomes_total", outcome="first_byte_timeout") == 2


async def test_one_that_hangs_in_the_middle_of_an_answer_is_left_out(
    upstreams: tuple[Upstream, Upstream], start: Start
) -> None:
    proxy = start(timeouts={"idle": "300ms"}, circuit={"failures": 1, "rest": "1h"})
    a, b = upstreams
    async with proxy.connection() as client:
        await client.send(post(Ask("m", Script("hung", pieces=1000, between=0.01)).body()))
        await client.until(b'"n":1,')
        a.tell(signal.SIGSTOP)
        reply = await client.reply()
    told = reply.body.rpartition(b"data: ")[2]
    assert (reply.whole, giver(reply)) == (False, ("a", 1))
    assert (b'"upstream_timeout"' in told, b"idle" in told) == (True, True)
    metrics = await proxy.shows(lambda metrics: not metrics.up(a))
    assert metrics.total("sluice_outcomes_total", outcome="idle_timeout") == 1
    assert giver(await proxy.answer(Ask("m", Script("next")))) == ("b", 1)
    assert b.noted("received") == ["next"]


async def test_the_last_one_is_asked_however_often_it_failed(
    upstreams: tuple[Upstream, Upstream], start: Start
) -> None:
    proxy = start(circuit={"failures": 1, "rest": "1h"})
    a, b = upstreams
    a.kill()
    b.kill()
    for prompt in "1", "2", "3":
        reply = await proxy.answer(Ask("m", Script(prompt)))
        assert (reply.status, b'"upstream_unreachable"' in reply.body) == (502, True)
    metrics = await proxy.metrics()
    assert metrics.total("sluice_upstream_attempts_total", upstream="a") == 1
    assert metrics.total("sluice_upstream_attempts_total", upstream="b") == 3
    b.start()
    assert giver(await proxy.answer(Ask("m", Script("4")))) == ("b", 1)


async def test_the_last_one_stays_though_another_was_probed_in_vain(
    upstreams: tuple[Upstream, Upstream], start: Start
) -> None:
    rest = 1.0
    proxy = start(circuit={"failures": 1, "rest": rest})
    a, b = upstreams
    a.kill()
    assert giver(await proxy.answer(Ask("m", Script("1")))) == ("b", 2)
    await asyncio.sleep(rest / 2)
    b.kill()
    assert (await proxy.answer(Ask("m", Script("2")))).status == 502
    b.start()
    await asyncio.sleep(rest / 2)  # now `a` may be probed, and `b` not yet
    for prompt in "3", "4":
        assert giver(await proxy.answer(Ask("m", Script(prompt))))[0] == "b"


# ---------------------------------------------------------------- under load

CLIENTS = 40
DURATION = 8.0  # seconds
ROUTES = [
    {"models": ["a-first"], "upstreams": ["a", "b"]},
    {"models": ["b-first"], "upstreams": ["b", "a"]},
    # Its head goes out before there is an answer: an upstream may still be left for the other.
    {"models": ["early"], "upstreams": ["a", "b"], "commit_after": "15ms", "heartbeat": "5ms"},
]
HEARTBEATS = re.compile(rb"(?:\A|(?<=\n\n))(?::\n)+")


@dataclass(frozen=True, slots=True)
class Seen:
    """A prompt's answer as its client saw it: an upstream's, whole, or begun and visibly cut."""

    ask: Ask
    reply: Reply

    @property
    def prompt(self) -> str:
        return self.ask.script.prompt

    @property
    def giver(self) -> str:
        """Whose answer it is; the head of an early one tells who was being asked then."""
        named = re.search(rb'"upstream":"(.)"', self.reply.body)
        return named[1].decode() if named and self.ask.model == "early" else giver(self.reply)[0]

    def check(self) -> None:
        body, error, _ = HEARTBEATS.sub(b"", self.reply.body).partition(b'data: {"error"')
        answer = b"".join(self.ask.answer(self.giver))
        if self.reply.whole:
            assert (body, error) == (answer, b""), self
            return
        assert answer.startswith(body) and body != answer, self
        if self.ask.stream:  # what is none has begun with its head, and can't say more
            assert body, self  # or the other upstream would have been asked
            told = b'"code":"upstream_aborted"' in self.reply.body
            assert told == body.endswith(b"\n\n"), self


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(1, 11) if metafunc.config.getoption("--slow") else [1])


def test_one_of_two_dies_every_second(
    seed: int, upstreams: tuple[Upstream, Upstream], start: Start
) -> None:
    """Whatever a client sees fail had begun; and no prompt is answered twice."""
    # As many streams as can be: a place that is never given back would be missed at last.
    proxy = start(ROUTES, max_streams=CLIENTS + 10, circuit={"failures": 3, "rest": "100ms"})
    # Not on pytest's loop: in debug mode it could not keep so many clients busy.
    answers, metrics = uvloop.run(_chaos(proxy, upstreams, Random(seed)))

    for seen in answers:
        seen.check()
    for upstream in upstreams:
        _compare_with_journal(upstream, answers, metrics)
    total = len(answers)
    whole = sum(seen.reply.whole for seen in answers)
    outcomes = partial(metrics.total, "sluice_outcomes_total")
    assert outcomes(outcome="completed") == whole
    assert outcomes(outcome="upstream_truncated") == total - whole
    assert outcomes() == total
    requests = partial(metrics.total, "sluice_requests_total")
    assert requests() == requests(code="200") == total
    heartbeats = sum(seen.reply.body.split(b"\n").count(bytearray(b":")) for seen in answers)
    assert metrics.total("sluice_heartbeats_total") == heartbeats
    asked_both = set.intersection(*(set(each.noted("received")) for each in upstreams))
    print(f"{total} prompts: {whole} whole, {total - whole} cut; {len(asked_both)} asked twice")
    assert min(whole, total - whole, len(asked_both), heartbeats) > 0  # or nothing was tried


def _compare_with_journal(upstream: Upstream, answers: list[Seen], metrics: Metrics) -> None:
    received, first, answered = map(upstream.noted, ("received", "first", "answered"))
    given = {seen.prompt: seen.reply.whole for seen in answers if seen.giver == upstream.name}
    whole = {prompt for prompt in given if given[prompt]}
    # Whoever has begun an answer is its giver: nobody has begun another, before it or after.
    assert len(first) == len(set(first))
    assert set(first) <= given.keys() <= set(received)
    # A note may be missing, if death came between the deed and its note.
    assert set(answered) <= whole <= set(first)
    attempts = partial(metrics.total, "sluice_upstream_attempts_total", upstream=upstream.name)
    assert attempts(result="answer") == len(given)
    assert attempts() >= len(received)  # it was dead for the rest of them


async def _chaos(
    proxy: Proxy, upstreams: tuple[Upstream, Upstream], random: Random
) -> tuple[list[Seen], Metrics]:
    """What the clients saw, and what the proxy counted."""
    asks = _asks(Random(random.random()))
    asking: set[Ask] = set()
    answers: list[Seen] = []
    over = asyncio.Event()

    async def go_on_asking() -> None:
        while not over.is_set():
            ask = next(asks)
            asking.add(ask)
            answers.append(Seen(ask, await proxy.answer(ask)))
            asking.remove(ask)

    async with asyncio.TaskGroup() as clients:
        for _ in range(CLIENTS):
            clients.create_task(go_on_asking())
        end = time.monotonic() + DURATION
        for victim in cycle(upstreams):
            if (begun := time.monotonic()) > end:
                break
            await asyncio.sleep(random.uniform(0, 0.1))
            victim.kill()
            await asyncio.sleep(random.uniform(0.05, 0.2))
            await asyncio.to_thread(victim.start)
            await proxy.shows(lambda metrics: all(map(metrics.up, upstreams)))
            # Whoever found it dead has its answer before the other one dies: nobody loses both.
            left = set(asking)
            while left & asking:
                await asyncio.sleep(0.01)
            await asyncio.sleep(begun + 1 - time.monotonic())
        over.set()
    return answers, await proxy.shows(
        lambda metrics: not metrics.total("sluice_requests_in_flight")
    )


def _asks(random: Random) -> Iterator[Ask]:
    for n in count():
        script = Script(
            prompt=f"{n}",
            pieces=random.randint(20, 60),
            before_head=random.uniform(0, 0.08),
            before_first=random.uniform(0, 0.06),
            between=random.uniform(0.0002, 0.002),
        )
        model = random.choice(["a-first", "b-first", "early"])
        yield Ask(model, script, stream=random.random() < 0.8)
