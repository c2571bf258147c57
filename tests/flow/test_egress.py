"""Upstreams behind a forward proxy: what it is told, what it is not, and how it can fail."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from proxy.exchange import Outcome
from tests.canaries import UPSTREAM_KEY
from tests.flow.conftest import Sluice, Start, listening
from tests.flow.wire import LAST, STREAM, Close, Reset, Step, Upstream, chunked, json_answer, post

CERTS = Path(__file__).parent / "certs"
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
OK = b"HTTP/1.1 200 Connection established\r\n\r\n"


@dataclass
class ForwardProxy:
    """Answers each CONNECT with `says`; if that opens the tunnel, passes bytes both ways."""

    port: int = 0
    says: list[Step] = field(default_factory=lambda: [OK])
    leads_on: bool = True
    asked: list[bytes] = field(default_factory=list)
    passed: bytearray = field(default_factory=bytearray)  # what the tunnels carried to upstreams
    connections: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.asked.append(head)
            scripted = Upstream()
            for step in self.says:
                if not await scripted._play(step, reader, writer):
                    return
            if self.leads_on:
                _, _, port = head.split(b" ")[1].rpartition(b":")
                await self._lead_on(int(port), reader, writer)
            else:
                self.passed += await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.gone.set()
            writer.close()

    async def _lead_on(
        self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        answers, requests = await asyncio.open_connection("127.0.0.1", port)
        back = asyncio.create_task(_pump(answers, writer))
        try:
            while data := await reader.read(65536):
                self.passed += data
                requests.write(data)
                await requests.drain()
        finally:
            back.cancel()
            requests.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


@pytest.fixture
async def forward() -> AsyncIterator[ForwardProxy]:
    forward = ForwardProxy()
    async with listening(forward):  # type: ignore[arg-type]
        yield forward


Secured = Callable[..., Awaitable[Sluice]]


@pytest.fixture
async def secured(
    start: Start, upstream: Upstream, forward: ForwardProxy
) -> AsyncIterator[Secured]:
    """Starts a proxy whose upstream speaks TLS, behind the forward proxy."""
    async with AsyncExitStack() as stack:

        async def secured(certificate: str = "localhost", *, connect: str = "5s") -> Sluice:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(CERTS / f"{certificate}.pem")
            await stack.enter_async_context(listening(upstream, context))
            settings = (
                f"egress: 'http://127.0.0.1:{forward.port}', ca_file: '{CERTS / 'ca.pem'}', "
                f"api_key: {UPSTREAM_KEY}, timeouts: {{connect: {connect}}}"
            )
            return await start(up=settings, scheme="https", host="localhost")

        yield secured


# https: a tunnel ------------------------------------------------------------------------------


async def test_a_stream_through_a_tunnel(secured: Secured, forward: ForwardProxy) -> None:
    sluice = await secured()
    sluice.upstream.plays(STREAM, chunked(EVENT), LAST)
    for _ in range(2):
        reply = await sluice.ask(post())
        assert (reply.body, reply.whole) == (EVENT, True)
    asked = sluice.upstream.requests[1]
    authority = b"localhost:%d" % sluice.upstream.port
    assert asked.line == b"POST /v1/chat/completions HTTP/1.1"
    assert asked.values("host") == [authority]
    assert asked.values("authorization") == [b"Bearer " + UPSTREAM_KEY.encode()]
    # The forward proxy was told where to, once, and nothing else; what it carried is ciphertext.
    assert forward.asked == [b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (authority, authority)]
    assert UPSTREAM_KEY.encode() not in forward.passed
    assert b"chat/completions" not in forward.passed


async def test_only_the_forward_proxys_name_is_looked_up(
    secured: Secured, forward: ForwardProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    look_up = socket.getaddrinfo

    def noted(host: str, *rest: Any, **more: Any) -> object:
        asked.append(host)
        return look_up(host, *rest, **more)

    sluice = await secured()
    sluice.upstream.plays(STREAM, chunked(EVENT), LAST)
    monkeypatch.setattr(socket, "getaddrinfo", noted)
    assert (await sluice.ask(post())).whole
    assert "localhost" not in asked


@pytest.mark.parametrize(
    "says",
    [
        [b"HTTP/1.0 200 Connection established\r\n\r\n"],
        [b"HTTP/1.1 204 No Content\r\n\r\n"],
        [b"HTTP/1.1 100 Continue\r\n\r\n" + OK],
        # RFC 9110 9.3.6: they mean nothing here, and whoever heeds them waits for a body.
        [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"],
        [OK[at : at + 1] for at in range(len(OK))],
    ],
    ids=["HTTP/1.0", "204", "interim", "lengths", "byte by byte"],
)
async def test_any_2xx_opens_the_tunnel(
    secured: Secured, forward: ForwardProxy, says: list[Step]
) -> None:
    forward.says = says
    sluice = await secured()
    sluice.upstream.plays(json_answer(b"{}"))
    assert (await sluice.ask(post())).body == b"{}"


@pytest.mark.parametrize(
    ("says", "words"),
    [
        (
            [b"HTTP/1.1 403 Filtered\r\nContent-Length: 12\r\n\r\n<p>hosts</p>"],
            "refused with status 403",
        ),
        ([b"HTTP/1.1 407 Who?\r\nProxy-Authenticate: Basic\r\n\r\n"], "refused with status 407"),
        ([b"HTTP/1.1 302 Found\r\nLocation: http://login.example/\r\n\r\n"], "with status 302"),
        ([Close()], "closed the connection without an answer"),
        ([b"HTTP/1.1 200", Close()], "closed the connection without an answer"),
        ([Reset()], "connection reset"),
        ([b"SSH-2.0-OpenSSH_9.9\r\n"], "not valid HTTP/1.1"),
        ([b"HTTP/1.1 200 OK\n\n"], "not valid HTTP/1.1"),
        ([b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n"], "not valid HTTP/1.1"),
        ([b"HTTP/1.1 101 Switching Protocols\r\n\r\n"], "not valid HTTP/1.1"),
        ([b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000], "not valid HTTP/1.1"),
        ([b"HTTP/1.1 102 Processing\r\n\r\n" * 10_000], "not valid HTTP/1.1"),
        # TLS servers wait for their client: whoever speaks first in there is not the upstream.
        ([OK + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"], "bytes of its own"),
    ],
)
async def test_a_tunnel_that_does_not_open(
    secured: Secured, forward: ForwardProxy, says: list[Step], words: str
) -> None:
    forward.says, forward.leads_on = says, False
    sluice = await secured()
    reply = await sluice.ask(post())
    error = json.loads(reply.body)["error"]
    assert (reply.status, error["code"]) == (502, "upstream_unreachable")
    assert "its forward proxy failed: " in error["message"]
    assert words in error["message"]
    for text in ("Filtered", "hosts", "login", "SSH", f"{forward.port}"):
        assert text not in error["message"]
    await asyncio.wait_for(forward.gone.wait(), 5)  # no connection is left open
    assert not forward.passed
    record = await sluice.record()
    assert record.outcome is Outcome.UPSTREAM_ERROR
    assert record.error is not None and record.error.detail is not None
    assert f"through 127.0.0.1:{forward.port}" in record.error.detail


async def test_what_the_forward_proxy_says_is_for_the_log(
    secured: Secured, forward: ForwardProxy
) -> None:
    forward.says = [b"HTTP/1.0 500 Unable to connect\r\n\r\n"]
    sluice = await secured()
    await sluice.ask(post())
    error = (await sluice.record()).error
    assert error is not None and error.detail is not None
    assert error.detail.endswith(": 500 Unable to connect")
    assert "Unable" not in error.message


@pytest.mark.parametrize(
    "says",
    [[], [b"HTTP/1.1 200"], [b"HTTP/1.1 102 Processing\r\n\r\n"], [OK]],
    ids=["silence", "half a head", "an interim answer", "an open tunnel and silence"],
)
async def test_a_tunnel_that_takes_too_long(
    secured: Secured, forward: ForwardProxy, says: list[Step]
) -> None:
    forward.says, forward.leads_on = says, False
    sluice = await secured(connect="200ms")
    reply = await sluice.ask(post())
    error = json.loads(reply.body)["error"]
    assert (reply.status, error["code"]) == (504, "upstream_timeout")
    assert "connect timeout" in error["message"]
    await asyncio.wait_for(forward.gone.wait(), 5)


async def test_a_client_that_leaves_takes_the_tunnel_along(
    secured: Secured, forward: ForwardProxy
) -> None:
    forward.says, forward.leads_on = [], False
    sluice = await secured()
    client = await sluice.connect()
    await client.send(post())
    while not forward.asked:
        await asyncio.sleep(0.001)
    client.abort()
    await asyncio.wait_for(forward.gone.wait(), 5)


async def test_the_certificate_inside_the_tunnel_is_verified(
    secured: Secured, forward: ForwardProxy
) -> None:
    sluice = await secured("other.example")
    reply = await sluice.ask(post())
    error = json.loads(reply.body)["error"]
    assert (reply.status, error["code"]) == (502, "upstream_unreachable")
    assert error["message"].endswith("its certificate was refused: Hostname mismatch.")
    assert not sluice.upstream.requests


async def test_a_tunnel_that_ends_at_once(secured: Secured, forward: ForwardProxy) -> None:
    forward.says = [OK, Close()]
    sluice = await secured()
    error = json.loads((await sluice.ask(post())).body)["error"]
    assert error["code"] == "upstream_unreachable"
    assert "forward proxy" not in error["message"]  # it has done its part
    assert not sluice.upstream.connections


# http: the absolute form ----------------------------------------------------------------------


async def test_a_plain_upstream_is_asked_for_in_absolute_form(
    start: Start, upstream: Upstream
) -> None:
    """RFC 9112 3.2.2. The name is the forward proxy's to look up: here it has none."""
    egress = f"egress: 'http://127.0.0.1:{upstream.port}', api_key: {UPSTREAM_KEY}"
    sluice = await start(up=egress, host="nowhere.invalid")
    upstream.plays(json_answer(b"{}"))
    for _ in range(2):
        reply = await sluice.ask(post(b"{}", path="/v1/chat/completions?a=%2F"))
        assert reply.body == b"{}"
    authority = b"nowhere.invalid:%d" % upstream.port
    first, second = upstream.requests
    assert first.line == b"POST http://%b/v1/chat/completions?a=%%2F HTTP/1.1" % authority
    assert first.values("host") == [authority]
    assert first.values("authorization") == [b"Bearer " + UPSTREAM_KEY.encode()]
    assert second == first
    assert upstream.connections == 1


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_forward_proxy_that_is_not_there(
    start: Start, unused_tcp_port: int, scheme: str
) -> None:
    egress = f"egress: 'http://127.0.0.1:{unused_tcp_port}'"
    sluice = await start(up=egress, scheme=scheme, host="localhost")
    reply = await sluice.ask(post())
    error = json.loads(reply.body)["error"]
    assert (reply.status, error["code"]) == (502, "upstream_unreachable")
    assert error["message"] == (
        "Upstream 'up' could not be reached: its forward proxy failed: connection refused."
    )
    assert not sluice.upstream.connections


async def test_a_forward_proxy_without_a_name(start: Start) -> None:
    sluice = await start(up="egress: 'http://nowhere.invalid:3128'")
    error = json.loads((await sluice.ask(post())).body)["error"]
    assert "its forward proxy failed: its name could not be resolved" in error["message"]
    assert "nowhere" not in error["message"]
