"""The load generator: one run against one target, on plain epoll, in a process of its own.

It reads everybody's CPU time itself, at both ends of its measured window, and prints one JSON
object. Whatever is not exactly what the mock sent ends the run: a lost frame voids the figure.
"""

from __future__ import annotations

import gc
import json
import os
import re
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import quantiles

from bench import procfs, wire

WARM_UP = 0.5
_OPENING = 64  # streams asked for but not answered yet: nobody's accept queue shall overflow
_GIVE_UP = 20.0  # seconds without an answer
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_BUFFER = memoryview(bytearray(262144))  # one for all: allocating it is dearer than reading
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Order:
    """What to do, as the bench hands it over."""

    scenario: str  # request, mega, paced, flood, memory
    port: int
    mock_port: int
    connections: int
    seconds: float
    watch: dict[str, int]  # process trees, by the name their figures get


@dataclass(slots=True)
class Result:
    units: int = 0  # requests or chunks within the window
    seconds: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)  # seconds of CPU within the window
    latency_ms: dict[str, float] = field(default_factory=dict)
    rss_before: int = 0
    rss_open: int = 0


class Damaged(Exception):
    """The target's answer is not what the mock sent."""


class Response:
    """Reads one HTTP/1.1 response: bytes in, body bytes out."""

    __slots__ = ("_chunked", "_head", "_left", "_text", "done")

    def __init__(self) -> None:
        self._head = True
        self._chunked = False
        self._left = 0  # of the body, or of this HTTP chunk with the CRLF behind it
        self._text = b""  # a head or a size line that has not arrived whole
        self.done = False

    def feed(self, data: bytes) -> bytes:
        if self.done:
            raise Damaged("bytes behind the answer")
        if self._head:
            data = self._read_head(self._text + data)
            if self._head:
                return b""
        if self._chunked:
            return self._dechunk(data)
        self._left -= len(data)
        self.done = self._left == 0
        if self._left < 0:
            raise Damaged("bytes behind the answer")
        return data

    def _read_head(self, data: bytes) -> bytes:
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._text = data
            return b""
        if not data.startswith(b"HTTP/1.1 200"):
            raise Damaged(f"answered {data[:600]!r}")
        self._head, self._text = False, b""
        if length := _LENGTH.search(data, 0, end + 2):
            self._left = int(length[1])
        elif _CHUNKED.search(data, 0, end + 2):
            self._chunked = True
        else:
            raise Damaged("an answer without a length")
        return data[end + 4 :]

    def _dechunk(self, data: bytes) -> bytes:
        if self._text:
            data, self._text = self._text + data, b""
        body = []
        at, size = 0, len(data)
        left = self._left
        while at < size:
            if left:  # the last two of them are the CRLF
                stop = min(at + left, size)
                left -= stop - at
                body.append(data[at : stop if left > 1 else max(at, stop - 2 + left)])
                at = stop
                continue
            line = data.find(b"\r\n", at)
            if line < 0:
                self._text = data[at:]
                break
            length = int(data[at:line], 16)
            if not length:
                if size - line < 4:
                    self._text = data[at:]
                    break
                self.done = True
                break
            left = length + 2
            at = line + 2
        self._left = left
        return body[0] if len(body) == 1 else b"".join(body)


class Caller:
    """One keep-alive connection to the target, with one request in progress at most."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.sock = socket.create_connection(("127.0.0.1", run.order.port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.response = Response()
        self._unsent = memoryview(b"")
        run.epoll.register(self.sock, select.EPOLLIN)

    def ask(self) -> None:
        self.response = Response()
        self._unsent = memoryview(self.run.request)
        self.send()

    def send(self) -> None:
        """As much of the request as the socket takes."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self.sock.send(self._unsent) :]
        except BlockingIOError:
            self.run.epoll.modify(self.sock, select.EPOLLIN | select.EPOLLOUT)
        else:
            if len(self.run.request) > 65536:  # may have been waited for
                self.run.epoll.modify(self.sock, select.EPOLLIN)

    def read(self) -> None:
        size = self.sock.recv_into(_BUFFER)
        if not size:
            if not self.response.done:
                raise Damaged("the connection was closed within an answer")
            self.close()
            return
        self.take(self.response.feed(_BUFFER[:size].tobytes()))

    def close(self) -> None:
        self.run.callers.pop(self.sock.fileno(), None)
        self.sock.close()

    def take(self, body: bytes) -> None:
        raise NotImplementedError


