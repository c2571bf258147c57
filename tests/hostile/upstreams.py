"""Three real upstream servers, each of which writes down what it read: aiohttp, nginx and node.

Each keeps a journal, one JSON line for each request, written before the answer is over. Their
parsers share no line with the proxy's and, but for llhttp in two of them, none with each other: what
reaches all three as the same requests can be read in one way only.

`python -m tests.hostile.upstreams PORT` is the aiohttp one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from aiohttp import web

from tests.hostile.reading import Request
from tests.parts import need
from tests.real.processes import Upstream, free_port, running

PATIENCE = 10.0  # seconds: whoever waits longer has failed

# nginx reads a request's body only to hand it on, hence the sink. $request_body is the body as
# nginx read it, as long as it fits into one buffer.
_NGINX = Template("""
daemon off;
master_process off;
pid nginx.pid;
error_log error.log;
events { worker_connections 512; }
http {
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    log_format journal escape=json '{"method":"$$request_method","target":"$$request_uri",'
                                   '"body":"$$request_body","status":$$status}';
    keepalive_timeout 300s;
    keepalive_requests 1000000;
    server {
        listen 127.0.0.1:$port;
        access_log journal journal;
        client_max_body_size 0;
        client_body_buffer_size 1m;
        large_client_header_buffers 8 64k;
        location / {
            proxy_pass http://unix:sink;
            add_header X-Read "$$request_method $$request_uri" always;
        }
    }
    server {
        listen unix:sink;
        access_log off;
        client_max_body_size 0;
        large_client_header_buffers 8 64k;
        location / { return 200 "ok\\n"; }
    }
}
""")


@dataclass(frozen=True, slots=True)
class Seen:
    """What an upstream made of some bytes. `request` is None for what it could not read at all;
    `fields` are the names of its header fields, where the server tells them."""

    request: Request | None
    whole: bool
    fields: frozenset[str]

    @property
    def target(self) -> str | None:
        return self.request.target if self.request else None

    @classmethod
    def of(cls, line: dict[str, Any]) -> Seen:
        if not line.get("method"):
            return cls(None, whole=False, fields=frozenset())
        request = Request(line["method"], line["target"], line["body"].encode("latin-1"))
        # nginx says by its status whether the request was whole; 499: who asked has left.
        whole = line.get("whole", line.get("status") == 200)
        return cls(request, whole, frozenset(name.lower() for name in line.get("fields", ())))


class Journal:
    """Reads an upstream's journal as it grows."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")

    def until(self, target: str) -> list[Seen]:
        """All that was seen before the request for `target`."""
        seen = []
        while (each := self._next()).target != target:
            seen.append(each)
        return seen

    def _next(self) -> Seen:
        """The next line, waiting for it: nginx writes it just after its answer."""
        end, line = time.monotonic() + PATIENCE, b""
        while not line.endswith(b"\n"):
            line += self._file.readline()
            if not line:
                time.sleep(0.0005)
            assert time.monotonic() < end, "the journal ended before what was waited for"
        return Seen.of(json.loads(line.decode("latin-1")))

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True, slots=True)
class Witness:
    """A running upstream and its journal."""

    upstream: Upstream
    journal: Path


@contextmanager
def _start(name: str, argv: list[str | Path], port: int, folder: Path) -> Iterator[Witness]:
    log = folder / f"{name}.log"
    with running(argv, f"http://127.0.0.1:{port}", "/health", log) as process:
        yield Witness(Upstream(name, process), log)


def start_aiohttp(folder: Path) -> AbstractContextManager[Witness]:
    port = free_port()
    argv: list[str | Path] = [sys.executable, "-m", "tests.hostile.upstreams", str(port)]
    return _start("aiohttp", argv, port, folder)


def start_node(folder: Path) -> AbstractContextManager[Witness]:
    port = free_port()
    script = Path(__file__).parent / "upstream.js"
    return _start("node", [need("node"), script, str(port)], port, folder)


@contextmanager
def start_nginx(folder: Path) -> Iterator[Witness]:
    port = free_port()
    (folder / "nginx.conf").write_text(_NGINX.substitute(port=port))
    argv: list[str | Path] = [need("nginx"), "-p", folder, "-c", "nginx.conf", "-e", "error.log"]
    with _start("nginx", argv, port, folder) as witness:
        yield Witness(witness.upstream, folder / "journal")


STARTERS: dict[str, Callable[[Path], AbstractContextManager[Witness]]] = {
    "aiohttp": start_aiohttp,
    "nginx": start_nginx,
    "node": start_node,
}


# ---------------------------------------------------------------- the aiohttp upstream


def _say(**line: object) -> None:
    print(json.dumps(line), flush=True)


async def _answer(request: web.BaseRequest) -> web.Response:
    line = {"method": request.method, "target": request.raw_path, "fields": [*request.headers]}
    try:
        body, whole = await request.read(), True
    except (web.RequestPayloadError, OSError):
        body, whole = b"", False
    _say(**line, body=body.decode("latin-1"), whole=whole)
    return web.Response(text="ok\n", headers={"X-Read": f"{request.method} {request.raw_path}"})


class _Garbage(logging.Handler):
    """aiohttp's server answers what it can't parse by itself; only its log tells."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(garbage=record.getMessage())


async def _serve(port: int) -> None:
    logging.getLogger("aiohttp.server").addHandler(_Garbage())
    # Its own bound on header fields counts those that the proxy adds, too.
    server = web.Server(_answer, auto_decompress=False, keepalive_timeout=300, max_headers=256)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", port)
    await listener.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
