"""python -m bench.admission: µs of an admission with its settlement, in memory and over Redis.

A request, its tokens and its slot, one admission after the other. `CPU` is this process's, `Redis`
that of redis-server, `time` from the call to the answer. Two PINGs of the same library, as many
round trips, show what of it is the way there and back.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from statistics import median

import uvloop
from redis.asyncio import Redis

from bench import procfs
from proxy import store
from proxy.store import Bucket, Counters, Slot

_ROUNDS = 5
_SECONDS = 1.0  # that each measurement takes

_BUCKETS = (
    Bucket("client:requests:60", 1e9, 1e9 / 60, 1),
    Bucket("client:tokens:60", 1e9, 1e9 / 60, 1_000),
)
_SLOT = Slot("client:streams", 20, "0123456789abcdef")

Subject = Callable[[], Awaitable[object]]


async def main() -> None:
    if shutil.which("redis-server") is None:
        sys.exit("bench: redis-server is not in the PATH")
    with _redis() as (server, url):
        redis = Redis.from_url(url, protocol=2)
        memory, shared = _counters("memory"), _counters(url)
        subjects: dict[str, Subject] = {
            "memory": lambda: _admission(memory),
            "Redis": lambda: _admission(shared),
            "two PINGs": lambda: _pings(redis),
        }
        rounds = [  # they take turns, so that what else the machine does strikes all of them
            {name: await _measure(subject, server) for name, subject in subjects.items()}
            for _ in range(_ROUNDS)
        ]
        assert shared.last_error is None
        await shared.close()
        await redis.aclose()
    print(f"{'µs':12}{'CPU':>8}{'Redis':>8}{'time':>8}")
    for name in subjects:
        figures = (median(figure) for figure in zip(*(turn[name] for turn in rounds), strict=True))
        print(f"{name:12}" + "".join(f"{figure:8.1f}" for figure in figures))


def _counters(url: str) -> Counters:
    return store.build(url, failure="deny", timeout=5, clock=time.monotonic, on_error=lambda: None)


async def _admission(counters: Counters) -> None:
    admission = await counters.acquire(_BUCKETS, _SLOT)
    assert admission.admitted
    await admission.by.settle(_BUCKETS, _SLOT)


async def _pings(redis: Redis) -> None:
    await redis.ping()
    await redis.ping()


async def _measure(subject: Subject, server: int) -> tuple[float, float, float]:
    """Our CPU, Redis' CPU and the time for one."""
    await subject()  # connected, and the scripts are known
    count, theirs, own = 0, procfs.cpu_seconds(server), time.process_time()
    since = now = time.perf_counter()
    while now < since + _SECONDS:
        await subject()
        count, now = count + 1, time.perf_counter()
    own, theirs = time.process_time() - own, procfs.cpu_seconds(server) - theirs
    return own / count * 1e6, theirs / count * 1e6, (now - since) / count * 1e6


@contextmanager
def _redis() -> Iterator[tuple[int, str]]:
    """A server's pid and URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        argv = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", home]
        server = subprocess.Popen([*argv, "--save", ""], stdout=subprocess.DEVNULL)
        try:
            while not _listens(port):
                time.sleep(0.01)
            yield server.pid, f"redis://127.0.0.1:{port}"
        finally:
            server.kill()
            server.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    uvloop.run(main())
