"""Redis in every kind of trouble: requests go on, nobody hangs, its return is seen by itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import redis as library

from proxy.store import Bucket, Counters, Slot, Unavailable, build, guard
from tests.contract.conftest import Clock
from tests.real.processes import free_port
from tests.redis_server import RedisServer, redis_server

BUCKET = Bucket("a", 1_000, 1, 1)
TIMEOUT = 1.0
PATIENCE = 5.0  # seconds within which what does not hang is done, however busy the machine


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "PROBE_EVERY", 0.05)


@dataclass(slots=True)
class Patient:
    """A server, the operator's connection to it, and a store in front of it."""

    server: RedisServer
    operator: library.Redis
    store: Counters
    errors: list[None]

    async def ask(self, slot: Slot | None = None) -> bool:
        """Whether it is Redis that counted."""
        async with asyncio.timeout(PATIENCE):
            admission = await self.store.acquire([BUCKET], slot)
        assert admission.admitted
        return admission.by is self.store

    async def errs(self, times: int) -> None:
        async with asyncio.timeout(10):
            while len(self.errors) < times:
                await asyncio.sleep(0.01)

    async def recovers(self) -> None:
        async with asyncio.timeout(10):
            while self.store.last_error:
                await asyncio.sleep(0.01)

    def kick(self) -> None:
        """Ends all connections but the operator's."""
        self.operator.client_kill_filter(_type="normal", skipme=True)

    async def restarts(self, *options: str, loading: bool = False) -> None:
        """Ends and comes back; the loop sees the ends of its connections."""
        self.server.kill()
        self.server.start(*options, loading=loading)
        await asyncio.sleep(0.1)


@asynccontextmanager
async def watched(
    url: str, errors: list[None], failure: Literal["allow", "deny"] = "allow"
) -> AsyncIterator[Counters]:
    store = build(
        url,
        failure=failure,
        timeout=TIMEOUT,
        clock=Clock(),
        on_error=lambda: errors.append(None),
    )
    try:
        yield store
    finally:
        async with asyncio.timeout(PATIENCE):
            await store.close()


@asynccontextmanager
async def in_care(folder: Path, failure: Literal["allow", "deny"]) -> AsyncIterator[Patient]:
    errors: list[None] = []
    with redis_server(folder) as server, library.Redis(port=server.port) as operator:
        async with watched(server.url, errors, failure) as store:
            yield Patient(server, operator, store, errors)


