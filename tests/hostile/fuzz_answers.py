"""A fuzzer of answers: an upstream sends mutated bytes, several clients share it through the proxy.

    python -m tests.hostile.fuzz_answers [--inputs 100000] [--seed 1] [--clients 16]

Each answer bears the mark of the request that it answers, and h11, which shares no line with the
proxy, reads the upstream's bytes too. Found is:

- *leaked*: a client read a byte that was meant for another, or behind its answer's end,
- *ambiguous*: an answer looked whole to the client that is not whole to h11, or has another body
  there, or is spelled so that others read it otherwise,
- *broken*: the client's answer is not HTTP/1.1, or never ended,
- *crashed*: the process, or the proxy's own 500.

A cut that the client can see, and the proxy's own 502 and 504, are what must become of the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from tests.hostile.figures import Figures, Problem
from tests.hostile.lanes import complaints_in
from tests.hostile.mutation import Vocabulary, mutate, split
from tests.hostile.reading import Answer, Malformed, plain_answer, read_answer
from tests.real.processes import Upstream, free_port, start_proxy

KINDS = ("leaked", "ambiguous", "broken", "crashed")
_PATIENCE = 15.0  # seconds, longer than all timeouts of the proxy below
_DONE = re.compile(rb"(?:^|[\r\n])data: ?\[DONE\][\r\n]")
_TIMEOUTS = {"connect": 5, "first_byte": 1, "idle": 1}

# ---------------------------------------------------------------- what the upstream sends

_MARK = b"~@@@@@@~"  # in a template; `mark` puts the request's number there, just as long
_MARKS = re.compile(rb"~([0-9a-f]{6})~")


def mark(number: int) -> bytes:
    return b"~%06x~" % number


_JSON = b'{"id": "' + _MARK + b'", "choices": [{"message": {"content": "Hello"}}]}'
_EVENTS = [
    b'data: {"id": "' + _MARK + b'", "choices": [{"delta": {"content": "Hel"}}]}\n\n',
    b": a comment\n\n",
    b'event: x\r\ndata: {"choices": [{"delta": {"content": "lo"}}]}\r\n\r\n',
    b"data: [DONE]\n\n",
]
_STREAM = b"".join(_EVENTS)
_OK = b"HTTP/1.1 200 OK\r\nX-Mark: " + _MARK + b"\r\n"
_AS_JSON = _OK + b"Content-Type: application/json\r\n"
_AS_EVENTS = _OK + b"Content-Type: text/event-stream; charset=utf-8\r\n"
_CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


def _chunks(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


_ANSWERS = [
    _AS_JSON + b"Content-Length: %d\r\n\r\n" % len(_JSON) + _JSON,
    _AS_JSON + _CHUNKED + _chunks(_JSON) + b"0\r\n\r\n",
    _AS_JSON + _CHUNKED + b"%x;a=b\r\n" % len(_JSON) + _JSON + b"\r\n0\r\nX-Mark: " + _MARK + b"\r\n\r\n",
    _AS_JSON + b"\r\n" + _JSON,
    _AS_JSON + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(_JSON) + _JSON,
    _AS_EVENTS + _CHUNKED + _chunks(*_EVENTS) + b"0\r\n\r\n",
    _AS_EVENTS + _CHUNKED + _chunks(_STREAM * 40, _STREAM) + b"0\r\n\r\n",
    _AS_EVENTS + b"\r\n" + _STREAM,
    _AS_EVENTS + b"Content-Length: %d\r\n\r\n" % len(_STREAM) + _STREAM,
    b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n" + _JSON,
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nX-Mark: " + _MARK + b"\r\n\r\n"
    + _OK + b"Content-Length: 0\r\n\r\n",
    # Found by mutation: a length that Connection nominates, and one of an interim answer.
    _AS_JSON + b"Connection: Content-Length\r\nContent-Length: %d\r\n\r\n" % len(_JSON) + _JSON,
    b"HTTP/1.1 103 Early Hints\r\nContent-Length: 8\r\n\r\n" + _OK + b"Content-Length: 0\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\nX-Mark: " + _MARK + b"\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nETag: \"" + _MARK + b"\"\r\nContent-Length: 9\r\n\r\n",
    b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 8\r\n\r\n" + _MARK,
    b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 8\r\n\r\n" + _MARK,
]  # fmt: skip
_WORDS = [
    *(bytes([byte]) for byte in b"\x00\t\n\x0b\x0c\r \"#+,-./0159:;=a\x7f\x80\xff"),
    *(b"\r\n", b"\r\n\r\n", b"\n\n", b"\r\n ", b"\x00\r\n", b"\xe2\x84\xaa", b"data: [DONE]\n\n"),
    *(b"chunked", b", chunked", b"identity, ", b", 8", b"0x", b"+0", b"-1", b";a=b", b";\n", b"_0"),
    *(b"0\r\n\r\n", b"0\r\n", b"8\r\n" + _MARK + b"\r\n", b"ffffffffffffffff", b"X: y\r\n"),
    *(b"HTTP/1.0", b"HTTP/2", b"HTTP/0.9", b" 204 ", b" 304 ", b" 99 ", b" 600 ", b" 100 "),
    *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", _ANSWERS[0], _ANSWERS[5]),
    *(b"HTTP/1.1 101 Switching Protocols\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n"),
]  # fmt: skip
_LINES = [
    *(b"Content-Length: 8", b"Content-Length: 0", b"content-length:8", b"Content-Length : 8"),
    *(b"Content-Length: +8", b"Content-Length: 8, 8", b" Content-Length: 8", b"Content-Length:"),
    *(b"Transfer-Encoding: chunked", b"transfer-encoding:CHUNKED", b"Transfer-Encoding: identity"),
    *(b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding : chunked", b"Transfer-Encoding:"),
    *(b"Connection: close", b"Connection: keep-alive", b"Connection: Content-Length, X-Mark"),
    *(b"Content-Type: text/event-stream", b"Content-Encoding: gzip", b"Upgrade: h2c", b"Trailer: X"),
    *(b"X: y\x00", b" folded", b"", b"X"),
]  # fmt: skip
_VOCABULARY = Vocabulary(_WORDS, _LINES)


class Ending(Enum):
    """What becomes of a connection when everything is sent."""

    STAY = "it stays open"
    CLOSE = "it is closed"
    RESET = "it is reset"


@dataclass(frozen=True, slots=True)
class Script:
    """One request and what the upstream answers."""

    method: str
    version: bytes
    segments: tuple[bytes, ...]
    ending: Ending

    def read(self) -> tuple[Answer | None, bool, bytes]:
        """What h11 makes of it: the final answer as far as it goes, whether it is whole, and the
        bytes that it was read from, interim answers included."""
        data = rest = b"".join(self.segments)
        while True:
            try:
                answer, whole, rest = read_answer(
                    rest, self.method, closed=self.ending is Ending.CLOSE
                )
            except Malformed as error:
                return error.answer, False, b""
            if answer is None or answer.status >= 200:
                return answer, whole, data[: len(data) - len(rest)]


def make_script(seed: int, number: int) -> Script:
    """Script `number` of a run: an answer or two, mutated and cut into segments."""
    rng = random.Random(f"{seed} {number}")
    method = rng.choice(("GET", "GET", "GET", "POST", "HEAD"))
    version = rng.choice((b"1.1", b"1.1", b"1.1", b"1.1", b"1.0"))
    data = rng.choice(_ANSWERS)
    if rng.random() < 0.2:
        data += rng.choice(_ANSWERS)  # nobody asked for this one
    if rng.random() < 0.9:
        data = mutate(rng, data, _VOCABULARY)
    data = data.replace(_MARK, mark(number))
    _, whole, spelling = Script(method, version, (data,), Ending.STAY).read()
    if not whole:  # mostly: the proxy would wait for what is missing until its timeout
        ending = rng.choices(list(Ending), (1, 60, 20))[0]
        return Script(method, version, split(rng, data), ending)
    # What is behind the end comes with it: a moment later the proxy may have asked for the next
    # answer on this connection, and nobody could tell them apart.
    *first, last = split(rng, spelling)
    ending = rng.choices(list(Ending), (8, 1, 1))[0]
    return Script(method, version, (*first, last + data[len(spelling) :]), ending)


# ---------------------------------------------------------------- the upstream


class ScriptedUpstream:
    """Plays script N to the request for /v1/N."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if length := re.search(rb"Content-Length: (\d+)", head):
                    await reader.readexactly(int(length[1]))
                number = re.match(rb"[A-Z]+ /v1/(\d+) ", head)
                assert number is not None, head
                script = make_script(self._seed, int(number[1]))
                await self._play(script, writer)
                if script.ending is not Ending.STAY:
                    break
        writer.close()
        del self._open[task]

    async def close(self) -> None:
        for writer in self._open.values():
            writer.close()
        await asyncio.gather(*self._open)

    @staticmethod
    async def _play(script: Script, writer: asyncio.StreamWriter) -> None:
        for turn, segment in enumerate(script.segments):
            if turn:
                await asyncio.sleep(0.001)
            writer.write(segment)
            await writer.drain()
        if script.ending is Ending.RESET:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()


