"""A real redis-server of a test's own: started, paused, killed, started again."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.parts import need
from tests.real.processes import eventually, free_port


class RedisServer:
    """`folder` holds its data; `options` are more words for its command line."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.socket = folder / "redis.sock"
        self._argv: list[str | Path] = [need("redis-server")]
        self._argv += ["--bind", "127.0.0.1", "--port", str(self.port)]
        self._argv += ["--unixsocket", self.socket, "--dir", folder]
        self._argv += ["--save", "", "--loglevel", "warning", *options]
        self._child: subprocess.Popen[bytes] | None = None

    def start(self, *options: str, loading: bool = False) -> None:
        """Until it answers, or, with `loading`, until it says that it is reading its data."""
        wanted = b"-LOADING" if loading else b"+PONG"
        self._child = child = subprocess.Popen(
            [*self._argv, *options], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        assert eventually(lambda: child.poll() is not None or self._says(wanted))
        assert child.poll() is None, "redis-server did not start"

    def command(self, *words: str) -> bytes:
        """Its answer to a command, as it stands on the wire; at most 64 KiB."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            parts = [f"${len(word)}\r\n{word}\r\n" for word in words]
            connection.sendall("".join([f"*{len(words)}\r\n", *parts]).encode("ascii"))
            return connection.recv(65536)

    def pause(self) -> None:
        """Hangs it: the kernel accepts for it, and nobody answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None

    def _signal(self, number: int) -> None:
        assert self._child is not None
        self._child.send_signal(number)

    def _says(self, wanted: bytes) -> bool:
        try:
            return self.command("PING").startswith(wanted)
        except OSError:
            return False


@contextmanager
def redis_server(folder: Path, *options: str) -> Iterator[RedisServer]:
    """One that answers, until the block ends."""
    server = RedisServer(folder, *options)
    try:
        server.start()
        yield server
    finally:
        server.kill()
