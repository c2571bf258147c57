"""What a stream tells of itself, at every byte of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.sse import (
    HEARTBEAT,
    FirstEvent,
    FirstToken,
    Tap,
    event_data,
    events_of,
    has_data,
    has_payload,
    has_token,
    is_error,
)

ENDS = pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])


def tapped(*pieces: bytes) -> Tap:
    tap = Tap()
    for piece in pieces:
        tap.remember(piece)
    return tap


def data(document: Any) -> bytes:
    return json.dumps(document).encode()


def event(document: Any, name: str | None = None) -> bytes:
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + data(document) + b"\n\n"


def chat(**delta: Any) -> dict[str, Any]:
    """A chunk of a chat completion."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
    }


# The WHATWG's interpretation, as plainly as it can be written ---------------------------------


def lines_of(stream: bytes) -> tuple[list[bytes], bytes]:
    """The whole lines, and what has come of the next. A CR ends a line at once."""
    stream = stream.removeprefix(b"\xef\xbb\xbf")
    lines, line, at = [], b"", 0
    while at < len(stream):
        byte = stream[at : at + 1]
        at += 1
        if byte in {b"\r", b"\n"}:
            if byte == b"\r" and stream[at : at + 1] == b"\n":
                at += 1
            lines.append(line)
            line = b""
        else:
            line += byte
    return lines, line


def between_events(stream: bytes) -> bool:
    """Whether an added event would be read as one, and spoil none that has begun."""
    lines, unfinished = lines_of(stream)
    in_event = False
    for line in lines:
        if not line:
            in_event = False
        elif not line.startswith(b":"):
            in_event = True
    return not unfinished and not in_event


def dispatched(stream: bytes) -> list[bytes]:
    """The data of the events that a browser would dispatch."""
    found: list[bytes] = []
    values: list[bytes] = []
    for line in lines_of(stream)[0]:
        name, _, value = line.partition(b":")
        if not line:
            if values:
                found.append(b"\n".join(values))
            values = []
        elif name == b"data":
            values.append(value.removeprefix(b" "))
    return found


RECORDED = (
    b"\xef\xbb\xbf: hello\n\n"
    + event(chat(role="assistant", content=""))
    + b'data: {"choices":[{"delta":{"content":"Gr\xc3\xbc\xc3\x9fe"}}]}\n\n'
    + b": ping\n\n:\n"
    + b"event: odd\nid: 7\nretry: 300\ndata: 1\ndata:  2\n: within\ndata:3\n\n"
    + b"nonsense\n\n\n\n"
    + b"data: [DONE]\n\n"
)


@ENDS
def test_where_an_event_may_be_added_at_every_byte(end: bytes) -> None:
    stream = RECORDED.replace(b"\n", end)
    boundaries = 0
    for at in range(len(stream) + 1):
        seen = stream[:at]
        if b"\xef\xbb\xbf".startswith(seen) and seen:
            continue  # half a BOM: nobody sends one
        found = tapped(seen).on_event_boundary
        assert found == between_events(seen), seen[-40:]
        assert tapped(*(seen[i : i + 1] for i in range(at))).on_event_boundary == found
        boundaries += found
    assert boundaries >= 10


@given(st.lists(st.sampled_from([b"\n", b"\r", b"\r\n", b":", b"a", b"data: x", b": c"])))
def test_an_event_is_never_added_within_another(pieces: list[bytes]) -> None:
    stream = b"".join(pieces)
    if tapped(*pieces).on_event_boundary:
        assert between_events(stream)
    # Not to add one where it could stand is allowed only behind a blank line at the very start.
    elif between_events(stream):
        assert stream.startswith((b"\r", b"\n"))


@ENDS
def test_boundaries_of_long_streams(end: bytes) -> None:
    one = b"data: " + b"x" * 500 + end + end
    long = [one] * 100
    assert tapped(*long).on_event_boundary
    assert tapped(*long, b": comment" + end).on_event_boundary
    assert not tapped(*long, b"data: y" + end).on_event_boundary
    assert not tapped(*long, b": comment").on_event_boundary
    assert tapped(*long, b"data: " + b"y" * 100_000 + end + end).on_event_boundary
    assert not tapped(*long, b"data: " + b"y" * 100_000 + end).on_event_boundary


