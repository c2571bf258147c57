"""The whole proxy without its sockets: bytes of requests in, bytes of answers out."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import h11
import pytest

from proxy import config
from proxy.app import App
from proxy.connection import UpstreamConnection
from proxy.downstream import ClientConnection
from proxy.errors import ProxyError
from proxy.exchange import Outcome
from proxy.pool import Pool

DEMO = "upstreams:\n  demo: {base_url: 'demo://'}\n"
ROUTED = "routes: [{models: ['*'], upstreams: [up]}]\n"
CHAT = b'{"model":"sluice-demo","messages":[{"role":"user","content":"Hi!"}]}'


class Transport(asyncio.Transport):
    """A client that reads all at once; `news` is set with every write."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1)})
        self.written = b""
        self.ended = False
        self.news = asyncio.Event()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data
        self.news.set()

    def is_closing(self) -> bool:
        return self.ended

    def close(self) -> None:
        self.ended = True
        self.news.set()

    abort = close

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class Reply:
    def __init__(self, response: h11.Response, body: bytes, ended: bool) -> None:
        self.status = response.status_code
        self.headers = {name.decode(): value.decode() for name, value in response.headers}
        self.body, self.ended = body, ended

    @property
    def code(self) -> Any:
        return json.loads(self.body)["error"]["code"]


