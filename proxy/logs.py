"""F1 logs: one event a line, as text on a terminal and as JSON elsewhere, on standard output.

A record's `fields` (a dict in `extra`) are its data; the message is the event's name. Nothing is
interpolated from what clients or upstreams send, so that a line can't be forged.

Nor is anything quoted that somebody else wrote: the text of an exception, and what a library has to
say, may hold a header or a body (`int()` repeats what is no number). An exception is shown by its
type and the lines that it passed through, a library's message up to the first value in it.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import ssl
import sys
import time
import traceback
from functools import lru_cache
from typing import Any, Literal, TextIO

import msgspec

ROOT = "sluice"

# Where a library's message begins to quote: asyncio puts the reprs of a failed callback's arguments
# there, and on lines of their own those of a task's result or exception.
_QUOTE = re.compile(r"['\"<{\[\n]")


def configure(
    format: Literal["auto", "text", "json"], level: str, stream: TextIO | None = None
) -> None:
    """Sends what the program and its libraries log to `stream`; may be called again."""
    stream = stream or sys.stdout
    text = stream.isatty() if format == "auto" else format == "text"
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Text() if text else Json())
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
        "event": _event(record),
        **getattr(record, "fields", {}),
    }
    if record.exc_info and record.exc_info[1] is not None:
        document["exception"] = _trace(record.exc_info[1])
    return document


def _event(record: logging.LogRecord) -> str:
    """Our own message, which is a name; of a library's what stands before its first value."""
    if record.name.partition(".")[0] == ROOT:
        return record.getMessage()
    return _QUOTE.split(str(record.msg), maxsplit=1)[0].rstrip()


def _trace(error: BaseException | None) -> str:
    """A traceback, causes first, without the exceptions' texts."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:  # a cause can be its own
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n".join(
        "".join(traceback.format_tb(each.__traceback__)) + _named(each) for each in reversed(chain)
    )


def _named(error: BaseException) -> str:
    """Its type, and what the system calls the problem, as in `OSError: EMFILE`."""
    word = None
    if isinstance(error, ssl.SSLError):
        word = error.reason  # OpenSSL's, one of a list
    elif isinstance(error, OSError):
        word = errno.errorcode.get(error.errno or 0)
    kind = type(error)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    return f"{name}: {word}" if word else name


class Json(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        document = _document(record)
        try:
            return msgspec.json.encode(document).decode()
        except UnicodeEncodeError:  # a path may hold bytes that are no text
            return json.dumps(document)


class Text(logging.Formatter):
    """For people: `time level event key=value`, an exception below."""

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
