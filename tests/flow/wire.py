"""Both ends of the wire, as bytes: a scripted upstream and a client that sees everything.

An upstream's script is a list of steps, played for each request that arrives:

    [HEAD, b"data: 1\n\n", Until(gate), b"data: 2\n\n", Close()]

Bytes are sent at once. The client sends and reads raw bytes; `h11`, which shares no line with the
proxy, says what a correct reader makes of them.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import h11

from tests.canaries import CLIENT_KEY, PROMPT

PATIENCE = 10.0  # seconds: a test that waits longer has failed


@dataclass
class Until:
    """Goes on when the event is set."""

    event: asyncio.Event


@dataclass
class Close:
    """Ends the connection in order (FIN)."""


@dataclass
class Reset:
    """Ends the connection with a reset (RST)."""


@dataclass
class UntilGone:
    """Goes on when the proxy has closed its side."""


@dataclass
class AnswerEarly:
    """Plays on without waiting for the rest of the request's body; only as the first step."""


Step = bytes | Until | Close | Reset | UntilGone | AnswerEarly


@dataclass
class Request:
    """One request as it arrived."""

    line: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""
    raw_body: bytes = b""
    complete: bool = False

    def values(self, name: str) -> list[bytes]:
        return [value for key, value in self.headers if key.lower() == name.lower().encode()]


@dataclass
class Upstream:
    """A scripted server. `scripts` are played one after another; the last one again and again."""

    port: int = 0
    scripts: list[Sequence[Step]] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    gone_at: float | None = None
    sent: int = 0
    got_head: asyncio.Event = field(default_factory=asyncio.Event)
    got_request: asyncio.Event = field(default_factory=asyncio.Event)

    def plays(self, *steps: Step) -> None:
        """From now on every request is answered so."""
        self.scripts = [steps]

    def plays_first(self, *steps: Step) -> None:
        """Before all others."""
        self.scripts.insert(0, steps)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.gone_at = time.monotonic()
            self.gone.set()
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        line, *fields = head[:-4].split(b"\r\n")
        request = Request(line, [_split(each) for each in fields])
        self.requests.append(request)
        self.got_head.set()
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        body = asyncio.create_task(self._read_body(reader, request))
        try:
            if not any(isinstance(step, AnswerEarly) for step in script):
                await body
            for step in script:
                if not await self._play(step, reader, writer):
                    return False
            await body
        finally:
            body.cancel()
        return True

    async def _read_body(self, reader: asyncio.StreamReader, request: Request) -> None:
        if request.values("transfer-encoding") == [b"chunked"]:
            while True:
                size = await reader.readuntil(b"\r\n")
                data = await reader.readexactly(int(size, 16) + 2)
                request.raw_body += size + data
                request.body += data[:-2]
                if len(data) == 2:
                    break
        elif lengths := request.values("content-length"):
            left = int(lengths[0])
            while left:
                data = await reader.read(min(left, 65536))
                if not data:
                    raise ConnectionResetError
                request.body += data
                left -= len(data)
        request.complete = True
        self.got_request.set()

    async def _play(
        self, step: Step, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        match step:
            case bytes():
                for start in range(0, len(step), 65536):
                    writer.write(step[start : start + 65536])
                    await writer.drain()
                    self.sent += len(step[start : start + 65536])
            case Until(event):
                await event.wait()
            case UntilGone():
                while await reader.read(65536):
                    pass
                return False
            case Close():
                return False
            case Reset():
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, linger
                )
                writer.transport.abort()
                return False
        return True


def _split(field: bytes) -> tuple[bytes, bytes]:
    name, _, value = field.partition(b":")
    return name, value.strip()


@dataclass
class Reply:
    """What a correct HTTP/1.1 reader makes of an answer. `whole` is false for a cut one."""

    status: int
    reason: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytearray
    whole: bool

    def values(self, name: str) -> list[bytes]:
        return [value for key, value in self.headers if key.lower() == name.lower().encode()]


class Client:
    """A client's connection as raw bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.seen = bytearray()

    @classmethod
    async def connect(cls, port: int, *, limit: int = 2**16) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=limit))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def until(self, text: bytes) -> bytearray:
        """Reads on until `text` has come; returns all that has been seen."""
        async with asyncio.timeout(PATIENCE):
            while text not in self.seen:
                data = await self.reader.read(65536)
                if not data:
                    raise AssertionError(f"the connection ended before {text!r}: {self.seen!r}")
                self.seen += data
        return self.seen

    async def rest(self) -> bytearray:
        """Reads to the connection's end, however it ends."""
        async with asyncio.timeout(PATIENCE):
            try:
                while data := await self.reader.read(65536):
                    self.seen += data
            except ConnectionError:
                pass
        return self.seen

    async def reply(self, method: str = "POST") -> Reply:
        """One answer; reads no further than its end, or to the end of the connection."""
        connection = h11.Connection(h11.CLIENT)
        head = h11.Request(method=method, target="/", headers=[("Host", "x")])
        connection.send(head)
        connection.send(h11.EndOfMessage())
        if self.seen:  # h11 takes no bytes for the end of the connection
            connection.receive_data(bytes(self.seen))
        reply: Reply | None = None
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    event = connection.next_event()
                except h11.RemoteProtocolError:
                    assert reply is not None, self.seen
                    return reply
                if event is h11.NEED_DATA:
                    connection.receive_data(await self._read())
                elif isinstance(event, h11.Response):
                    raw = event.headers.raw_items()
                    reply = Reply(
                        event.status_code, event.reason, list(raw), bytearray(), whole=False
                    )
                elif isinstance(event, h11.Data):
                    assert reply is not None
                    reply.body += event.data
                elif isinstance(event, h11.EndOfMessage):
                    assert reply is not None
                    reply.whole = True
                    self.seen = bytearray(connection.trailing_data[0])
                    return reply
                elif not isinstance(event, h11.InformationalResponse):
                    raise AssertionError(f"{event} after {self.seen!r}")

    async def _read(self) -> bytes:
        try:
            data = await self.reader.read(65536)
        except ConnectionError:
            raise h11.RemoteProtocolError("reset") from None
        self.seen += data
        return data

    def close(self) -> None:
        self.writer.close()

    def abort(self) -> None:
        self.writer.transport.abort()


def post(
    body: bytes = b'{"model":"m","stream":true,"prompt":"%b"}' % PROMPT.encode(),
    *fields: str,
    path: str = "/v1/chat/completions",
    content_type: str = "application/json",
) -> bytes:
    """The bytes of one POST."""
    own = ("Host: sluice", f"Content-Type: {content_type}", f"api-key: {CLIENT_KEY}")
    lines = [f"POST {path} HTTP/1.1", *own, *fields]
    if not any(field.lower().startswith("transfer-encoding") for field in fields):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def get(path: str = "/v1/models", *fields: str, method: str = "GET") -> bytes:
    """The bytes of one request without a body."""
    return (
        "\r\n".join([f"{method} {path} HTTP/1.1", "Host: sluice", *fields]).encode() + b"\r\n\r\n"
    )


def chunked(*pieces: bytes) -> bytes:
    """The pieces as one chunk each, without the last chunk."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


LAST = b"0\r\n\r\n"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def json_answer(body: bytes, *fields: bytes, status: bytes = b"200 OK") -> bytes:
    """A whole JSON answer with a Content-Length."""
    head = [b"HTTP/1.1 " + status, b"Content-Type: application/json", *fields]
    head.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(head) + b"\r\n\r\n" + body
