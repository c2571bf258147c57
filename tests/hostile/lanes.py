"""A lane: one real upstream, the real proxy process in front of it, and a client that sends bytes.

One input at a time goes through a lane, and is settled by a well-behaved request behind it: whatever
the upstream read before that one came of the input.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.hostile.corpus import MAX_BODY
from tests.hostile.reading import Answer, read_answers
from tests.hostile.upstreams import PATIENCE, STARTERS, Journal, Seen
from tests.real.processes import Process, start_proxy

_SPLIT = 0.001  # seconds between two segments, so that they are two reads at the other end


class Conversation:
    """One connection to the proxy, as bytes."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._heard = b""
        self.closed = False  # by the proxy

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def send(self, *segments: bytes) -> None:
        """Sends each segment by itself. A proxy that has refused may not take them all."""
        with suppress(ConnectionError):
            for number, segment in enumerate(segments):
                if number:
                    time.sleep(_SPLIT)
                self._socket.sendall(segment)

    def hang_up(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def answers(
        self, methods: Sequence[str], count: int, patience: float = PATIENCE
    ) -> tuple[list[Answer], bytes]:
        """What has been answered to requests with these methods, and what is no whole answer: as
        soon as `count` final answers are there, the proxy has closed, or nothing has come for
        `patience` seconds. Raises Malformed."""
        while True:
            answers, rest = read_answers(self._heard, methods, closed=self.closed)
            finals = sum(answer.status >= 200 for answer in answers)
            if finals >= count or self.closed or not self._hear(patience):
                return answers, rest

    def read_to_the_end(self) -> None:
        """Returns when the proxy has closed the connection, or has let us wait for too long."""
        while not self.closed and self._hear(PATIENCE):
            pass

    def _hear(self, patience: float) -> bool:
        self._socket.settimeout(patience)
        try:
            data = self._socket.recv(2**18)
        except (TimeoutError, BlockingIOError):
            return False
        except ConnectionError:
            data = b""
        self._heard += data
        self.closed = not data
        return True


class Lane:
    """One upstream, and the proxy before it."""

    def __init__(self, name: str, proxy: Process, journal: Journal) -> None:
        self.name = name
        self._journal = journal
        self._log = proxy.log.open("rb")
        self._port = int(proxy.url.rpartition(":")[2])
        self._settled = 0
        self._neighbour = HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        self.settle()

    def talk(self) -> Conversation:
        return Conversation(self._port)

    def settle(self) -> list[Seen]:
        """What the upstream has read since the last time. Another client's well-behaved request
        must be answered as if nothing had been."""
        self._settled += 1
        target = f"/v1/settled/{self._settled}"
        self._neighbour.request("GET", target)
        answer = self._neighbour.getresponse()
        read = (answer.status, answer.headers["X-Read"], answer.read())
        assert read == (200, f"GET {target}", b"ok\n"), read
        return self._journal.until(target)

    def complaints(self) -> list[str]:
        """What the proxy's log has since the last time that would be a bug of its own."""
        return complaints_in(self._log.read().decode(errors="replace"))

    def close(self) -> None:
        self._neighbour.close()
        self._journal.close()
        self._log.close()


def complaints_in(log: str) -> list[str]:
    return [line for line in log.splitlines() if "Traceback" in line or "internal_error" in line]


@contextmanager
def open_lane(name: str, folder: Path) -> Iterator[Lane]:
    with (
        STARTERS[name](folder) as witness,
        start_proxy(folder, witness.upstream, max_body=MAX_BODY) as proxy,
    ):
        lane = Lane(name, proxy, Journal(witness.journal))
        try:
            yield lane
        finally:
            lane.close()