def test_many_comments_hide_no_unfinished_event() -> None:
    assert not tapped(b"data: unfinished\n", *[b": ping\n"] * 5000).on_event_boundary


@ENDS
def test_events_and_their_data(end: bytes) -> None:
    stream = RECORDED.replace(b"\n", end)
    events = events_of(stream)
    assert b"".join(events) == stream
    found = [event_data(each) for each in events]
    assert [each for each in found if each] == dispatched(stream)


def test_an_unfinished_event_is_none() -> None:
    assert events_of(b"data: 1\n\ndata: 2\n") == [b"data: 1\n\n"]
    assert events_of(b"") == []


# The tap --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 1000, 4096, 4097, 100_000])
def test_a_tap_keeps_both_ends_and_little_else(size: int) -> None:
    stream = bytes(range(256)) * 400
    tap = tapped(*(stream[at : at + size] for at in range(0, len(stream), size)))
    assert tap.head == stream[:4096]
    assert stream.endswith(tap.tail[-4096:])
    assert 4096 <= len(tap.tail) < 4096 + min(size, 4096) + 256


def test_a_tap_of_a_short_body_has_all_of_it() -> None:
    tap = tapped(b"ab", b"c")
    assert (tap.head, tap.tail) == (b"abc", b"abc")
    assert (tapped().head, tapped().tail) == (b"", b"")


LAST_EVENTS = [
    b"data: [DONE]\n\n",
    b"data:[DONE]\n\n",
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    b'event:message_stop\ndata:{"type": "message_stop"}\n\n',
    b'event: response.completed\ndata: {"type":"response.completed"}\n\n',
    b'event: response.incomplete\ndata: {"type":"response.incomplete"}\n\n',
    b'event: response.failed\ndata: {"type":"response.failed"}\n\n',
]


@ENDS
@pytest.mark.parametrize("last", LAST_EVENTS)
def test_the_last_event_of_every_dialect(last: bytes, end: bytes) -> None:
    last = last.replace(b"\n", end)
    before = (b"data: 1\n\n" * 2000).replace(b"\n", end)
    assert tapped(last).saw_last_event
    assert tapped(before, last).saw_last_event
    assert tapped(*(bytes([byte]) for byte in before + last)).saw_last_event
    for at in range(len(last)):
        # A blank line that ends in CR LF is over with its CR.
        assert tapped(before, last[:at]).saw_last_event == last[:at].endswith(b"\r\n\r")
    assert not tapped(last, b"data: 1" + end + end).saw_last_event


@pytest.mark.parametrize(
    "end",
    [
        b'data: {"content":"data: [DONE]"}\n\n',
        b"xdata: [DONE]\n\n",
        b": data: [DONE]\n\n",
        b"data: [DONE]x\n\n",
        b"event: message_stopped\ndata: {}\n\n",
        b"event: message_stop\n\n",
        b"event: response.created\ndata: {}\n\n",
        b"event: error\ndata: {}\n\n",
        b"[DONE]\n\n",
    ],
)
def test_what_is_no_last_event(end: bytes) -> None:
    assert not tapped(b"data: 1\n\n", end).saw_last_event


def test_a_last_event_may_be_long() -> None:
    # Responses repeat the whole answer in `response.completed`.
    last = event({"type": "response.completed", "text": "x" * 20_000}, "response.completed")
    assert tapped(b"data: 1\n\n", last).saw_last_event


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (event({"error": {"message": "m"}}), True),
        (event({"error": "m"}), True),
        (event({"type": "error", "error": {"type": "overloaded_error"}}, "error"), True),
        (event({"type": "response.failed", "response": {}}, "response.failed"), True),
        (event({"type": "error", "code": "x", "sequence_number": 0}), True),
        (b": ping\n\nevent: ping\n\n" + event({"error": {"message": "m"}}), True),
        (event(chat(content="x")) + event({"error": {"message": "m"}}), False),
        (event({"error": None, "choices": []}), False),
        (event({"error": {}}), False),
        (event({"type": "response.created", "response": {"error": None}}), False),
        (event({"type": "message_start"}, "message_start"), False),
        (event([{"error": 1}]), False),
        (b'data: {"error":\n\n', False),
        (b'data: {"error":1}\n', False),
        (b"data: [DONE]\n\n", False),
        (b"", False),
    ],
)
def test_streams_that_begin_with_an_error(stream: bytes, error: bool) -> None:
    assert begins_with_error(stream) is error
    assert begins_with_error(*(bytes([byte]) for byte in stream)) is error
    assert begins_with_error(stream.replace(b"\n", b"\r\n")) is error
    assert begins_with_error(stream, b"data: 1\n\n" * 5000) is error


