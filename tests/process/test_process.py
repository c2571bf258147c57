"""The process: its first bind, its signals, its exit code; in front of the embedded demo upstream."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import canaries
from tests.flow.wire import PATIENCE, Client, get, post

ASK = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"a long story"}]}'
DEMO = "upstreams: {demo: {base_url: 'demo://'}}\nlisten: {port: 0}\n"


@dataclass
class Running:
    process: asyncio.subprocess.Process
    config: Path
    port: int
    log: list[dict[str, Any]]

    async def logged(self, event: str) -> dict[str, Any]:
        """The next line of the log with this event."""
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            while line := await self.process.stdout.readline():
                self.log.append(json.loads(line))
                if self.log[-1]["event"] == event:
                    return self.log[-1]
        raise AssertionError(f"no {event} in {self.log}")

    async def connect(self) -> Client:
        return await Client.connect(self.port)

    def tell(self, number: int) -> None:
        self.process.send_signal(number)

    async def exit_code(self) -> int:
        async with asyncio.timeout(PATIENCE):
            return await self.process.wait()


Run = Callable[[str], Awaitable[Running]]


@pytest.fixture
async def run(tmp_path: Path) -> AsyncIterator[Run]:
    """Starts `python -m proxy` with a config."""
    started: list[Running] = []

    async def start(text: str) -> Running:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", "--config", str(path)),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "NO_PROXY": "*"},
        )
        running = Running(process, path, 0, [])
        started.append(running)
        url = (await running.logged("listening"))["url"]
        running.port = int(url.rpartition(":")[2])
        return running

    yield start
    for running in started:
        if running.process.returncode is None:
            running.process.kill()
        assert running.process.stdout is not None
        rest = await running.process.stdout.read()
        canaries.search(json.dumps(running.log).encode() + rest, canaries.here("standard output"))
        await running.process.wait()


async def _streaming(running: Running) -> Client:
    client = await running.connect()
    await client.send(post(ASK))
    await client.until(b'"content":"You"')
    return client


async def test_a_drain_lets_streams_end_and_refuses_new_work(run: Run) -> None:
    running = await run(DEMO)
    open_connection = await running.connect()
    client = await _streaming(running)
    running.tell(signal.SIGTERM)
    await running.logged("draining")
    await asyncio.sleep(0.1)
    with pytest.raises(ConnectionRefusedError):
        await running.connect()
    await open_connection.send(post(ASK))
    refused = await open_connection.reply()
    assert (refused.status, b"shutting_down" in refused.body) == (503, True)
    open_connection.close()
    reply = await client.reply()
    assert (reply.whole, reply.body.endswith(b"data: [DONE]\n\n")) == (True, True)
    client.close()
    assert await running.exit_code() == 0


async def test_during_the_notice_everything_is_served(run: Run) -> None:
    running = await run(DEMO + "drain_notice: 1s\n")
    running.tell(signal.SIGTERM)
    await running.logged("draining")
    client = await running.connect()
    await client.send(get("/readyz"))
    ready = await client.reply("GET")
    assert (ready.status, json.loads(ready.body)["status"]) == (503, "draining")
    await client.send(get("/v1/models"))
    assert (await client.reply("GET")).status == 200
    client.close()
    assert await running.exit_code() == 0


async def test_what_is_left_after_the_drain_ends_visibly(run: Run) -> None:
    running = await run(DEMO + "drain_timeout: 300ms\n")
    client = await _streaming(running)
    running.tell(signal.SIGINT)
    reply = await client.reply()
    assert (reply.whole, b'"code":"shutting_down"' in reply.body) == (False, True)
    client.close()
    line = await running.logged("request")
    assert (line["outcome"], line["status"]) == ("shutdown", 200)
    assert await running.exit_code() == 0


async def test_a_second_signal_hurries(run: Run) -> None:
    running = await run(DEMO)
    client = await _streaming(running)
    running.tell(signal.SIGTERM)
    await running.logged("draining")
    told = time.monotonic()
    running.tell(signal.SIGTERM)
    assert await running.exit_code() == 0
    assert time.monotonic() - told < 1
    assert not (await client.reply()).whole
    client.close()


@pytest.mark.parametrize("delay", [0, 0.02])
async def test_a_signal_at_the_very_end_changes_nothing(run: Run, delay: float) -> None:
    running = await run(DEMO)
    running.tell(signal.SIGTERM)
    await running.logged("stopped")
    await asyncio.sleep(delay)  # somewhere between its last word and its exit
    with suppress(ProcessLookupError):
        running.tell(signal.SIGTERM)
    assert await running.exit_code() == 0


async def test_a_reload_holds_for_new_requests(run: Run) -> None:
    running = await run(DEMO)
    client = await _streaming(running)
    running.config.write_text(DEMO + "routes: [{models: [only], upstreams: [demo]}]\n")
    running.tell(signal.SIGHUP)
    await running.logged("reloaded")
    other = await running.connect()
    await other.send(post(ASK))
    assert (await other.reply()).status == 404
    assert (await client.reply()).whole
    running.config.write_text("upstreams: {}\nnonsense: 1\n")
    running.tell(signal.SIGHUP)
    assert "upstreams" in (await running.logged("reload_rejected"))["problem"]
    await other.send(post(ASK.replace(b'"m"', b'"only"').replace(b"true", b"false")))
    assert (await other.reply()).status == 200
    await other.send(get("/metrics"))
    metrics = (await other.reply("GET")).body.decode()
    assert 'sluice_config_reloads_total{result="applied"} 1.0' in metrics
    assert 'sluice_config_reloads_total{result="rejected"} 1.0' in metrics
    client.close()
    other.close()


async def test_the_admin_port_answers_to_the_end(run: Run, unused_tcp_port: int) -> None:
    running = await run(DEMO + f"admin: {{port: {unused_tcp_port}, key: adm}}\n")
    client = await _streaming(running)
    running.tell(signal.SIGTERM)
    await running.logged("draining")
    await asyncio.sleep(0.1)
    admin = await Client.connect(unused_tcp_port)
    await admin.send(get("/admin/streams", "Authorization: Bearer adm"))
    assert len(json.loads((await admin.reply("GET")).body)["data"]) == 1
    await admin.send(get("/readyz"))
    assert (await admin.reply("GET")).status == 503
    assert (await client.reply()).whole
    client.close()
    admin.close()
    assert await running.exit_code() == 0


async def test_a_drain_waits_for_who_has_yet_to_read(run: Run) -> None:
    running = await run(DEMO)
    slow = await Client.connect(running.port, limit=1024)
    await slow.send(get("/metrics") * 400)  # more than the kernel's buffers hold
    await asyncio.sleep(1)
    running.tell(signal.SIGTERM)
    await running.logged("draining")
    await asyncio.sleep(0.5)
    seen = await slow.rest()
    assert seen.count(b"HTTP/1.1 200 OK") > 30
    assert seen.endswith(b"\n")  # the last answer that began is whole
    slow.close()
    assert await running.exit_code() == 0


async def test_a_reload_does_not_open_keys_to_a_bound_address(run: Run) -> None:
    running = await run(DEMO.replace("port: 0", "host: 0.0.0.0, port: 0"))
    keyed = "upstreams: {up: {base_url: 'http://127.0.0.1:9/v1', api_key: sk-x}}\n"
    running.config.write_text(keyed)
    running.tell(signal.SIGHUP)
    problem = (await running.logged("reload_rejected"))["problem"]
    assert "is not loopback" in problem