class Story:
    """One proxy, asked on one connection after another."""

    def __init__(self, app: App) -> None:
        self.app = app
        app._demo._pace = 0
        self.connections: list[ClientConnection] = []

    def says(self, data: bytes, *, admin: bool = False) -> Transport:
        connection, transport = self.app.server(admin=admin)(), Transport()
        connection.connection_made(transport)
        connection.data_received(data)
        self.connections.append(connection)
        return transport

    async def asks(
        self,
        path: str,
        method: str = "GET",
        body: bytes = b"",
        *,
        admin: bool = False,
        **fields: str,
    ) -> Reply:
        lines = [f"{method} {path} HTTP/1.1", "Host: sluice"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
        if body:
            lines += [f"Content-Length: {len(body)}", "Content-Type: application/json"]
        transport = self.says("\r\n".join(lines).encode() + b"\r\n\r\n" + body, admin=admin)
        return await read(transport, method)

    def close(self) -> None:
        for each in self.connections:
            each.connection_lost(None)


async def read(transport: Transport, method: str = "GET") -> Reply:
    """One answer, as h11 reads it."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    connection.send(h11.EndOfMessage())
    taken, body, response = 0, b"", None
    async with asyncio.timeout(10):
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                while taken == len(transport.written):
                    transport.news.clear()
                    await transport.news.wait()
                connection.receive_data(transport.written[taken:])
                taken = len(transport.written)
            elif isinstance(event, h11.Response):
                response = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert response is not None
                await asyncio.sleep(0)
                return Reply(response, body, transport.ended)


Start = Callable[..., Story]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    begun: list[Story] = []

    def start(settings: str = "") -> Story:
        begun.append(Story(App(load(tmp_path, settings))))
        return begun[-1]

    yield start
    for story in begun:
        story.close()
        await asyncio.sleep(0)
        await story.app.close()


def load(tmp_path: Path, settings: str) -> config.Config:
    path = tmp_path / "config.yaml"
    path.write_text(DEMO + settings)
    return config.load(path, {})


@pytest.fixture
async def story(start: Start) -> Story:
    return start()


async def test_a_relayed_answer(story: Story) -> None:
    reply = await story.asks("/v1/chat/completions", "POST", CHAT, X_Request_Id="mine-1")
    assert reply.status == 200
    assert "Hi!" in json.loads(reply.body)["choices"][0]["message"]["content"]
    assert reply.headers["sluice-request-id"] == "mine-1"
    assert reply.headers["sluice-upstream"] == "demo"
    assert reply.headers["sluice-attempts"] == "1"
    assert not reply.ended


async def test_an_id_that_cannot_be_used_is_replaced(story: Story) -> None:
    reply = await story.asks("/v1/models", X_Request_Id="a b")
    assert len(reply.headers["sluice-request-id"]) == 24


@pytest.mark.parametrize(
    ("path", "method", "status", "code"),
    [
        ("/", "GET", 404, "unknown_url"),
        ("/v1", "GET", 404, "unknown_url"),
        ("/metricsx", "GET", 404, "unknown_url"),
        ("/v1/%2e%2e/models", "GET", 400, "invalid_path"),
        ("/v1/models", "TRACE", 405, "method_not_allowed"),
        ("/livez", "POST", 405, "method_not_allowed"),
    ],
)
async def test_errors_are_answers(
    story: Story, path: str, method: str, status: int, code: str
) -> None:
    reply = await story.asks(path, method)
    assert (reply.status, reply.code) == (status, code)
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["server"] == "sluice"
    assert len(reply.headers["sluice-request-id"]) == 24


async def test_errors_speak_the_dialect_of_their_path(start: Start) -> None:
    story = start("routes: [{models: [x], upstreams: [demo]}]")
    reply = await story.asks("/v1/messages?a", "POST", b"{}")
    assert json.loads(reply.body)["type"] == "error"
    assert reply.code == "model_not_found"


async def test_own_paths(story: Story) -> None:
    for path in ("/livez", "/readyz", "/metrics"):
        reply = await story.asks(path)
        assert reply.status == 200
        assert reply.headers["server"] == "sluice"
        assert "sluice-request-id" in reply.headers
    # Requests to the proxy's own paths are not counted.
    assert b"sluice_requests_total{" not in (await story.asks("/metrics")).body


async def test_an_admin_port_takes_them_away(start: Start) -> None:
    story = start("admin: {port: 9, key: admin-key}")
    assert (await story.asks("/metrics")).code == "unknown_url"
    assert (await story.asks("/admin/streams")).code == "unknown_url"
    assert (await story.asks("/livez")).status == 200
    assert (await story.asks("/metrics", admin=True)).status == 200
    assert (await story.asks("/admin/streams", admin=True)).code == "invalid_api_key"
    assert (await story.asks("/v1/models", admin=True)).code == "unknown_url"


async def test_what_is_no_request_counts_like_one(story: Story) -> None:
    reply = await read(story.says(b"NONSENSE\r\n\r\n"))
    assert (reply.status, reply.code, reply.ended) == (400, "invalid_request", True)
    assert "sluice-request-id" in reply.headers
    metrics = (await story.asks("/metrics")).body
    assert b'client="anonymous",code="400",model="other",route="none"} 1' in metrics


# Browsers ---------------------------------------------------------------------------------------

PAGE = "https://chat.example"


async def test_a_preflight(start: Start) -> None:
    story = start(f"cors: {{origins: ['{PAGE}']}}")
    asking: dict[str, Any] = {
        "Access_Control_Request_Method": "POST",
        "Access_Control_Request_Headers": "a,b",
    }
    reply = await story.asks("/v1/chat/completions", "OPTIONS", Origin=PAGE, **asking)
    assert (reply.status, reply.body) == (204, b"")
    assert reply.headers["access-control-allow-origin"] == PAGE
    assert reply.headers["access-control-allow-headers"] == "a,b"
    reply = await story.asks("/v1/models", "OPTIONS", Origin="https://evil.example", **asking)
    assert (reply.status, reply.code) == (403, "origin_not_allowed")


async def test_every_answer_bears_the_cors_headers(start: Start) -> None:
    story = start(f"cors: {{origins: ['{PAGE}']}}")
    for path in ("/v1/models", "/nowhere", "/livez"):
        reply = await story.asks(path, Origin=PAGE)
        assert reply.headers["access-control-allow-origin"] == PAGE
        assert reply.headers["vary"] == "Origin"


async def test_another_sites_page(story: Story) -> None:
    reply = await story.asks("/v1/models", Sec_Fetch_Site="cross-site")
    assert (reply.status, reply.code) == (403, "origin_not_allowed")


# Endings ----------------------------------------------------------------------------------------


async def test_draining_and_refusing(story: Story) -> None:
    story.app.draining = True
    assert (await story.asks("/readyz")).status == 503
    assert (await story.asks("/v1/models")).status == 200
    story.app.refusing = True
    reply = await story.asks("/v1/models")
    assert (reply.status, reply.code, reply.ended) == (503, "shutting_down", True)
    assert reply.headers["connection"] == "close"
    assert int(reply.headers["retry-after"]) >= 1
    assert (await story.asks("/livez")).status == 200


async def test_an_interruption_before_the_head_is_an_answer(story: Story) -> None:
    story.app._demo._pace = 60
    transport = story.says(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: s\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(CHAT), CHAT)
    )
    async with asyncio.timeout(10):
        while not [each for each in story.app.observer.in_flight.values() if each.forwarded]:
            await asyncio.sleep(0)
    [exchange] = story.app.observer.in_flight.values()
    exchange.interrupt(ProxyError("shutting_down", "Enough."))
    reply = await read(transport, "POST")
    assert (reply.status, reply.code) == (503, "shutting_down")
    assert exchange.outcome is Outcome.SHUTDOWN


async def test_a_mistake_of_ours_is_an_answer_too(
    story: Story, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: object) -> None:
        raise ValueError("secret")

    monkeypatch.setattr(story.app._setup.cors, "judge", fails)
    with caplog.at_level(logging.ERROR, "sluice.app"):
        reply = await story.asks("/v1/models")
    assert (reply.status, reply.code) == (500, "internal_error")
    assert b"secret" not in reply.body
    assert [record.getMessage() for record in caplog.records] == ["internal_error"]
    assert caplog.records[0].exc_info is not None


async def test_a_reload_holds_for_new_requests(start: Start, tmp_path: Path) -> None:
    story = start()
    assert (await story.asks("/v1/models")).status == 200
    story.app.reload(load(tmp_path, f"cors: {{origins: ['{PAGE}']}}\nmax_body: 5"))
    reply = await story.asks("/v1/chat/completions", "POST", CHAT, Origin=PAGE)
    assert (reply.status, reply.code) == (413, "request_too_large")
    assert reply.headers["access-control-allow-origin"] == PAGE


class Up:
    """An upstream whose connections are made when the test lets them."""

    def __init__(self) -> None:
        self.knocks = 0
        self.opens = asyncio.Event()
        self.transports: list[Transport] = []

    async def connect(self) -> UpstreamConnection:
        self.knocks += 1
        await self.opens.wait()
        connection = UpstreamConnection("up")
        self.transports.append(Transport())
        connection.connection_made(self.transports[-1])
        return connection

    async def knocked(self) -> None:
        async with asyncio.timeout(10):
            while not self.knocks:
                await asyncio.sleep(0)

    async def heard(self) -> bytes:
        """The first request that went up."""
        self.opens.set()
        async with asyncio.timeout(10):
            while not self.transports or not self.transports[0].written:
                await asyncio.sleep(0)
        return self.transports[0].written


def asking(*fields: str) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: s", "Content-Type: application/json"]
    lines += [*fields, f"Content-Length: {len(CHAT)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + CHAT


async def test_who_waits_for_an_upstream_goes_up_with_the_key_of_now(
    start: Start, tmp_path: Path
) -> None:
    def settings(key: str) -> str:
        return f"  up: {{base_url: 'http://up.example', api_key: {key}}}\n" + ROUTED

    story, up = start(settings("sk-first")), Up()
    story.app._setup.upstreams["up"].pool = Pool(up.connect)
    story.says(asking())
    await up.knocked()
    story.app.reload(load(tmp_path, settings("sk-second")))
    sent = await up.heard()
    assert b"Bearer sk-second" in sent
    assert b"sk-first" not in sent


async def test_a_clients_key_never_goes_up_whatever_a_reload_says_meanwhile(
    start: Start, tmp_path: Path
) -> None:
    # interface.md, §3: `A key that identified a client never goes up, whatever auth`. Where there are
    # no clients any more, the credentials of later requests are their own.
    upstream = "  up: {base_url: 'http://up.example'}\n" + ROUTED
    story, up = start(upstream + "clients: [{name: web, key: the-clients-key}]\n"), Up()
    story.app._setup.upstreams["up"].pool = Pool(up.connect)
    story.says(asking("Authorization: Bearer the-clients-key"))
    await up.knocked()
    story.app.reload(load(tmp_path, upstream))
    assert b"the-clients-key" not in await up.heard()


async def test_a_reload_that_cannot_be_built_changes_nothing(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = start("  up: {base_url: 'http://up.example', api_key: sk-first}\n" + ROUTED)
    before, terms = story.app._setup, story.app._setup.upstreams["up"].terms

    def fails(*_: object, **__: object) -> None:
        raise OSError("no descriptors left")

    later = load(tmp_path, "  up: {base_url: 'http://other.example', api_key: sk-2}\n" + ROUTED)
    for part in "Auth", "Router", "Cors":
        with monkeypatch.context() as patch:
            patch.setattr(f"proxy.app.{part}", fails)
            with pytest.raises(OSError, match="no descriptors"):
                story.app.reload(later)
        assert story.app._setup is before
        assert story.app._setup.upstreams["up"].terms is terms, part


async def test_what_a_reload_removes_is_forgotten(start: Start, tmp_path: Path) -> None:
    story = start("  up: {base_url: 'http://up.example'}\n")
    gone = story.app._setup.upstreams["up"]
    metrics = (await story.asks("/metrics")).body
    assert b'sluice_upstream_up{upstream="up"} 1.0' in metrics
    story.app.reload(load(tmp_path, ""))
    assert repr(gone.pool) == "<Pool idle=0 closed>"
    metrics = (await story.asks("/metrics")).body
    assert b'upstream="up"' not in metrics
    assert b'sluice_upstream_up{upstream="demo"} 1.0' in metrics


async def test_trusted_addresses_are_traced_at_debug(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    story = start("trusted_proxies: [127.0.0.0/8]")
    with caplog.at_level(logging.DEBUG, "sluice.app"):
        await story.asks("/v1/models", X_Forwarded_For="6.6.6.6, 1.2.3.4")
    [fields] = [record.fields for record in caplog.records if record.msg == "received"]  # type: ignore[attr-defined]
    assert fields["address"] == "1.2.3.4"