def test_an_error_may_be_long() -> None:
    # Some quote the whole prompt.
    stream = event({"error": {"message": "m" * 50_000}})
    assert begins_with_error(*(stream[at : at + 1000] for at in range(0, len(stream), 1000)))


def begins_with_error(*pieces: bytes) -> bool:
    first_token = FirstToken()
    for piece in pieces:
        if first_token.seen_in(piece):
            break
    return first_token.began_with_error


def test_a_byte_order_mark_hides_no_event() -> None:
    mark = b"\xef\xbb\xbf"
    assert begins_with_error(mark + event({"error": {"message": "m"}}))
    assert FirstToken().seen_in(mark + event(chat(content="x")))


@pytest.mark.parametrize(
    ("pieces", "number"),
    [
        ([], 0),
        ([b"data: 1\n\n"], 0),
        ([event({"sequence_number": 0})], 1),
        ([event({"sequence_number": n}) for n in range(2000)], 2000),
        ([b'data: {"sequence_number":41}\n\n', b": ping\n\n"], 42),
        ([b'data: {"sequence_number": 999999999999999}\n\n'], 10**15),
        ([b'data: {"sequence_number": "x"}\n\n'], 0),
        ([event({"sequence_number": 8, "text": "x" * 20_000})], 9),
    ],
)
def test_the_next_sequence_number(pieces: list[bytes], number: int) -> None:
    assert tapped(*pieces).next_sequence_number == number


# The first token ------------------------------------------------------------------------------

TOKENS: list[tuple[Any, bool]] = [
    # OpenAI's chat completions, and what others add to them
    (chat(role="assistant", content=""), False),
    (chat(role="assistant"), False),
    (chat(role="assistant", content=None, refusal=None), False),
    (chat(role="assistant", content="", tool_calls=[]), False),
    (chat(), False),
    (chat(content="x"), True),
    (chat(content=" "), True),
    (chat(role="assistant", content="x"), True),
    (chat(reasoning_content="x"), True),
    (chat(content="", reasoning_content=None), False),
    (chat(reasoning="x"), True),
    (chat(content=None, reasoning=""), False),
    (chat(tool_calls=[{"index": 0, "function": {"name": "f", "arguments": ""}}]), True),
    (chat(refusal="I"), True),
    (chat(function_call={"name": "f"}), True),
    ({"choices": [{"delta": {}, "finish_reason": "stop"}]}, False),
    ({"choices": [{"delta": {"content": ""}}, {"delta": {"content": "x"}}]}, True),
    ({"choices": [], "usage": {"completion_tokens": 1}}, False),
    ({"choices": [{"delta": None}]}, False),
    ({"choices": [None, 1, "x"]}, False),
    ({"choices": {"delta": {"content": "x"}}}, False),
    ({"choices": None}, False),
    ({"error": {"message": "m"}}, False),
    # legacy completions
    ({"object": "text_completion", "choices": [{"text": "x", "index": 0}]}, True),
    ({"object": "text_completion", "choices": [{"text": "", "index": 0}]}, False),
    # Anthropic's messages
    ({"type": "message_start", "message": {"content": [], "role": "assistant"}}, False),
    ({"type": "ping"}, False),
    (
        {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "text", "text": ""},
        },
        False,
    ),
    ({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "x"}}, True),
    ({"type": "content_block_delta", "delta": {"type": "text_delta", "text": ""}}, False),
    ({"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "x"}}, True),
    ({"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": ""}}, False),
    (
        {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": "{"}},
        True,
    ),
    (
        {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": ""}},
        False,
    ),
    (
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"output_tokens": 1},
        },
        False,
    ),
    ({"type": "message_stop"}, False),
    ({"type": "error", "error": {"message": "m"}}, False),
    # Responses
    ({"type": "response.created", "response": {"output": []}}, False),
    ({"type": "response.output_item.added", "item": {"content": []}}, False),
    ({"type": "response.output_text.delta", "delta": "x"}, True),
    ({"type": "response.output_text.delta", "delta": ""}, False),
    ({"type": "response.reasoning_summary_text.delta", "delta": "x"}, True),
    ({"type": "response.function_call_arguments.delta", "delta": "{"}, True),
    ({"type": "response.refusal.delta", "delta": "I"}, True),
    ({"type": "response.output_text.done", "text": "x"}, False),
    # neither
    ([], False),
    ("x", False),
    (None, False),
    ({"type": None}, False),
    ({"type": 1, "delta": "x"}, False),
]


@pytest.mark.parametrize(("document", "token"), TOKENS)
def test_what_is_a_token(document: Any, token: bool) -> None:
    assert has_token(data(document)) is token
    assert FirstToken().seen_in(event(document)) is token


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b"[DONE]",
        b"{",
        b"\xff",
        b'{"choices":[{"text":"\xff"}]}',
        b'{"choices":' + b"[" * 100_000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"type":"\\ud800"}',
        b'{"choices":NaN}',
        b'{"choices":1e999999}',
        b"\xef\xbb\xbf{}",
    ],
)
def test_what_cannot_be_read_is_neither_token_nor_error(hostile: bytes) -> None:
    assert not has_token(hostile)
    assert not is_error(b"data: " + hostile + b"\n\n")


