"""From argv to exit code, as a shell sees it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from proxy import __version__

ROOT = Path(__file__).parents[2]
DEMO = "upstreams: {demo: {base_url: 'demo://'}}\nlisten: {port: 0}\nlog: {format: json}\n"
PATIENCE = 10  # seconds


def run(*argv: str, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    """A run that ends by itself, within 3 s as the interface promises."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "proxy", *argv],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        check=False,
    )
    assert time.monotonic() - began < 3
    return done


@contextmanager
def serving(path: Path, *argv: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A proxy and its URL."""
    child = subprocess.Popen(
        [sys.executable, "-m", "proxy", "--config", str(path), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert child.stdout is not None
    try:
        line = child.stdout.readline()
        yield child, json.loads(line)["url"]
    finally:
        child.kill()
        child.communicate()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(DEMO)
    return path


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"sluice {__version__}\n")


@pytest.mark.parametrize("argv", [["nonsense"], ["--port", "x"], ["--nonsense"]])
def test_bad_arguments(argv: list[str]) -> None:
    done = run(*argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: sluice" in done.stderr


def test_a_bad_config(path: Path) -> None:
    path.write_text("upstreams: {a: {base_url: http://a}}\nnonsense: 1\nmax_body: -1\n")
    for argv in (["--config", str(path)], ["check", "--config", str(path)]):
        done = run(*argv)
        assert (done.returncode, done.stdout) == (2, "")
        lines = done.stderr.splitlines()
        assert len(lines) == 2
        assert all(re.match(re.escape(str(path)) + r":[23]: \w+: ", line) for line in lines)


def test_no_config(tmp_path: Path) -> None:
    done = run(cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "config.yaml" in done.stderr
    assert "Traceback" not in done.stderr


def test_check_prints_what_holds(path: Path) -> None:
    path.write_text("upstreams: {a: {base_url: 'http://a', api_key: '${KEY}'}}\n")
    done = run("check", "--config", str(path), "--port", "81", KEY="sk-secret")
    assert (done.returncode, done.stderr) == (0, "")
    assert "sk-secret" not in done.stdout
    shown = yaml.safe_load(done.stdout)
    assert shown["upstreams"]["a"]["api_key"] == "***"
    assert shown["listen"]["port"] == 81
    # Options may stand on either side of the word.
    assert run("--port", "81", "check", "--config", str(path), KEY="k").stdout == done.stdout


def test_schema() -> None:
    done = run("schema")
    assert done.returncode == 0
    assert "upstreams" in json.loads(done.stdout)["properties"]


def test_a_port_in_use(path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = run("--config", str(path), "--port", port)
    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_as_asked(path: Path, number: signal.Signals) -> None:
    with serving(path) as (child, url):
        with urllib.request.urlopen(url + "/livez", timeout=PATIENCE) as answer:
            assert json.load(answer) == {"status": "ok", "reasons": []}
        child.send_signal(number)
        out, err = child.communicate(timeout=PATIENCE)
    assert (child.returncode, err) == (0, "")
    assert [json.loads(line)["event"] for line in out.splitlines()] == ["draining", "stopped"]


def test_a_second_signal_ends_it_within_a_second(path: Path) -> None:
    path.write_text(DEMO + "drain_notice: 5m\n")
    with serving(path) as (child, _):
        assert child.stdout is not None
        child.send_signal(signal.SIGTERM)
        assert json.loads(child.stdout.readline())["event"] == "draining"
        began = time.monotonic()
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=PATIENCE)
        assert time.monotonic() - began < 1
    assert child.returncode == 0


def test_a_signal_before_it_serves(path: Path) -> None:
    # `docker stop` right behind `docker run`.
    child = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "proxy", "--config", str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert child.stderr is not None
    for line in child.stderr:  # its imports, as they happen
        if "asyncio" in line:
            break
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 0
    assert "Traceback" not in err
