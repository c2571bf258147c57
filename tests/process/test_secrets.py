"""A real process tells no secret: not at level debug, in debug mode, whatever goes wrong.

Every test drives one proxy and stops it; what it wrote until then is searched for canaries, and so
is each of its own answers. On both event loops, as their debug modes say different things.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tests.canaries import ADMIN_KEY, CLIENT_KEY, COMPLETION, PROMPT, UPSTREAM_KEY, seen_in
from tests.flow.conftest import listening
from tests.flow.wire import (
    LAST,
    PATIENCE,
    STREAM,
    Client,
    Close,
    Reply,
    Reset,
    Step,
    Until,
    UntilGone,
    Upstream,
    chunked,
    get,
    json_answer,
    post,
)

BODY = json.dumps({"stream": True, "messages": [{"role": "user", "content": PROMPT}]}).encode()
EVENT = f'data: {{"choices":[{{"delta":{{"content":"{COMPLETION}"}}}}]}}\n\n'.encode()
ADMIN = f"Authorization: Bearer {ADMIN_KEY}"

RUN = "import sys; from proxy.__main__ import main; sys.exit(main(sys.argv[1:]))"
LOOPS = {"uvloop": RUN, "asyncio": "import sys; sys.modules['uvloop'] = None; " + RUN}


@dataclass
class Proxy:
    """A proxy in debug mode, and all that it writes."""

    child: subprocess.Popen[bytes]
    config: Path
    log: Path
    upstream: Upstream
    clients: list[Client] = field(default_factory=list)
    port: int = 0

    def wrote(self) -> str:
        return self.log.read_text()

    async def writes(self, text: str, times: int = 1) -> None:
        async with asyncio.timeout(PATIENCE):
            while self.wrote().count(text) < times:
                assert self.child.poll() is None, self.wrote()
                await asyncio.sleep(0.01)

    async def connect(self) -> Client:
        self.clients.append(await Client.connect(self.port))
        return self.clients[-1]

    async def ask(self, request: bytes, *, method: str = "POST") -> Reply:
        client = await self.connect()
        await client.send(request)
        return await client.reply(method)

    def stop(self) -> None:
        self.child.terminate()

    def reload(self, text: str) -> None:
        self.config.write_text(text)
        self.child.send_signal(signal.SIGHUP)


def settings(upstream: Upstream) -> str:
    up = {
        "base_url": f"http://127.0.0.1:{upstream.port}/v1",
        "api_key": "${UPSTREAM_KEY}",
        "headers": {"X-Second-Key": UPSTREAM_KEY},
        "timeouts": {"idle": "10s", "first_byte": "10s"},
    }
    return yaml.safe_dump(
        {
            "listen": {"port": 0},
            "admin": {"key": ADMIN_KEY},
            "log": {"level": "debug"},
            "upstreams": {"up": up},
            "drain_timeout": "100ms",
        }
    )


@pytest.fixture(params=LOOPS)
async def proxy(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Proxy]:
    """Stopped and searched at the end."""
    config, log = tmp_path / "config.yaml", tmp_path / "proxy.log"
    async with listening(Upstream()) as upstream:
        config.write_text(settings(upstream))
        with log.open("wb") as out:
            child = subprocess.Popen(
                [sys.executable, "-X", "dev", "-c", LOOPS[request.param], "--config", str(config)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "UPSTREAM_KEY": UPSTREAM_KEY},
            )
        proxy = Proxy(child, config, log, upstream)
        try:
            await proxy.writes('"listening"')
            first = json.loads(proxy.wrote().splitlines()[0])
            proxy.port = int(first["url"].rpartition(":")[2])
            yield proxy
            proxy.stop()
            assert await asyncio.to_thread(child.wait, PATIENCE) == 0
        finally:
            for client in proxy.clients:
                client.abort()
            child.kill()
            child.wait()
        assert seen_in(proxy.wrote()) == []


async def test_of_what_goes_well(proxy: Proxy) -> None:
    answering = asyncio.Event()
    proxy.upstream.plays(STREAM, chunked(EVENT), Until(answering), LAST)
    client = await proxy.connect()
    await client.send(post(BODY, f"Authorization: Bearer {CLIENT_KEY}"))
    await client.until(COMPLETION.encode())
    streams = await proxy.ask(get("/admin/streams", ADMIN), method="GET")
    assert (b'"relaying"' in streams.body, seen_in(repr(streams))) == (True, [])
    answering.set()
    assert (await client.reply()).whole
    proxy.upstream.plays(json_answer(EVENT))
    await proxy.ask(post(BODY, f"x-api-key: {CLIENT_KEY}", content_type="text/plain"))
    for path in ("/metrics", "/readyz"):
        assert seen_in(repr(await proxy.ask(get(path), method="GET"))) == []
    await proxy.writes('"outcome":"completed"', times=2)


# The code of the error, and what the upstream does.
FAILURES: list[tuple[str, list[Step]]] = [
    ("upstream_auth", [json_answer(f"Wrong key: {UPSTREAM_KEY}".encode(), status=b"401 No")]),
    ("upstream_invalid", [EVENT, Close()]),
    ("upstream_invalid", [f"HTTP/1.1 200 {COMPLETION}\0\r\n\r\n".encode()]),
    ("upstream_invalid", [f"HTTP/1.1 200 OK\r\n{UPSTREAM_KEY} : x\r\n\r\n".encode()]),
    ("upstream_invalid", [f"HTTP/1.1 200 OK\r\nContent-Length: {COMPLETION}\r\n\r\n".encode()]),
    ("upstream_invalid", [STREAM, chunked(EVENT), COMPLETION.encode(), UntilGone()]),
    ("upstream_aborted", [STREAM, chunked(EVENT, EVENT[:-2]), Close()]),
    ("upstream_aborted", [STREAM, chunked(EVENT), Reset()]),
    ("upstream_aborted", [Reset()]),
]
SILENCES: list[tuple[str, list[Step]]] = [
    ("upstream_timeout", [STREAM, chunked(EVENT), UntilGone()]),
    ("upstream_timeout", [UntilGone()]),
]


async def test_of_upstreams_that_fail(proxy: Proxy) -> None:
    for code, script in FAILURES:
        await fails(proxy, code, script)
    proxy.reload(proxy.config.read_text().replace("10s", "200ms"))
    await proxy.writes('"reloaded"')
    for code, script in SILENCES:
        await fails(proxy, code, script)
    proxy.upstream.plays(json_answer(EVENT, status=f"500 {COMPLETION}".encode()))
    assert (await proxy.ask(post(BODY))).body == EVENT  # relayed as it came
    await proxy.writes('"outcome":"upstream_error"')


async def fails(proxy: Proxy, code: str, script: list[Step]) -> None:
    proxy.upstream.plays(*script)
    number = len(proxy.clients)
    reply = await proxy.ask(post(BODY, f"x-api-key: {CLIENT_KEY}", f"X-Request-Id: {number}"))
    if not reply.values("sluice-upstream"):
        assert (reply.status in {502, 504}, seen_in(repr(reply))) == (True, [])
    await proxy.writes(f'"request_id":"{number}","upstream":"up","code":"{code}"')


MALFORMED = [
    # Keys where none belongs.
    get(f"/v1/models?key={CLIENT_KEY}"),
    get(f"/v1/{CLIENT_KEY}/models"),
    get(f"/{CLIENT_KEY}/v1/models?key={CLIENT_KEY}"),
    get(f"/v1/%2e%2e/{CLIENT_KEY}"),
    get(f"/v1/models#{CLIENT_KEY}"),
    get(f"http://user:{CLIENT_KEY}@sluice/v1/models"),
    get("/admin/streams", f"Authorization: Bearer {CLIENT_KEY}"),
    get(f"/admin/streams/{CLIENT_KEY}", ADMIN, method="DELETE"),
    get("/v1/models", f"Origin: https://{CLIENT_KEY}", "Sec-Fetch-Site: cross-site"),
    # Heads that can't be read.
    f"{CLIENT_KEY}\r\n\r\n".encode(),
    f"{CLIENT_KEY} /v1/models HTTP/1.1\r\nHost: s\r\n\r\n".encode(),
    f"GET {CLIENT_KEY} HTTP/1.1\r\nHost: s\r\n\r\n".encode(),
    f"GET /v1/models?key={CLIENT_KEY} HTTP/9.9\r\nHost: s\r\n\r\n".encode(),
    f"GET /v1/models HTTP/1.1\r\nHost: {CLIENT_KEY}/@\r\n\r\n".encode(),
    get("/v1/models", f"Authorization : Bearer {CLIENT_KEY}"),
    get("/v1/models", f"Authorization: Bearer\r\n {CLIENT_KEY}"),
    get("/v1/models", f"Authorization: Bearer {CLIENT_KEY}\0"),
    get("/v1/models", f"Bearer {CLIENT_KEY}"),
    get("/v1/models", f"Authorization: Bearer {CLIENT_KEY * 8000}"),
    get("/v1/models", *[f"X-{CLIENT_KEY}: {CLIENT_KEY}"] * 200),
    # Framing, and bodies, that can't be either.
    post(BODY, f"Content-Length: {CLIENT_KEY}", "Transfer-Encoding: chunked"),
    post(BODY, f"Transfer-Encoding: {CLIENT_KEY}"),
    post(BODY, f"Expect: {CLIENT_KEY}"),
    post(PROMPT.encode(), "Transfer-Encoding: chunked"),
    post(b"5\r\n" + PROMPT.encode(), "Transfer-Encoding: chunked"),
]


async def test_of_what_it_refuses(proxy: Proxy) -> None:
    proxy.upstream.plays(json_answer(b"{}"))
    for request in MALFORMED:
        assert seen_in(repr(await proxy.ask(request))) == [], request
    for body in (b'{"model": "m", "messages": "%b' % PROMPT.encode(), b"\xff" + BODY, BODY + BODY):
        assert (await proxy.ask(post(body))).status == 200  # for the upstream to judge
    await proxy.ask(post(BODY, "X-Request-Id: the-last"))
    await proxy.writes("the-last")


# Where KEY stands, an upstream's does.
NOT_CONFIGS = """\
upstreams: {up: {base_url: 'http://a', api_key: KEY
upstreams: {up: {base_url: 'http://a', api_key:KEY}}
upstreams: {up: {base_url: 'http://a', api_key: [KEY]}}
upstreams: {up: {base_url: 'http://a', api_key: 'KEY KEY', kye: KEY}}
upstreams: {up: {base_url: 'http://a', api_key: KEY\u0430}}
upstreams: {up: {base_url: 'http://a', headers: {X-Key: "KEY\\n"}}}
upstreams: {up: {base_url: 'http://a', headers: {"X-Key: KEY": x}}}
upstreams: {up: {base_url: 'http://user:KEY@a'}}
upstreams: {up: {base_url: 'http://a/?key=KEY', timeouts: KEY}}
upstreams: *KEY
{upstreams: built-in, admin: {key: 'KEY KEY'}, log: {level: KEY}}
{upstreams: built-in, store: 'redis://:KEY@a', clients: [{name: a, key: KEY, limits: KEY}]}
""".replace("KEY", UPSTREAM_KEY).splitlines()


async def test_of_configs(proxy: Proxy) -> None:
    good = proxy.config.read_text()
    for number, bad in enumerate(NOT_CONFIGS, 1):
        proxy.reload(bad)
        async with asyncio.timeout(PATIENCE):
            while f'{{result="rejected"}} {number}.0' not in await metrics(proxy):
                await asyncio.sleep(0.01)
    assert seen_in(check(proxy.config, exit_code=2)) == []
    proxy.reload(good)
    await proxy.writes('"reloaded"')
    shown = check(proxy.config, exit_code=0)
    assert (shown.count("***"), seen_in(shown)) == (3, [])


async def metrics(proxy: Proxy) -> str:
    return (await proxy.ask(get("/metrics"), method="GET")).body.decode()


def check(config: Path, exit_code: int) -> str:
    """What `sluice check` says of the file."""
    done = subprocess.run(
        [sys.executable, "-m", "proxy", "check", "--config", str(config)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "UPSTREAM_KEY": UPSTREAM_KEY},
    )
    assert done.returncode == exit_code, done
    return done.stdout + done.stderr


async def test_of_the_end(proxy: Proxy) -> None:
    """Nor, while it runs, what every local user may read."""
    cmdline = Path(f"/proc/{proxy.child.pid}/cmdline")
    if cmdline.exists():
        assert (b"--config" in cmdline.read_bytes(), seen_in(cmdline.read_bytes())) == (True, [])
    proxy.upstream.plays(STREAM, chunked(EVENT), UntilGone())
    client = await proxy.connect()
    await client.send(post(BODY))
    await client.until(COMPLETION.encode())
    proxy.stop()
    reply = await client.reply()
    assert (reply.whole, b'"shutting_down"' in reply.body) == (False, True)
