"""F1 logs: one event a line, as text on a terminal and as JSON elsewhere, on standard output.

A record's `fields` (a dict in `extra`) are its data; the message is the event's name. Nothing is
interpolated from what clients or upstreams send, so that a line can't be forged.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from functools import lru_cache
from typing import Any, Literal, TextIO

import msgspec

ROOT = "sluice"


def configure(
    format: Literal["auto", "text", "json"], level: str, stream: TextIO | None = None
) -> None:
    """Sends what the program and its libraries log to `stream`; may be called again."""
    stream = stream or sys.stdout
    text = stream.isatty() if format == "auto" else format == "text"
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Text() if text else _Json())
    # Nobody reads them, and finding them out costs more than writing the line
    # (https://docs.python.org/3/howto/logging.html#optimization).
    logging.raiseExceptions = False  # a reader of the log that has left is no reason for tracebacks
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger(ROOT).setLevel(level.upper())


@lru_cache(1)
def _moment(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def _document(record: logging.LogRecord) -> dict[str, Any]:
    document = {
        "time": f"{_moment(int(record.created))}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "event": record.getMessage(),
        **getattr(record, "fields", {}),
    }
    if record.exc_info and record.exc_info[0] is not None:
        document["exception"] = logging.Formatter().formatException(record.exc_info)
    return document


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        document = _document(record)
        try:
            return msgspec.json.encode(document).decode()
        except UnicodeEncodeError:  # a path may hold bytes that are no text
            return json.dumps(document)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        document = _document(record)
        head = f"{document.pop('time')} {document.pop('level'):7} {document.pop('event')}"
        exception = document.pop("exception", None)
        pairs = [f"{key}={_shown(value)}" for key, value in document.items() if value is not None]
        return " ".join([head, *pairs]) + (f"\n{exception}" if exception else "")


def _shown(value: object) -> str:
    """A value on a text line: quoted where it could be taken for something else."""
    text = str(value)
    return text if text.isprintable() and " " not in text and text else repr(text)
