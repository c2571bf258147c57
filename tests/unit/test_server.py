"""The life of the process, lived in the test's own: its sockets and its signals are real."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import math
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from proxy import config, logs
from proxy.server import BindError, Process, _LoopTrouble, _most_clients, _url

ASK = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: s\r\nContent-Type: application/json\r\n"
    b"Content-Length: 50\r\n\r\n" + b'{"stream":true,"messages":[{"content":"Hi!"}]}'.ljust(50)
)


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: s\r\nConnection: close\r\n\r\n".encode()


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def of(self, event: str) -> list[dict[str, Any]]:
        found = [record for record in self.records if record.getMessage() == event]
        return [getattr(record, "fields", {}) for record in found]


class Story:
    """One process; `pace` is the demo upstream's."""

    def __init__(self, path: Path, lines: Lines) -> None:
        self.path, self.lines = path, lines
        self.process: Process
        self.running: asyncio.Task[None]

    async def starts(self, settings: str = "", pace: float = 0) -> int:
        """Returns the port."""
        self.writes("listen: {port: 0}\n" + settings)
        self.process = Process(self.load(), self.load)
        self.process._app._demo._pace = pace
        self.running = asyncio.create_task(self.process.run())
        await self.until(lambda: self.lines.of("listening"))
        return int(self.lines.of("listening")[-1]["url"].rpartition(":")[2])

    def writes(self, settings: str) -> None:
        self.path.write_text("upstreams: {demo: {base_url: 'demo://'}}\n" + settings)

    def load(self, host: str | None = None) -> config.Config:
        return config.load(self.path, {}, host=host)

    async def until(self, holds: Callable[[], Any]) -> None:
        async with asyncio.timeout(10):
            while not holds():
                assert not self.running.done(), self.running
                await asyncio.sleep(0.001)

    async def ends(self) -> None:
        await asyncio.wait_for(self.running, 10)

    @property
    def metrics(self) -> str:
        return self.process._app.observer.render().decode()


def tell(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


async def ask(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


@pytest.fixture
async def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Story]:
    lines, ours = Lines(), logging.getLogger("sluice")
    monkeypatch.setattr(logs, "configure", lambda *_: None)  # pytest has handlers of its own
    level = ours.level
    ours.addHandler(lines)
    ours.setLevel(logging.INFO)
    story = Story(tmp_path / "config.yaml", lines)
    yield story
    ours.removeHandler(lines)
    ours.setLevel(level)
    if hasattr(story, "running") and not story.running.done():
        story.running.cancel()
        await asyncio.wait([story.running])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_told_to_stop(story: Story, number: signal.Signals) -> None:
    port = await story.starts()
    assert b" 200 OK" in await ask(port, get("/livez"))
    tell(number)
    await story.ends()
    assert [record.getMessage() for record in story.lines.records] == [
        "listening",
        "draining",
        "stopped",
    ]
    assert story.lines.of("listening")[0]["upstreams"].startswith("demo (")
    with pytest.raises(ConnectionRefusedError):
        await ask(port, get("/livez"))


async def test_an_open_stream_goes_on_to_its_end(story: Story) -> None:
    port = await story.starts(pace=0.005)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(ASK)
    seen = await reader.readuntil(b'"content"')
    tell(signal.SIGTERM)
    await story.until(lambda: story.process._app.refusing)
    with pytest.raises(ConnectionRefusedError):
        await ask(port, get("/livez"))
    seen += await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 10)
    assert b"data: [DONE]" in seen
    assert b"error" not in seen
    writer.close()
    await story.ends()
    assert len(story.lines.of("stopped")) == 1


@pytest.mark.parametrize("how", ["drain_timeout", "a second signal"])
async def test_what_is_left_is_told_so(story: Story, how: str) -> None:
    timeout = "10ms" if how == "drain_timeout" else "5m"
    port = await story.starts(f"drain_timeout: {timeout}", pace=60)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(ASK)
    seen = await reader.readuntil(b'"role"')
    tell(signal.SIGTERM)
    if how == "a second signal":
        await story.until(lambda: story.lines.of("draining"))
        tell(signal.SIGTERM)
    seen += await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert b'"code":"shutting_down"' in seen
    assert not seen.endswith(b"\r\n0\r\n\r\n")
    await story.ends()
    assert len(story.lines.of("stopped")) == 1
    assert story.lines.of("request")[0]["outcome"] == "shutdown"


async def test_during_the_notice_everything_is_served(story: Story) -> None:
    port = await story.starts("drain_notice: 1m")
    tell(signal.SIGTERM)
    await story.until(lambda: story.lines.of("draining"))
    assert b" 503 " in await ask(port, get("/readyz"))
    assert b" 200 " in await ask(port, get("/v1/models"))
    tell(signal.SIGINT)  # in a hurry
    await story.ends()


