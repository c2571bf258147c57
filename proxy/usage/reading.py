"""F0 usage.reading: what an upstream says its answer used.

It says so once, at one of an answer's ends, and a relay keeps both. Where:

| endpoint | streamed | not streamed |
|---|---|---|
| chat, completions | the last chunk with a `usage` that isn't null: one of its own, or the finish chunk | `usage` of the body |
| embeddings | – | `usage` of the body, behind the data or (llama.cpp) before it |
| responses | `response.usage` of `response.completed`, `.incomplete` or `.failed` | `usage` of the body |
| messages | input in `message_start`, output in the last `message_delta` | `usage` of the body |

None of it can be forged by what a model writes. Only a member called `usage` at its proper depth
counts, whose name stands between two quotes that are not escaped, as none within a string does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec

from proxy.members import find_from_end, find_in_head
from proxy.usage.words import STATED, Endpoint, Usage

_Count = Annotated[int, msgspec.Meta(ge=0, le=10**9)] | None  # more is no count of tokens


class _Counts(msgspec.Struct):
    """The counts of every dialect; absent ones are None."""

    prompt_tokens: _Count = None
    completion_tokens: _Count = None
    input_tokens: _Count = None
    output_tokens: _Count = None
    cache_creation_input_tokens: _Count = None
    cache_read_input_tokens: _Count = None

    @property
    def all_input_tokens(self) -> int | None:
        """Anthropic's `input_tokens` are those that no cache had to do with."""
        if self.input_tokens is None:
            return None
        cached = (self.cache_creation_input_tokens or 0) + (self.cache_read_input_tokens or 0)
        return self.input_tokens + cached


_counts = msgspec.json.Decoder(_Counts)


def usage_of(endpoint: Endpoint, stream: bool, head: bytes, tail: bytes) -> Usage | None:
    """The usage that an answer states; None if it doesn't, or not believably.

    `head` and `tail` are the first and the last bytes of its body, some KiB of each without a gap,
    and may overlap. A body that is no stream must have ended whole: in one that was cut, something
    else may seem to stand at its end.
    """
    match endpoint:
        case Endpoint.NONE:
            return None
        case Endpoint.MESSAGES if stream:
            return _usage_of_messages(head, tail)
        case Endpoint.RESPONSES if stream:
            counts = _told(_backwards(tail), depth=2)
        case _ if stream:
            counts = _told(_backwards(tail), depth=1)
        case _:
            counts = _of_body(head, tail)
    if counts is None:
        return None
    read, written = _in_terms_of(endpoint, counts)
    return None if read is None or written is None else Usage(read, written)


def _in_terms_of(endpoint: Endpoint, counts: _Counts) -> tuple[int | None, int | None]:
    """Input and output, as the endpoint calls them."""
    match endpoint:
        case Endpoint.MESSAGES:
            return counts.all_input_tokens, counts.output_tokens
        case Endpoint.RESPONSES:
            return counts.input_tokens, counts.output_tokens
        case Endpoint.EMBEDDINGS:
            return counts.prompt_tokens, 0
        case _:
            return counts.prompt_tokens, counts.completion_tokens


def _usage_of_messages(head: bytes, tail: bytes) -> Usage | None:
    """Counts are cumulative, and a `message_delta` may repeat the input's: what a server tool has
    read comes on top. Others say 0 in one of the two places (sglang #20830), so the larger holds.
    """
    start, end = _told(head.splitlines(), depth=2), _told(_backwards(tail), depth=1)
    if end is None or end.output_tokens is None:
        return None
    inputs = [counts.all_input_tokens for counts in (start, end) if counts is not None]
    known = [each for each in inputs if each is not None]
    return Usage(max(known), end.output_tokens) if known else None


def _of_body(head: bytes, tail: bytes) -> _Counts | None:
    counts = _read(tail, find_from_end(tail, "usage", depth=1))
    return counts or _read(head, find_in_head(head, "usage"))


def _backwards(tail: bytes) -> Iterable[bytes]:
    return reversed(tail.splitlines())


def _told(lines: Iterable[bytes], depth: int) -> _Counts | None:
    """The counts of the first of these lines that has some, `depth` objects deep. A line may lack
    its beginning."""
    for line in lines:
        if STATED.search(line):
            counts = _read(line, find_from_end(line, "usage", depth))
            if counts is not None:
                return counts
    return None


def _read(text: bytes, span: slice | None) -> _Counts | None:
    if span is None:
        return None
    try:
        return _counts.decode(text[span])
    except (msgspec.MsgspecError, RecursionError):
        return None
