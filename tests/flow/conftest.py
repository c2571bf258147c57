"""One proxy in front of one scripted upstream, on loopback, in the test's own event loop."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from proxy import config
from proxy.app import App
from proxy.downstream import Server
from proxy.exchange import Exchange
from tests import canaries
from tests.flow.wire import PATIENCE, Client, Reply, Upstream


@dataclass
class Sluice:
    """A running proxy; `ended` collects the records of its requests."""

    app: App
    server: Server
    port: int
    upstream: Upstream
    ended: list[Exchange]
    clients: list[Client]

    async def connect(self, *, limit: int = 2**16) -> Client:
        client = await Client.connect(self.port, limit=limit)
        self.clients.append(client)
        return client

    async def ask(self, request: bytes, *, method: str = "POST") -> Reply:
        """One request on a connection of its own, and its answer."""
        client = await self.connect()
        try:
            await client.send(request)
            return await client.reply(method)
        finally:
            client.abort()

    async def record(self, count: int = 1) -> Exchange:
        """The record of the `count`th request, once it has ended."""
        async with asyncio.timeout(PATIENCE):
            while len(self.ended) < count:
                await asyncio.sleep(0.001)
        return self.ended[count - 1]


Start = Callable[..., Awaitable[Sluice]]


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with listening(Upstream()) as scripted:
        yield scripted


@asynccontextmanager
async def listening(
    upstream: Upstream, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Upstream]:
    """Lets `upstream` play on a port of its own."""
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(upstream.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=2**20, ssl=tls)
    upstream.port = server.sockets[0].getsockname()[1]
    try:
        yield upstream
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


@pytest.fixture
async def start(upstream: Upstream, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts a proxy. `settings` is YAML beside the upstream's; `up` stands inside of it."""
    async with AsyncExitStack() as stack:

        async def start(
            settings: str = "",
            *,
            up: str = "",
            base: str = "/v1",
            scheme: str = "http",
            host: str = "127.0.0.1",
        ) -> Sluice:
            path = tmp_path / "config.yaml"
            url = f"{scheme}://{host}:{upstream.port}{base}"
            path.write_text(f"upstreams: {{up: {{base_url: '{url}', {up}}}}}\n{settings}\n")
            app = App(config.load(path, {}))
            server, port = await serve(app, stack)
            clients: list[Client] = []
            stack.callback(_abort_all, clients)
            return Sluice(app, server, port, upstream, _collect(app), clients)

        yield start


async def serve(app: App, stack: AsyncExitStack) -> tuple[Server, int]:
    """Lets a proxy listen on a port, until `stack` is left."""
    stack.push_async_callback(app.close)
    stack.callback(_search_metrics, app)
    server = app.server()
    stack.push_async_callback(server.shutdown, 0.1)
    bound = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    stack.callback(bound.close)
    return server, bound.sockets[0].getsockname()[1]


def _abort_all(clients: list[Client]) -> None:
    for client in clients:
        client.abort()


def _search_metrics(app: App) -> None:
    canaries.search(app.observer.render(), canaries.here("metrics"))


def _collect(app: App) -> list[Exchange]:
    """All records, as they are written down, searched with the errors that clients were told."""
    ended: list[Exchange] = []
    write = app.observer._write

    def written(exchange: Exchange) -> None:
        ended.append(exchange)
        write(exchange)
        canaries.search(repr(exchange), canaries.here("a record"))
        if exchange.error is not None:
            body = exchange.error.body(exchange.dialect)
            canaries.search(body, canaries.here("an error"))

    app.observer._write = written  # type: ignore[method-assign]
    return ended


@pytest.fixture
async def sluice(start: Start) -> Sluice:
    """A proxy with the defaults."""
    return await start()
