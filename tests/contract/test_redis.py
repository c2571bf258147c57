"""What only Redis has to be asked: its keys and their ends, its scripts, its clock, its connections."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis as library

from proxy.store import LAPSE, Bucket, Slot
from proxy.store.guard import AT_ONCE, Guard
from proxy.store.redis import RedisCounters
from tests.contract import race
from tests.contract.conftest import Clock
from tests.real.processes import free_port
from tests.redis_server import RedisServer, redis_server

ROOT = Path(__file__).parents[2]
CERTS = ROOT / "tests/flow/certs"

REQUESTS = Bucket("web:requests:1m", 60, 1, 10)
TOKENS = Bucket("web:tokens:1m", 100_000, 100_000 / 60, 1_000)
SLOT = Slot("web", 5, "x")


@pytest.fixture
def database(redis: RedisServer) -> Iterator[library.Redis]:
    """The server as its operator sees it, empty."""
    with library.Redis(port=redis.port, decode_responses=True) as client:
        client.flushall()
        client.config_resetstat()
        yield client


@asynccontextmanager
async def closing(counters: RedisCounters) -> AsyncIterator[RedisCounters]:
    try:
        yield counters
    finally:
        await counters.close()


@pytest.fixture
async def counters(redis: RedisServer, database: library.Redis) -> AsyncIterator[RedisCounters]:
    async with closing(RedisCounters(redis.url)) as counters:
        yield counters


# Keys


async def test_every_key_ends_by_itself(counters: RedisCounters, database: library.Redis) -> None:
    await counters.acquire([REQUESTS, TOKENS], SLOT)
    await counters.acquire([], Slot("other", 5, "y"))
    await counters.settle([Bucket("web:requests:1m", 60, 1, -5)])
    await counters.settle([Bucket("new:requests:1m", 60, 1, -5)])
    await counters.renew([SLOT, Slot("lost", 5, "z")])
    left = {key: database.pttl(key) / 1_000 for key in database.scan_iter()}
    spare = 10  # see common.lua
    assert left == {
        "sluice:bucket:web:requests:1m": pytest.approx(15 + spare, abs=2),
        "sluice:bucket:web:tokens:1m": pytest.approx(0.6 + spare, abs=2),
        "sluice:bucket:new:requests:1m": pytest.approx(5 + spare, abs=2),
        "sluice:slot:web": pytest.approx(LAPSE, abs=2),
        "sluice:slot:other": pytest.approx(LAPSE, abs=2),
        "sluice:slot:lost": pytest.approx(LAPSE, abs=2),
    }


async def test_what_is_as_it_was_leaves_no_key(
    counters: RedisCounters, database: library.Redis
) -> None:
    await counters.acquire([REQUESTS, TOKENS], SLOT)
    await counters.settle([REQUESTS, TOKENS], SLOT)
    assert database.keys() == []


async def test_a_refusal_writes_nothing(counters: RedisCounters, database: library.Redis) -> None:
    await counters.acquire([Bucket("a", 60, 1, 61), REQUESTS], SLOT)
    await counters.acquire([REQUESTS], Slot("web", 0, "x"))
    assert database.keys() == []


async def test_keys_and_values_hold_what_the_caller_gave_and_no_more(
    counters: RedisCounters, database: library.Redis
) -> None:
    await counters.acquire([REQUESTS], SLOT)
    level, at = str(database.get("sluice:bucket:web:requests:1m")).split(" ")
    assert (float(level), float(at)) == (50, pytest.approx(time.time(), abs=60))
    assert database.zcard("sluice:slot:web") == 1
    assert database.zscore("sluice:slot:web", "x") == pytest.approx(float(at) + LAPSE)


# Scripts


async def test_each_call_is_one_round_trip(
    counters: RedisCounters, database: library.Redis
) -> None:
    await counters.acquire([REQUESTS, TOKENS], SLOT)
    await counters.settle([REQUESTS, TOKENS], SLOT)
    await counters.renew([SLOT])  # the scripts are known now, and a connection is there
    before = _commands(database)
    await counters.acquire([REQUESTS, TOKENS], SLOT)
    await counters.settle([REQUESTS, TOKENS], SLOT)
    await counters.renew([SLOT, Slot("other", 5, "y")])
    sent = {name: count - before.get(name, 0) for name, count in _commands(database).items()}
    assert sent.pop("evalsha") == 3
    assert sent.pop("info") == 1  # this test's own
    within_scripts = {"time", "get", "set", "del", "zcount", "zadd", "zrem", "pexpire"}
    assert {name for name, count in sent.items() if count} <= within_scripts | {"zremrangebyscore"}


def _commands(database: library.Redis) -> dict[str, int]:
    """How often each command has been called, by clients or in scripts."""
    return {
        name.removeprefix("cmdstat_"): each["calls"]
        for name, each in database.info("commandstats").items()
    }


async def test_scripts_that_redis_forgot_are_told_again(
    counters: RedisCounters, database: library.Redis
) -> None:
    for _ in range(2):
        assert (await counters.acquire([REQUESTS], SLOT)).admitted
        database.script_flush()
        await counters.renew([SLOT])
        database.script_flush()
        await counters.settle([REQUESTS], SLOT)
        database.script_flush()
    assert database.keys() == []


async def test_a_redis_that_forgot_everything_starts_anew(
    counters: RedisCounters, database: library.Redis
) -> None:
    await counters.acquire([Bucket("a", 10, 1, 10)], SLOT)
    database.flushall()
    assert (await counters.acquire([Bucket("a", 10, 1, 10)], Slot("web", 1, "y"))).admitted
    await counters.renew([SLOT])
    assert (await counters.acquire([], Slot("web", 2, "z"))).in_use == 2


# Time


async def test_time_is_that_of_redis(
    counters: RedisCounters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)  # this machine's clock is far off
    await counters.acquire([Bucket("a", 10, 1_000, 10)])
    await asyncio.sleep(0.02)
    assert (await counters.acquire([Bucket("a", 10, 1_000, 10)])).admitted


@pytest.fixture
async def clocked(
    redis: RedisServer, database: library.Redis, clock: Clock
) -> AsyncIterator[RedisCounters]:
    async with closing(RedisCounters(redis.url, clock)) as counters:
        yield counters


async def test_a_clock_set_back_refills_nothing_and_takes_nothing(
    clocked: RedisCounters, clock: Clock
) -> None:
    await clocked.acquire([Bucket("a", 10, 1, 7)])
    clock.now -= 1_000
    assert (await clocked.acquire([Bucket("a", 10, 1, 1)])).levels == (2,)
    clock.now += 1
    assert (await clocked.acquire([Bucket("a", 10, 1, 0)])).levels == (3,)


async def test_lapsed_leases_leave_with_the_next_that_is_taken(
    clocked: RedisCounters, database: library.Redis, clock: Clock
) -> None:
    await clocked.acquire([], Slot("a", 5, "x"))
    clock.now += LAPSE
    await clocked.acquire([], Slot("a", 5, "y"))
    assert database.zrange("sluice:slot:a", 0, -1) == ["y"]


# Connections


async def test_no_more_connections_than_a_few_however_many_ask(
    counters: RedisCounters, database: library.Redis
) -> None:
    guard = Guard(counters, None, 30, "a test's", pytest.fail)
    bucket = Bucket("a", 1_000, 1, 1)
    admissions = await asyncio.gather(*(guard.acquire([bucket]) for _ in range(500)))
    assert all(each.admitted for each in admissions)
    clients = [each for each in database.client_list() if each["cmd"] == "evalsha"]
    assert 1 < len(clients) <= AT_ONCE


async def test_nobody_reads_the_late_answer_to_a_call_that_was_given_up(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        async with closing(RedisCounters(server.url)) as counters:
            for turn in range(5):
                await counters.acquire([Bucket(f"{turn}", 10, 1, 1)])
                server.pause()
                for _ in range(3):
                    with pytest.raises(TimeoutError):
                        async with asyncio.timeout(0.05):
                            await counters.acquire([Bucket("late", 1_000, 1, 111)], SLOT)
                server.resume()
                asked = [counters.acquire([Bucket(f"{turn} {n}", 10, 1, n)]) for n in range(8)]
                levels = [each.levels for each in await asyncio.gather(*asked)]
                assert levels == [(10 - n,) for n in range(8)]


async def test_callers_who_are_cancelled_leave_the_others_their_answers(
    counters: RedisCounters,
) -> None:
    asked = [
        asyncio.create_task(counters.acquire([Bucket(f"{n}", 1_000, 1, n)])) for n in range(90)
    ]
    for turn, task in enumerate(asked[::3]):
        if turn % 8 == 0:
            await asyncio.sleep(0.001)
        task.cancel()
    done = await asyncio.gather(*asked, return_exceptions=True)
    answered = [(n, each) for n, each in enumerate(done) if not isinstance(each, BaseException)]
    assert len(answered) >= 60
    assert all(each.levels == (1_000 - n,) for n, each in answered)
    assert (await counters.acquire([REQUESTS])).admitted


async def test_two_processes_share_what_there_is(
    redis: RedisServer, database: library.Redis
) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-m", race.__name__, redis.url, "20"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        for _ in range(2)
    ]
    for racer in racers:
        assert racer.stdout and racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("\n")
        racer.stdin.flush()
    admitted = [[int(word) for word in racer.communicate()[0].split()] for racer in racers]
    assert [sum(each) for each in zip(*admitted, strict=True)] == [10, 25]
    assert [racer.returncode for racer in racers] == [0, 0]


# Addresses


# What a Redis shared with others has to allow.
RIGHTS = "~sluice:* +evalsha +script|load +time +get +set +del +pexpire +select"
RIGHTS += " +zadd +zcount +zrem +zremrangebyscore"


async def test_user_password_and_database_come_with_the_url(
    redis: RedisServer, database: library.Redis
) -> None:
    database.execute_command("ACL", "SETUSER", "tenant", "on", ">p@ss/word", *RIGHTS.split())
    await _admits(f"redis://tenant:p%40ss%2Fword@127.0.0.1:{redis.port}/3")
    with library.Redis(port=redis.port, db=3, decode_responses=True) as third:
        assert third.keys() == ["sluice:bucket:web:requests:1m"]
    assert database.keys() == []
    with pytest.raises(library.AuthenticationError):
        await _admits(f"redis://tenant:wrong@127.0.0.1:{redis.port}/3")


async def test_a_unix_socket(redis: RedisServer, database: library.Redis) -> None:
    await _admits(f"unix://{redis.socket}?db=4")
    with library.Redis(port=redis.port, db=4, decode_responses=True) as fourth:
        assert fourth.keys() == ["sluice:bucket:web:requests:1m"]


async def test_tls_with_a_certificate_that_is_looked_at(tmp_path: Path) -> None:
    port = free_port()
    server = f"--tls-port {port} --tls-auth-clients no --tls-cert-file {CERTS}/localhost.pem "
    server += f"--tls-key-file {CERTS}/localhost.pem --tls-ca-cert-file {CERTS}/ca.pem"
    with redis_server(tmp_path, *server.split()):
        await _admits(f"rediss://localhost:{port}?ssl_ca_certs={CERTS}/ca.pem")
        for untrusted in (f"localhost:{port}", f"127.0.0.1:{port}?ssl_ca_certs={CERTS}/ca.pem"):
            with pytest.raises(library.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
                await _admits(f"rediss://{untrusted}")


async def _admits(url: str) -> None:
    async with closing(RedisCounters(url)) as counters:
        assert (await counters.acquire([REQUESTS], SLOT)).admitted
        await counters.renew([SLOT])
        await counters.settle([], SLOT)
