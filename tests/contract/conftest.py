"""Fixtures: the stores that have to agree, under a clock that a test moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass

import pytest
import uvloop

from proxy.store import Counters
from proxy.store.guard import Guard
from proxy.store.memory import MemoryCounters
from proxy.store.redis import RedisCounters
from tests.redis_server import RedisServer, redis_server


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


@dataclass(slots=True)
class Clock:
    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server that stays sound; a test may add keys and wipe them."""
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def clock() -> Clock:
    return Clock()


def _memory(request: pytest.FixtureRequest, clock: Clock) -> Counters:
    return MemoryCounters(clock)


def _redis(request: pytest.FixtureRequest, clock: Clock) -> Counters:
    server: RedisServer = request.getfixturevalue("redis")
    server.command("FLUSHALL")
    return RedisCounters(server.url, clock)


def _guarded(request: pytest.FixtureRequest, clock: Clock) -> Counters:
    return Guard(_redis(request, clock), None, 30, "a test's", pytest.fail)


@pytest.fixture(params=[_memory, _redis, _guarded], ids=["memory", "redis", "guarded"])
async def counters(request: pytest.FixtureRequest, clock: Clock) -> AsyncIterator[Counters]:
    store: Counters = request.param(request, clock)
    yield store
    await store.close()
