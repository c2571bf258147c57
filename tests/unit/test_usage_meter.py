"""How much was written: counted in any pieces as a JSON parser would count it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.usage import Endpoint, Meter
from proxy.usage.words import tokens_of


def metered(endpoint: Endpoint, stream: bool, pieces: Iterable[bytes]) -> Meter:
    meter = Meter(endpoint, stream)
    for piece in pieces:
        meter.feed(piece)
    return meter


def estimate(endpoint: Endpoint, body: bytes, *, stream: bool) -> int:
    return metered(endpoint, stream, [body]).tokens


def event(document: Any) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def chunk(**delta: Any) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta}]}


def block(**delta: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": 0, "delta": delta}


def split(body: bytes, sizes: Iterable[int]) -> list[bytes]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(body[at : at + size])
        at += size
    return [*pieces, body[at:]]


# What counts ------------------------------------------------------------------------------------

FOUR = "abcd"  # one token

TOKENS: list[tuple[Endpoint, Any, int]] = [
    (Endpoint.CHAT, chunk(role="assistant", content=""), 0),
    (Endpoint.CHAT, chunk(content=FOUR), 1),
    (Endpoint.CHAT, chunk(content="a"), 1),  # rounded up
    (Endpoint.CHAT, chunk(content=FOUR + "e"), 2),
    (Endpoint.CHAT, chunk(content=None, reasoning_content=FOUR), 1),
    (Endpoint.CHAT, chunk(reasoning=FOUR), 1),
    (Endpoint.CHAT, chunk(refusal=FOUR), 1),
    (Endpoint.CHAT, chunk(content=FOUR, refusal=FOUR, reasoning=FOUR), 3),
    (Endpoint.CHAT, chunk(tool_calls=[{"id": FOUR, "function": {"arguments": '{"a"'}}]), 1),
    (Endpoint.CHAT, chunk(function_call={"name": FOUR, "arguments": "\n\\\"'"}), 1),
    # the same thing twice, by an old name and a new one
    (Endpoint.CHAT, chunk(reasoning=FOUR, reasoning_content=FOUR), 1),
    (Endpoint.CHAT, chunk(reasoning='"é\n\\', reasoning_content='"é\n\\', tool_calls=[]), 1),
    (Endpoint.CHAT, chunk(reasoning=FOUR, reasoning_content=FOUR + FOUR), 3),
    # no text of the answer
    (Endpoint.CHAT, {**chunk(), "obfuscation": FOUR, "id": FOUR, "text": FOUR}, 0),
    (Endpoint.CHAT, {"choices": [{"logprobs": {"content": [{"token": FOUR}]}}]}, 0),
    (Endpoint.CHAT, chunk(content=[FOUR], refusal={"content_": FOUR}, arguments=1234), 0),
    (Endpoint.CHAT, {"role": "content", "x": "arguments", "y": ["content", FOUR]}, 0),
    (Endpoint.CHAT, chunk(content='"content":"' + FOUR), 4),  # 15 characters
    (Endpoint.COMPLETIONS, {"choices": [{"text": FOUR, "index": 0, "content": FOUR}]}, 1),
    (Endpoint.RESPONSES, {"type": "response.output_text.delta", "delta": FOUR}, 1),
    (Endpoint.RESPONSES, {"type": "response.reasoning_summary_text.delta", "delta": FOUR}, 1),
    (Endpoint.RESPONSES, {"type": "response.function_call_arguments.delta", "delta": FOUR}, 1),
    (Endpoint.RESPONSES, {"type": "response.output_text.done", "text": FOUR}, 0),
    (Endpoint.RESPONSES, {"type": "response.function_call_arguments.done", "arguments": FOUR}, 0),
    (Endpoint.RESPONSES, {"type": "response.completed", "response": {"text": FOUR}}, 0),
    (Endpoint.MESSAGES, block(type="text_delta", text=FOUR), 1),
    (Endpoint.MESSAGES, block(type="thinking_delta", thinking=FOUR), 1),
    (Endpoint.MESSAGES, block(type="input_json_delta", partial_json='{"":'), 1),
    (Endpoint.MESSAGES, block(type="signature_delta", signature=FOUR), 0),
    (Endpoint.MESSAGES, {"type": "ping"}, 0),
    (Endpoint.EMBEDDINGS, {"data": [{"embedding": FOUR, "text": FOUR, "content": FOUR}]}, 0),
    (Endpoint.NONE, chunk(content=FOUR), 0),
]


@pytest.mark.parametrize(("endpoint", "document", "tokens"), TOKENS)
def test_what_counts_in_a_stream(endpoint: Endpoint, document: Any, tokens: int) -> None:
    assert estimate(endpoint, event(document), stream=True) == tokens
    compact = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    assert estimate(endpoint, b"data:" + compact + b"\r\n\r\n", stream=True) == tokens


BODIES: list[tuple[Endpoint, Any, int]] = [
    (
        Endpoint.CHAT,
        {
            "choices": [
                {"message": {"role": "assistant", "content": FOUR, "reasoning_content": FOUR}},
                {"message": {"content": None, "tool_calls": [{"function": {"arguments": FOUR}}]}},
            ],
            "usage": None,
        },
        3,
    ),
    (Endpoint.COMPLETIONS, {"choices": [{"text": FOUR}, {"text": FOUR}]}, 2),
    (
        Endpoint.RESPONSES,
        {
            "instructions": FOUR,
            "output": [
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": FOUR}]},
                {"type": "message", "content": [{"type": "output_text", "text": FOUR}]},
                {"type": "message", "content": [{"type": "refusal", "refusal": FOUR}]},
                {"type": "function_call", "name": FOUR, "arguments": FOUR},
                {"type": "custom_tool_call", "input": FOUR},
            ],
            "text": {"format": {"type": "text"}},
        },
        5,
    ),
    (
        Endpoint.MESSAGES,
        {"content": [{"type": "text", "text": FOUR}, {"type": "thinking", "thinking": FOUR}]},
        2,
    ),
    (Endpoint.EMBEDDINGS, {"data": [{"embedding": FOUR}]}, 0),
]


@pytest.mark.parametrize(("endpoint", "document", "tokens"), BODIES)
@pytest.mark.parametrize("indent", [None, 2])
def test_what_counts_in_a_body(
    endpoint: Endpoint, document: Any, tokens: int, indent: int | None
) -> None:
    body = json.dumps(document, indent=indent).encode()
    assert estimate(endpoint, body, stream=False) == tokens
    assert metered(endpoint, False, split(body, [1] * len(body))).tokens == tokens


# Characters, not bytes --------------------------------------------------------------------------

TEXTS = st.lists(
    st.text(max_size=4)
    | st.sampled_from(
        ['"', "\\", "\\\\", '\\"', "\n", "é", "日本", "😀", '"content":"', "\\u00e9"]
    ),
    max_size=8,
).map("".join)


@settings(deadline=None)
@given(st.lists(TEXTS, max_size=40), st.booleans(), st.lists(st.integers(0, 300), max_size=60))
def test_a_stream_in_any_pieces(texts: list[str], ascii_only: bool, sizes: list[int]) -> None:
    chunks = [chunk(content=text) for text in texts]
    chunks += [chunk(reasoning=text, reasoning_content=text) for text in texts]
    lines = [b"data: " + json.dumps(each, ensure_ascii=ascii_only).encode() for each in chunks]
    stream = b"\n\n".join([*lines, b"data: [DONE]", b""])
    tokens = tokens_of(2 * sum(map(len, texts)))
    assert metered(Endpoint.CHAT, True, split(stream, sizes)).tokens == tokens


@settings(deadline=None)
@given(
    st.lists(TEXTS, min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([None, (",", ":")]),
    st.lists(st.integers(1, 4000), max_size=30),
    st.integers(1, 400),
)
def test_one_long_line_in_any_pieces(
    texts: list[str],
    ascii_only: bool,
    separators: tuple[str, str] | None,
    sizes: list[int],
    times: int,
) -> None:
    """A body without line ends is counted in parts, wherever those are cut."""
    choices = [
        {"finish_reason": "content", "message": {"content": text * times, "model": text * times}}
        for text in texts
    ]
    document = {"x": "y" * 3000, "choices": choices, "arguments": 5, "refusal": None}
    body = json.dumps(document, ensure_ascii=ascii_only, separators=separators).encode()
    tokens = tokens_of(sum(len(text) * times for text in texts))
    assert metered(Endpoint.CHAT, False, split(body, sizes)).tokens == tokens


@pytest.mark.parametrize(
    "written", ["é", r"\u00e9", "\\n", '\\"', "\\\\", "😀", r"\ud83d\uDE00", "日"]
)
def test_a_character_that_is_cut_counts_once(written: str) -> None:
    for before in range(4060, 4110):
        long = "x" * before + written * 2000
        for begin, counted in (('{"content":"', before + 2000), ('{"name":"', 0), ('["', 0)):
            body = begin + long + '","content":"' + "y" * 9000 + '"}'
            pieces = split(body.encode(), [4096] * 20)
            assert metered(Endpoint.CHAT, False, pieces).tokens == tokens_of(counted + 9000)


@pytest.mark.parametrize("key", ['"content": "', '"content":"', '"model":"', '"x":["content","'])
def test_a_key_that_is_cut_is_recognised(key: str) -> None:
    for before in range(4050, 4100):
        body = '{"x":"' + "x" * before + '",' + key + "y" * 9000 + '"}'
        pieces = split(body.encode(), [4096] * 4)
        expected = 9000 // 4 if key.startswith('"content"') else 0
        assert metered(Endpoint.CHAT, False, pieces).tokens == expected


def test_reasoning_that_is_told_twice_in_a_long_stream() -> None:
    stream = event(chunk(reasoning=FOUR, reasoning_content=FOUR)) * 1000
    for size in (7, 100, 1000, 4096):
        assert metered(Endpoint.CHAT, True, split(stream, [size] * 20_000)).tokens == 1000


def test_what_has_come_of_a_text_counts() -> None:
    """A client may leave, or an upstream die, in the middle of an event."""
    assert estimate(Endpoint.CHAT, b'data: {"content":"abcd', stream=True) == 1
    assert estimate(Endpoint.CHAT, b'data: {"content":"abcd\\', stream=True) == 1
    assert estimate(Endpoint.CHAT, b'data: {"content":"abcd\\\\', stream=True) == 2
    assert estimate(Endpoint.CHAT, b'data: {"content":"abcde\\u', stream=True) == 2
    assert estimate(Endpoint.CHAT, b'data: {"content":"abcd\\u00e9', stream=True) == 2


def test_the_estimate_may_be_asked_for_at_any_time() -> None:
    meter = Meter(Endpoint.CHAT, stream=True)
    for number in range(1, 200):
        half = len(event(chunk(content=FOUR))) // 2
        meter.feed(event(chunk(content=FOUR))[:half])
        meter.feed(event(chunk(content=FOUR))[half:])
        assert meter.tokens == meter.tokens == number


def test_characters_grow_with_every_piece_that_has_some() -> None:
    meter = Meter(Endpoint.CHAT, stream=True)
    assert meter.characters == 0
    for quiet in (b": ping\n\n", event(chunk(role="assistant", content="")), b"data: {"):
        meter.feed(quiet)
        assert meter.characters == 0
    meter.feed(b'"content":"a')
    assert meter.characters == 1
    meter.feed("b\\né".encode())
    assert meter.characters == meter.characters == 4
    meter.feed(b'"}\n\n' + b": ping\n\n" * 2000)
    assert meter.characters == 4
    assert meter.tokens == 1


@given(st.lists(st.integers(0, 40), max_size=60))
def test_characters_never_go_down(sizes: list[int]) -> None:
    pieces = split(b"".join(event(document) for _, document, _ in TOKENS) * 5, sizes)
    meter, before = Meter(Endpoint.CHAT, stream=True), 0
    for piece in pieces:
        meter.feed(piece)
        assert meter.characters >= before
        before = meter.characters
    assert tokens_of(before) == meter.tokens


# Bounds -----------------------------------------------------------------------------------------


def held(meter: Meter) -> int:
    """Bytes that a meter keeps."""
    return sum(map(len, meter._pieces))


@pytest.mark.parametrize(
    ("first", "piece"),
    [
        (b"", event(chunk(content=FOUR))),
        (b"", b'{"content":"' + b"x" * 1000),
        (b'{"content":"', b"x" * 1000),
        (b'{"name":"', b"x" * 1000),
        (b'["', b"x" * 1000),
        (b"", b"x" * 1000),
        (b"", b'"' * 1001),
        (b"", b"\\" * 1001),
        (b'"', b"\\" * 1001),
        (b"", b'"content"' * 101),
        (b"", b'"content":' * 101),
        (b"", b'data: {"x":"' + b"y" * 990 + b"\r"),
        (b"", b"x" * 300_000),
    ],
)
def test_little_is_kept(first: bytes, piece: bytes) -> None:
    meter = Meter(Endpoint.CHAT, stream=True)
    meter.feed(first)
    for _ in range(100):
        meter.feed(piece)
        assert held(meter) < 4096


def test_recorded_chunks_of_every_kind() -> None:
    stream = b"".join(
        event(document) for endpoint, document, _ in TOKENS if endpoint is Endpoint.CHAT
    )
    tokens = estimate(Endpoint.CHAT, stream, stream=True)
    texts = re.findall(rb'"(?:content|reason\w+|refusal|arguments)": ("(?:[^"\\]|\\.)*")', stream)
    assert tokens < tokens_of(sum(len(json.loads(text)) for text in texts))
    assert metered(Endpoint.CHAT, True, split(stream, [7] * len(stream))).tokens == tokens
