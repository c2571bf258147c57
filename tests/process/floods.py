"""A real proxy process under a flood, and a neighbour who goes on asking it meanwhile.

The proxy and its upstreams are processes, the neighbour is a thread, and a flood is a plain loop
over blocking sockets: nothing shares an event loop with what it measures.
"""

from __future__ import annotations

import http.client
import re
import resource
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml

from bench.procfs import cpu_seconds
from tests.real.processes import Process, eventually, free_port, get, running

MIB = 1024 * 1024
SERVED_WITHIN = 3.0  # seconds: what no flood may make a neighbour wait; in calm it is milliseconds
SETTLED_WITHIN = 10.0  # seconds in which what a flood took is free again; all timeouts are shorter

# As a config would have them, but so that a test can wait for them.
CLIENT_TIMEOUTS = {"head": "1s", "body": "1s", "keep_alive": "2s", "write": "1s"}
UPSTREAM_TIMEOUTS = {"connect": "1s", "first_byte": "5s", "idle": "2s"}

# Memory is read from Linux's /proc, and peaks are forgotten there (proc(5), clear_refs).
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is measured with Linux's /proc"
)


# ---------------------------------------------------------------- processes


@dataclass(frozen=True, slots=True)
class Upstream:
    """A `tests.process.endless`."""

    process: Process

    @property
    def base_url(self) -> str:
        return self.process.url + "/v1"

    def open(self) -> int:
        """How many connections it has."""
        return int(get(self.process.url + "/open"))


@contextmanager
def start_upstream(folder: Path) -> Iterator[Upstream]:
    port = free_port()
    argv: list[str | Path] = [sys.executable, "-m", "tests.process.endless", str(port)]
    log = folder / f"upstream-{port}.log"
    with running(argv, f"http://127.0.0.1:{port}", "/small", log) as process:
        yield Upstream(process)


