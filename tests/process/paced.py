"""An upstream that keeps a pace, the proxy's process in front of it, and what a client is told.

`python -m tests.process.paced` prints its port. The query of a request chooses its answer:

    left=5       a stream: an event each beat, and once `/begin` was asked for 5 more, then its end
    left=never   a stream without an end
    barrier=7    a small answer; from here on nobody may send a key below the seventh
    (neither)    a small answer

Keys are numbered, see `key`. `since=7` says that the sender knew the seventh to hold already.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl

import uvloop
import yaml

from tests import canaries
from tests.canaries import COMPLETION, UPSTREAM_KEY
from tests.flow import wire
from tests.flow.wire import LAST, STREAM, Client, Reply, chunked, json_answer
from tests.real.processes import free_port

BEAT = 0.3  # seconds between two events of a stream
DONE = b"data: [DONE]"


def key(number: int) -> str:
    return f"{UPSTREAM_KEY}-{number}"


def event(number: int) -> bytes:
    return b'data: {"choices":[{"delta":{"content":"%b %d"}}]}' % (COMPLETION.encode(), number)


def usage(events: int) -> bytes:
    return b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":%d}}' % events


# ---------------------------------------------------------------- the upstream


@dataclass
class Seen:
    """What an upstream has seen."""

    keys: list[int] = field(default_factory=list)  # of each request, as they arrived
    stale: list[str] = field(default_factory=list)  # keys that were gone
    open: int = 0  # streams
    hang_ups: int = 0  # streams that were left before their end


class _Upstream:
    def __init__(self) -> None:
        self.seen = Seen()
        self._begun = False
        self._revoked = 0  # keys below this number

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await self._exchange(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if length := re.search(r"\r\ncontent-length: (\d+)", head, re.IGNORECASE):
            await reader.readexactly(int(length[1]))
        path, _, query = head.split(" ", 2)[1].partition("?")
        wants = dict(parse_qsl(query))
        match path:
            case "/begin":
                self._begun = True
            case "/seen":
                writer.write(json_answer(json.dumps(asdict(self.seen)).encode()))
                return
            case _:
                self._judge(head, int(wants.get("since", 0)))
        if "barrier" in wants:
            await self._revoke(int(wants["barrier"]))
        if "left" in wants:
            await self._stream(reader, writer, float(wants["left"].replace("never", "inf")))
        else:
            writer.write(json_answer(b"{}"))
        await writer.drain()

    def _judge(self, head: str, since: int) -> None:
        found = re.search(
            rf"\r\nauthorization: bearer {UPSTREAM_KEY}-(\d+)\r\n", head, re.IGNORECASE
        )
        number = int(found[1]) if found else -1
        self.seen.keys.append(number)
        if number < max(since, self._revoked):
            self.seen.stale.append(f"{number}; {since} was known, and below {self._revoked} gone")

    async def _revoke(self, below: int) -> None:
        """Keys below this number are gone, as of the moment in which the proxy sent this request.

        What the proxy wrote before it, and so perhaps with an older key, lies in our sockets
        already: loopback delivers in the order of the writes. So that is read first. Accepting a
        connection, reading from it and waking its task takes some turns of the loop; each of them
        looks at all sockets.
        """
        for _ in range(20):
            await asyncio.sleep(0)
        self._revoked = max(self._revoked, below)

    async def _stream(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: float
    ) -> None:
        self.seen.open += 1
        sent = 0
        try:
            writer.write(STREAM)
            while left:
                writer.write(chunked(event(sent) + b"\n\n"))
                sent += 1
                await asyncio.sleep(BEAT)
                if reader.at_eof() or writer.is_closing():
                    raise ConnectionAbortedError
                left -= self._begun
        except ConnectionError:
            self.seen.hang_ups += 1
            raise
        finally:
            self.seen.open -= 1
        writer.write(chunked(usage(sent) + b"\n\n", DONE + b"\n\n") + LAST)


async def _main() -> None:
    server = await asyncio.start_server(_Upstream().serve, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@dataclass(frozen=True, slots=True)
class Upstream:
    """One that runs, as a test sees it."""

    port: int

    async def begin(self) -> None:
        """Streams that have an end come to it from now on."""
        await self._get("/begin")

    async def seen(self) -> Seen:
        return Seen(**json.loads(await self._get("/seen")))

    async def _get(self, path: str) -> bytearray:
        return (await get(self.port, path)).body


@asynccontextmanager
async def upstream() -> AsyncIterator[Upstream]:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", __name__), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        yield Upstream(int(await child.stdout.readline()))
    finally:
        child.kill()
        await child.wait()


# ---------------------------------------------------------------- the proxy


class Proxy:
    """`python -m proxy`, and the events of its log as they come."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.config = folder / "config.yaml"
        self.settings = {
            "listen": {"port": 0},
            "admin": {"port": free_port()},
            "drain_timeout": "1s",
            **settings,
        }
        self.log: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()  # of the log's events
        self.port = 0
        self.clients: list[Client] = []
        self.child: asyncio.subprocess.Process
        self._news = asyncio.Event()

    @property
    def admin(self) -> int:
        port: int = self.settings["admin"]["port"]
        return port

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Those of the log with this event."""
        return [line for line in self.log if line["event"] == event]

    async def logged(self, event: str, times: int = 1) -> dict[str, Any]:
        """The log's `times`th line with this event, once it is there."""
        async with asyncio.timeout(wire.PATIENCE):
            while self.counts[event] < times:
                assert not self.counts["(end)"], f"no {event} in {self.log[-5:]}"
                self._news.clear()
                await self._news.wait()
        return self.lines(event)[times - 1]

    def tell(self, number: int) -> None:
        self.child.send_signal(number)

    def configure(self, **changes: Any) -> None:
        """Writes the config's file, with these keys changed."""
        self.settings |= changes
        self.config.write_text(yaml.safe_dump(self.settings))

    async def reload(self, **changes: Any) -> None:
        """Returns when the changed config holds."""
        self.configure(**changes)
        told = self.counts["reloaded"]
        self.tell(signal.SIGHUP)
        await self.logged("reloaded", told + 1)

    async def connect(self, *, limit: int = 2**16) -> Client:
        self.clients.append(await Client.connect(self.port, limit=limit))
        return self.clients[-1]

    async def ask(self, request: bytes, method: str = "POST") -> Reply:
        """One request on a connection of its own, and its answer."""
        client = await self.connect()
        await client.send(request)
        reply = await client.reply(method)
        client.close()
        return reply

    async def stream(self, left: int | None, **wants: int) -> Client:
        """A client of a `paced` stream that has begun; without an end if `left` is None."""
        client = await self.connect()
        await client.send(post(left="never" if left is None else left, **wants))
        await client.until(event(0))
        return client

    async def samples(self, metric: str) -> dict[tuple[str, ...], float]:
        """A metric's, by the values of their labels in the order of the labels' names."""
        text = (await get(self.admin, "/metrics")).body.decode()
        canaries.search(text, canaries.here("metrics"))
        found = re.findall(rf"^{metric}(?:\{{(.*)\}})? (\S+)$", text, re.MULTILINE)
        return {tuple(re.findall(r'="(.*?)"', each)): float(value) for each, value in found}

    def descriptors(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.child.pid}/fd").iterdir())

    async def exit_code(self) -> int:
        async with asyncio.timeout(wire.PATIENCE):
            code = await self.child.wait()
            await self.logged("(end)")
        return code

    async def _listen(self) -> None:
        """Follows its output: JSON lines, nothing else, and no secret."""
        assert self.child.stdout is not None
        try:
            async for line in self.child.stdout:
                canaries.search(line, canaries.here("standard output"))
                self._note(json.loads(line))
        finally:
            self._note({"event": "(end)"})

    def _note(self, line: dict[str, Any]) -> None:
        self.log.append(line)
        self.counts[line["event"]] += 1
        self._news.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Whatever a test did, it stops with exit code 0 and without an error of its own."""
        self.configure()
        self.child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", "--config", self.config),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "NO_PROXY": "*"},
        )
        listener = asyncio.create_task(self._listen())
        try:
            url = (await self.logged("listening"))["url"]
            self.port = int(url.rpartition(":")[2])
            yield self
            if self.child.returncode is None:
                self.tell(signal.SIGTERM)
            assert await self.exit_code() == 0
            assert not self.lines("internal_error")
        finally:
            for client in self.clients:
                client.abort()
            if self.child.returncode is None:
                self.child.kill()
                await self.child.wait()
            await listener


# ---------------------------------------------------------------- clients


def post(**wants: object) -> bytes:
    """A request of which the query tells what the client wants of a `paced` upstream."""
    query = "&".join(f"{name}={value}" for name, value in wants.items())
    return wire.post(path=f"/v1/chat/completions?{query}")


async def get(port: int, path: str) -> Reply:
    """One answer, on a connection of its own."""
    client = await Client.connect(port)
    try:
        await client.send(wire.get(path))
        return await client.reply("GET")
    finally:
        client.abort()


@dataclass(frozen=True, slots=True)
class Told:
    """What a stream has told: how many events, each once and in order; what came behind them; and
    whether the answer had an end of its own."""

    events: int
    behind: list[bytes]
    ended: bool

    @classmethod
    def by(cls, reply: Reply) -> Told:
        *blocks, rest = bytes(reply.body).split(b"\n\n")
        events = 0
        while events < len(blocks) and blocks[events] == event(events):
            events += 1
        return cls(events, blocks[events:] + [rest] * bool(rest), reply.whole)

    @property
    def is_whole(self) -> bool:
        return self.ended and self.behind == [usage(self.events), DONE]

    def ends_with(self, code: str) -> bool:
        """Whether it is cut, and says so with this error, between two events."""
        errors = [json.loads(each.removeprefix(b"data: "))["error"] for each in self.behind]
        return not self.ended and [each["code"] for each in errors] == [code]


if __name__ == "__main__":
    uvloop.run(_main())
