"""python -m bench.admission: µs for an admission with its settlement, in memory and in Redis.

One after the other, of a request, its tokens and its slot. CPU is this process's and Redis' own;
time is from call to answer. `a round trip` is a PING over the same library, twice, as an admission
with settlement makes two. Redis is started for it, if redis-server is in the PATH.
"""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from statistics import median

from redis.asyncio import Redis

from proxy.store import Bucket, Slot

_ROUNDS = 5
_SECONDS = 1.0  # of each measurement in a round

_BUCKETS = (
    Bucket("client:requests:60", 1e9, 1e9 / 60, 1),
    Bucket("client:tokens:60", 1e9, 1e9 / 60, 1_000),
)
_SLOT = Slot("client:streams", 20, "0123456789abcdef")

Figures = tuple[float, float, float]  # µs: our CPU, Redis' CPU, time


async def main() -> None:
    print(f"{'µs, median of ' + str(_ROUNDS):24}{'CPU':>8}{'of Redis':>10}{'time':>8}")
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        server, url = _start_redis(home)
        subjects: dict[str, Callable[[], Awaitable[object]]] = {}
        subjects["memory"] = _admission(_counters("memory"))
        if server is not None:
            redis = Redis.from_url(url, protocol=2)
            await _ready(redis)
            subjects["redis"] = _admission(_counters(url))
            subjects["a round trip, twice"] = lambda: _pings(redis)
        else:
            print("(no redis-server in the PATH)")
        rounds = [
            {name: await _measure(once, server) for name, once in subjects.items()}
            for _ in range(_ROUNDS)
        ]
        for name in subjects:
            own, theirs, elapsed = (median(each) for each in zip(*(r[name] for r in rounds)))
            print(f"{name:24}{own:8.1f}{theirs:10.1f}{elapsed:8.1f}")
        if server is not None:
            server.kill()
            server.wait()