@dataclass(frozen=True, slots=True)
class Proxy:
    """The process, as its operator sees it."""

    port: int
    process: Process

    @property
    def pid(self) -> int:
        return self.process.child.pid

    def memory(self) -> float:
        """Resident MiB."""
        return self._status("VmRSS")

    def peak(self) -> float:
        """The most that was resident since `forget_peak`, in MiB."""
        return self._status("VmHWM")

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def cpu(self) -> float:
        """Seconds so far."""
        return cpu_seconds(self.pid)

    def descriptors(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    def log_lines(self) -> int:
        return self.process.log.read_bytes().count(b"\n")

    def _status(self, key: str) -> float:
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(rf"^{key}:\s+(\d+) kB$", status, re.MULTILINE)
        assert found is not None
        return int(found[1]) / 1024


# How `python -m proxy` starts, and how it does where there is no uvloop.
UVLOOP = ["-m", "proxy"]
ASYNCIO = [
    "-c",
    "import sys; sys.modules['uvloop'] = None; from proxy.__main__ import main; sys.exit(main())",
]


@contextmanager
def start_proxy(
    folder: Path,
    upstream: Upstream,
    neighbours: Upstream,
    *,
    start: list[str] = UVLOOP,
    descriptors: int | None = None,
    **settings: Any,
) -> Iterator[Proxy]:
    """The process in front of `upstream`, and of `neighbours` for the model of that name; whatever
    a test did, it stops with exit code 0."""
    port = free_port()
    config = {
        "listen": {"port": port},
        "client_timeouts": CLIENT_TIMEOUTS,
        "drain_timeout": "1s",
        "upstreams": {
            "flooded": {"base_url": upstream.base_url, "timeouts": UPSTREAM_TIMEOUTS},
            "calm": {"base_url": neighbours.base_url, "timeouts": UPSTREAM_TIMEOUTS},
        },
        "routes": [
            {"models": ["neighbour"], "upstreams": ["calm"]},
            {"models": ["*"], "upstreams": ["flooded"]},
        ],
        **settings,
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    argv: list[str | Path] = [sys.executable, *start, "--config", file]
    if descriptors is not None:
        argv = ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh", *argv]
    with running(argv, f"http://127.0.0.1:{port}", "/livez", folder / "proxy.log") as process:
        yield Proxy(port, process)
    assert process.child.returncode == 0, process.log.read_text()[-2000:]


def allow_descriptors(wanted: int) -> None:
    """Raises this process's limit, which the proxy inherits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"{hard} open files are allowed, {wanted} needed (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


# ---------------------------------------------------------------- the neighbour


@dataclass
class Neighbour:
    """A client that asks for a stream and for a small answer in turns."""

    port: int
    calm: list[float] = field(default_factory=list)  # seconds that each took before the flood
    beside: list[float] = field(default_factory=list)  # and beside it
    trouble: list[str] = field(default_factory=list)

    def asks(self, times: list[float]) -> None:
        """Both, on a new connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5 * SERVED_WITHIN)
        try:
            for path, stream, end in ("stream", b"true", b"[DONE]\n\n"), ("small", b"false", b"}"):
                asked = time.perf_counter()
                body = b'{"model":"neighbour","stream":%b}' % stream
                fields = {"Content-Type": "application/json"}
                connection.request("POST", f"/v1/{path}", body, fields)
                reply = connection.getresponse()
                answer = reply.read()  # raises if it was cut
                times.append(time.perf_counter() - asked)
                if reply.status != 200 or not answer.endswith(end):
                    self.trouble.append(f"{path}: {reply.status} {answer[:200]!r}")
        except (OSError, http.client.HTTPException) as error:
            self.trouble.append(f"{error!r} after {time.perf_counter() - asked:.1f} s")
        finally:
            connection.close()

    def goes_on(self, until: threading.Event) -> None:
        self.asks(self.beside)
        while not until.wait(0.01):
            self.asks(self.beside)


@contextmanager
def flood(proxy: Proxy, name: str, *, below: float = 150) -> Iterator[None]:
    """Around a flood: its neighbour is served in time, the proxy's memory stays `below` so many MiB,
    and when it is over, what it held is free again."""
    neighbour = Neighbour(proxy.port)
    for _ in range(10):
        neighbour.asks(neighbour.calm)
    descriptors, before = proxy.descriptors(), proxy.memory()
    proxy.forget_peak()
    over = threading.Event()
    thread = threading.Thread(target=neighbour.goes_on, args=[over])
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    peak, after = proxy.peak(), proxy.memory()
    print(
        f"{name:30} {before:4.0f} MiB before, {peak:4.0f} at most, {after:4.0f} after; "
        f"neighbour {_milliseconds(neighbour.calm)} in calm, {_milliseconds(neighbour.beside)} beside"
    )
    assert not neighbour.trouble
    assert max(neighbour.beside) < SERVED_WITHIN
    assert peak < below
    assert eventually(lambda: proxy.descriptors() < descriptors + 10, SETTLED_WITHIN)


def _milliseconds(times: list[float]) -> str:
    if not times:
        return "never served"
    return f"{1000 * median(times):.1f} ms (worst of {len(times)}: {1000 * max(times):.0f})"


# ---------------------------------------------------------------- what floods are made of


def dial(proxy: Proxy, *, takes: int | None = None) -> socket.socket:
    """A client's connection; the kernel takes about `takes` bytes of answers for it."""
    connection = socket.socket()
    if takes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, takes)
    connection.settimeout(SETTLED_WITHIN)
    connection.connect(("127.0.0.1", proxy.port))
    return connection


@contextmanager
def crowd(proxy: Proxy, count: int, *, takes: int | None = None) -> Iterator[list[socket.socket]]:
    """That many connections."""
    connections = [dial(proxy, takes=takes) for _ in range(count)]
    try:
        yield connections
    finally:
        for each in connections:
            each.close()


def said(connection: socket.socket) -> bytes:
    """What the proxy says until it ends the connection, in whatever way."""
    answer = b""
    with suppress(ConnectionError):
        while data := connection.recv(64 * 1024):
            answer += data
    return answer


def status(answer: bytes) -> bytes:
    """Its three digits; none if there was no answer."""
    return answer[9:12]


def pour(connections: list[socket.socket], piece: bytes, seconds: float) -> int:
    """Sends `piece` on all of them, again and again, as much as each takes; returns how many bytes
    were taken."""
    poured, end = 0, time.monotonic() + seconds
    left = dict.fromkeys(connections, piece)
    while left and time.monotonic() < end:
        for each, rest in list(left.items()):
            try:
                sent = each.send(rest, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except ConnectionError:
                del left[each]
                continue
            poured += sent
            left[each] = rest[sent:] or piece
        time.sleep(0.001)
    return poured


def is_over(connection: socket.socket) -> bool:
    """Whether the proxy has ended it, found out without reading."""
    try:
        connection.send(b"x", socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return False


def was_reset(connection: socket.socket) -> bool:
    """Whether the proxy has reset it, found out without sending, which would provoke a reset."""
    poll = select.poll()
    poll.register(connection, 0)  # what is over is told anyway (poll(2), POLLHUP)
    return bool(poll.poll(0))


def reset(connection: socket.socket) -> None:
    """Closes with a reset (RST)."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
