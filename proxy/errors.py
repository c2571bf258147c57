"""F0 errors: what can go wrong, said once, and its only two renderings.

An error is raised anywhere as `ProxyError(code, message)`; the code alone decides its status, its
type and whose fault it is, so that no two places can disagree. It is rendered once: as an HTTP
answer while the head has not gone out (`ProxyError.body`, `ProxyError.headers`), and afterwards as
an event in the protocol of the path (`ProxyError.event`).

An upstream's own 4xx or 5xx is not an error here: it is an answer and is relayed as it came.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any


class Source(Enum):
    """Whose doing an error is; only UPSTREAM ever counts against an upstream."""

    DOWNSTREAM = "downstream"
    PROXY = "proxy"
    UPSTREAM = "upstream"


class Dialect(Enum):
    """The protocol that the client of a path speaks, as far as errors look different in it."""

    CHAT = "chat"
    MESSAGES = "messages"  # Anthropic: top-level "type": "error"; `event: error` in a stream
    RESPONSES = "responses"  # OpenAI Responses: flat, numbered `error` events in a stream

    @classmethod
    def of(cls, path: str) -> Dialect:
        """The dialect of a request path (without its query)."""
        if path.startswith("/v1/messages"):
            return cls.MESSAGES
        if path.startswith("/v1/responses"):
            return cls.RESPONSES
        return cls.CHAT


@dataclass(frozen=True, slots=True)
class Kind:
    """What a code stands for: HTTP status, the `type` that SDKs read, whose doing it is."""

    status: int
    type: str
    source: Source


def _kinds(source: Source, type: str, **codes: int) -> dict[str, Kind]:
    return {code: Kind(status, type, source) for code, status in codes.items()}


KINDS: Mapping[str, Kind] = MappingProxyType(
    _kinds(
        Source.DOWNSTREAM,
        "invalid_request_error",
        invalid_path=400,
        invalid_request=400,
        unknown_url=404,
        model_not_found=404,
        stream_not_found=404,
        method_not_allowed=405,
        request_timeout=408,
        request_too_large=413,
        uri_too_long=414,
        expectation_failed=417,
        headers_too_large=431,
        loop_detected=508,
        invalid_api_key=401,
    )
    | _kinds(Source.DOWNSTREAM, "permission_error", origin_not_allowed=403, model_not_allowed=403)
    | _kinds(Source.DOWNSTREAM, "requests", rate_limit_exceeded=429, concurrency_limit_exceeded=429)
    | _kinds(
        Source.UPSTREAM,
        "upstream_error",
        upstream_unreachable=502,
        upstream_aborted=502,
        upstream_invalid=502,
        upstream_auth=502,
    )
    | _kinds(Source.UPSTREAM, "timeout_error", upstream_timeout=504)
    | _kinds(
        Source.PROXY,
        "overloaded_error",
        no_upstream_available=503,
        shutting_down=503,
        killed=503,
        store_unavailable=503,
    )
    | _kinds(Source.PROXY, "server_error", internal_error=500)
)

# Said inside of a stream only (interface, §6).
IN_BAND_ONLY = frozenset({"killed"})

_NO_RETRY_ABOVE = 60  # seconds: SDKs ignore a longer Retry-After and try again at once


class ProxyError(Exception):
    """Something went wrong; `code` is one of KINDS.

    `message` says what happened, where, and what to do; it is shown to clients, so it never holds a
        key or an upstream's text. `detail` is for the log alone: addresses, the system's words. `clock`
    names the timeout that ran out (connect, first_byte, idle, stall, total), `limit` the limit that is
    used up (requests, tokens, streams). `retry_after` is in seconds. `said` is the error object of an
    upstream, which a client is shown instead of ours, and nobody else. `close` asks for the client's
    connection to be closed.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        clock: str | None = None,
        limit: str | None = None,
        detail: str | None = None,
        retry_after: float | None = None,
        said: Mapping[str, Any] | None = None,
        close: bool = False,
        extra_headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.kind = KINDS[code]
        self.param = param
        self.clock = clock
        self.limit = limit
        self.detail = detail
        self.retry_after = retry_after
        self._said = said
        self.close = close
        self._extra_headers = extra_headers or {}

    @property
    def status(self) -> int:
        return self.kind.status

    def as_object(self) -> dict[str, Any]:
        """The `error` object of OpenAI's API."""
        if self._said is not None:
            return dict(self._said)
        return {
            "message": self.message,
            "type": "tokens" if self.limit == "tokens" else self.kind.type,
            "param": self.param,
            "code": self.code,
        }

    def body(self, dialect: Dialect) -> bytes:
        """The JSON body of the HTTP answer."""
        document: dict[str, Any] = {"error": self.as_object()}
        if dialect is Dialect.MESSAGES:
            document = {"type": "error"} | document
        return _json(document)

    def headers(self) -> dict[str, str]:
        """The headers of the HTTP answer, beside those that every answer bears."""
        headers = {"Content-Type": "application/json", **self._extra_headers}
        if self.close:
            headers["Connection"] = "close"
        if self.status in {429, 503}:
            # Whole seconds (RFC 9110 10.2.3), rounded up: a client told too little comes in vain.
            wait = max(1, math.ceil(self.retry_after or 0))
            headers["Retry-After"] = str(wait)
            if wait > _NO_RETRY_ABOVE:
                headers["x-should-retry"] = "false"
        return headers

    def event(self, dialect: Dialect, sequence_number: int) -> bytes:
        """One whole SSE event for a stream whose head is out.

        Chat completions take an unnamed event: openai-python parses named ones as chunks.
        `sequence_number` is for the Responses API, which numbers all its events.
        """
        if dialect is Dialect.MESSAGES:
            data = _json({"type": "error", "error": self.as_object()})
            return b"event: error\ndata: " + data + b"\n\n"
        if dialect is Dialect.RESPONSES:
            error = self.as_object()
            flat = {key: error.get(key) for key in ("code", "message", "param")}
            data = _json({"type": "error", **flat, "sequence_number": sequence_number})
            return b"event: error\ndata: " + data + b"\n\n"
        return b"data: " + _json({"error": self.as_object()}) + b"\n\n"


def timed_out(upstream: str, clock: str, after: float, detail: str | None = None) -> ProxyError:
    """One of an upstream's clocks has run out: connect, first_byte, idle, stall or total."""
    message = f"Upstream '{upstream}' ran into its {clock} timeout of {after:g} s."
    return ProxyError("upstream_timeout", message, clock=clock, detail=detail)


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=True, separators=(",", ":")).encode("ascii")