def plays(*pieces: bytes) -> Iterator[bool]:
    watch = FirstToken()
    return (watch.seen_in(piece) for piece in pieces)


@ENDS
def test_the_first_token_in_every_split(end: bytes) -> None:
    before = b": ping\n\n" + event(chat(role="assistant", content=""))
    before = before.replace(b"\n", end)
    token = event(chat(content="x")).replace(b"\n", end)
    stream = before + token
    for at in range(1, len(stream)):
        first, second = plays(stream[:at], stream[at:])
        # The blank line that ends it in CR LF is over with its CR.
        assert first == stream[:at].endswith(b"\r\n\r") * (at > len(before))
        assert first or second
    found = list(plays(*(bytes([byte]) for byte in stream)))
    assert found.index(True) == len(stream) - (2 if end == b"\r\n" else 1)


def test_a_token_of_several_data_lines() -> None:
    assert FirstToken().seen_in(b'data: {"choices":\ndata: [{"text":\ndata:"x"}]}\n\n')


def test_looking_ends_where_an_event_is_too_long() -> None:
    watch = FirstToken()
    assert not watch.seen_in(b"data: " + b"x" * 200_000)
    assert watch.seen_in(b"x" * 100_000)


def test_events_without_a_token_are_not_kept() -> None:
    watch = FirstToken()
    for _ in range(1000):
        assert not watch.seen_in(event({"type": "ping", "padding": "x" * 1000}))


def test_a_large_piece_keeps_what_stands_before_a_short_last_event() -> None:
    tap = Tap()
    usage = b'data: {"usage":{"prompt_tokens":9}}\n\n'
    tap.remember(b'data: {"choices":[]}\n\n' * 500 + usage + b"data: [DONE]\n\n")
    assert tap.tail.endswith(usage + b"data: [DONE]\n\n")
    assert len(tap.tail) <= 2 * 4096


def test_a_tap_may_keep_more_of_the_end() -> None:
    tap = Tap(16 * 1024)
    for _ in range(100):
        tap.remember(b"x" * 1000)
    assert 16 * 1024 <= len(tap.tail) <= 17 * 1024


# The first event ------------------------------------------------------------------------------

MARK = b"\xef\xbb\xbf"
OVERLOADED = {"error": {"message": "m", "type": "overloaded_error"}}
REFUSED = event(OVERLOADED)
HELLO = event(chat(content="x"))


