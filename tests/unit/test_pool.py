"""Which idle connection is used again, and which never."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import cast

import pytest

from proxy.connection import State, UpstreamConnection
from proxy.pool import KEEP_IDLE, LOOKUP_HOLDS, MAX_IDLE, Pool
from proxy.resolver import Resolver


class Transport(asyncio.Transport):
    """Of a real socket, but nobody reads it: so a test decides what waits in there."""

    def __init__(self, ours: socket.socket, peer: tuple[str, int]) -> None:
        super().__init__({"socket": ours, "peername": peer})
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


class Origin:
    """Makes connections over socket pairs; `far` are the upstream's ends. `peer` is its address."""

    def __init__(self) -> None:
        self.peer = ("192.0.2.1", 80)
        self.made: list[UpstreamConnection] = []
        self.far: list[socket.socket] = []
        self._near: list[socket.socket] = []

    async def connect(self) -> UpstreamConnection:
        near, far = socket.socketpair()
        connection = UpstreamConnection("up")
        connection.connection_made(Transport(near, self.peer))
        self.made.append(connection)
        self.far.append(far)
        self._near.append(near)
        return connection

    def close(self) -> None:
        for each in self.far + self._near:
            each.close()


@pytest.fixture
async def origin() -> AsyncIterator[Origin]:
    origin = Origin()
    yield origin
    origin.close()


@pytest.fixture
async def pool(origin: Origin) -> Pool:
    return Pool(origin.connect)


class Now:
    """The loop's time, moved by hand."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    now = Now(asyncio.get_running_loop().time())
    monkeypatch.setattr(asyncio.get_running_loop(), "time", now)
    return now


def aborted(connection: UpstreamConnection) -> bool:
    return cast(Transport, connection.transport).aborted


async def test_the_most_recently_used_one_first(pool: Pool) -> None:
    a, b, c = [await pool.acquire() for _ in range(3)]
    assert repr(pool) == "<Pool idle=0>"
    for each in (b, a, c):
        pool.release(each)
    assert repr(pool) == "<Pool idle=3>"
    assert [await pool.acquire() for _ in range(3)] == [c, a, b]


async def test_a_fresh_one_leaves_the_idle_ones_idle(pool: Pool, origin: Origin) -> None:
    first = await pool.acquire()
    pool.release(first)
    second = await pool.acquire(fresh=True)
    assert origin.made == [first, second]
    assert await pool.acquire() is first


async def test_one_that_has_been_idle_for_too_long_is_closed(pool: Pool, now: Now) -> None:
    first = await pool.acquire()
    pool.release(first)
    now.now += KEEP_IDLE - 0.001
    assert await pool.acquire() is first
    pool.release(first)
    now.now += KEEP_IDLE
    assert await pool.acquire() is not first
    assert aborted(first)


async def test_a_sweep_closes_the_old_ones(pool: Pool, now: Now) -> None:
    a, b, c = [await pool.acquire() for _ in range(3)]
    pool.release(a)
    now.now += 1
    pool.release(b)
    now.now += KEEP_IDLE - 0.5
    pool.release(c)
    pool.sweep()
    assert (aborted(a), aborted(b), aborted(c)) == (True, False, False)
    assert repr(pool) == "<Pool idle=2>"


async def test_only_so_many_are_kept(pool: Pool) -> None:
    taken = [await pool.acquire() for _ in range(MAX_IDLE + 2)]
    for each in taken:
        pool.release(each)
    assert repr(pool) == f"<Pool idle={MAX_IDLE}>"
    assert [aborted(each) for each in taken[-3:]] == [False, True, True]


@pytest.mark.parametrize("what", ["in a head", "in a body", "closed", "lost"])
async def test_only_one_that_ended_cleanly_comes_back(pool: Pool, what: str) -> None:
    connection = await pool.acquire()
    connection.begin("GET", first_byte=5, idle=5, total=None)
    match what:
        case "in a body":
            connection.data_received(b"HTTP/1.1 200 OK\r\n\r\n")
        case "closed":
            connection.abort()
        case "lost":
            connection.connection_lost(None)
    pool.release(connection)
    assert connection.state is State.CLOSED
    assert await pool.acquire() is not connection


@pytest.mark.parametrize("what", ["bytes", "eof"])
async def test_one_with_unread_input_is_not_used(pool: Pool, origin: Origin, what: str) -> None:
    stale, good = await pool.acquire(), await pool.acquire()
    pool.release(good)
    pool.release(stale)
    if what == "bytes":
        origin.far[0].send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nstolen")
    else:
        origin.far[0].close()
    assert stale.reusable  # the loop has not read it yet
    assert await pool.acquire() is good
    assert aborted(stale)


async def test_one_that_died_while_idle_is_skipped(pool: Pool) -> None:
    first, second = await pool.acquire(), await pool.acquire()
    pool.release(first)
    pool.release(second)
    second.connection_lost(None)
    assert await pool.acquire() is first


async def test_a_closed_pool_keeps_nothing(pool: Pool) -> None:
    idle, used = await pool.acquire(), await pool.acquire()
    pool.release(idle)
    pool.close()
    assert (aborted(idle), aborted(used)) == (True, False)
    pool.release(used)
    assert aborted(used)
    assert repr(pool) == "<Pool idle=0 closed>"
    # A request that began before a reload may still need one.
    late = await pool.acquire()
    pool.release(late)
    assert aborted(late)


async def test_connecting_may_fail() -> None:
    async def fails() -> UpstreamConnection:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        await Pool(fails).acquire()


class Name(Resolver):
    """A name that leads where `origin` is now; connecting looks it up."""

    def __init__(self, origin: Origin) -> None:
        super().__init__("up.example", 80)
        self._origin = origin

    async def connect(self) -> UpstreamConnection:
        self._told_at = asyncio.get_running_loop().time()
        self._newest = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", self._origin.peer)]
        return await self._origin.connect()


async def test_a_name_that_moves_is_followed_however_busy_its_connections_are(
    origin: Origin, now: Now
) -> None:
    name = Name(origin)
    pool = Pool(name.connect, name)
    first = await pool.acquire()
    origin.peer = ("192.0.2.2", 80)
    for _ in range(int(LOOKUP_HOLDS) - 1):
        now.now += 1
        pool.release(first)
        assert await pool.acquire() is first
    pool.release(first)
    now.now += 1
    second = await pool.acquire()
    assert second.peer == origin.peer
    third = await pool.acquire()
    assert third.peer == origin.peer  # what is idle still is passed over, and closed
    assert aborted(first)


async def test_a_name_that_stays_keeps_its_connections(origin: Origin, now: Now) -> None:
    name = Name(origin)
    pool = Pool(name.connect, name)
    first, second = await pool.acquire(), await pool.acquire()
    now.now += 1000  # two long answers
    pool.release(first)
    pool.release(second)
    third = await pool.acquire()  # asks anew
    assert third not in {first, second}
    assert {await pool.acquire(), await pool.acquire()} == {first, second}
    assert not any(map(aborted, origin.made))
