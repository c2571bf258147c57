"""Canaries: made-up secrets, and the search for them in everything that the proxy wrote.

Keys, prompts and completions appear in no log at any level, in no metric, error, repr or traceback.
So the tests hand these to the proxy wherever they hand it a secret at all, and pass what the proxy
wrote to `search`: the log of each test (`listening`), files that a process wrote (`search_logs`),
metrics and errors (the fixtures that see them). `conftest.py` fails the run if any was found. What
scripted clients and upstreams say and hear is not the proxy's writing, and is not searched.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from proxy import logs

UPSTREAM_KEY = "sk-canary-upstream"
CLIENT_KEY = "sk-canary-client"
ADMIN_KEY = "sk-canary-admin"
PROMPT = "a canary asks"
COMPLETION = "a canary sings"

CANARIES = {
    "an upstream's key": UPSTREAM_KEY,
    "a client's key": CLIENT_KEY,
    "the admin key": ADMIN_KEY,
    "a prompt": PROMPT,
    "a completion": COMPLETION,
}

# Who speaks for the proxy; other loggers are those of the SDKs that the tests call it with.
_LOGGERS = (logs.ROOT, "asyncio", "aiohttp")

sightings: dict[str, None] = {}  # in order, each once


def seen_in(written: str | bytes) -> list[str]:
    """The canaries in something that the proxy wrote; by name, as whoever says so writes too."""
    text = written if isinstance(written, str) else written.decode("utf-8", "replace")
    return [name for name, canary in CANARIES.items() if canary in text]


def search(written: str | bytes, where: str) -> None:
    """Notes the canaries in something that the proxy wrote there."""
    for name in seen_in(written):
        sightings[f"{where}: {name}"] = None


def here(what: str) -> str:
    """`what` is where, in the test that is running."""
    return f"{os.environ['PYTEST_CURRENT_TEST']}: {what}"


def search_logs(folder: Path) -> None:
    """Searches what processes wrote: each into a file proxy.log, by convention."""
    for path in sorted(folder.rglob("proxy.log")):
        with path.open(errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                search(line, f"{path}:{number}")


class _Listener(logging.Handler):
    """Searches each record as both formats write it, and as somebody else's format might."""

    _formats = (logs.Json(), logs.Text())

    def emit(self, record: logging.LogRecord) -> None:
        where = here(f"a log line of {record.name}")
        for each in self._formats:
            search(each.format(record), where)
        if record.name.partition(".")[0] == logs.ROOT:
            search(repr(vars(record)), where)


@contextmanager
def listening() -> Iterator[None]:
    """Searches what this process logs meanwhile, at every level."""
    listener, loggers = _Listener(), [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(listener)
        logger.setLevel(logging.DEBUG)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(listener)
        logger.setLevel(level)