@pytest.fixture
async def patient(tmp_path: Path) -> AsyncIterator[Patient]:
    async with in_care(tmp_path, "allow") as patient:
        yield patient


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Sees to it, at the end, that the store logged each change of its state, and no more."""
    caplog.set_level(logging.INFO, logger="sluice.store")
    yield
    records = caplog.get_records("call")
    events = [each.message for each in records if each.name == "sluice.store"]
    assert events and events == ["store_unavailable", "store_recovered"] * (len(events) // 2)


# Troubles that come and go


@dataclass(frozen=True, slots=True)
class Trouble:
    begin: Callable[[Patient], object]
    end: Callable[[Patient], object]
    reason: str


def lock(patient: Patient) -> None:
    patient.operator.config_set("requirepass", "a new one")
    patient.kick()


def crowd(patient: Patient) -> None:
    patient.operator.config_set("maxclients", 1)
    patient.kick()


TROUBLES = {
    "gone": Trouble(lambda p: p.server.kill(), lambda p: p.server.start(), "ConnectionError"),
    "hung": Trouble(lambda p: p.server.pause(), lambda p: p.server.resume(), "TimeoutError"),
    "read-only": Trouble(
        lambda p: p.operator.replicaof("127.0.0.1", free_port()),
        lambda p: p.operator.replicaof("NO", "ONE"),
        "ReadOnlyError",
    ),
    "full": Trouble(
        lambda p: p.operator.config_set("maxmemory", "1mb"),
        lambda p: p.operator.config_set("maxmemory", 0),
        "OutOfMemoryError",
    ),
    "locked": Trouble(
        lock, lambda p: p.operator.config_set("requirepass", ""), "AuthenticationError"
    ),
    "crowded": Trouble(crowd, lambda p: p.operator.config_set("maxclients", 99), "ConnectionError"),
}


@pytest.mark.parametrize("name", TROUBLES)
@pytest.mark.usefixtures("said")
async def test_requests_go_on_and_its_return_is_seen(patient: Patient, name: str) -> None:
    trouble = TROUBLES[name]
    assert await patient.ask(Slot("a", 5, "before"))
    trouble.begin(patient)
    # At once, so that calls wait in the pool too; and those that come when it is known.
    assert not any(await asyncio.gather(*(patient.ask() for _ in range(40))))
    assert patient.store.last_error == trouble.reason
    async with asyncio.timeout(PATIENCE):  # if each of them waited, it would be 40 seconds
        assert not any([await patient.ask() for _ in range(40)])
    await patient.store.renew([Slot("a", 5, "before")])
    await patient.errs(len(patient.errors) + 2)  # it is tried, in vain
    assert patient.store.last_error == trouble.reason

    trouble.end(patient)
    await patient.recovers()
    await patient.store.renew([Slot("a", 5, "before")])
    admission = await patient.store.acquire([BUCKET], Slot("a", 5, "after"))
    assert (admission.by, admission.in_use) == (patient.store, 2)


@pytest.mark.usefixtures("said")
async def test_while_it_reads_its_data(patient: Patient) -> None:
    assert await patient.ask()
    patient.operator.eval("for i = 1, 3000 do redis.call('SET', i, ('x'):rep(100)) end", 0)
    patient.operator.save()
    # It waits after each key, and says between the keys that it is not ready.
    slowly = "--key-load-delay 3000 --loading-process-events-interval-bytes 1024"
    await patient.restarts(*slowly.split(), loading=True)
    assert not await patient.ask()
    assert patient.store.last_error == "BusyLoadingError"
    patient.server.command("CONFIG", "SET", "key-load-delay", "0")
    await patient.recovers()
    assert await patient.ask()


@pytest.mark.usefixtures("said")
async def test_a_key_of_somebody_else(patient: Patient) -> None:
    patient.operator.hset("sluice:bucket:a", "field", "value")
    assert not await patient.ask()
    assert patient.store.last_error == "WRONGTYPE"
    patient.operator.delete("sluice:bucket:a")
    await patient.recovers()
    assert await patient.ask()


async def test_idle_connections_that_a_restart_ended_are_no_trouble(patient: Patient) -> None:
    await asyncio.gather(*(patient.ask() for _ in range(40)))
    await patient.restarts()
    assert all(await asyncio.gather(*(patient.ask() for _ in range(40))))
    assert patient.errors == []


@pytest.mark.usefixtures("said")
async def test_deny_admits_nobody_meanwhile(tmp_path: Path) -> None:
    async with in_care(tmp_path, "deny") as patient:
        assert await patient.ask()
        patient.server.kill()
        for _ in range(3):
            with pytest.raises(Unavailable):
                await patient.ask()
        patient.server.start()
        await patient.recovers()
        assert await patient.ask()


# Servers that never were any good


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1", "unix:///no/such/socket"])
async def test_none_there_at_all(url: str) -> None:
    errors: list[None] = []
    async with watched(url, errors) as store:
        assert (await store.acquire([BUCKET])).by is not store
        assert store.last_error == "ConnectionError"


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (b"", "TimeoutError"),
        (b"*4\r\n:1\r\n:0\r\n", "TimeoutError"),  # and the rest never comes
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "InvalidResponse"),
        (b":1\r\n", "TypeError"),
        (b"*0\r\n", "ValueError"),
        (b"*4\r\n:1\r\n:0\r\n$3\r\nabc\r\n$3\r\nabc\r\n", "ValueError"),
        (b"-NOSCRIPT No matching script. Please use EVAL.\r\n" * 9, "NoScriptError"),
        (b"-CLUSTERDOWN Hash slot not served\r\n", "ClusterDownError"),
        (b"-MISCONF Redis is configured to save RDB snapshots\r\n", "MISCONF"),
        (b"-BUSY Redis is busy running a script\r\n", "BUSY"),
        (
            b"-ERR unknown command 'EVALSHA', with args beginning with: 'secret'\r\n",
            "ResponseError",
        ),
    ],
)
async def test_one_that_says_something_else(says: bytes, reason: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            writer.write(says)
        writer.close()

    errors: list[None] = []
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, watched(f"redis://127.0.0.1:{port}", errors) as store:
        async with asyncio.timeout(PATIENCE):
            assert (await store.acquire([BUCKET])).by is not store
        assert store.last_error == reason


async def test_one_that_hangs_up() -> None:
    errors: list[None] = []
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, watched(f"redis://127.0.0.1:{port}", errors) as store:
        assert (await store.acquire([BUCKET])).by is not store
        assert store.last_error == "ConnectionError"
