"""F1 exchange: one request as plain data: what was asked (`Ask`), what became of it (`Exchange`).

`Exchange` is the one mutable record of a request. Whoever learns something writes it here;
metrics and the access line are written from it, at its end, in `observe`. Times are in seconds of
the monotonic clock; `None` means that it did not come to that.

Neither tells a secret: an `Ask` shows its headers, query and body in no repr, so that none gets
into a log with whatever holds it, and an `Exchange` has none to tell.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import Enum

from proxy.errors import Dialect, ProxyError
from proxy.framing import Header
from proxy.usage import Endpoint, Meter, Usage

# A segment of a path that looks like a key: some gateways have a place for one there, and a client
# that was moved here may still send it.
_KEY_LIKE = re.compile(r"/[^/]*?(?<![A-Za-z])sk-[^/]*")


class Outcome(Enum):
    """How a request ended for which an upstream was asked."""

    COMPLETED = "completed"
    CLIENT_GONE = "client_gone"
    UPSTREAM_ERROR = "upstream_error"  # no answer
    UPSTREAM_TRUNCATED = "upstream_truncated"  # cut after the head
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    IDLE_TIMEOUT = "idle_timeout"
    STALL_TIMEOUT = "stall_timeout"
    TOTAL_TIMEOUT = "total_timeout"
    SHUTDOWN = "shutdown"
    KILLED = "killed"


class Phase(Enum):
    """How far a request has come."""

    READING = "reading"  # the client's request
    WAITING = "waiting"  # for the upstream's head
    RELAYING = "relaying"


@dataclass(frozen=True, slots=True)
class Upload:
    """A request body that streams up as it comes: it can't be sent twice.

    `length` is its declared Content-Length in bytes; None if it is chunked. `pieces` raises
    ProxyError when the client stalls or exceeds `max_body`.
    """

    length: int | None
    pieces: AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class Ask:
    """What the client asked for: the parsed request beside its raw bytes.

    `target` is the path behind `/v1` and the query, as they came. `body` is whole, streams, or is
    None if the request has none. `model` and `stream` are read from a JSON body; None and False if
    it is none.
    """

    method: str
    target: bytes = field(repr=False)
    headers: tuple[Header, ...] = field(repr=False)
    body: bytes | Upload | None = field(default=None, repr=False)
    model: str | None = None
    stream: bool = False
    identity: bool = False  # asks for an answer that is not compressed


@dataclass(slots=True)
class Exchange:
    """The record of one request."""

    id: str  # ours, unique
    request_id: str  # the client's if it gave a usable one
    method: str
    path: str  # without the query; what may be a key in it is ***
    received: float
    client: str = "anonymous"
    route: str = "none"
    model: str | None = None
    upstream: str | None = None
    attempts: int = 0
    attempt_results: list[tuple[str, str]] = field(default_factory=list)  # (upstream, result)
    phase: Phase = Phase.READING
    status: int | None = None
    stream: bool = False  # the answer is an event stream
    outcome: Outcome | None = None
    read: float | None = None  # the request's last byte
    forwarded: float | None = None  # our first byte to an upstream
    first_byte: float | None = None  # the upstream's head
    first_token: float | None = None
    last_payload: float | None = None
    last_own: float | None = None  # a stream's head, or heartbeat
    ended: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    chunks: int = 0
    heartbeats: int = 0
    prompt: Usage | None = None  # what the request may use, as estimated before
    hides_usage: bool = False  # the answer's usage was asked for by us, and is not the client's
    tokens_in: int | None = None
    tokens_out: int | None = None
    tokens_source: str | None = None  # who counted: upstream, estimated
    left: bool = False  # the client has, and the answer is read on all the same
    delivered: bool = False  # the client had all of the answer when it left
    meter: Meter | None = None  # counts the answer's tokens as they pass
    limits: tuple[Header, ...] = ()  # what the client is told about what is left to it
    task: asyncio.Task[object] | None = None
    # What answers, as far as it generates: reading or deleting what was stored does not.
    endpoint: Endpoint = field(init=False)
    dialect: Dialect = field(init=False)
    interruption: ProxyError | None = None
    error: ProxyError | None = None  # what the client was told, as an answer or in-band

    def __post_init__(self) -> None:
        self.endpoint = Endpoint.of(self.path) if self.method == "POST" else Endpoint.NONE
        self.dialect = Dialect.of(self.path)
        self.path = _KEY_LIKE.sub("/***", self.path)

    @property
    def tokens(self) -> int:
        """What the request has used, once it has ended."""
        return (self.tokens_in or 0) + (self.tokens_out or 0)

    def spent(self, usage: Usage) -> None:
        """Notes what the request has used, as its upstream says."""
        self.tokens_in, self.tokens_out = usage.input, usage.output
        self.tokens_source = "upstream"

    def interrupt(self, error: ProxyError) -> None:
        """Ends the request with `error`, in whatever phase it is: a kill, or the end of a drain."""
        if self.interruption is None and self.task is not None and not self.task.done():
            self.interruption = error
            self.task.cancel()

    def interrupted(self) -> ProxyError | None:
        """To be asked by whoever catches CancelledError: the error, if it was `interrupt`.

        None means that the client has left. The cancellation counts as dealt with.
        """
        if self.left:
            return None
        if self.interruption is not None and self.task is not None:
            self.task.uncancel()
        return self.interruption
