"""An upstream that may be killed at any moment: `python -m tests.process.mortal PORT JOURNAL`.

Each request brings the script of its own answer. The upstream's name is the journal's stem. Every
piece of an answer names the upstream and the prompt, so that a splice of two answers shows.

The journal outlives its upstream; each life appends what it does, a line each:

    received PROMPT     the request has been read
    first PROMPT        the first piece of its answer's body is with the kernel
    answered PROMPT     and so is its last byte

With the kernel: asyncio's own loop sends within `write`, where uvloop collects. So a line that
stands here is true, even if the upstream was killed right behind it.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import msgspec

from tests.canaries import COMPLETION, PROMPT
from tests.flow.wire import LAST, STREAM, chunked

_JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)


class Script(msgspec.Struct, frozen=True):
    """How a prompt is answered: so many pieces, after pauses in seconds."""

    prompt: str  # its id
    pieces: int = 3
    before_head: float = 0.0
    before_first: float = 0.0  # between the head and the first piece
    between: float = 0.0  # two parts of a piece, two pieces


class Ask(msgspec.Struct, frozen=True):
    """A chat completion request."""

    model: str
    script: Script
    stream: bool = True

    def body(self) -> bytes:
        """As it stands on the wire, with its prompt where prompts stand."""
        said = {"role": "user", "content": f"{PROMPT} {self.script.prompt}"}
        return msgspec.json.encode(msgspec.to_builtins(self) | {"messages": [said]})

    def answer(self, upstream: str) -> list[bytes]:
        """The pieces of the body with which the upstream of that name answers."""
        pieces = [
            b'{"upstream":"%b","prompt":"%b","n":%d,"choices":[{"delta":{"content":"%b"}}]}'
            % (upstream.encode(), self.script.prompt.encode(), n, COMPLETION.encode())
            for n in range(self.script.pieces)
        ]
        if self.stream:
            return [b"data: %b\n\n" % each for each in [*pieces, b"[DONE]"]]
        return [b"[" + pieces[0], *(b"," + each for each in pieces[1:]), b"]"]


class Mortal:
    """One life of an upstream. `journal` is a file opened to append."""

    def __init__(self, name: str, journal: int) -> None:
        self._name = name
        self._journal = journal

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            async for ask in _asks(reader):
                await self._answer(ask, writer)
        writer.close()

    async def _answer(self, ask: Ask, writer: asyncio.StreamWriter) -> None:
        script, pieces = ask.script, ask.answer(self._name)
        self._note("received", ask)
        await asyncio.sleep(script.before_head)
        writer.write(STREAM if ask.stream else _JSON % sum(map(len, pieces)))
        await asyncio.sleep(script.before_first)
        for n, piece in enumerate(pieces):
            for part in piece[:10], piece[10:]:  # so that it may die within an event
                await asyncio.sleep(script.between)
                writer.write(chunked(part) if ask.stream else part)
                await writer.drain()  # raises if the proxy has left
            if n == 0:
                self._note("first", ask)
        writer.write(LAST if ask.stream else b"")
        self._note("answered", ask)

    def _note(self, word: str, ask: Ask) -> None:
        os.write(self._journal, f"{word} {ask.script.prompt}\n".encode())


async def _asks(reader: asyncio.StreamReader) -> AsyncIterator[Ask]:
    """The requests of one connection."""
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(head)
        assert length is not None
        yield msgspec.json.decode(await reader.readexactly(int(length[1])), type=Ask)


async def _main(port: int, path: Path) -> None:
    journal = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    # Its port is reserved for it while it is dead, hence reuse_port.
    server = await asyncio.start_server(
        Mortal(path.stem, journal).serve, "127.0.0.1", port, backlog=1024, reuse_port=True
    )
    print("listening", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), Path(sys.argv[2])))
