"""F0 usage.stripper: takes the chunk out of a stream that only we have asked for.

Where usage was asked for on our own account, the upstream sends one chunk more before `[DONE]`, with
no choices and an object `usage` (OpenAI's `stream_options.include_usage`). A client that did not ask
does not expect it: many read `choices[0]` of every chunk. Azure's first chunk has no choices either,
but no usage: it stays.
"""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

from proxy.sse import event_data, events_of
from proxy.usage.words import STATED

_MAX_EVENT = 256 * 1024  # bytes; a longer event passes without a look
_BLANK_LINES = (b"\n\n", b"\r\n\r\n")  # of almost all upstreams


_COMMENTS = re.compile(rb"(?::[^\r\n]*+(?:\r\n|\n))++")


class _Chunk(msgspec.Struct):
    choices: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=0)]
    usage: dict[str, msgspec.Raw]


_chunk = msgspec.json.Decoder(_Chunk)


class UsageStripper:
    """A filter of an event stream, fed in any pieces: all but that chunk passes byte for byte, each
    event as soon as it is whole."""

    __slots__ = ("_held", "_line_feed", "_unlooked")

    def __init__(self) -> None:
        self._held = bytearray()  # of an event whose end is still to come
        self._unlooked = False  # it was too long: most of it has gone out
        # Where a piece ended with an event's last CR: what to make of an LF that belongs to it.
        self._line_feed: bytes | None = None

    def feed(self, piece: bytes) -> bytes:
        """The bytes to relay now."""
        if (
            not self._held
            and self._line_feed is None
            and piece.endswith(_BLANK_LINES)
            and not STATED.search(piece)
        ):
            return piece
        if not self._held and self._line_feed is None and _COMMENTS.fullmatch(piece):
            return piece  # a heartbeat, which nobody should wait for
        line_feed = b""
        if self._line_feed is not None and piece:
            if piece.startswith(b"\n"):
                line_feed, piece = self._line_feed, piece[1:]
            self._line_feed = None
        return line_feed + self._filter(piece)

    def flush(self) -> bytes:
        """What is left at the stream's end: an event that was not finished."""
        left = bytes(self._held)
        self._held.clear()
        return left

    def _filter(self, piece: bytes) -> bytes:
        # The end of the line before may be all that is missing of a blank line.
        if not events_of(bytes(self._held[-1:]) + piece):
            self._held += piece
            return self._overflow()
        text = bytes(self._held) + piece
        events = events_of(text)
        passed = [event for event in events if not self._is_ours(event)]
        self._held = bytearray(text[sum(map(len, events)) :])
        if not self._held and text.endswith(b"\r"):
            self._line_feed = b"\n" if passed[-1:] == events[-1:] else b""
        return b"".join(passed)

    def _overflow(self) -> bytes:
        if len(self._held) <= _MAX_EVENT:
            return b""
        self._unlooked = True
        out = bytes(self._held[:-1])
        del self._held[:-1]
        return out

    def _is_ours(self, event: bytes) -> bool:
        if self._unlooked:
            self._unlooked = False
            return False
        if not STATED.search(event):
            return False
        try:
            _chunk.decode(event_data(event))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return False
        return True
