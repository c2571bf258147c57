"""Behind a real forward proxy: tinyproxy, with nginx as the upstream's TLS."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Template

import pytest

from tests.parts import need
from tests.real.processes import (
    CLIENT_KEY,
    KEY,
    Process,
    Upstream,
    eventually,
    free_port,
    running,
    start_proxy,
)

CERTS = Path(__file__).parents[1] / "flow/certs"
QUESTION = {
    "model": "gpt-4o",
    "stream": True,
    "messages": [{"role": "user", "content": "a paced answer"}],
}

NGINX = Template("""
daemon off;
pid $folder/nginx.pid;
error_log $folder/error.log;
events {}
http {
  access_log off;
  client_body_temp_path $folder/body;
  proxy_temp_path $folder/proxy;
  fastcgi_temp_path $folder/fastcgi;
  uwsgi_temp_path $folder/uwsgi;
  scgi_temp_path $folder/scgi;
  server {
    listen 127.0.0.1:$port ssl;
    listen 127.0.0.1:$health;
    ssl_certificate $certs/localhost.pem;
    ssl_certificate_key $certs/localhost.pem;
    location / { proxy_pass $upstream; proxy_buffering off; proxy_http_version 1.1; }
  }
}
""")


@contextmanager
def tls_in_front_of(upstream: Upstream, folder: Path) -> Iterator[int]:
    """The port at which `upstream` speaks TLS."""
    port, health = free_port(), free_port()
    file = folder / "nginx.conf"
    file.write_text(
        NGINX.substitute(
            folder=folder, port=port, health=health, certs=CERTS, upstream=upstream.process.url
        )
    )
    argv: list[str | Path] = [need("nginx"), "-p", folder, "-c", file]
    with running(argv, f"http://127.0.0.1:{health}", "/health", folder / "nginx.log"):
        yield port


@dataclass(frozen=True, slots=True)
class ForwardProxy:
    url: str
    log: Path

    def requests(self) -> list[str]:
        """What it was asked, one request line after another."""
        return re.findall(r"Request \(file descriptor \d+\): (.*)", self.log.read_text())


@pytest.fixture
def forward(tmp_path: Path) -> Iterator[ForwardProxy]:
    port, log = free_port(), tmp_path / "tinyproxy.log"
    file = tmp_path / "tinyproxy.conf"
    file.write_text(
        f"Listen 127.0.0.1\nPort {port}\nAllow 127.0.0.1\nTimeout 30\nMaxClients 20\n"
        f'LogLevel Info\nLogFile "{log}"\nFilter "{tmp_path / "filter"}"\n'
    )
    (tmp_path / "filter").write_text("refused[.]example\n")

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with subprocess.Popen([need("tinyproxy"), "-d", "-c", file]) as tinyproxy:
        try:
            assert eventually(listens)
            yield ForwardProxy(f"http://127.0.0.1:{port}", log)
        finally:
            tinyproxy.terminate()


def answer(proxy: Process) -> bytes:
    """The body of one streamed answer."""
    request = urllib.request.Request(
        f"{proxy.url}/v1/chat/completions",
        data=json.dumps(QUESTION).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {CLIENT_KEY}"},
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        body: bytes = response.read()
        return body


def test_a_plain_upstream(aimock: Upstream, forward: ForwardProxy, tmp_path: Path) -> None:
    up = {"base_url": aimock.base_url, "api_key": KEY, "egress": forward.url}
    with start_proxy(tmp_path, aimock, upstreams={"up": up}) as proxy:
        assert answer(proxy).endswith(b"data: [DONE]\n\n")
    assert "tinyproxy" in aimock.journal()[-1]["headers"]["via"]
    assert forward.requests() == [f"POST {aimock.base_url}/chat/completions HTTP/1.1"]


def test_a_tls_upstream(aimock: Upstream, forward: ForwardProxy, tmp_path: Path) -> None:
    with tls_in_front_of(aimock, tmp_path) as port:
        up = {
            "base_url": f"https://localhost:{port}/v1",
            "api_key": KEY,
            "ca_file": str(CERTS / "ca.pem"),
            "egress": forward.url,
        }
        with start_proxy(tmp_path, aimock, upstreams={"up": up}) as proxy:
            for _ in range(2):
                assert answer(proxy).endswith(b"data: [DONE]\n\n")
    assert forward.requests() == [f"CONNECT localhost:{port} HTTP/1.1"]


def test_a_refusal(aimock: Upstream, forward: ForwardProxy, tmp_path: Path) -> None:
    up = {"base_url": "https://refused.example/v1", "api_key": KEY, "egress": forward.url}
    with start_proxy(tmp_path, aimock, upstreams={"up": up}) as proxy:
        with pytest.raises(urllib.error.HTTPError) as caught:
            answer(proxy)
        error = json.load(caught.value)["error"]
        assert error["code"] == "upstream_unreachable"
        assert "its forward proxy failed: it refused with status 403" in error["message"]
        assert "403 Filtered" in proxy.log.read_text()
