"""The chunk that only we asked for is taken out, and nothing else, in any pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.usage import UsageStripper

ENDS = pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}


def event(document: Any) -> bytes:
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


def chunk(content: str) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": content}}], "usage": None})


EXTRA = event({"id": "chatcmpl-1", "choices": [], "usage": USAGE})
DONE = b"data: [DONE]\n\n"
AZURE = event({"choices": [], "prompt_filter_results": [{"prompt_index": 0}]})


def stripped(*pieces: bytes) -> bytes:
    stripper = UsageStripper()
    return b"".join([stripper.feed(piece) for piece in pieces]) + stripper.flush()


EXTRAS = [
    EXTRA,
    event({"choices": [], "usage": {}}),
    b'data:{"usage" : { "prompt_tokens" : 9 } , "choices" : [ ] }\n\n',
    b'data: {"choices":[],"usage":{},"timings":{"prompt_n":9},"obfuscation":"x"}\n\n',
    b'id: 7\n: comment\nevent: message\ndata: {"choices":[],\ndata: "usage":{}}\n\n',
    b'data: {"choices":[],"usage":{"x":[{"y":null}]}}\n\n',
]

OTHERS = [
    chunk("Hello"),
    chunk('"choices":[],"usage":{}'),
    AZURE,
    DONE,
    b": ping\n\n",
    b":\n",
    b"\n",
    b"retry: 300\n\n",
    event({"choices": [], "usage": None}),
    event({"choices": [], "usage": []}),
    event({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": USAGE}),  # transformers
    event({"usage": USAGE}),
    event({"choices": None, "usage": USAGE}),
    event({"choices": {}, "usage": USAGE}),
    event({"x": {"choices": [], "usage": USAGE}}),
    event({"x": {"usage": USAGE}, "choices": [], "usage": None}),
    event([{"choices": [], "usage": USAGE}]),
    event({"error": {"message": '{"choices":[],"usage":{'}}),
    b'data: {"choices":[],"usage":{}\n\n',
    b'data: {"choices":[],"usage":{}}}\n\n',
    b': {"choices":[],"usage":{}}\n\n',
    b'{"choices":[],"usage":{}}\n\n',
    b'data: {"choices":[],"usage":{"\xff":"\xff"}\n\n',
    b'data: {"choices":[],"usage":{"x":' + b"[" * 5000 + b"\n\n",
    b"\xff\x00\n\n",
]


@pytest.mark.parametrize("extra", EXTRAS)
@ENDS
def test_the_chunk_goes_with_its_blank_line(extra: bytes, end: bytes) -> None:
    before = b"\xef\xbb\xbf" + (AZURE + chunk("Hi") * 3).replace(b"\n", end)
    extra, after = extra.replace(b"\n", end), DONE.replace(b"\n", end)
    assert stripped(before, extra, after) == before + after
    assert stripped(before + extra + after) == before + after
    assert stripped(extra) == b""


@pytest.mark.parametrize("other", OTHERS)
@ENDS
def test_everything_else_passes(other: bytes, end: bytes) -> None:
    stream = (chunk("Hi") + other + DONE).replace(b"\n", end)
    assert stripped(stream) == stream
    assert stripped(*(bytes([byte]) for byte in stream)) == stream


WHOLE = [other for other in OTHERS if other.endswith(b"\n\n")]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([*EXTRAS, *WHOLE]), max_size=8),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    st.lists(st.integers(0, 200), max_size=40),
    st.sampled_from([b"", b"data: unfinished", b'data: {"choices":[],"usage":{}}\n']),
)
def test_in_any_pieces(
    events: list[bytes], end: bytes, sizes: list[int], unfinished: bytes
) -> None:
    stream = b"".join(events).replace(b"\n", end) + unfinished
    kept = b"".join(each for each in events if each not in EXTRAS).replace(b"\n", end)
    pieces, at = [], 0
    for size in sizes:
        pieces.append(stream[at : at + size])
        at += size
    assert stripped(*pieces, stream[at:]) == kept + unfinished


@ENDS
def test_every_event_passes_as_soon_as_it_is_whole(end: bytes) -> None:
    stripper = UsageStripper()
    for content in ("Hello", '"usage":{', "x" * 100_000):
        one = chunk(content).replace(b"\n", end)
        for cut in range(1, len(one), max(1, len(one) // 200)):
            relayed = stripper.feed(one[:cut])
            assert one.startswith(relayed)
            assert relayed + stripper.feed(one[cut:]) == one
    assert stripper.flush() == b""


def test_the_end_of_the_line_after_a_cut_one() -> None:
    """A blank line may be cut between CR and LF, when its event is over already."""
    extra, done = EXTRA.replace(b"\n", b"\r\n"), DONE.replace(b"\n", b"\r\n")
    stripper = UsageStripper()
    assert stripper.feed(done[:-1]) == done[:-1]
    assert stripper.feed(b"") == b""
    assert stripper.feed(b"\n") == b"\n"  # at once, and not with the next event
    assert stripper.feed(extra[:-1]) == b""
    assert stripper.feed(b"\n" + done) == done  # no blank line is left behind
    assert stripper.feed(done + b"data: 1\r") == done  # of a line, not of a blank one
    assert stripper.feed(b"\n\r\n") == b"data: 1\r\n\r\n"
    assert stripper.feed(extra[:-1].replace(b"\r\n", b"\r")) == b""
    assert stripper.feed(done) == done


def test_a_long_event_passes_without_a_look() -> None:
    head, rest = b'data: {"x":"' + b"y" * 300_000, b'","choices":[],"usage":{}}'
    stripper = UsageStripper()
    begun = stripper.feed(head)
    assert begun == head[:-1]  # a blank line may begin with its last byte
    assert begun + stripper.feed(rest) + stripper.feed(b"\n") + stripper.feed(b"\n") == (
        head + rest + b"\n\n"
    )
    assert stripper.feed(EXTRA + DONE) == DONE  # and the next one is looked at again
    # The end of a long event may look like the chunk.
    assert stripped(head, b"\n" + EXTRA + EXTRA + DONE) == head + b"\n" + EXTRA + DONE


@pytest.mark.parametrize("size", [1, 1000, 100_000])
def test_little_is_held(size: int) -> None:
    stripper = UsageStripper()
    fed = relayed = 0
    while fed < 400_000:
        fed += size
        relayed += len(stripper.feed(b"x" * size))
        assert fed - relayed <= 256 * 1024 + size
    assert relayed + len(stripper.flush()) == fed
    assert stripper.flush() == b""


def test_a_heartbeat_waits_for_nobody() -> None:
    stripper = UsageStripper()
    for beat in (b":\n", b": ping\r\n", b":\n:\n"):
        assert stripper.feed(beat) == beat
    assert stripper.feed(b"data: {") == b""
    assert stripper.feed(b":\n") == b""  # it is part of an event here, or of its text
    assert stripper.flush() == b"data: {:\n"
