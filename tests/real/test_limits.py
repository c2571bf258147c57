"""Clients and limits on real parts: proxy processes, a redis-server between them, official SDKs."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import openai
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from proxy.limits import RENEW_EVERY
from proxy.store import LAPSE
from tests import canaries
from tests.real.processes import (
    CLIENT_KEY,
    KEY,
    Process,
    Upstream,
    eventually,
    free_port,
    get,
    running,
    start_proxy,
)
from tests.redis_server import RedisServer, redis_server

Pair = tuple[Process, Process]


def client(name: str, *, models: tuple[str, ...] = ("*",), **limits: Any) -> dict[str, Any]:
    """A client for the config."""
    return {"name": name, "key": key_of(name), "models": [*models], "limits": limits}


def key_of(name: str) -> str:
    return f"{CLIENT_KEY}-{name}"


def ask(text: str, **more: Any) -> dict[str, Any]:
    question = {"role": "user", "content": text}
    return {"model": "gpt-4o", "messages": [question], "max_tokens": 40, **more}


SHORT = ask("a short answer")
LONG = ask("a long answer", stream=True)  # from aimock, for a minute
RESERVED = 4 + 40  # tokens, for either: a quarter of the prompt's characters, and max_tokens


def counted(process: Process, name: str, **labels: str) -> float:
    """The sum of a metric over all children that have these labels."""
    families = text_string_to_metric_families(get(process.url + "/metrics"))
    samples = (sample for family in families for sample in family.samples)
    return sum(
        each.value
        for each in samples
        if each.name == name and labels.items() <= each.labels.items()
    )


@contextmanager
def start_pair(folder: Path, upstream: Upstream, **settings: Any) -> Iterator[Pair]:
    """Two processes with one config; a test may kill the second."""
    port, log = free_port(), folder / "second" / "proxy.log"
    log.parent.mkdir()
    argv: list[str | Path] = [sys.executable, "-m", "proxy", "--port", str(port)]
    argv += ["--config", folder / "config.yaml"]
    with (
        start_proxy(folder, upstream, **settings) as first,
        running(argv, f"http://127.0.0.1:{port}", "/livez", log) as second,
    ):
        yield first, second


@dataclass(frozen=True, slots=True)
class Told:
    """What a request came to, after so many seconds."""

    took: float
    status: int
    code: str | None
    retry_after: str | None


@dataclass(frozen=True, slots=True)
class Crowd:
    """Many clients. What they have begun ends with the block of `gathered`, if not before."""

    session: aiohttp.ClientSession
    begun: AsyncExitStack

    def post(
        self, process: Process, name: str, question: dict[str, Any]
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return self.session.post(
            f"{process.url}/v1/chat/completions",
            json=question,
            headers={"Authorization": f"Bearer {key_of(name)}"},
        )

    async def begin(self, process: Process, name: str) -> aiohttp.ClientResponse:
        """The head of an answer that goes on for a minute."""
        return await self.begun.enter_async_context(self.post(process, name, LONG))

    async def is_admitted(self, process: Process, name: str) -> bool:
        async with self.post(process, name, LONG) as answer:
            return answer.status == 200

    async def ask(self, process: Process, name: str) -> Told:
        began = time.monotonic()
        async with self.post(process, name, SHORT) as answer:
            code = (await answer.json()).get("error", {}).get("code")
        took = time.monotonic() - began
        return Told(took, answer.status, code, answer.headers.get("Retry-After"))

    async def rush(self, pair: Pair, name: str) -> Counter[int]:
        """The statuses of 40 requests at once, half of them to each process."""
        asked = (self.ask(process, name) for process in pair * 20)
        return Counter(told.status for told in await asyncio.gather(*asked))


@asynccontextmanager
async def gathered() -> AsyncIterator[Crowd]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session, AsyncExitStack() as begun:
        yield Crowd(session, begun)


async def until(holds: Callable[[], bool]) -> None:
    """Waits for what other processes do on their own; this one goes on meanwhile."""
    assert await asyncio.to_thread(eventually, holds)


# Two processes over one Redis


async def test_a_race_over_two_processes(aimock: Upstream, tmp_path: Path) -> None:
    """Nothing is given back before the race is over: what gets in stays in."""
    tokens = f"{10 * RESERVED}/hour"
    clients = [client("requests", requests="10/hour"), client("tokens", tokens=tokens)]
    with (
        redis_server(tmp_path) as redis,
        start_pair(tmp_path, aimock, store=redis.url, clients=clients) as pair,
    ):
        async with gathered() as crowd:
            asked = [(process, each["name"]) for each in clients for process in pair * 20]
            answers = await asyncio.gather(*(crowd.begin(*each) for each in asked))
            for name in ("requests", "tokens"):
                statuses = [
                    answer.status
                    for answer, each in zip(answers, asked, strict=True)
                    if each[1] == name
                ]
                assert Counter(statuses) == {200: 10, 429: 30}


async def test_leases_of_a_killed_process_lapse_and_others_are_renewed(
    aimock: Upstream, tmp_path: Path
) -> None:
    clients = [client("killed", streams=2), client("alive", streams=2)]
    with (
        redis_server(tmp_path) as redis,
        start_pair(tmp_path, aimock, store=redis.url, clients=clients) as (first, second),
    ):
        async with gathered() as crowd:
            began = time.monotonic()
            alive = [await crowd.begin(first, "alive") for _ in range(2)]
            killed = [await crowd.begin(second, "killed") for _ in range(2)]
            assert {each.status for each in alive + killed} == {200}
            await asyncio.sleep(RENEW_EVERY + 1)
            second.kill()
            killed_at = time.monotonic()
            while not await crowd.is_admitted(first, "killed"):
                assert time.monotonic() - killed_at < 13
                await asyncio.sleep(0.1)
            # The last renewal was at most RENEW_EVERY before; a second is for a busy machine.
            assert time.monotonic() - killed_at > LAPSE - RENEW_EVERY - 1
            await asyncio.sleep(max(0, began + 13.5 - time.monotonic()))
            assert not await crowd.is_admitted(first, "alive")
            alive[0].close()
            async with asyncio.timeout(5):
                while not await crowd.is_admitted(first, "alive"):
                    await asyncio.sleep(0.1)


# A Redis that leaves and returns


TIMEOUT = 0.5  # seconds: store_timeout
ASKERS = 4  # for each process
PASSWORD = f"{CLIENT_KEY}-of-the-store"  # a canary: whoever writes it is found out at the end


def stop(redis: RedisServer) -> None:
    redis.command("SHUTDOWN")  # as SIGTERM does
    redis.kill()


@dataclass(frozen=True, slots=True)
class Trouble:
    begin: Callable[[RedisServer], None]
    end: Callable[[RedisServer], None]


TROUBLES = {
    "stopped": Trouble(stop, RedisServer.start),
    "paused": Trouble(RedisServer.pause, RedisServer.resume),
}


def reports_the_store(process: Process) -> bool:
    """Whether /readyz says that the store is away, with status 200."""
    answer = get(process.url + "/readyz")
    assert canaries.seen_in(answer) == []
    reasons: list[str] = json.loads(answer)["reasons"]
    return any(reason.startswith("store: ") for reason in reasons)


def store_events(process: Process) -> list[str]:
    events = [json.loads(line)["event"] for line in process.log.read_text().splitlines()]
    return [event for event in events if event.startswith("store_")]


@asynccontextmanager
async def asking(crowd: Crowd, pair: Pair) -> AsyncIterator[list[Told]]:
    """Several clients of each process that ask all the time; what they are told."""
    told: list[Told] = []

    async def ask_on(process: Process) -> None:
        while True:
            told.append(await crowd.ask(process, "busy"))

    async with asyncio.TaskGroup() as askers:
        tasks = [askers.create_task(ask_on(process)) for process in pair * ASKERS]
        yield told
        for task in tasks:
            task.cancel()


@pytest.mark.parametrize(
    ("failure", "meanwhile"), [("allow", {200: 20, 429: 20}), ("deny", {503: 40})]
)
async def test_a_store_that_leaves_and_returns_under_load(
    aimock: Upstream, tmp_path: Path, failure: str, meanwhile: dict[int, int]
) -> None:
    clients = [client("busy", requests="1000000/hour", tokens="1000000/second", streams=99)]
    for name in TROUBLES:
        clients += [client(f"{when}-{name}", requests="10/hour") for when in ("while", "after")]
    with redis_server(tmp_path, *f"--user sluice on ~* +@all >{PASSWORD}".split()) as redis:
        settings = {
            "clients": clients,
            "store": f"redis://sluice:{PASSWORD}@127.0.0.1:{redis.port}",
            "store_failure": failure,
            "store_timeout": TIMEOUT,
        }
        with start_pair(tmp_path, aimock, **settings) as pair:
            async with gathered() as crowd, asking(crowd, pair) as told:
                for name, trouble in TROUBLES.items():
                    await until(lambda: len(told) > 100)
                    assert not any(map(reports_the_store, pair))
                    errors = [counted(each, "sluice_store_errors_total") for each in pair]
                    told.clear()
                    await asyncio.to_thread(trouble.begin, redis)
                    await until(lambda: all(map(reports_the_store, pair)))
                    assert await crowd.rush(pair, f"while-{name}") == meanwhile
                    await until(lambda: len(told) > 200)
                    judge(told, failure)
                    for process, before in zip(pair, errors, strict=True):
                        assert counted(process, "sluice_store_errors_total") > before
                    await asyncio.to_thread(trouble.end, redis)
                    await until(lambda: not any(map(reports_the_store, pair)))
                    assert await crowd.rush(pair, f"after-{name}") == {200: 10, 429: 30}
                    judge(told, failure)
                    told.clear()
            for process in pair:
                assert store_events(process) == ["store_unavailable", "store_recovered"] * 2
                written = process.log.read_text() + get(process.url + "/metrics")
                assert canaries.seen_in(written) == []


def judge(told: list[Told], failure: str) -> None:
    """Nobody has waited long, and few at all: those who asked before it was known."""
    assert max(each.took for each in told) < TIMEOUT + 1
    assert sum(each.took > TIMEOUT for each in told) < len(told) / 10
    refused = [each for each in told if each.status != 200]
    if failure == "allow":
        assert refused == []
    for each in refused:
        assert (each.status, each.code) == (503, "store_unavailable")
        assert int(each.retry_after or 0) >= 1


# Official SDKs


@pytest.fixture(scope="module")
def limited(aimock: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    clients = [
        client("patient", requests="1/2s"),
        client("hourly", requests="1/hour"),
        client("hourly-too", requests="1/hour"),
        client("thrifty", tokens=f"{RESERVED}/hour"),
        client("single", streams=1),
        client("picky", models=("gpt-4o-*",)),
    ]
    with start_proxy(tmp_path_factory.mktemp("limited"), aimock, clients=clients) as proxy:
        yield proxy


def openai_sdk(process: Process, name: str, retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{process.url}/v1", api_key=key_of(name), max_retries=retries, timeout=60
    )


def anthropic_sdk(process: Process, name: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=process.url, api_key=key_of(name), max_retries=0)


@pytest.mark.parametrize(
    ("name", "type", "code", "headers"),
    [
        (
            "hourly",
            "requests",
            "rate_limit_exceeded",
            {
                "x-should-retry": "false",
                "x-ratelimit-limit-requests": "1",
                "x-ratelimit-remaining-requests": "0",
            },
        ),
        (
            "thrifty",
            "tokens",
            "rate_limit_exceeded",
            {"x-should-retry": "false", "x-ratelimit-limit-tokens": f"{RESERVED}"},
        ),
        ("single", "requests", "concurrency_limit_exceeded", {"retry-after": "1"}),
    ],
)
def test_openai_is_told_which_limit(
    limited: Process, name: str, type: str, code: str, headers: dict[str, str]
) -> None:
    """And, where it would have to wait for too long, that it need not try again."""
    retries = 2 if "x-should-retry" in headers else 0
    with (
        openai_sdk(limited, name, retries) as sdk,
        sdk.chat.completions.create(**LONG),
        pytest.raises(openai.RateLimitError) as raised,
    ):
        sdk.chat.completions.create(**SHORT)
    assert (raised.value.type, raised.value.code) == (type, code)
    assert headers.items() <= raised.value.response.headers.items()
    assert 1 <= int(raised.value.response.headers["retry-after"]) <= 3600
    assert counted(limited, "sluice_limit_rejections_total", client=name) == 1


def test_openai_waits_as_told_and_succeeds(limited: Process) -> None:
    """One retry is enough: without Retry-After the SDK would come back after half a second."""
    with openai_sdk(limited, "patient", retries=5) as sdk:
        answers = [sdk.chat.completions.with_raw_response.create(**SHORT) for _ in range(2)]
    assert [answer.retries_taken for answer in answers] == [0, 1]
    assert counted(limited, "sluice_limit_rejections_total", client="patient") == 1


def test_anthropic_is_told_too(limited: Process) -> None:
    with anthropic_sdk(limited, "hourly-too") as sdk:
        sdk.messages.create(**SHORT)
        with pytest.raises(anthropic.RateLimitError) as raised:
            sdk.messages.create(**SHORT)
    body: Any = raised.value.body
    assert (body["type"], body["error"]["code"]) == ("error", "rate_limit_exceeded")


def test_who_may_not_is_told_so(limited: Process) -> None:
    with openai_sdk(limited, "nobody") as sdk, pytest.raises(openai.AuthenticationError) as who:
        sdk.chat.completions.create(**SHORT)
    assert (who.value.code, who.value.response.headers["www-authenticate"]) == (
        "invalid_api_key",
        "Bearer",
    )
    with openai_sdk(limited, "picky") as sdk:
        with pytest.raises(openai.PermissionDeniedError) as what:
            sdk.chat.completions.create(**SHORT)
        assert (what.value.type, what.value.code) == ("permission_error", "model_not_allowed")
        sdk.chat.completions.create(**{**SHORT, "model": "gpt-4o-mini"})
    with anthropic_sdk(limited, "nobody") as asdk, pytest.raises(anthropic.AuthenticationError):
        asdk.messages.create(**SHORT)
    with anthropic_sdk(limited, "picky") as asdk, pytest.raises(anthropic.PermissionDeniedError):
        asdk.messages.create(**SHORT)


def test_tokens_are_charged_as_the_upstream_counts_them(upstream: Upstream, tmp_path: Path) -> None:
    clients = [client("saver", tokens="100000/9999h")]  # so slow that none comes back meanwhile
    same: Any = {**SHORT, "temperature": 0, "seed": 1}  # in the same words each time
    with (
        start_proxy(tmp_path, upstream, clients=clients) as proxy,
        openai_sdk(proxy, "saver") as sdk,
        openai.OpenAI(base_url=upstream.base_url, api_key=KEY) as direct,
    ):
        spent = 0

        def spends(usage: openai.types.CompletionUsage | None) -> None:
            nonlocal spent
            assert usage is not None
            assert usage.prompt_tokens and usage.completion_tokens
            spent += usage.total_tokens
            # Written when all is settled.
            assert eventually(
                lambda: counted(proxy, "sluice_tokens_total", source="upstream") == spent
            )

        whole = sdk.chat.completions.with_raw_response.create(**same)
        assert int(whole.headers["x-ratelimit-remaining-tokens"]) == 100_000 - RESERVED
        spends(whole.parse().usage)

        options: Any = {"include_usage": True}
        chunks = [*sdk.chat.completions.create(**same, stream=True, stream_options=options)]
        assert chunks[-1].choices == []
        spends(chunks[-1].usage)

        unasked = [*sdk.chat.completions.create(**same, stream=True)]
        assert all(chunk.choices and chunk.usage is None for chunk in unasked)
        assert len(unasked) == len([*direct.chat.completions.create(**same, stream=True)])
        spends(chunks[-1].usage)

        last = sdk.chat.completions.with_raw_response.create(**same)
        left = int(last.headers["x-ratelimit-remaining-tokens"])
        assert left == 100_000 - spent - RESERVED
        assert counted(proxy, "sluice_tokens_total", source="estimated") == 0


# sluice key


def test_a_made_key_works_as_printed(aimock: Upstream, tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "proxy", "key", "web"], check=True, capture_output=True, text=True
    ).stdout
    key, _, pasted = made.partition("\n")
    with start_proxy(tmp_path, aimock, **yaml.safe_load(pasted)) as proxy:
        url = f"{proxy.url}/v1"
        with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as sdk:
            assert sdk.chat.completions.create(**SHORT).choices
        with (
            openai.OpenAI(base_url=url, api_key=key[:-1], max_retries=0) as sdk,
            pytest.raises(openai.AuthenticationError),
        ):
            sdk.chat.completions.create(**SHORT)
        assert counted(proxy, "sluice_requests_total", client="web", code="200") == 1
