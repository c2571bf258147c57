"""The processes of a run: the mock and the proxies, started, waited for, and ended in every ending."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from bench import wire
from bench.load import Order

_READY_WITHIN = 20.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
_ROOT = Path(__file__).parent.parent

# What an operator would write for streams. Its log has the fields that our access log has.
_NGINX = """\
{user}
daemon off;
worker_processes 1;
worker_rlimit_nofile {files};
pid {home}/nginx.pid;
error_log {home}/error.log warn;
events {{ worker_connections {files}; }}
http {{
  log_format json escape=json '{{"time":"$time_iso8601","level":"info","event":"request",'
    '"request_id":"$request_id","client":"$remote_addr","method":"$request_method","path":"$uri",'
    '"upstream":"$upstream_addr","status":$status,"ttfb":"$upstream_header_time",'
    '"duration":$request_time,"bytes_up":$request_length,"bytes_down":$body_bytes_sent}}';
  access_log {home}/access.log json;
  client_body_temp_path {home}/body;
  proxy_temp_path {home}/proxy;
  fastcgi_temp_path {home}/fastcgi;
  uwsgi_temp_path {home}/uwsgi;
  scgi_temp_path {home}/scgi;
  client_max_body_size 64m;
  keepalive_requests 100000000;
  upstream mock {{
    server 127.0.0.1:{mock_port};
    keepalive 1024;
    keepalive_requests 100000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location = /livez {{ access_log off; return 200; }}
    location /v1/ {{
      proxy_pass http://mock;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_request_buffering off;
      proxy_read_timeout 10m;
    }}
  }}
}}
"""

_SLUICE = """\
listen: {{host: 127.0.0.1, port: {port}}}
upstreams: {{mock: {{base_url: "http://127.0.0.1:{mock_port}/v1", api_key: sk-bench-upstream}}}}
log: {{format: json}}
"""

# Limits that are counted and never reached.
_SLUICE_FEATURES = f"""\
clients: [{{name: bench, key: {wire.CLIENT_KEY}}}]
limits: {{requests: 1000000/second, tokens: 1000000000/second, streams: 100000}}
"""


@dataclass(frozen=True, slots=True)
class Target:
    """A proxy that runs; as `direct` it is the mock itself, without a pid."""

    name: str
    port: int
    pid: int | None


class Stage:
    """Every process of the bench, and a directory for their configs and logs."""

    def __init__(self, home: Path, sluices: Mapping[str, Sequence[str]], *, bare: bool) -> None:
        self._home = home
        self._sluices = sluices
        self._bare = bare
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        mock = self._spawn("mock", [sys.executable, "-m", "bench.mock"], stdout=subprocess.PIPE)
        assert mock.stdout
        self.mock_port, self.mock_pid = int(mock.stdout.readline()), mock.pid
        return self

    def __exit__(self, *_: object) -> None:
        for pid in list(self._children):
            self.end(pid)

    def start(self, name: str, streams: int) -> Target:
        if name == "direct":
            return Target(name, self.mock_port, None)
        port, home = _free_port(), self._home / name
        home.mkdir(exist_ok=True)
        if name == "nginx":
            command = self._nginx(home, port, streams)
        else:
            command = [*self._sluices[name], "--config", self._sluice_config(home, port)]
        child = self._spawn(name, command)
        self._wait_for(name, child, port)
        return Target(name, port, child.pid)

    def load(self, order: Order) -> tuple[dict[str, Any], str]:
        """Runs the load generator: its result, and what it has to say if there is none."""
        command = [sys.executable, "-m", "bench.load", json.dumps(asdict(order))]
        child = self._spawn("load", command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, complaint = child.communicate()  # it limits its own time
        self.end(child.pid)
        if child.returncode:
            text = complaint.decode().strip() or f"ended with {child.returncode}"
            return {}, text.splitlines()[-1]
        return dict(json.loads(out)), ""

    def end(self, pid: int, patience: float = 3) -> None:
        """Ends a child with whatever it has started: politely, then for certain."""
        child = self._children.pop(pid)
        if child.stdin:
            child.stdin.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(pid, number)
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=patience)

    def _spawn(
        self,
        name: str,
        command: Sequence[str],
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> subprocess.Popen[bytes]:
        with (self._home / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                command,
                cwd=_ROOT,
                stdin=subprocess.PIPE,
                stdout=stdout or log,
                stderr=stderr or log,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self._children[child.pid] = child
        return child

    def _nginx(self, home: Path, port: int, streams: int) -> list[str]:
        # nginx allocates all its connections at its start: no more of them than are needed
        config = _NGINX.format(
            user="user root;" if os.geteuid() == 0 else "",
            files=2 * streams + 1024,
            home=home,
            port=port,
            mock_port=self.mock_port,
        )
        (home / "nginx.conf").write_text(config)
        binary = shutil.which("nginx") or "/usr/sbin/nginx"
        return [binary, "-e", f"{home}/error.log", "-c", f"{home}/nginx.conf"]

    def _sluice_config(self, home: Path, port: int) -> str:
        config = _SLUICE.format(port=port, mock_port=self.mock_port)
        path = home / "config.yaml"
        path.write_text(config + ("" if self._bare else _SLUICE_FEATURES))
        return str(path)

    def _wait_for(self, name: str, child: subprocess.Popen[bytes], port: int) -> None:
        deadline = time.monotonic() + _READY_WITHIN
        while child.poll() is None and time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as sock:
                sock.sendall(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                if sock.recv(1024).startswith(b"HTTP/1.1 200"):
                    return
            time.sleep(0.1)
        said = (self._home / f"{name}.log").read_text(errors="replace")[-2000:]
        raise NotReady(f"{name} did not get ready; it said:\n{said}")


class NotReady(Exception):
    """A target could not be started."""


def allow_files(number: int) -> None:
    """Raises this process's limit of open files, which its children inherit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= number:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, max(hard, number)))
    except ValueError:
        raise NotReady(f"needs {number} open files; the limit here is {hard}") from None


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def _die_with_parent() -> None:
    """So that not even a kill -9 of the bench leaves anything running."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
