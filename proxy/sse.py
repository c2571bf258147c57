"""F0 sse: what a stream of Server-Sent Events tells a proxy that does not change it.

The relay moves bytes; it does not know where one event ends and the next begins. What must look
into a stream lives here, outside that loop, and reads it the way the WHATWG specifies
(https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation):
lines end in LF, CRLF or CR, a blank line ends an event, lines that begin with a colon are comments.

`FirstEvent` holds a stream back until it is clear whether it begins with an error. `FirstToken` looks
at events until the first with content, and then retires. `Tap` remembers the first and the last bytes
of a body and answers questions about them once, after the last byte. `has_payload` and `has_data` look at what
was remembered, now and then, and `HEARTBEAT` is all that is ever added between two events of others.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Any

import msgspec

MEDIA_TYPE = b"text/event-stream"
# A comment without the blank line that a client's parser may take for an event (openai-python #2722).
HEARTBEAT = b":\n"
_KEEP = (
    4 * 1024
)  # bytes that a tap remembers of each end; usage and the end marks fit in many times
_EVENT_BEGIN = 256  # bytes of a long event's beginning: its name, type and number
_MAX_EVENT = 256 * 1024  # a longer event is not looked into
_MAX_HELD = 64 * 1024  # bytes of a stream's beginning that are held back
_MAX_EMPTY = 1024  # bytes; no comment, ping or empty delta is as long

_BOM = b"\xef\xbb\xbf"  # one at the start of a stream is ignored
_LINE_END = re.compile(rb"\r\n|\n|\r")
# A blank line is two line ends in a row; CR LF is one of them, never two.
_BLANK = rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)"
_EVENT_END = re.compile(_BLANK)
_WITHOUT_DATA = re.compile(rb":|event:|id:|retry:|(?:data: ?)?\Z")
_NAMED_ERROR = re.compile(rb"(?:\A(?:\xef\xbb\xbf)?|[\r\n])event: ?error[\r\n]")
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
        """Whether an event may be added at the end: nothing yet, or a blank line and then only comments."""
        begun, *lines = reversed(_LINE_END.split(self.tail.removeprefix(_BOM)))
        content = next((line for line in lines if line[:1] != b":"), None)
        return not begun and (self._whole if content is None else not content)

    @property
    def is_between_events(self) -> bool:
        """Whether a comment may be added, and the stream go on behind it. A CR at the end may be half
        of a line's end: what followed would be a blank line of its own."""
        return self.on_event_boundary and not self.tail.endswith(b"\r")

    @property
    def saw_last_event(self) -> bool:
        """Whether the stream ended with its protocol's last event, such as `data: [DONE]`."""
        return _LAST_EVENT.search(self.tail) is not None

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


class FirstEvent:
    """Holds a stream back until its first event with data is whole; comments and the like before it
    are no news. What is longer than `_MAX_HELD` is no error."""

    __slots__ = ("_begin", "_seen", "held", "is_error")

    def __init__(self) -> None:
        self.held = bytearray()
        self.is_error = False
        self._begin = 0  # of the first event that is not whole
        self._seen = False

    def seen_in(self, payload: bytes) -> bool:
        """Whether the event has come by the end of `payload`; True also when it gives up looking."""
        searched = max(self._begin, len(self.held) - 3)  # a blank line may have begun there
        self.held += payload
        if self._seen:
            return True
        for match in _EVENT_END.finditer(self.held, searched):
            begin, self._begin = self._begin, match.end()
            event = bytes(self.held[begin : match.end()])
            if event_data(event, first=not begin):
                self.is_error = is_error(event, first=not begin)
                self._seen = True
                return True
        self._seen = len(self.held) > _MAX_HELD
        return self._seen


class FirstToken:
    """Watches for the first non-empty content, reasoning or tool delta; and notes, on the way there,
    whether the first event with data is an error: then the stream is no answer, whatever its status."""

    __slots__ = ("_begun", "_rest", "began_with_error")

    def __init__(self) -> None:
        self.began_with_error = False
        self._begun = False
        self._rest = b""

    def seen_in(self, payload: bytes) -> bool:
        """Whether the token has come by the end of `payload`; True also when it gives up looking,
        because an event is too long: such an event is payload in all likelihood."""
        searched = max(0, len(self._rest) - 3)  # a blank line may have begun there
        self._rest += payload
        end = 0
        for match in _EVENT_END.finditer(self._rest, searched):
            event, end = self._rest[end : match.end()], match.end()
            data = event_data(event)
            if has_token(data):
                return True
            if data and not self._begun:
                self._begun, self.began_with_error = True, is_error(event)
        self._rest = self._rest[end:]
        return len(self._rest) > _MAX_EVENT


def events_of(stream: bytes) -> list[bytes]:
    """The whole events at the start of `stream`, each with its blank line."""
    events, start = [], 0
    for match in _EVENT_END.finditer(stream):
        events.append(stream[start : match.end()])
        start = match.end()
    return events


def event_data(event: bytes, *, first: bool = True) -> bytes:
    """The data of one event, its lines joined with LF. A byte order mark is ignored where a stream
    begins, so in its `first` event only."""
    lines = []
    for line in _LINE_END.split(event.removeprefix(_BOM) if first else event):
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


def has_payload(part: bytes, *, cut: bool) -> bool:
    """Whether a part of a stream holds generated text, reasoning or a tool call. `cut`: more came
    before it, so that it may begin within an event; one too long to be an empty one counts."""
    events = events_of(part)
    if cut:
        begun, *lines = _LINE_END.split(events[0] if events else part)
        if len(begun) + sum(len(line) for line in lines if line[:1] != b":") > _MAX_EMPTY:
            return True
    return any(has_token(event_data(event)) for event in events)


def has_data(part: bytes) -> bool:
    """Whether a part of a stream holds data, or a piece of a line that may be some."""
    return not all(_WITHOUT_DATA.match(line) for line in _LINE_END.split(part))


_NOT_PAYLOAD = {"role", "type", "stop_reason", "stop_sequence"}


def _filled(delta: Any) -> bool:
    return isinstance(delta, dict) and any(
        value for key, value in delta.items() if key not in _NOT_PAYLOAD
    )


def is_error(event: bytes, *, first: bool = True) -> bool:
    """Whether an event reports an error: by its name, as `{"error": {...}}`, or by a type that says so
    (`object` of vLLM)."""
    if _NAMED_ERROR.search(event):
        return True
    document = _object(event_data(event, first=first))
    if document is None:
        return False
    if document.get("error") or document.get("object") == "error":
        return True
    return document.get("type") in ("error", "response.failed")


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        document = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