async def test_new_work_on_an_open_connection_is_refused(story: Story) -> None:
    port = await story.starts(pace=60)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    busy = await asyncio.open_connection("127.0.0.1", port)
    busy[1].write(ASK)
    await busy[0].readuntil(b'"role"')
    writer.write(b"GET /livez HTTP/1.1\r\nHost: s\r\n\r\n")
    await reader.readuntil(b"}")
    tell(signal.SIGTERM)
    await story.until(lambda: story.process._app.refusing)
    writer.write(b"GET /v1/models HTTP/1.1\r\nHost: s\r\n\r\n")
    refusal = await asyncio.wait_for(reader.read(), 10)
    head, _, body = refusal.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"Connection: close" in head
    assert json.loads(body)["error"]["code"] == "shutting_down"
    tell(signal.SIGTERM)
    for each in (writer, busy[1]):
        each.close()
    await story.ends()


async def test_an_admin_port_answers_to_the_end(story: Story) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        admin = free.getsockname()[1]
    port = await story.starts(f"admin: {{port: {admin}}}", pace=60)
    assert b" 404 " in await ask(port, get("/metrics"))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(ASK)
    await reader.readuntil(b'"role"')
    tell(signal.SIGTERM)
    await story.until(lambda: story.process._app.refusing)
    assert b'in_flight{route="default"} 1' in await ask(admin, get("/metrics"))
    tell(signal.SIGTERM)
    writer.close()
    await story.ends()


async def test_a_reload(story: Story) -> None:
    port = await story.starts("max_body: 1KiB")
    story.writes("listen: {port: 0}\nmax_body: 1")
    tell(signal.SIGHUP)
    await story.until(lambda: story.lines.of("reloaded"))
    assert b'"request_too_large"' in await ask(port, ASK.replace(b"POST", b"PUT"))
    assert 'sluice_config_reloads_total{result="applied"} 1.0' in story.metrics
    assert story.lines.of("restart_needed") == []


@pytest.mark.parametrize("bad", ["nonsense: 1\nmax_body: -1", "\t", "routes: []", None])
async def test_a_bad_reload_changes_nothing(story: Story, bad: str | None) -> None:
    port = await story.starts()
    if bad is None:
        story.path.unlink()
    else:
        story.writes(bad)
    tell(signal.SIGHUP)
    await story.until(lambda: story.lines.of("reload_rejected"))
    problems = [fields["problem"] for fields in story.lines.of("reload_rejected")]
    assert len(problems) == (2 if bad and "nonsense" in bad else 1)
    assert all("config.yaml" in problem for problem in problems)
    assert 'sluice_config_reloads_total{result="rejected"} 1.0' in story.metrics
    assert story.lines.of("reloaded") == []
    assert b" 200 " in await ask(port, get("/v1/models"))


async def test_what_a_reload_cannot_change(story: Story) -> None:
    await story.starts()
    story.writes("listen: {port: 1}\nadmin: {port: 2}")
    tell(signal.SIGHUP)
    await story.until(lambda: story.lines.of("reloaded"))
    assert story.lines.of("restart_needed") == [{"key": "listen"}, {"key": "admin"}]


@pytest.mark.parametrize("taken", ["listen", "admin"])
async def test_an_address_that_cannot_be_listened_on(story: Story, taken: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        story.writes(f"{taken}: {{port: {port}}}" + ("\nlisten: {port: 0}" * (taken == "admin")))
        with pytest.raises(BindError, match=f"127.0.0.1:{port}"):
            await Process(story.load(), story.load).run()


async def test_how_an_address_is_shown() -> None:
    with socket.create_server(("127.0.0.1", 0)) as four:
        assert _url(four) == f"http://127.0.0.1:{four.getsockname()[1]}"
    if socket.has_ipv6:
        with socket.socket(socket.AF_INET6) as six:
            six.bind(("::1", 0))
            assert _url(six) == f"http://[::1]:{six.getsockname()[1]}"


def test_as_many_clients_as_there_are_descriptors_for_both_sides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr("resource.getrlimit", lambda _: (64, 1032))
    monkeypatch.setattr("resource.setrlimit", lambda _, limits: raised.append(limits))
    assert _most_clients() == 500
    assert raised == [(1032, 1032)]

    def refuse(*_: object) -> None:
        raise ValueError

    monkeypatch.setattr("resource.setrlimit", refuse)
    assert _most_clients() == 16
    monkeypatch.setattr("resource.getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert _most_clients() == math.inf


async def test_a_loop_that_cannot_accept_says_so_once_a_minute(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = story.lines
    loop, trouble = asyncio.get_running_loop(), _LoopTrouble()
    now = loop.time()
    monkeypatch.setattr(loop, "time", lambda: now)
    handled: list[dict[str, Any]] = []
    monkeypatch.setattr(loop, "default_exception_handler", handled.append)
    for _ in range(100):
        trouble(loop, {"exception": OSError(errno.EMFILE, "Too many open files")})
    assert lines.of("not_accepting") == [{"problem": "Too many open files"}]
    now += 61
    trouble(loop, {"exception": OSError(errno.EMFILE, "Too many open files")})
    assert len(lines.of("not_accepting")) == 2
    trouble(loop, {"exception": OSError(errno.EPIPE, "Broken pipe")})
    trouble(loop, {"message": "something else"})
    assert len(handled) == 2