class Requester(Caller):
    """Asks again as soon as it was answered."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._body = b""

    def take(self, body: bytes) -> None:
        self._body += body
        if not self.response.done:
            return
        if self._body != self.run.answer:
            raise Damaged(f"answered {self._body!r}")
        self._body = b""
        self.run.units += 1
        if self.run.going:
            self.ask()
        else:
            self.run.finished += 1


class Streamer(Caller):
    """Reads one stream to its end and counts."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._began = False
        self._rest = b""  # of an event that has not arrived whole
        self._events = 0
        self._bytes = 0
        self._sum: tuple[int, int] | None = None

    def take(self, body: bytes) -> None:
        now = time.monotonic_ns()
        self._bytes += len(body)
        if self._rest:
            body = self._rest + body
        end = body.rfind(b"\n\n") + 2
        if end > 1:
            self._rest = body[end:]
            self._count(body[:end] if self._rest else body, now)
        else:
            self._rest = body
        if self.response.done:
            self._close()

    def _count(self, events: bytes, now: int) -> None:
        run = self.run
        if not self._began:
            self._began = True
            run.opened += 1
        if b"[DONE]" in events or b"chatcmpl-sum-" in events:
            events = self._read_ending(events)
        number = events.count(b"\n\n")
        self._events += number
        run.units += number
        if run.timing:
            for sent_at in wire.SENT_AT.findall(events):
                run.latencies.append(now - int(sent_at))

    def _read_ending(self, events: bytes) -> bytes:
        """Takes note of the sum, returns the chunks before it."""
        if found := wire.SUM.search(events):
            self._sum = int(found[1]), int(found[2])
            return events[: events.rindex(b"data: ", 0, found.start())]
        return b""

    def _close(self) -> None:
        if self._sum != (self._events, self._bytes) or self._rest:
            raise Damaged(
                f"{self._events} chunks and {self._bytes} bytes arrived, sent (chunks, bytes): "
                f"{self._sum}"
            )
        self.run.finished += 1


class Run:
    """One scenario against one target."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.epoll = select.epoll()
        self.units = 0
        self.opened = 0  # streams that have had their first chunk
        self.finished = 0
        self.going = True
        self.timing = False
        self.latencies: list[int] = []
        self.request = b""
        self.answer = b""
        self.callers: dict[int, Caller] = {}

    def measure(self) -> Result:
        result = Result()
        order = self.order
        if order.scenario == "memory":
            self._warm_code()
            result.rss_before = procfs.rss_bytes(order.watch["proxy"])
        self._start(order.scenario, order.connections)
        self._run_for(WARM_UP)
        self._window(result)
        self._finish()
        return result

    def _start(self, scenario: str, connections: int) -> None:
        self.going = True
        port = self.order.port
        if scenario in ("request", "mega"):
            filler = 1_000_000 if scenario == "mega" else 0
            self.request = wire.request(port, "json", stream=False, filler=filler)
            self.answer = wire.answer(len(self.request.partition(b"\r\n\r\n")[2]))
            for _ in range(connections):
                self._add(Requester(self))
            return
        # Proxies remember parts of a stream: `memory` begins with 19 KB, so that it shows.
        what = {"paced": "paced=50", "memory": "paced=1+100", "flood": "flood"}[scenario]
        self.request = wire.request(port, what, stream=True)
        for _ in range(connections):
            self._run_until(lambda: len(self.callers) - self.opened < _OPENING, "first chunks")
            self._add(Streamer(self))
        self._run_until(lambda: self.opened == connections, "first chunks")

    def _finish(self) -> None:
        """Lets every request and stream end, and sees to it that it ends well."""
        self.going = False
        self._stop_mock()
        self._run_until(lambda: self.finished == len(self.callers), "the ends")

    def _warm_code(self) -> None:
        """What the target loads with its first requests is not the price of a stream."""
        for scenario in ("request", "paced"):
            self._start(scenario, 8)
            self._run_for(WARM_UP)
            self._finish()
            for caller in list(self.callers.values()):
                caller.close()
            self.opened = self.finished = 0

    def _add(self, caller: Caller) -> None:
        self.callers[caller.sock.fileno()] = caller
        caller.ask()

    def _window(self, result: Result) -> None:
        cpu, units, start = self._cpu(), self.units, time.monotonic()
        self.timing = self.order.scenario == "paced"
        self._run_for(self.order.seconds)
        self.timing = False
        result.seconds = time.monotonic() - start
        result.units = self.units - units
        result.cpu = {name: used - cpu[name] for name, used in self._cpu().items()}
        if self.latencies:
            cuts = quantiles(self.latencies, n=100)
            result.latency_ms = {"p50": cuts[49] / 1e6, "p99": cuts[98] / 1e6}
        if self.order.scenario == "memory":
            result.rss_open = procfs.rss_bytes(self.order.watch["proxy"])

    def _cpu(self) -> dict[str, float]:
        return {name: procfs.cpu_seconds(pid) for name, pid in self.order.watch.items()}

    def _run_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            self._turn(end - now)

    def _run_until(self, reached: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + _GIVE_UP
        while not reached():
            if time.monotonic() > end:
                raise Damaged(
                    f"waited {_GIVE_UP:.0f} s for {what}: {len(self.callers)} connections, "
                    f"{self.opened} streams opened, {self.finished} finished"
                )
            self._turn(0.1)

    def _turn(self, timeout: float) -> None:
        for fd, event in self.epoll.poll(timeout):
            caller = self.callers[fd]
            if event & select.EPOLLOUT:
                caller.send()
            if event & ~select.EPOLLOUT:
                caller.read()

    def _stop_mock(self) -> None:
        with socket.create_connection(("127.0.0.1", self.order.mock_port), timeout=5) as sock:
            sock.sendall(b"POST /stop HTTP/1.1\r\nHost: mock\r\nContent-Length: 0\r\n\r\n")
            sock.recv(1024)


def main() -> None:
    given = json.loads(sys.argv[1])
    order = Order(**{**given, "watch": {**given["watch"], "load": os.getpid()}})
    signal.alarm(int(order.seconds + 5 * _GIVE_UP))  # whatever happens, it ends
    gc.disable()
    try:
        print(json.dumps(asdict(Run(order).measure())))
    except (Damaged, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
