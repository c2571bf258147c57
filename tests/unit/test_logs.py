"""One event a line, which nobody can forge or lose, and which quotes nobody."""

from __future__ import annotations

import asyncio
import errno
import gc
import io
import json
import logging
import re
import ssl
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from proxy.errors import ProxyError
from proxy.logs import configure

CANARY = "sk-canary"
log = logging.getLogger("sluice.test")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Puts logging back: pytest has handlers of its own, and tests.canaries levels."""
    root = logging.getLogger()
    levels = {
        name: logging.getLogger(name).level for name in (None, "sluice", "asyncio", "aiohttp")
    }
    for name in ("asyncio", "aiohttp"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    handlers = root.handlers[:]
    switches = ("logThreads", "logProcesses", "logMultiprocessing", "_srcfile")
    before = {name: getattr(logging, name) for name in switches}
    root.handlers = []  # configure closes what it finds
    yield
    root.handlers = handlers
    for logger, level in levels.items():
        logging.getLogger(logger).setLevel(level)
    for name, value in before.items():
        setattr(logging, name, value)


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def write(event: str = "event", **fields: Any) -> None:
    log.info(event, extra={"fields": fields})


def test_json() -> None:
    stream = io.StringIO()
    configure("json", "info", stream)
    write("request", path="/v1/x", status=200, ttfb=None, a="\n\u2028ü")
    [line] = stream.getvalue().split("\n")[:-1]
    document = json.loads(line)
    assert list(document) == ["time", "level", "event", "path", "status", "ttfb", "a"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", document.pop("time"))
    assert document == {
        "level": "info",
        "event": "request",
        "path": "/v1/x",
        "status": 200,
        "ttfb": None,
        "a": "\n\u2028ü",
    }


def test_time_is_utc_with_milliseconds() -> None:
    stream = io.StringIO()
    configure("json", "info", stream)
    for created, shown in (
        (0.0, "1970-01-01T00:00:00.000Z"),
        (1e9 + 0.9996, "2001-09-09T01:46:40.999Z"),
        (1e9 + 1.25, "2001-09-09T01:46:41.250Z"),
        (1e9, "2001-09-09T01:46:40.000Z"),
    ):
        record = logging.makeLogRecord(
            {"name": "sluice.test", "levelno": 20, "levelname": "INFO", "msg": "e"}
        )
        record.created, record.msecs = created, created % 1 * 1000
        log.handle(record)
        assert json.loads(lines(stream)[-1])["time"] == shown


def test_text() -> None:
    stream = io.StringIO()
    configure("text", "info", stream)
    write("request", path="/v1/x", ttfb=None, model="a b", empty="", upstreams={"a": "b"})
    [line] = lines(stream)
    assert line[24:] == (
        " info    request path=/v1/x model='a b' empty='' upstreams=\"{'a': 'b'}\""
    )


@pytest.mark.parametrize("format", ["json", "text"])
@pytest.mark.parametrize(
    "value",
    ["a\nb", "a\r\nb", "a\x1b[31mb", "a\x85b", "a\u2028b", "a\x00b", "a\udcffb"],
)
def test_what_callers_send_stays_on_its_line_and_is_never_lost(
    format: Any, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # A path comes as bytes; those that are no UTF-8 come as lone surrogates (\\udcff is \\xff).
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    configure(format, "info", stream)
    write("request", path=value, status=200)
    stream.seek(0)
    text = stream.read()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert "request" in text
    assert not {"\r", "\x1b", "\x00"} & set(text)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("format", "stream", "json_"),
    [
        ("auto", Terminal(), False),
        ("auto", io.StringIO(), True),
        ("json", Terminal(), True),
        ("text", io.StringIO(), False),
    ],
)
def test_formats(format: Any, stream: io.StringIO, json_: bool) -> None:
    configure(format, "info", stream)
    write()
    assert stream.getvalue().startswith("{") == json_


def test_levels() -> None:
    stream = io.StringIO()
    configure("json", "warning", stream)
    log.info("no")
    log.warning("yes")
    configure("json", "debug", stream)
    log.debug("yes")
    logging.getLogger("aiohttp.server").info("no")
    logging.getLogger("asyncio").warning("yes")
    assert [json.loads(line)["event"] for line in lines(stream)] == ["yes"] * 3


def test_configured_twice_is_written_once() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure("json", "info", first)
    configure("text", "info", second)
    write()
    assert (lines(first), len(lines(second))) == ([], 1)


def fails() -> None:
    """With a text in every exception that came to it."""
    try:
        int(CANARY)
    except ValueError as error:
        raise ProxyError("internal_error", CANARY) from error


@pytest.mark.parametrize("format", ["json", "text"])
def test_an_exception_is_its_type_and_its_way_but_not_its_text(format: Any) -> None:
    stream = io.StringIO()
    configure(format, "info", stream)
    try:
        fails()
    except ProxyError:
        log.exception("internal_error", extra={"fields": {"id": "7"}})
    text = stream.getvalue()
    if format == "json":
        document = json.loads(text)
        assert (document["event"], document["id"]) == ("internal_error", "7")
        trace = document["exception"].splitlines()
    else:
        first, *trace = lines(stream)
        assert first.endswith("error   internal_error id=7")
    assert (trace[1].strip(), trace[-1]) == ("int(CANARY)", "proxy.errors.ProxyError")
    assert "ValueError" in trace  # the cause comes first, as in every traceback
    assert any(line.endswith("in fails") for line in trace)
    assert CANARY not in text


def ssl_error() -> ssl.SSLError:
    error = ssl.SSLError(1, CANARY)
    error.reason = "WRONG_VERSION_NUMBER"
    return error


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (OSError(errno.EMFILE, CANARY), "OSError: EMFILE"),
        (ConnectionResetError(errno.ECONNRESET, CANARY), "ConnectionResetError: ECONNRESET"),
        (OSError(CANARY), "OSError"),
        (ssl_error(), "ssl.SSLError: WRONG_VERSION_NUMBER"),
        (UnicodeDecodeError("utf-8", CANARY.encode(), 0, 1, CANARY), "UnicodeDecodeError"),
    ],
)
def test_of_an_exceptions_text_the_systems_word_stays(error: Exception, shown: str) -> None:
    stream = io.StringIO()
    configure("json", "info", stream)
    log.error("event", exc_info=error)
    assert json.loads(stream.getvalue())["exception"] == shown


def test_a_cause_may_be_its_own_or_unsaid() -> None:
    stream = io.StringIO()
    configure("json", "info", stream)
    circle, unsaid = ValueError(), KeyError()
    circle.__cause__ = circle
    unsaid.__context__, unsaid.__suppress_context__ = circle, True  # `raise ... from None`
    for error in (circle, unsaid):
        log.error("event", exc_info=error)
    shown = [json.loads(line)["exception"] for line in lines(stream)]
    assert shown == ["ValueError", "KeyError"]


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("Task exception was never retrieved\nfuture: <Task CANARY>", "Task exception was never retrieved"),
        ("Exception in callback Feed.take(b'CANARY')", "Exception in callback Feed.take(b"),
        ("Executing <Handle f('CANARY')> took 0.2 seconds", "Executing"),
        ("Fatal error: protocol.data_received() call failed.\nprotocol: CANARY", "Fatal error: protocol.data_received() call failed."),
    ],
)  # fmt: skip
def test_a_library_is_not_quoted_beyond_its_own_words(message: str, shown: str) -> None:
    stream = io.StringIO()
    configure("json", "info", stream)
    logging.getLogger("asyncio").error(message)
    logging.getLogger("aiohttp.server").error("Cannot read %s", CANARY)
    assert [json.loads(line)["event"] for line in lines(stream)] == [shown, "Cannot read %s"]


async def test_nor_is_what_the_event_loop_reports() -> None:
    stream = io.StringIO()
    configure("json", "debug", stream)
    loop = asyncio.get_running_loop()
    loop.call_soon(int, CANARY)
    failed = loop.create_future()
    failed.set_exception(UnicodeDecodeError("utf-8", CANARY.encode(), 0, 1, ""))
    del failed
    await asyncio.sleep(0)
    gc.collect()
    written = stream.getvalue()
    assert "Future exception was never retrieved" in written
    assert "Exception in callback" in written
    assert CANARY not in written


def test_standard_output_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    configure("json", "info")
    write()
    assert len(lines(stream)) == 1
