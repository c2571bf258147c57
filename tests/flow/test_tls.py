"""TLS to upstreams: verified before a byte of the request goes out, and whole only if it says so.

`certs/` holds a test authority's certificate, whose key is gone, two servers' certificates of it,
and two that vouch for themselves.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from proxy.connection import Origin, UpstreamConnection, connect
from proxy.errors import ProxyError
from proxy.exchange import Outcome
from proxy.resolver import Resolver
from tests.canaries import UPSTREAM_KEY
from tests.flow.conftest import Start, listening
from tests.flow.wire import LAST, PATIENCE, STREAM, Upstream, chunked, json_answer, post

CERTS = Path(__file__).parent / "certs"
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'


def server_context(certificate: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(CERTS / f"{certificate}.pem")
    return context


# How a server ends its TLS connection.


def close_notify(tls: ssl.SSLSocket) -> None:
    """In order: by the alert that only the server itself can send (RFC 8446 6.1)."""
    tls.settimeout(0.05)  # the other side need not answer
    with suppress(OSError):
        tls.unwrap()


def bare_fin(tls: ssl.SSLSocket) -> None:
    """As whoever is on the way could end it too."""
    tls.shutdown(socket.SHUT_WR)


def reset(tls: ssl.SSLSocket) -> None:
    tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Server:
    """A server for one connection, in a thread: it can end TLS in ways that no event loop offers.

    It answers the first bytes that it receives; `wait_for` is set before it ends the connection.
    """

    def __init__(
        self, context: ssl.SSLContext, answer: bytes, end: Callable[[ssl.SSLSocket], None]
    ) -> None:
        self.received = b""
        self.shook_hands = False
        self.wait_for = threading.Event()
        self.ended = threading.Event()
        self._context, self._answer, self._end = context, answer, end
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self._let_go = threading.Event()

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    @contextmanager
    def serving(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self.wait_for.set()
            self._let_go.set()
            self._thread.join()
            self._listener.close()

    def _serve(self) -> None:
        plain, _ = self._listener.accept()
        plain.settimeout(PATIENCE)
        with self._context.wrap_socket(
            plain, server_side=True, do_handshake_on_connect=False
        ) as tls:
            try:
                tls.do_handshake()
            except OSError:
                self.received = _rest(tls)
            else:
                self.shook_hands = True
                self.received = tls.recv(65536)
                tls.sendall(self._answer)
                self.wait_for.wait(PATIENCE)
                self._end(tls)
                if self._end is not reset:  # which the closing is
                    self.ended.set()
                    self._let_go.wait(PATIENCE)
        self.ended.set()


def _rest(tls: ssl.SSLSocket) -> bytes:
    """What was sent behind a handshake that failed, whatever it was."""
    with socket.socket(fileno=tls.detach()) as plain, suppress(ConnectionError):
        plain.settimeout(PATIENCE)
        return plain.recv(65536)
    return b""


Serve = Callable[..., Server]


@pytest.fixture
def serve(upstream: Upstream) -> Iterator[Serve]:
    """Puts such a server where the upstream is."""
    with ExitStack() as stack:

        def serve(
            answer: bytes = b"",
            end: Callable[[ssl.SSLSocket], None] = close_notify,
            context: ssl.SSLContext | None = None,
        ) -> Server:
            server = Server(context or server_context("localhost"), answer, end)
            stack.enter_context(server.serving())
            upstream.port = server.port
            return server

        yield serve


TRUSTED = f"ca_file: '{CERTS / 'ca.pem'}', api_key: {UPSTREAM_KEY}"


async def test_a_stream_over_tls(start: Start, upstream: Upstream) -> None:
    upstream.plays(STREAM, chunked(EVENT), LAST)
    async with listening(upstream, server_context("localhost")):
        sluice = await start(up=TRUSTED, scheme="https", host="localhost")
        for _ in range(2):
            reply = await sluice.ask(post())
            assert (reply.body, reply.whole) == (EVENT, True)
    assert upstream.connections == 1
    assert upstream.requests[0].values("authorization") == [b"Bearer " + UPSTREAM_KEY.encode()]


# Whom the key goes to -------------------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize(
    ("certificate", "trusted", "words"),
    [
        ("localhost", "", "unable to get local issuer certificate"),
        ("self-signed", "", "self-signed certificate"),
        ("other.example", "ca", "Hostname mismatch"),
        ("expired", "expired", "certificate has expired"),
    ],
)
async def test_a_certificate_that_proves_nothing_gets_nothing(
    start: Start,
    serve: Serve,
    version: ssl.TLSVersion,
    certificate: str,
    trusted: str,
    words: str,
) -> None:
    context = server_context(certificate)
    context.minimum_version = context.maximum_version = version
    server = serve(context=context)
    ca = f", ca_file: '{CERTS / trusted}.pem'" if trusted else ""
    sluice = await start(up=f"api_key: {UPSTREAM_KEY}{ca}", scheme="https", host="localhost")
    error = json.loads((await sluice.ask(post())).body)["error"]
    assert error["code"] == "upstream_unreachable"
    assert error["message"].endswith(f"its certificate was refused: {words}.")
    assert await asyncio.to_thread(server.ended.wait, PATIENCE)
    assert (server.shook_hands, server.received) == (False, b"")


async def test_nothing_older_than_tls_1_2(start: Start, serve: Serve) -> None:
    context = server_context("localhost")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    server = serve(context=context)
    sluice = await start(up=TRUSTED, scheme="https", host="localhost")
    error = json.loads((await sluice.ask(post())).body)["error"]
    assert "TLS failed" in error["message"]
    assert await asyncio.to_thread(server.ended.wait, PATIENCE)
    assert (server.shook_hands, server.received) == (False, b"")


async def test_an_upstream_that_hangs_up_on_the_handshake(start: Start, upstream: Upstream) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        upstream.port = server.sockets[0].getsockname()[1]
        sluice = await start(up=TRUSTED, scheme="https", host="localhost")
        error = json.loads((await sluice.ask(post())).body)["error"]
    assert error["code"] == "upstream_unreachable"
    assert "is https right for it?" in error["message"] or "reset" in error["message"]


# Where an answer ends -------------------------------------------------------------------------

HEADS = {
    "sized": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n",
    "until close": b"HTTP/1.1 200 OK\r\nX-Length: %d\r\n\r\n",
}


@pytest.mark.parametrize("end", [close_notify, bare_fin])
@pytest.mark.parametrize(
    "answer",
    [
        json_answer(b'{"a":1}'),
        json_answer(b'{"a":1}', b"Connection: close"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b'{"a":1}') + LAST,
    ],
)
async def test_what_states_its_length_is_whole_by_it(
    start: Start, serve: Serve, answer: bytes, end: Callable[[ssl.SSLSocket], None]
) -> None:
    serve(answer, end).wait_for.set()
    sluice = await start(up=TRUSTED, scheme="https", host="localhost")
    reply = await sluice.ask(post())
    assert (reply.body, reply.whole) == (b'{"a":1}', True)


@pytest.mark.parametrize(
    ("end", "whole"), [(close_notify, True), (bare_fin, False), (reset, False)]
)
async def test_a_body_until_close_is_whole_if_the_upstream_itself_has_closed(
    start: Start, serve: Serve, end: Callable[[ssl.SSLSocket], None], whole: bool
) -> None:
    """RFC 9112 9.8: a FIN alone could be anybody's on the way."""
    server = serve(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{"a":', end)
    sluice = await start(up=TRUSTED, scheme="https", host="localhost")
    client = await sluice.connect()
    await client.send(post())
    await client.until(b'{"a":')
    server.wait_for.set()
    reply = await client.reply()
    assert (reply.body, reply.whole) == (b'{"a":', whole)
    expected = Outcome.COMPLETED if whole else Outcome.UPSTREAM_TRUNCATED
    assert (await sluice.record()).outcome is expected


async def test_a_stream_cut_on_the_way_says_so(start: Start, serve: Serve) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    serve(head + EVENT, bare_fin).wait_for.set()
    sluice = await start(up=TRUSTED, scheme="https", host="localhost")
    reply = await sluice.ask(post())
    assert not reply.whole
    error = json.loads(reply.body.removeprefix(EVENT + b"data: "))["error"]
    assert error["code"] == "upstream_aborted"


class Pausing:
    """A receiver that does not keep up with what comes first."""

    def __init__(self, connection: UpstreamConnection) -> None:
        self.length = 0
        self.ending: asyncio.Future[ProxyError | None] = asyncio.Future()
        self._connection = connection

    def payload(self, data: bytes) -> None:
        if not self.length:
            self._connection.pause()
        self.length += len(data)

    def ended(self, error: ProxyError | None) -> None:
        self.ending.set_result(error)


@pytest.mark.parametrize("end", [close_notify, bare_fin])
@pytest.mark.parametrize("framing", HEADS)
async def test_what_came_while_nobody_read_is_not_lost(
    serve: Serve, framing: str, end: Callable[[ssl.SSLSocket], None]
) -> None:
    """A reader is slow, and its upstream has said all and is gone. uvloop throws the rest away."""
    size = 150_000  # more than one read, less than the loops take in while reading stands still
    server = serve(HEADS[framing] % size + b"x" * size, end)
    context = ssl.create_default_context(cafile=CERTS / "ca.pem")
    resolver = Resolver("localhost", server.port)
    connection = await connect(Origin("localhost", server.port, context, "up", resolver), 5)
    connection.begin("GET", first_byte=5, idle=5, total=None)
    connection.write(b"GET / HTTP/1.1\r\n\r\n")
    connection.request_sent()
    await connection.head()
    receiver = Pausing(connection)
    connection.deliver_to(receiver)
    server.wait_for.set()
    assert await asyncio.to_thread(server.ended.wait, PATIENCE)
    await asyncio.sleep(0.05)  # until the loop has seen the end, if it looks
    connection.resume()
    async with asyncio.timeout(PATIENCE):
        error = await receiver.ending
    connection.abort()
    assert receiver.length == size
    assert (error is None) == (framing == "sized" or end is close_notify)
