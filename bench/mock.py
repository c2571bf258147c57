"""The mock upstream: OpenAI-shaped answers on plain epoll, in one process.

Streams go on until somebody POSTs /stop, then all of them say their sum and `[DONE]`: so the
measured window ends when the measuring side wants it to, and every chunk is still accounted for.
Each chunk is a send of its own, as a model server's is.
"""

from __future__ import annotations

import gc
import heapq
import re
import select
import socket
import sys
import time
from itertools import count

from bench import wire

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_USAGE = re.compile(rb'"include_usage": *true')
_CHUNKED = b"%x\r\n%b\r\n"
_FRAME = _CHUNKED % (wire.CHUNK_BYTES, wire.CHUNK)
_FLOOD_FRAME = _FRAME % 0
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
_JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
_STOPPED = b"HTTP/1.1 204 No Content\r\n\r\n"
_REFUSED = b"HTTP/1.1 411 Length Required\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_KEPT = 8192  # of a request: its head and the order in its prompt
_TURN = 32  # chunks a flooding stream sends before the next one has its turn
_GOLDEN = 0.618033988749895


class Peer:
    """One connection of the proxy to us."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.head = b""  # of the request being read
        self.missing = 0  # bytes of its body
        self.length = 0
        self.unsent = b""  # what did not fit into the socket
        self.streaming = False
        self.period = 0.0  # 0: flooding
        self.usage = False
        self.chunks = 0


class Mock:
    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._epoll = select.epoll()
        self._peers: dict[int, Peer] = {}
        self._due: list[tuple[float, int, Peer]] = []  # heap of the paced streams
        self._flooding: list[Peer] = []
        self._serial = count()
        self._buffer = memoryview(bytearray(1 << 18))

    def run(self) -> None:
        self._epoll.register(self._listener, select.EPOLLIN)
        self._epoll.register(sys.stdin, select.EPOLLIN)  # its end is our parent's
        while True:
            for fd, event in self._wait():
                if fd == self._listener.fileno():
                    self._accept()
                elif fd == sys.stdin.fileno():
                    return
                elif peer := self._peers.get(fd):
                    self._ready(peer, event)
            self._pace()
            self._flood()

    def _wait(self) -> list[tuple[int, int]]:
        if self._flooding:
            return self._epoll.poll(0)
        if not self._due:
            return self._epoll.poll()
        # epoll counts whole milliseconds, select does not, and can wait for an epoll.
        pause = max(0.0, self._due[0][0] - time.monotonic())
        ready, _, _ = select.select([self._epoll], [], [], pause)
        return self._epoll.poll(0) if ready else []

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._peers[sock.fileno()] = Peer(sock)
            self._epoll.register(sock, select.EPOLLIN)

    def _ready(self, peer: Peer, event: int) -> None:
        if event & select.EPOLLOUT:
            self._epoll.modify(peer.sock, select.EPOLLIN)
            unsent, peer.unsent = peer.unsent, b""
            self._send(peer, unsent)
            if not peer.unsent and peer.streaming and not peer.period:
                self._flooding.append(peer)
        if event & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            self._read(peer)

    def _read(self, peer: Peer) -> None:
        try:
            size = peer.sock.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            size = 0
        if not size:
            self._drop(peer)
        elif peer.missing:
            if len(peer.head) < _KEPT:
                peer.head += self._buffer[: min(size, _KEPT)]
            peer.missing -= size
            if peer.missing <= 0:
                self._answer(peer)
        else:
            self._read_head(peer, self._buffer[:size].tobytes())

    def _read_head(self, peer: Peer, data: bytes) -> None:
        data = peer.head + data
        end = data.find(b"\r\n\r\n")
        peer.head = data[:_KEPT]
        if end < 0:
            return
        if data.startswith(b"POST /stop "):
            peer.head = b""
            self._stop()
            self._send(peer, _STOPPED)
        elif length := _LENGTH.search(data, 0, end):
            peer.length = int(length[1])
            peer.missing = peer.length - (len(data) - end - 4)
            if peer.missing <= 0:
                self._answer(peer)
        else:
            self._send(peer, _REFUSED)
            self._drop(peer)

    def _answer(self, peer: Peer) -> None:
        order = wire.ORDER.search(peer.head)
        kind = order[1] if order else wire.JSON
        if kind == wire.JSON:
            body = wire.answer(peer.length)
            self._send(peer, _JSON_HEAD % (len(body), body))
        else:
            peer.streaming = True
            peer.chunks = int(order[3] or 1) if order else 1
            peer.usage = bool(_USAGE.search(peer.head))
            self._send(peer, _STREAM_HEAD + (_FRAME % time.monotonic_ns()) * peer.chunks)
            if kind == wire.FLOOD:
                peer.period = 0.0
                self._flooding.append(peer)
            else:
                self._start_pacing(peer, 1 / int(order[2] or 1) if order else 1)
        peer.head, peer.missing = b"", 0

    def _start_pacing(self, peer: Peer, period: float) -> None:
        """Phases follow the golden ratio: even over the period, and the same for every target."""
        peer.period = period
        serial = next(self._serial)
        now = time.monotonic()
        due = now - now % period + (serial * _GOLDEN % 1) * period
        heapq.heappush(self._due, (due if due > now else due + period, serial, peer))

    def _pace(self) -> None:
        due = self._due
        while due and due[0][0] <= time.monotonic():
            at, serial, peer = due[0]
            if not peer.streaming:
                heapq.heappop(due)
                continue
            peer.chunks += 1
            self._send(peer, _FRAME % time.monotonic_ns())
            heapq.heapreplace(due, (at + peer.period, serial, peer))

    def _flood(self) -> None:
        going = []
        for peer in self._flooding:
            for _ in range(_TURN):
                if peer.unsent or not peer.streaming:
                    break
                peer.chunks += 1
                self._send(peer, _FLOOD_FRAME)
            else:
                going.append(peer)
        self._flooding = going

    def _stop(self) -> None:
        for peer in list(self._peers.values()):
            if peer.streaming:
                peer.streaming = False
                last = wire.ending(peer.chunks, usage=peer.usage)
                self._send(peer, _CHUNKED % (len(last), last) + b"0\r\n\r\n")
        self._due.clear()
        self._flooding.clear()

    def _send(self, peer: Peer, data: bytes) -> None:
        if peer.unsent:  # keep the order; the kernel will say when it has room
            peer.unsent += data
            return
        try:
            sent = peer.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._drop(peer)
            return
        if sent < len(data):
            peer.unsent = data[sent:]
            self._epoll.modify(peer.sock, select.EPOLLIN | select.EPOLLOUT)

    def _drop(self, peer: Peer) -> None:
        peer.streaming = False
        if self._peers.pop(peer.sock.fileno(), None):
            peer.sock.close()


def main() -> None:
    gc.disable()
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        listener.setblocking(False)
        print(listener.getsockname()[1], flush=True)
        Mock(listener).run()


if __name__ == "__main__":
    main()
