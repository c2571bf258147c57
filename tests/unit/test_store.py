"""Which store a config gets. What stores do: tests/contract."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

import pytest

from proxy import store
from proxy.store import Bucket, Counters
from proxy.store.guard import Guard
from proxy.store.memory import MemoryCounters

NOBODY = "127.0.0.1:1"  # where nothing listens
BUCKET = Bucket("a", 10, 1, 1)


@asynccontextmanager
async def built(
    url: str, failure: Literal["allow", "deny"] = "allow", errors: list[None] | None = None
) -> AsyncIterator[Counters]:
    counted: list[None] = [] if errors is None else errors
    counters = store.build(
        url, failure=failure, timeout=1, clock=lambda: 0.0, on_error=lambda: counted.append(None)
    )
    try:
        yield counters
    finally:
        await counters.close()


async def test_memory_is_in_this_process() -> None:
    async with built("memory") as counters:
        assert isinstance(counters, MemoryCounters)
        assert (await counters.acquire([BUCKET])).levels == (9,)


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
async def test_allow_counts_in_this_process_while_redis_is_away(scheme: str) -> None:
    errors: list[None] = []
    async with built(f"{scheme}://{NOBODY}", errors=errors) as counters:
        assert isinstance(counters, Guard)
        assert counters.last_error is None  # nothing has been asked yet
        assert [(await counters.acquire([BUCKET])).levels for _ in range(3)] == [(9,), (8,), (7,)]
        assert (counters.last_error, len(errors)) == ("ConnectionError", 3)


async def test_deny_admits_nobody_while_redis_is_away() -> None:
    async with built(f"redis://{NOBODY}", failure="deny") as counters:
        with pytest.raises(store.Unavailable):
            await counters.acquire([BUCKET])


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"redis://{NOBODY}", f"redis://{NOBODY}"),
        (f"redis://{NOBODY}/3", f"redis://{NOBODY}/3"),
        (f"rediss://me:hush@{NOBODY}/3?ssl_ca_certs=/ca", f"rediss://{NOBODY}/3"),
        (f"redis://:hush%40@{NOBODY}", f"redis://{NOBODY}"),
        (f"redis://me:hush@hush@{NOBODY}", f"redis://{NOBODY}"),
        (f"redis://{NOBODY}?password=hush#hush", f"redis://{NOBODY}"),
        ("unix://me@/no/such/socket?db=1&password=hush", "unix:///no/such/socket"),
    ],
)
async def test_the_log_says_where_the_store_is_and_not_its_password(
    url: str, shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with built(url) as counters:
        await counters.acquire([BUCKET])
        assert "hush" not in repr(counters)
    [record] = [each for each in caplog.records if each.name == "sluice.store"]
    assert record.__dict__["fields"]["store"] == shown
    assert not [each for each in caplog.records if "hush" in repr(vars(each))]


def test_memory_does_without_the_library() -> None:
    program = """
import sys
sys.modules["redis"] = None  # as if it were not installed
from proxy import store
print(store.build("memory", failure="allow", timeout=1, clock=lambda: 0.0, on_error=print))
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert told.stdout == b"<MemoryCounters 0 buckets, 0 slots>\n"
