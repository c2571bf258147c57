"""TLS to upstreams: verified before a byte of the request goes out.

`certs/` holds a test authority's certificate, whose key is gone, and two servers' certificates.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.flow.conftest import Start, listening
from tests.flow.wire import LAST, STREAM, Upstream, chunked, post

CERTS = Path(__file__).parent / "certs"
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'


@pytest.fixture
async def secured(upstream: Upstream) -> AsyncIterator[Callable[[str], object]]:
    """Lets the upstream speak TLS with one of the certificates."""
    async with AsyncExitStack() as stack:

        async def secure(name: str) -> None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(CERTS / f"{name}.pem")
            await stack.enter_async_context(listening(upstream, context))

        yield secure


async def test_a_stream_over_tls(start: Start, upstream: Upstream, secured) -> None:
    await secured("localhost")
    upstream.plays(STREAM, chunked(EVENT), LAST)
    ca = f"ca_file: '{CERTS / 'ca.pem'}', api_key: sk-ours"
    sluice = await start(up=ca, scheme="https", host="localhost")
    for _ in range(2):
        reply = await sluice.ask(post())
        assert (reply.body, reply.whole) == (EVENT, True)
    assert upstream.connections == 1
    assert upstream.requests[0].values("authorization") == [b"Bearer sk-ours"]


@pytest.mark.parametrize(
    ("certificate", "ca"),
    [("localhost", ""), ("other.example", f", ca_file: '{CERTS / 'ca.pem'}'")],
    ids=["an unknown authority", "another name"],
)
async def test_a_certificate_that_proves_nothing_gets_nothing(
    start: Start, upstream: Upstream, secured, certificate: str, ca: str
) -> None:
    await secured(certificate)
    upstream.plays(STREAM, LAST)
    sluice = await start(up=f"api_key: sk-ours{ca}", scheme="https", host="localhost")
    reply = await sluice.ask(post())
    error = json.loads(reply.body)["error"]
    assert (reply.status, error["code"]) == (502, "upstream_unreachable")
    assert "certificate was refused" in error["message"]
    assert not upstream.requests