def verdict(*pieces: bytes) -> bool | None:
    """Whether the first event is an error; None if it has not come."""
    first = FirstEvent()
    seen = False
    for piece in pieces:
        seen = first.seen_in(piece) or seen
    assert first.held == b"".join(pieces)
    return first.is_error if seen else None


@ENDS
@pytest.mark.parametrize("before", [b"", MARK, b": hello\n\n", b":\n", b"retry: 300\n\n", b"\n\n"])
@pytest.mark.parametrize(
    ("first", "error"),
    [
        (REFUSED, True),
        (event({"type": "error", **OVERLOADED}, "error"), True),
        (event({"type": "error", "code": "x", "sequence_number": 0}, "error"), True),
        (b'data: {"error":\ndata: {"message":"m"}}\n\n', True),
        (HELLO, False),
        (event({"type": "message_start"}, "message_start"), False),
        (b"data: [DONE]\n\n", False),
        (b"data: Internal Server Error\n\n", False),
        (b'data: {"error": null}\n\n', False),
    ],
)
def test_the_first_event_in_every_split(
    before: bytes, first: bytes, error: bool, end: bytes
) -> None:
    head, first = before.replace(b"\n", end), first.replace(b"\n", end)
    stream = head + first
    assert verdict(stream) is error
    for at in range(len(stream) + 1):
        assert verdict(stream[:at], stream[at:]) is error
        early = verdict(stream[:at])
        # The blank line that ends it in CR LF is over with its CR.
        assert early is (error if stream[:at].endswith(b"\r\n\r") and at > len(head) else None) or (
            at == len(stream)
        )
    assert verdict(*(bytes([byte]) for byte in stream)) is error


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        MARK,
        b": ping\n\n" * 100,
        b"event: ping\n\n",
        b"data\n\n",  # without a value it dispatches nothing
        b"data:\n\n",
        b"id: 1\n\n",
        REFUSED[:-1],
        b": " + REFUSED[:-1],
    ],
)
def test_what_is_no_first_event_yet(stream: bytes) -> None:
    assert verdict(stream) is None
    assert verdict(stream, b"\n\n" if stream.endswith(b"}") else b"", HELLO) is not None


ANY_STREAM = st.lists(
    st.sampled_from(
        [
            *(MARK, b"\n", b"\r", b"\r\n", b":", b"data", b"data: ", b"data: 1", b"x"),
            *(b'{"error":1}', b"{}", HELLO, REFUSED, REFUSED.replace(b"\n", b"\r\n")),
        ]
    ),
    max_size=12,
).map(b"".join)


@settings(max_examples=500, deadline=None)
@given(ANY_STREAM, st.lists(st.integers(0, 60), max_size=12))
def test_any_split_has_the_same_first_event(stream: bytes, sizes: list[int]) -> None:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(stream[at : at + size])
        at += size
    pieces.append(stream[at:])
    assert verdict(*pieces) is verdict(stream)
    found = [each for each in dispatched(stream) if each]
    if verdict(stream) is not None:
        assert verdict(stream) is is_error(
            b"data: " + found[0].replace(b"\n", b"\ndata: ") + b"\n\n"
        )
    else:
        # Only the end of a blank line may be missing, at the very start of all.
        assert not found or stream.removeprefix(MARK).startswith((b"\n", b"\r"))


@pytest.mark.parametrize("later", [REFUSED, REFUSED[:-1], b"data: " + b"x" * 100_000])
def test_what_comes_behind_the_first_event_changes_nothing(later: bytes) -> None:
    assert verdict(HELLO, later) is False
    assert verdict(HELLO + later) is False
    assert verdict(HELLO[:9], HELLO[9:] + later, later) is False
    assert verdict(REFUSED, later.replace(b"error", b"other"), HELLO) is True


