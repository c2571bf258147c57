"""What a request may cost: text by its characters, files by the piece, and what it declares."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.usage import Endpoint, Usage, reserved

FOUR = "abcd"  # one token


def input_of(**members: Any) -> int:
    return reserved(Endpoint.CHAT, json.dumps(members).encode()).input


def output_of(**members: Any) -> int:
    return reserved(Endpoint.CHAT, json.dumps(members).encode()).output


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def part(type: str, **members: Any) -> dict[str, Any]:
    return {"type": type, **members}


# Text -------------------------------------------------------------------------------------------

DATA_URL = "data:image/png;base64," + "Ab3/" * 10_000

INPUTS: list[tuple[str, dict[str, Any], int]] = [
    ("nothing", {}, 0),
    ("a message", user(FOUR), 1),
    ("rounded up", user("a"), 1),
    ("rounded once", {"messages": [{"content": "a"}] * 8}, 2),
    ("characters", user("日本é😀"), 1),
    ("no content", {"messages": [{"role": "assistant", "content": None, "refusal": None}]}, 0),
    ("parts", user([part("text", text=FOUR), part("text", text=FOUR)]), 2),
    ("one part", user(part("text", text=FOUR)), 1),
    ("a refusal", {"messages": [{"role": "assistant", "refusal": FOUR}]}, 1),
    ("reasoning", {"messages": [{"content": FOUR, "reasoning_content": FOUR}]}, 2),
    (
        "tool calls",
        {
            "messages": [
                {"tool_calls": [{"id": FOUR, "function": {"name": FOUR, "arguments": FOUR}}]},
                {"function_call": {"name": FOUR, "arguments": FOUR}},
                {"role": "tool", "tool_call_id": FOUR, "content": FOUR},
            ]
        },
        3,
    ),
    ("arguments as an object", {"messages": [{"function": {"arguments": {"a": FOUR}}}]}, 0),
    ("names, roles and ids", {"messages": [{"role": FOUR, "name": FOUR, "id": FOUR}]}, 0),
    ("tools and schemas", {"tools": [{"text": FOUR}], "response_format": {"content": FOUR}}, 0),
    ("others", {"model": FOUR, "user": FOUR, "stop": [FOUR], "metadata": {"text": FOUR}}, 0),
    # completions, embeddings
    ("a prompt", {"prompt": FOUR}, 1),
    ("prompts", {"prompt": [FOUR, "abcde"]}, 3),
    ("an input", {"input": FOUR}, 1),
    ("inputs", {"input": [FOUR, "", "é" * 5]}, 3),
    ("token ids", {"prompt": [1, 22, 333]}, 3),
    ("lists of token ids", {"input": [[1, 2], [3], [4, 5, 6]]}, 6),
    ("no prompt", {"prompt": None, "input": []}, 1),
    # Responses
    (
        "items",
        {
            "instructions": FOUR,
            "input": [
                {"role": "user", "content": FOUR},
                {"role": "user", "content": [part("input_text", text=FOUR)]},
                part("reasoning", summary=[part("summary_text", text=FOUR)], encrypted_content="x"),
                part("function_call", name=FOUR, arguments=FOUR),
                part("function_call_output", call_id=FOUR, output=FOUR),
                part("function_call_output", output=[part("input_text", text=FOUR)]),
            ],
        },
        7,
    ),
    # Anthropic's messages
    (
        "blocks",
        {
            "system": [part("text", text=FOUR, cache_control={"type": "ephemeral"})],
            "messages": [
                {"content": [part("thinking", thinking=FOUR, signature=FOUR)]},
                {"content": [part("tool_result", content=[part("text", text=FOUR)])]},
                {"content": [part("tool_result", content=FOUR)]},
            ],
        },
        4,
    ),
    ("a system prompt", {"system": FOUR, **user(FOUR)}, 2),
    # files
    ("image_url", user([part("image_url", image_url={"url": DATA_URL})]), 1_000),
    ("input_image", {"input": [{"content": [part("input_image", image_url=DATA_URL)]}]}, 1_000),
    ("input_file", {"input": [{"content": [part("input_file", file_data=DATA_URL)]}]}, 1_000),
    ("file", user([part("file", file={"file_data": DATA_URL})]), 1_000),
    ("input_audio", user([part("input_audio", input_audio={"data": DATA_URL})]), 1_000),
    ("image", user([part("image", source={"type": "base64", "data": DATA_URL})]), 1_000),
    ("document", user([part("document", source={"type": "text", "data": FOUR})]), 1_000),
    (
        "a screenshot",
        {"input": [part("computer_call_output", output=part("computer_screenshot"))]},
        1_000,
    ),
    (
        "text and images",
        user([part("text", text=FOUR), *[part("image_url", image_url={"url": "https://x"})] * 3]),
        3_001,
    ),
    (
        "an image among a tool's results",
        user([part("tool_result", content=[part("image")])]),
        1_000,
    ),
]


@pytest.mark.parametrize(
    ("members", "tokens"), [each[1:] for each in INPUTS], ids=[i[0] for i in INPUTS]
)
def test_input(members: dict[str, Any], tokens: int) -> None:
    for body in (json.dumps(members), json.dumps(members, ensure_ascii=False, indent=1)):
        for endpoint in Endpoint:
            usage = reserved(endpoint, body.encode())
            assert usage.input == (0 if endpoint is Endpoint.NONE else tokens)


@settings(deadline=None)
@given(st.lists(st.text(), max_size=5), st.booleans())
def test_characters_are_counted_not_bytes(texts: list[str], ascii_only: bool) -> None:
    members = {"messages": [{"content": text} for text in texts], "system": "".join(texts)}
    body = json.dumps(members, ensure_ascii=ascii_only).encode()
    assert reserved(Endpoint.MESSAGES, body).input == -(-2 * sum(map(len, texts)) // 4)


def test_a_tools_input_counts_as_it_stands() -> None:
    body = b'{"messages":[{"content":[{"type":"tool_use","name":"x","input":{"a":[1,{}]}}]}]}'
    assert reserved(Endpoint.MESSAGES, body).input == 3  # 12 characters


def test_names_are_compared_as_they_read() -> None:
    body = rb'{"mess\u0061ges":[{"c\u006fntent":"abcd"}]}'
    assert reserved(Endpoint.CHAT, body).input == 1


# What is declared -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "tokens"),
    [
        ({}, 1_024),
        ({"max_tokens": None}, 1_024),
        ({"max_tokens": 100}, 100),
        ({"max_completion_tokens": 100}, 100),
        ({"max_output_tokens": 100}, 100),
        ({"max_tokens": 1, "max_completion_tokens": 100}, 100),
        ({"max_tokens": 0}, 0),
        ({"max_tokens": 4_096}, 4_096),
        ({"max_tokens": 4_097}, 4_096),
        ({"max_tokens": 10**30}, 4_096),
        ({"max_tokens": -5}, 1_024),
        ({"max_tokens": 10.5}, 1_024),
        ({"max_tokens": "100"}, 1_024),
        ({"max_tokens": [100] * 1000}, 1_024),
        ({"n": 3}, 3 * 1_024),
        ({"n": 3, "max_tokens": 100}, 300),
        ({"n": 0, "max_tokens": 100}, 100),
        ({"n": -1, "max_tokens": 100}, 100),
        ({"n": None, "max_tokens": 100}, 100),
        ({"n": 129, "max_tokens": 100}, 12_800),
        ({"n": 10**30, "max_tokens": 10**30}, 128 * 4_096),
    ],
)
def test_output(members: dict[str, Any], tokens: int) -> None:
    assert output_of(**members) == tokens


def test_nothing_is_written_by_embeddings_and_nothing_costs_elsewhere() -> None:
    body = json.dumps({"input": FOUR, "max_tokens": 100}).encode()
    assert reserved(Endpoint.EMBEDDINGS, body) == Usage(1, 0)
    assert reserved(Endpoint.NONE, body) == Usage(0, 0)
    assert reserved(Endpoint.NONE, b"\xff" * 1000) == Usage(0, 0)


# What can't be read -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x" * 4001,
        b"[]",
        b'"messages"',
        b'{"messages":[{"content":"abcd"}]',
        b'{"messages":[{"content":"\xff"}]}',
        rb'{"messages":[{"content":"\ud800"}]}',
        b'{"messages":[{"content":5}],"max_tokens":7}',
        b'{"messages":["abcd",{"content":"abcd"}]}',
        b'{"messages":[null]}',
        b'{"messages":[{"content":["abcd"]}]}',
        b'{"prompt":["abcd",1]}',
        b'{"prompt":[["abcd"]]}',
        b'{"input":[{"content":"abcd"},"abcd"]}',
        # hostile ones
        b'{"messages":' + b"[" * 1_000_000,
        b'{"messages":' + b'{"content":' * 10_000 + b"1" + b"}" * 10_000 + b"}",
        b'{"messages":[' + b"{}," * 1_000_000 + b"{}]}",
        b'{"messages":[{"content":[' + b"{}," * 1_000_000 + b"{}]}]}",
        b'{"input":[' + b'"",' * 1_000_000 + b'""]}',
        b'{"messages":[' + b"0," * 1_000_000 + b"0]}",
    ],
    ids=range(20),
)
def test_its_bytes_count_where_a_body_cannot_be_read(body: bytes) -> None:
    assert reserved(Endpoint.CHAT, body) == Usage(-(-len(body) // 4), 1_024)


def test_what_is_long_but_plain_is_read() -> None:
    ids = b'{"prompt":[' + b"1," * 1_000_000 + b"1]}"
    assert reserved(Endpoint.COMPLETIONS, ids) == Usage(1_000_001, 1_024)
    text = b'{"messages":[{"content":"' + rb"\"[" * 1_000_000 + b'"}],"max_tokens":7}'
    assert reserved(Endpoint.CHAT, text) == Usage(500_000, 7)
    number = b'{"max_tokens":' + b"9" * 1_000_000 + b"}"
    assert reserved(Endpoint.CHAT, number) == Usage(0, 4_096)
    deep: dict[str, Any] = {"content": FOUR}
    for _ in range(100):
        deep = {"content": [deep, part("image")]}
    assert input_of(messages=[deep]) == 100_001


def test_a_long_conversation_is_read() -> None:
    messages = [{"role": "user", "content": FOUR}] * 10_000
    assert input_of(messages=messages) == 10_000
