"""An upstream whose answers have no end: `python -m tests.process.endless PORT`.

The last word of a request's path chooses the answer. `/open` tells how many connections are open
besides the one that asks.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable

import uvloop

from tests.flow.wire import LAST, STREAM, chunked, json_answer

CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = chunked(*[b'data: {"choices":[{"delta":{"content":"word "}}]}\n\n'] * 5)
INTERIM = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def once(answer: bytes) -> Answer:
    """Answers with these bytes, and is ready for another request."""

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    return serve


def endlessly(start: bytes, piece: bytes, pause: float = 0.0) -> Answer:
    """Begins an answer, and goes on with the same piece for as long as anybody takes it."""

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)

    return serve


async def take_all(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    while await reader.read(1024 * 1024):
        pass


async def take_nothing(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
    await asyncio.sleep(10)  # for longer than anybody waits for it
    raise ConnectionAbortedError


ANSWERS: dict[str, Answer] = {
    "small": once(json_answer(b'{"object":"list","data":[]}')),
    "medium": once(json_answer(b" " * 16 * 1024)),
    "stream": once(STREAM + EVENTS + chunked(b"data: [DONE]\n\n") + LAST),
    # Without an end:
    "huge": endlessly(CHUNKED, chunked(bytes(64 * 1024))),
    "huge-stream": endlessly(STREAM, EVENTS * 200),
    "crumbs": endlessly(CHUNKED, chunked(b"x") * 10_000),
    "interim": endlessly(b"", INTERIM * 100),
    "slow-interim": endlessly(b"", INTERIM, 0.1),
    "slow-head": endlessly(b"HTTP/1.1 200 OK\r\nX-A: ", b"a", 0.05),
    "fat-head": endlessly(b"HTTP/1.1 200 OK\r\n", b"X-A: %b\r\n" % (b"a" * 1000)),
    "trailers": endlessly(CHUNKED + b"0\r\n", b"X-A: a\r\n" * 100),
    "extension": endlessly(CHUNKED + b"1;", b"a" * 1000),
    # And those who read the request's body themselves:
    "take-all": take_all,
    "take-nothing": take_nothing,
}
_open = 0


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    global _open  # noqa: PLW0603  # one program, one count
    _open += 1
    try:
        while True:
            await _exchange(reader, writer)
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        _open -= 1
        writer.close()


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    kind = head.split(b" ", 2)[1].rpartition(b"/")[2].decode()
    if kind == "open":
        writer.write(json_answer(b"%d" % (_open - 1)))
        return
    length = re.search(rb"\r\ncontent-length: (\d+)", head, re.IGNORECASE)
    if length and not kind.startswith("take-"):
        await reader.readexactly(int(length[1]))
    await ANSWERS.get(kind, ANSWERS["small"])(reader, writer)
    await writer.drain()


async def _main(port: int) -> None:
    server = await asyncio.start_server(_serve, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_main(int(sys.argv[1])))
