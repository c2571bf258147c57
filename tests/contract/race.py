"""python -m tests.contract.race URL NUMBER: asks NUMBER times at once; prints how often it got in.

Waits for a line on standard input first, so that several of it begin together.
"""

from __future__ import annotations

import asyncio
import sys

from proxy.store import Bucket
from proxy.store.redis import RedisCounters

REQUESTS = Bucket("race:requests:1h", 10, 10 / 3_600, 1)
TOKENS = Bucket("race:tokens:1h", 100_000, 100_000 / 3_600, 4_000)


async def main(url: str, number: int) -> None:
    counters = RedisCounters(url)
    await counters.renew([])  # connected
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    for bucket in (REQUESTS, TOKENS):
        asked = (counters.acquire([bucket]) for _ in range(number))
        print(sum(each.admitted for each in await asyncio.gather(*asked)), flush=True)
    await counters.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
