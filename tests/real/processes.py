"""Real upstreams and the real proxy process, for tests that speak to both over loopback.

The upstream is npm's aimock. With SLUICE_LLAMA_SERVER (a llama-server binary) and
SLUICE_LLAMA_MODEL (a GGUF file) set, every test that does not script its upstream runs against
llama.cpp too; without them those variants do not exist, so that a complete run skips nothing.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import canaries
from tests.parts import need

HERE = Path(__file__).parent
KEY = canaries.UPSTREAM_KEY  # the upstream's; the proxy injects it
CLIENT_KEY = canaries.CLIENT_KEY  # what clients send; must never arrive


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def get(url: str, key: str | None = None) -> str:
    request = urllib.request.Request(url)
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    with urllib.request.urlopen(request, timeout=10) as response:
        text: str = response.read().decode()
        return text


def eventually(holds: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether `holds()` became true in time: for what another process does on its own."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def answers(url: str) -> bool:
    try:
        get(url)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class Process:
    """A child that listens on `url` and writes to `log`."""

    url: str
    log: Path
    child: subprocess.Popen[bytes]

    def kill(self) -> None:
        self.child.kill()
        self.child.wait()


@contextmanager
def running(
    argv: list[str | Path], url: str, health: str, log: Path, **env: str
) -> Iterator[Process]:
    """`argv` from ready to reaped, whatever the test does."""
    with log.open("wb") as out:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            cwd=HERE.parents[1],
        )
    try:
        eventually(lambda: child.poll() is not None or answers(url + health), 30)
        if child.poll() is not None or not answers(url + health):
            pytest.fail(f"{argv[0]} did not start:\n{log.read_text()}")
        yield Process(url, log, child)
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


# ---------------------------------------------------------------- upstreams


@dataclass(frozen=True, slots=True)
class Upstream:
    """An upstream, and what only it can tell: how often a caller left before the end."""

    name: str
    process: Process

    @property
    def base_url(self) -> str:
        return self.process.url + "/v1"

    def hang_ups(self) -> int:
        if self.name == "llama":
            return self.process.log.read_text(errors="replace").count("cancel task")
        counted = re.findall(
            r'^aimock_requests_total\{.*status="destroyed".*\} (\d+)',
            get(self.process.url + "/metrics"),
            re.MULTILINE,
        )
        return sum(map(int, counted))

    def journal(self) -> list[dict[str, Any]]:
        """aimock's record of the requests that reached it, the newest last."""
        entries: list[dict[str, Any]] = json.loads(get(self.process.url + "/__aimock/journal", KEY))
        return entries


@contextmanager
def start_aimock(folder: Path) -> Iterator[Upstream]:
    port = free_port()
    argv: list[str | Path] = [need("node"), need("aimock"), "--port", str(port), "--metrics"]
    argv += ["--fixtures", HERE / "fixtures.json", "--validate-on-load"]
    with running(
        argv, f"http://127.0.0.1:{port}", "/health", folder / "aimock.log", AIMOCK_API_KEYS=KEY
    ) as process:
        yield Upstream("aimock", process)


@contextmanager
def start_llama(folder: Path) -> Iterator[Upstream]:
    port = free_port()
    argv: list[str | Path] = [os.environ["SLUICE_LLAMA_SERVER"]]
    argv += ["-m", os.environ["SLUICE_LLAMA_MODEL"], "--port", str(port), "--api-key", KEY]
    argv += ["--ctx-size", "16384", "--parallel", "4", "--threads", "1", "--no-webui"]
    with running(argv, f"http://127.0.0.1:{port}", "/health", folder / "llama.log") as process:
        yield Upstream("llama", process)


STARTERS = {"aimock": start_aimock}
if {"SLUICE_LLAMA_SERVER", "SLUICE_LLAMA_MODEL"} <= os.environ.keys():
    STARTERS["llama"] = start_llama


# ---------------------------------------------------------------- the proxy


@contextmanager
def start_proxy(folder: Path, upstream: Upstream, **settings: Any) -> Iterator[Process]:
    """`python -m proxy` in front of `upstream`; whatever a test did, it stops with exit code 0."""
    port = free_port()
    config = {
        "listen": {"host": "127.0.0.1", "port": port},
        "drain_timeout": "5s",
        "upstreams": {"up": {"base_url": upstream.base_url, "api_key": KEY}},
        **settings,
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    argv: list[str | Path] = [sys.executable, "-m", "proxy", "--config", file]
    with running(argv, f"http://127.0.0.1:{port}", "/livez", folder / "proxy.log") as process:
        yield process
    assert process.child.returncode == 0, process.log.read_text()
