"""F2 store: what is counted across requests, in this process or for all that share a Redis."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Literal
from urllib.parse import urlsplit

from proxy.store.guard import Guard
from proxy.store.memory import MemoryCounters
from proxy.store.ports import LAPSE, SLACK, Admission, Bucket, Counters, Slot, Unavailable

__all__ = ["LAPSE", "SLACK", "Admission", "Bucket", "Counters", "Slot", "Unavailable", "build"]


def build(
    store: str,
    *,
    failure: Literal["allow", "deny"],
    timeout: float,
    clock: Callable[[], float],
    on_error: Callable[[], object],
) -> Counters:
    """The counters of `store`, `memory` or a URL; nothing is connected yet.

    `timeout` (seconds) is for each call of a Redis; while it fails, `allow` counts in this process
    (by `clock`), `deny` raises Unavailable. `on_error` is called for each error of the store.
    """
    memory = MemoryCounters(clock)
    if store == "memory":
        return memory
    # Named at run time: only whoever has a Redis needs the library, or pays for its 7 MB.
    primary: Counters = import_module("proxy.store.redis").RedisCounters(store)
    fallback = memory if failure == "allow" else None
    return Guard(primary, fallback, timeout, _shown(store), on_error)


def _shown(url: str) -> str:
    """Where a store is, without the password, which may also stand in the query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