@pytest.mark.parametrize(
    ("begin", "filling"), [(b"data: ", b"x" * 100), (b"", b": x\n\n"), (b"", b"\r"), (b"", b":")]
)
def test_no_more_is_held_back_than_64_kib(begin: bytes, filling: bytes) -> None:
    first = FirstEvent()
    stream = begin + filling * (64 * 1024 // len(filling) + 1)
    most = 64 * 1024 - len(begin)
    at = most - most % len(filling)
    assert not any(first.seen_in(stream[i : i + 512]) for i in range(0, at, 512) if i + 512 <= at)
    assert first.seen_in(stream)
    assert not first.is_error


def test_a_first_event_that_comes_byte_by_byte_is_not_read_over_and_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = 0

    def counted(stream: bytes, *, first: bool = True) -> bytes:
        nonlocal read
        read += len(stream)
        return event_data(stream, first=first)

    monkeypatch.setattr("proxy.sse.event_data", counted)
    stream = b": ping\n\n" * 5000 + REFUSED
    assert verdict(*(bytes([byte]) for byte in stream)) is True
    assert read == len(stream) + len(REFUSED)  # of which two questions are asked


# Payload --------------------------------------------------------------------------------------

ROLE = event(chat(role="assistant", content=""))
PING = event({"type": "ping"}, "ping")
QUIET = [b"", b": ping\n\n", HEARTBEAT, ROLE, PING, event({"choices": [{"delta": {}}]})]


@pytest.mark.parametrize(("document", "token"), TOKENS)
def test_payload_is_what_a_token_is(document: Any, token: bool) -> None:
    assert has_payload(event(document), cut=False) is token
    for end in b"\r\n", b"\r":
        stream = (b": ping\n\n" + ROLE + event(document) + PING).replace(b"\n", end)
        assert has_payload(stream, cut=False) is token


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("stream", QUIET)
def test_what_says_nothing_is_no_payload(stream: bytes, cut: bool) -> None:
    assert not has_payload(stream * 20 if cut else stream, cut=cut)


@pytest.mark.parametrize(
    ("stream", "payload"),
    [
        (b"data: 1\n\n", True),
        (b"data: {}\n\n", True),
        (PING, True),
        (b": ping\n\n", False),
        (b"event: ping\n\n", False),
        (b"data:\n\n", False),
        (HEARTBEAT * 100, False),
        (b"data: 1\n", True),
        (b' {"a":1}\n\n', True),  # the rest of a line
    ],
)
def test_where_nothing_is_known_of_the_data_any_is_payload(stream: bytes, payload: bool) -> None:
    assert has_data(stream) is payload


@pytest.mark.parametrize(
    "part",
    [
        b'x"}}]}\n\n' + HELLO,  # begins within an event
        b"x" * 2000,  # of which neither end is there
        b"x" * 2000 + b"\n\n" + PING,
        b"x" * 2000 + b"\r\n\r\n: ping\r\n",
    ],
)
def test_a_part_that_begins_within_an_event(part: bytes) -> None:
    assert has_payload(part, cut=True)
    assert has_payload(part, cut=False) is part.endswith(HELLO)


def test_the_end_of_a_short_event_is_no_payload() -> None:
    assert not has_payload(ROLE[9:] + PING, cut=True)


@ENDS
@pytest.mark.parametrize("comment", [HEARTBEAT, b": ping\n", b": OPENROUTER PROCESSING\n"])
def test_many_comments_are_no_payload(comment: bytes, end: bytes) -> None:
    # Without blank lines all of them belong to one event, however long.
    part = (comment * 2000)[-5000:].replace(b"\n", end)
    assert not has_payload(part, cut=True)


# The heartbeat --------------------------------------------------------------------------------


def test_a_comment_is_not_added_within_a_lines_end() -> None:
    # Behind a comment, the LF that is still to come would be a blank line of its own.
    stream = HELLO.replace(b"\n", b"\r\n")
    assert tapped(stream[:-1]).on_event_boundary
    assert not tapped(stream[:-1]).is_between_events
    assert tapped(stream).is_between_events
    assert not tapped(stream[:-3]).is_between_events
    assert tapped().is_between_events


def test_a_heartbeat_is_a_comment_and_no_event() -> None:
    assert HEARTBEAT == b":\n"  # interface.md, §4
    stream = HEARTBEAT * 3 + HELLO + HEARTBEAT + REFUSED
    assert dispatched(stream) == dispatched(HELLO + REFUSED)
    assert tapped(HELLO, HEARTBEAT).on_event_boundary
