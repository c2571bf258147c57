"""Names are looked up one host at a time, and nobody waits for another's."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest

from proxy.resolver import Resolver

FOUND = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 80))]


class Names:
    """A system's resolver that answers when it is let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.let = threading.Event()
        self.answer: Any = FOUND
        monkeypatch.setattr(socket, "getaddrinfo", self._look_up)

    def _look_up(self, host: str, port: int, **_: object) -> Any:
        self.asked.append(host)
        self.let.wait(10)
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


async def test_whoever_asks_meanwhile_shares_the_lookup(names: Names) -> None:
    resolver = Resolver("up.example", 80)
    asking = [asyncio.create_task(resolver.addresses()) for _ in range(3)]
    await asyncio.sleep(0)
    names.let.set()
    assert await asyncio.gather(*asking) == [FOUND] * 3
    assert await resolver.addresses() == FOUND
    assert names.asked == ["up.example"]


async def test_a_failure_is_not_kept(names: Names) -> None:
    resolver = Resolver("up.example", 80)
    names.let.set()
    names.answer = socket.gaierror(socket.EAI_NONAME, "unknown")
    for _ in range(2):
        with pytest.raises(socket.gaierror):
            await resolver.addresses()
    names.answer = FOUND
    assert await resolver.addresses() == FOUND
    assert len(names.asked) == 3


async def test_a_name_that_hangs_holds_nobody_else(names: Names) -> None:
    slow = [asyncio.create_task(Resolver(f"slow{n}.example", 80).addresses()) for n in range(20)]
    await asyncio.sleep(0.01)
    assert len(names.asked) == 20  # each in a thread of its own
    for task in slow:
        task.cancel()
    await asyncio.wait(slow)
    names.let.set()


async def test_an_answer_holds_for_a_while_only(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    names.let.set()
    resolver = Resolver("up.example", 80)
    await resolver.addresses()
    monkeypatch.setattr("proxy.resolver._KEEP", 0.0)
    await resolver.addresses()
    assert len(names.asked) == 2


async def test_what_the_newest_answer_says(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = Resolver("up.example", 80)
    assert not resolver.leads_to(("192.0.2.1", 80))
    names.let.set()
    await resolver.addresses()
    assert resolver.leads_to(("192.0.2.1", 80))
    assert not resolver.leads_to(("192.0.2.2", 80))
    monkeypatch.setattr("proxy.resolver._KEEP", 0.0)
    names.answer = socket.gaierror(socket.EAI_AGAIN, "try again")
    with pytest.raises(socket.gaierror):
        await resolver.addresses()
    assert resolver.leads_to(("192.0.2.1", 80))  # for all we know
    names.answer = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 80, 0, 0))]
    await resolver.addresses()
    assert not resolver.leads_to(("192.0.2.1", 80))
    assert resolver.leads_to(("2001:db8::1", 80, 0, 0))


async def test_a_lookup_is_stale_after_a_while_unless_another_is_under_way(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = asyncio.get_running_loop().time()
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    resolver = Resolver("up.example", 80)
    assert resolver.is_stale(25)
    asking = asyncio.create_task(resolver.addresses())
    await asyncio.sleep(0)
    assert not resolver.is_stale(25)
    names.answer = socket.gaierror(socket.EAI_AGAIN, "try again")
    names.let.set()
    with pytest.raises(socket.gaierror):
        await asking
    assert not resolver.is_stale(25)  # asking at once again would not help
    now += 25
    assert resolver.is_stale(25)


async def test_a_lookup_that_cannot_be_started_holds_nobody_up(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    resolver = Resolver("up.example", 80)
    with monkeypatch.context() as without_threads:
        without_threads.setattr("threading.Thread.start", refuse)
        with pytest.raises(RuntimeError):
            await resolver.addresses()
    names.let.set()
    assert await resolver.addresses()
