"""One proxy in front of several scripted upstreams: a, b and c, candidates in this order.

    three = await several("attempts: 2", a="api_key: sk-a")
    three.a.plays(BUSY)
    three.b.plays(STREAM, chunked(said("b")), LAST)
    reply = await three.ask(post())

Behind each test nothing may be left: no request in progress, no upstream's connection, no place
taken at one. And no request may have run into a fault of the proxy itself.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from proxy import config
from proxy.app import App
from proxy.exchange import Exchange
from tests.flow.conftest import Sluice, _abort_all, _collect, listening, serve
from tests.flow.wire import PATIENCE, Client, Reply, Step, Until, Upstream, chunked, json_answer

DONE = b"data: [DONE]\n\n"
USED = b'{"prompt_tokens":7,"completion_tokens":13,"total_tokens":20}'
USAGE = b'data: {"choices":[],"usage":' + USED + b"}\n\n"


def said(text: str) -> bytes:
    """A chat completion's event with content."""
    return b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % text.encode()


def refusal(status: bytes, text: str, *fields: bytes) -> bytes:
    """A whole error answer, of an upstream that says `text`."""
    body = {"error": {"message": text, "type": "theirs", "param": None, "code": "their_code"}}
    return json_answer(json.dumps(body).encode(), *fields, status=status)


class Pause(asyncio.Event):
    """Comes by itself."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    async def wait(self) -> bool:  # type: ignore[override]
        await asyncio.sleep(self._seconds)
        return True


def after(seconds: float) -> Until:
    """A step that goes on after some time."""
    return Until(Pause(seconds))


def paced(pieces: Iterable[bytes], seconds: float) -> list[Step]:
    """Steps that send each piece as a chunk, with some time behind it."""
    return [step for piece in pieces for step in (chunked(piece), after(seconds))]


@dataclass
class Candidate(Upstream):
    """An upstream among several."""

    name: str = ""
    open: int = 0  # connections

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            await super().serve(reader, writer)
        finally:
            self.open -= 1

    @property
    def asked(self) -> int:
        """How many requests have come."""
        return len(self.requests)

    async def has_request(self) -> None:
        """Waits until one has come whole, since `got_request` was cleared."""
        await asyncio.wait_for(self.got_request.wait(), PATIENCE)

    async def is_left(self) -> None:
        """Waits until a connection has ended, since `gone` was cleared."""
        await asyncio.wait_for(self.gone.wait(), PATIENCE)


@dataclass
class Several(Sluice):
    """A running proxy, and its upstreams."""

    a: Candidate = field(default_factory=Candidate)
    b: Candidate = field(default_factory=Candidate)
    c: Candidate = field(default_factory=Candidate)

    @property
    def asked(self) -> dict[str, int]:
        """How many requests each upstream has got."""
        return {each.name: each.asked for each in (self.a, self.b, self.c) if each.asked}

    async def settled(self) -> None:
        """Waits until no request is in progress."""
        await _until(lambda: not self.app.observer.in_flight)

    async def leave(self, client: Client, *, reset: bool = False) -> None:
        """Lets a client, the only one, hang up, and waits until the proxy knows."""
        client.abort() if reset else client.close()
        await _until(lambda: not self.server.connections)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        text = self.app.observer.render().decode()
        samples = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
        return sum(float(value) for own, value in samples if wanted <= set(own.split(",")))

    @property
    def up(self) -> dict[str, float]:
        """The gauge of each upstream that is in rotation or out of it."""
        return {name: self.metric("sluice_upstream_up", upstream=name) for name in "abc"}


Begin = Callable[..., Awaitable[Several]]


@asynccontextmanager
async def _deserted() -> AsyncIterator[int]:
    """A port on which nobody listens, and which nobody else can take."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture(name="several")
async def several_upstreams(tmp_path: Path) -> AsyncIterator[Begin]:
    """Starts a proxy with one route over a, b and c.

    `route` stands inside of that route, `among` are its candidates, and `routes` replaces it. `a`,
    `b` and `c` stand inside of those upstreams, `each` in all of them; `absent` are upstreams that
    refuse connections, `mute` ones with which no TLS handshake is ever finished.
    """
    async with AsyncExitStack() as stack:

        async def begin(
            route: str = "attempts: 3",
            *,
            among: str = "a, b, c",
            routes: str = "",
            each: str = "",
            settings: str = "",
            absent: str = "",
            mute: str = "",
            **own: str,
        ) -> Several:
            lines = ["upstreams:"]
            upstreams = {}
            for name in "abc":
                upstream = upstreams[name] = Candidate(name=name)
                await stack.enter_async_context(listening(upstream))
                port = upstream.port
                if name in absent:
                    port = await stack.enter_async_context(_deserted())
                scheme = "https" if name in mute else "http"
                parts = [f"base_url: '{scheme}://127.0.0.1:{port}/v1'", each, own.get(name, "")]
                lines.append(f"  {name}: {{{', '.join(filter(None, parts))}}}")
            one = ", ".join(filter(None, [f"name: r, models: ['*'], upstreams: [{among}]", route]))
            lines += [f"routes: {routes or f'[{{{one}}}]'}", settings]
            path = tmp_path / "several.yaml"
            path.write_text("\n".join(lines) + "\n")
            app = App(config.load(path, {}))
            stack.push_async_callback(_until, lambda: not any(map(_is_open, upstreams.values())))
            server, port = await serve(app, stack)
            clients: list[Client] = []
            ended = _collect(app)
            stack.callback(_no_fault_of_ours, ended)
            stack.push_async_callback(_until, lambda: not _in_progress(app))
            stack.callback(_abort_all, clients)
            return Several(app, server, port, upstreams["a"], ended, clients, **upstreams)

        yield begin


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():
            await asyncio.sleep(0.001)


def _in_progress(app: App) -> bool:
    """Whether any request is, or any upstream believes so."""
    upstreams = app._setup.upstreams.values()
    return bool(app.observer.in_flight) or any(each.in_progress for each in upstreams)


def _no_fault_of_ours(ended: list[Exchange]) -> None:
    assert "internal_error" not in [record.error.code for record in ended if record.error]


def _is_open(upstream: Candidate) -> bool:
    return upstream.open > 0


def error_in(event: bytes | bytearray) -> dict[str, Any]:
    """The error object of one chat error event, which is all there is."""
    assert event.startswith(b"data: ") and event.endswith(b"\n\n") and event.count(b"\n") == 2
    error: dict[str, Any] = json.loads(event[6:])["error"]
    return error


def error_of(reply: Reply) -> dict[str, Any]:
    """The error object of an answer."""
    error: dict[str, Any] = json.loads(reply.body)["error"]
    return error


def source_of(reply: Reply) -> tuple[str, int]:
    """Whose answer the client was told it is, and after how many attempts."""
    (upstream,), (attempts,) = reply.values("sluice-upstream"), reply.values("sluice-attempts")
    return upstream.decode(), int(attempts)


def stream_of(name: str) -> bytes:
    """The chunks of a short stream that says who it is from; without the last one."""
    return chunked(said(f"from {name}"), USAGE, DONE)


def text_of(name: str) -> bytes:
    """What a client reads of `stream_of`."""
    return said(f"from {name}") + USAGE + DONE
