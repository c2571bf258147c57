"""F0 sse: what a stream of Server-Sent Events tells a proxy that does not change it.

The relay moves bytes; it does not know where one event ends and the next begins. What must look
into a stream lives here, outside that loop, and reads it the way the WHATWG specifies
(https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation):
lines end in LF, CRLF or CR, a blank line ends an event, lines that begin with a colon are comments.

`Tap` remembers the first and the last bytes of a body and answers questions about them once, after
the last byte. `FirstToken` looks at events until the first with content, and then retires.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Any

import msgspec

MEDIA_TYPE = b"text/event-stream"
_KEEP = (
    4 * 1024
)  # bytes that a tap remembers of each end; usage and the end marks fit in many times
_EVENT_BEGIN = 256  # bytes of a long event's beginning: its name, type and number
_MAX_EVENT = 256 * 1024  # a longer event is not looked into

_BOM = b"\xef\xbb\xbf"  # one at the start of a stream is ignored
_LINE_END = re.compile(rb"\r\n|\n|\r")
# A blank line is two line ends in a row; CR LF is one of them, never two.
_BLANK = rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)"
_EVENT_END = re.compile(_BLANK)
_BETWEEN_EVENTS = re.compile(rb"(?:\A(?:\xef\xbb\xbf)?|" + _BLANK + rb")(?::[^\r\n]*[\r\n]+)*\Z")
_SEQUENCE_NUMBER = re.compile(rb'"sequence_number":\s*(\d{1,15})')

# The last event of a stream that its upstream considers whole: chat and legacy completions,
# Anthropic messages, Responses. Anything else is whole only if its framing says so.
_LAST_EVENT = re.compile(
    rb"(?:\A|[\r\n])(?:data: ?\[DONE\]"
    rb"|event: ?message_stop(?:\r\n|\n|\r)data:[^\r\n]*"
    rb"|event: ?response\.(?:completed|incomplete|failed)(?:\r\n|\n|\r)data:[^\r\n]*)"
    + _BLANK
    + rb"\Z"
)


class Tap:
    """Remembers the first and the last few KiB of a body, at the cost of an append per piece."""

    __slots__ = ("_tail", "_tail_size", "_whole", "head", "keep")

    def __init__(self, keep: int = _KEEP) -> None:
        self.keep = keep  # bytes of the tail
        self.head = b""
        self._tail: deque[bytes] = deque()
        self._tail_size = 0
        self._whole = True  # the tail is all there was

    def remember(self, payload: bytes) -> None:
        if len(self.head) < _KEEP:
            self.head += payload[: _KEEP - len(self.head)]
        if len(payload) > self.keep:
            payload = _without_middle(payload, self.keep)
        self._tail.append(payload)
        self._tail_size += len(payload)
        while self._tail_size - len(self._tail[0]) >= self.keep:
            self._tail_size -= len(self._tail.popleft())
            self._whole = False

    @property
    def tail(self) -> bytes:
        return b"".join(self._tail)

    @property
    def on_event_boundary(self) -> bool:
        """Whether an event may be added: nothing yet, or a blank line and then only comments."""
        tail = self.tail if self._whole else b"x" + self.tail  # no false start of the stream
        return _BETWEEN_EVENTS.search(tail) is not None

    @property
    def saw_last_event(self) -> bool:
        """Whether the stream ended with its protocol's last event, such as `data: [DONE]`."""
        return _LAST_EVENT.search(self.tail) is not None

    @property
    def began_with_error(self) -> bool:
        """Whether the first event is an error: no answer, though its status is 200."""
        for event in events_of(self.head):
            if data := event_data(event):
                return is_error(data)
        return False

    @property
    def next_sequence_number(self) -> int:
        """The number that an event added to a Responses stream must bear."""
        numbers = _SEQUENCE_NUMBER.findall(self.tail)
        return int(numbers[-1]) + 1 if numbers else 0


def _without_middle(payload: bytes, keep: int) -> bytes:
    """A large piece as its last event's beginning and its own end: Responses' last event repeats
    the whole answer, and what it is stands in front."""
    blank = payload.rfind(b"\n\n", 0, -2)
    begin, end = (blank + 2 if blank >= 0 else 0), len(payload) - keep
    if begin >= end:
        return payload[end:]  # with what stands before the last event: usage, in most dialects
    return payload[begin : begin + _EVENT_BEGIN] + payload[max(begin + _EVENT_BEGIN, end) :]


class FirstToken:
    """Watches for the first non-empty content, reasoning or tool delta."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def seen_in(self, payload: bytes) -> bool:
        """Whether the token has come by the end of `payload`; True also when it gives up looking,
        because an event is too long: such an event is payload in all likelihood."""
        searched = max(0, len(self._rest) - 3)  # a blank line may have begun there
        self._rest += payload
        end = 0
        for match in _EVENT_END.finditer(self._rest, searched):
            event, end = self._rest[end : match.end()], match.end()
            if has_token(event_data(event)):
                return True
        self._rest = self._rest[end:]
        return len(self._rest) > _MAX_EVENT


def events_of(stream: bytes) -> list[bytes]:
    """The whole events at the start of `stream`, each with its blank line."""
    events, start = [], 0
    for match in _EVENT_END.finditer(stream):
        events.append(stream[start : match.end()])
        start = match.end()
    return events


def event_data(event: bytes) -> bytes:
    """The data of one event, its lines joined with LF."""
    lines = []
    for line in _LINE_END.split(event.removeprefix(_BOM)):
        name, colon, value = line.partition(b":")
        if name == b"data" and colon:
            lines.append(value.removeprefix(b" "))
    return b"\n".join(lines)


def has_token(data: bytes) -> bool:
    """Whether an event's data holds generated text, reasoning or a tool call, in any dialect."""
    document = _object(data)
    if document is None:
        return False
    kind = document.get("type")
    if isinstance(kind, str):  # Anthropic's content_block_delta, Responses' response.*.delta
        delta = document.get("delta")
        return kind.endswith("delta") and (
            _filled(delta) if isinstance(delta, dict) else bool(delta)
        )
    choices = document.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and (choice.get("text") or _filled(choice.get("delta"))):
            return True
    return False


_NOT_PAYLOAD = {"role", "type", "stop_reason", "stop_sequence"}


def _filled(delta: Any) -> bool:
    return isinstance(delta, dict) and any(
        value for key, value in delta.items() if key not in _NOT_PAYLOAD
    )


def is_error(data: bytes) -> bool:
    """Whether an event's data reports an error: `{"error": {...}}`, or a type that says so."""
    document = _object(data)
    if document is None:
        return False
    return bool(document.get("error")) or document.get("type") in ("error", "response.failed")


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        document = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