# ---------------------------------------------------------------- the clients


@dataclass(frozen=True, slots=True)
class Heard:
    """What a client has read, until its answer was whole or the connection ended."""

    data: bytes
    ending: Ending

    def read(self, method: str) -> tuple[Answer | None, bool, bytes]:
        """What h11 makes of it. Raises Malformed."""
        return read_answer(self.data, method, closed=self.ending is Ending.CLOSE)


class Client:
    """Asks for one answer after another, on one connection as long as that lasts."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, script: Script, number: int) -> Heard:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        body = b'{"stream": true}' if script.method == "POST" else b""
        writer.write(
            b"%b /v1/%d HTTP/%b\r\n" % (script.method.encode(), number, script.version)
            + b"Host: sluice\r\nContent-Type: application/json\r\n"
            + b"Content-Length: %d\r\n\r\n" % len(body)
            + body
        )
        heard = Heard(b"", Ending.STAY)
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                while heard.ending is Ending.STAY and not _is_over(heard, script.method):
                    heard = await _hear_more(heard, reader)
        if heard.ending is not Ending.STAY:
            self.close()
        return heard

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _hear_more(heard: Heard, reader: asyncio.StreamReader) -> Heard:
    try:
        data = await reader.read(2**18)
    except ConnectionError:
        return Heard(heard.data, Ending.RESET)
    return Heard(heard.data + data, Ending.STAY if data else Ending.CLOSE)


def _is_over(heard: Heard, method: str) -> bool:
    try:
        answer, whole, _ = heard.read(method)
    except Malformed:
        return True  # nothing will mend it
    return whole and answer is not None and answer.status >= 200


# ---------------------------------------------------------------- the judgement


def judge(script: Script, number: int, heard: Heard) -> tuple[str, Problem | None]:
    """The course of an answer, and what is wrong with it, if anything."""
    foreign = {found[0] for found in _MARKS.finditer(heard.data)} - {mark(number)}
    if foreign:
        return "leaked", Problem("leaked", f"marks of others: {foreign}")
    try:
        answer, whole, rest = heard.read(script.method)
    except Malformed as error:
        return "broken", Problem("broken", f"{error}: {heard.data!r}")
    if not whole or answer is None:
        if heard.ending is Ending.STAY:
            return "broken", Problem("broken", f"it never ended: {heard.data!r}")
        return "cut", None
    if rest:
        return "leaked", Problem("leaked", f"bytes behind the end: {rest!r}")
    if not plain_answer(heard.data, script.method):
        return "ambiguous", Problem("ambiguous", f"to the client: {heard.data!r}")
    if answer.value(b"sluice-attempts") is None:
        if answer.status not in {502, 504}:
            return "crashed", Problem("crashed", f"the proxy's own {answer.status}")
        return f"answered {answer.status}", None
    meant, meant_whole, spelling = script.read()
    if meant is None or meant.status != answer.status:
        return "ambiguous", Problem("ambiguous", f"h11 reads {meant}, the client {answer}")
    if not meant_whole:
        if _said_done(answer) and meant.body.startswith(answer.body):
            return "done without an end", None
        return "ambiguous", Problem("ambiguous", f"to h11 it is a cut: {meant}")
    if meant.body != answer.body:
        return "ambiguous", Problem("ambiguous", f"h11 reads {meant}, the client {answer}")
    if not plain_answer(spelling, script.method):
        if _said_done(meant):  # what is wrong came behind the end, and was not passed on
            return "done without an end", None
        return "ambiguous", Problem("ambiguous", f"from the upstream: {spelling!r}")
    return "whole", None


def _said_done(answer: Answer) -> bool:
    """Interface 4: an upstream that sent `[DONE]` but no last chunk counts as completed."""
    media_type = (answer.value(b"content-type") or "").lower()
    return media_type.startswith("text/event-stream") and bool(_DONE.search(answer.body))


# ---------------------------------------------------------------- the run


async def _run(proxy_port: int, upstream_port: int, seed: int, clients: int, count: int) -> Figures:
    figures = Figures(KINDS)
    upstream = ScriptedUpstream(seed)
    numbers = iter(range(count))
    async with await asyncio.start_server(upstream.serve, "127.0.0.1", upstream_port):
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(_ask_on(Client(proxy_port), seed, numbers, figures))
        await upstream.close()
    return figures


async def _ask_on(client: Client, seed: int, numbers: Iterator[int], figures: Figures) -> None:
    for number in numbers:
        script = make_script(seed, number)
        course = "crashed"
        try:
            heard = await client.ask(script, number)
        except OSError as error:
            problem: Problem | None = Problem("crashed", repr(error))
        else:
            course, problem = judge(script, number, heard)
        figures.inputs += 1
        figures.courses[course] += 1
        if problem is not None:
            figures.report(problem, f"    --seed {seed}, number {number}: {script}")
            client.close()
    client.close()


def fuzz(seed: int, count: int, clients: int) -> Figures:
    """Runs scripts 0 to `count` through a proxy of its own."""
    port = free_port()
    # Only its address is asked for; it is no process, but a server in this one.
    upstream = cast(Upstream, SimpleNamespace(base_url=f"http://127.0.0.1:{port}/v1"))
    settings = {"up": {"base_url": upstream.base_url, "timeouts": _TIMEOUTS}}
    with (
        tempfile.TemporaryDirectory() as folder,
        start_proxy(Path(folder), upstream, upstreams=settings) as proxy,
    ):
        figures = asyncio.run(_run(int(proxy.url.rpartition(":")[2]), port, seed, clients, count))
        for complaint in complaints_in(proxy.log.read_text()):
            figures.report(Problem("crashed", complaint), "")
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.fuzz_answers")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()
    began = time.monotonic()
    figures = fuzz(options.seed, options.inputs, options.clients)
    print(figures)
    print(f"in {time.monotonic() - began:.0f} s, seed {options.seed}")
    return 1 if figures.found else 0


if __name__ == "__main__":
    sys.exit(main())
