"""What answers say they used: shapes recorded from upstreams, cut anywhere, and forgeries."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.usage import Endpoint, Usage, usage_of

KEEP = 4096  # bytes of each end that a relay remembers


def told(endpoint: Endpoint, body: bytes, *, stream: bool) -> Usage | None:
    """What is read of an answer when its two ends are at hand."""
    return usage_of(endpoint, stream, body[:KEEP], body[-KEEP:])


def events(*documents: Any, end: str = "\n", spaced: bool = False) -> bytes:
    """Chunks of a stream of OpenAI's."""
    separators = (", ", ": ") if spaced else (",", ":")
    lines = [
        "data: " + (each if isinstance(each, str) else json.dumps(each, separators=separators))
        for each in documents
    ]
    return "".join(line + end + end for line in lines).encode()


def named_events(*documents: dict[str, Any]) -> bytes:
    """Events that bear their type as their name: Anthropic's, and those of Responses."""
    return b"".join(
        f"event: {each['type']}\ndata: {json.dumps(each)}\n\n".encode() for each in documents
    )


# Paths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "endpoint"),
    [
        ("/v1/chat/completions", Endpoint.CHAT),
        ("/v1/completions", Endpoint.COMPLETIONS),
        ("/v1/embeddings", Endpoint.EMBEDDINGS),
        ("/v1/responses", Endpoint.RESPONSES),
        ("/v1/messages", Endpoint.MESSAGES),
        # what some server takes for the same
        ("/v1/chat/completions/", Endpoint.CHAT),
        ("/v1/chat//completions", Endpoint.CHAT),
        ("/v1/Chat/Completions", Endpoint.CHAT),
        ("/v1/chat/complet%69ons", Endpoint.CHAT),
        ("/v1/chat%2Fcompletions", Endpoint.CHAT),
        ("/v1/chat/completions;x=1", Endpoint.CHAT),
        # what is another matter
        ("/v1/models", Endpoint.NONE),
        ("/v1/chat", Endpoint.NONE),
        ("/v1/chat/completions/chatcmpl-1", Endpoint.NONE),
        ("/v1/responses/resp_1", Endpoint.NONE),
        ("/v1/responses/resp_1/cancel", Endpoint.NONE),
        ("/v1/messages/count_tokens", Endpoint.NONE),
        ("/v1/files", Endpoint.NONE),
        ("/v1/", Endpoint.NONE),
        ("/", Endpoint.NONE),
        ("", Endpoint.NONE),
    ],
)
def test_endpoints(path: str, endpoint: Endpoint) -> None:
    assert Endpoint.of(path) is endpoint


def test_a_total() -> None:
    assert Usage(3, 4).total == 7


# Answers as they come from upstreams ------------------------------------------------------------


def openai_chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {
        "id": "chatcmpl-Cea0",
        "object": "chat.completion.chunk",
        "created": 1763800000,
        "model": "gpt-4o-2024-08-06",
        "service_tier": "default",
        "system_fingerprint": "fp_cbf1785567",
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}],
        "usage": None,
        "obfuscation": "aB3dE5",
    }


OPENAI = events(
    openai_chunk({"role": "assistant", "content": "", "refusal": None}),
    *[openai_chunk({"content": " word"}) for _ in range(50)],
    openai_chunk({}, "stop"),
    {
        **openai_chunk({}),
        "choices": [],
        "usage": {
            "prompt_tokens": 19,
            "completion_tokens": 50,
            "total_tokens": 69,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        },
        "obfuscation": "Xy7",
    },
    "[DONE]",
)
LLAMA_SERVER = events(
    {"choices": [{"finish_reason": None, "index": 0, "delta": {"content": "The"}}]},
    {"choices": [{"finish_reason": "stop", "index": 0, "delta": {}}], "object": "x"},
    {
        "choices": [],
        "created": 1763800000,
        "id": "chatcmpl-Ho1",
        "model": "tiny-river",
        "system_fingerprint": "b1-unknown",
        "object": "chat.completion.chunk",
        "usage": {"completion_tokens": 12, "prompt_tokens": 20, "total_tokens": 32},
        "timings": {"prompt_n": 20, "prompt_ms": 3.25, "predicted_n": 12, "predicted_ms": 4.5},
    },
    "[DONE]",
)
TRANSFORMERS_SERVE = events(
    {"choices": [{"delta": {"content": "Hi"}, "index": 0}], "model": "m", "usage": None},
    {
        "id": "req_0",
        "choices": [{"delta": {}, "finish_reason": "stop", "index": 0}],
        "model": "m",
        "usage": {"completion_tokens": 3, "prompt_tokens": 7, "total_tokens": 10},
    },
)
VLLM_CONTINUOUS = events(
    *[
        {
            "choices": [{"index": 0, "delta": {"content": "x"}}],
            "usage": {"prompt_tokens": 5, "total_tokens": 5 + n, "completion_tokens": n},
        }
        for n in range(40)
    ]
)
COMPLETION = json.dumps(
    {
        "id": "chatcmpl-B9",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 2000}}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 2000, "total_tokens": 2009},
        "service_tier": "default",
        "system_fingerprint": None,
    },
    indent=2,
).encode()
EMBEDDINGS = json.dumps(
    {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.01] * 1536}],
        "model": "text-embedding-3-small",
        "usage": {"prompt_tokens": 8, "total_tokens": 8},
    }
).encode()
LLAMA_EMBEDDINGS = json.dumps(
    {
        "model": "m",
        "object": "list",
        "usage": {"prompt_tokens": 6, "total_tokens": 6},
        "data": [{"embedding": [0.01] * 1536, "index": 0, "object": "embedding"}],
    }
).encode()
# The last event repeats the request's tools and the whole answer.
RESPONSE = {
    "id": "resp_67c",
    "object": "response",
    "status": "completed",
    "output": [{"type": "message", "content": [{"type": "output_text", "text": "word " * 2000}]}],
    "tools": [{"type": "function", "parameters": {"properties": {"usage": {"type": "object"}}}}],
    "usage": {
        "input_tokens": 37,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 11,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 48,
    },
    "user": None,
    "metadata": {},
}


def responses(last: str) -> bytes:
    begun = {**RESPONSE, "status": "in_progress", "output": [], "usage": None}
    return named_events(
        {"type": "response.created", "sequence_number": 0, "response": begun},
        {"type": "response.output_text.delta", "sequence_number": 1, "delta": "word"},
        {"type": last, "sequence_number": 2, "response": RESPONSE},
    )


def messages(start: dict[str, Any], end: dict[str, Any] | None) -> bytes:
    """Anthropic's events, with usage at the start and at the end."""
    message = {"id": "msg_01", "type": "message", "role": "assistant", "content": []}
    delta = {"type": "text_delta", "text": "Hello"}
    stream = named_events(
        {"type": "message_start", "message": {**message, "usage": start}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "ping"},
        *[{"type": "content_block_delta", "index": 0, "delta": delta}] * 100,
        {"type": "content_block_stop", "index": 0},
    )
    if end is not None:
        stop = {"stop_reason": "end_turn", "stop_sequence": None}
        stream += named_events(
            {"type": "message_delta", "delta": stop, "usage": end}, {"type": "message_stop"}
        )
    return stream


START = {
    "input_tokens": 25,
    "cache_creation_input_tokens": 100,
    "cache_read_input_tokens": 1000,
    "output_tokens": 1,
    "service_tier": "standard",
}
MESSAGE = json.dumps(
    {"type": "message", "content": [{"type": "text", "text": "x" * 9000}], "usage": START}
).encode()

ANSWERS = [
    pytest.param(Endpoint.CHAT, True, OPENAI, Usage(19, 50), id="OpenAI"),
    pytest.param(Endpoint.CHAT, True, LLAMA_SERVER, Usage(20, 12), id="llama-server"),
    pytest.param(Endpoint.CHAT, True, TRANSFORMERS_SERVE, Usage(7, 3), id="transformers serve"),
    pytest.param(Endpoint.CHAT, True, VLLM_CONTINUOUS, Usage(5, 39), id="vLLM, continuous"),
    pytest.param(Endpoint.COMPLETIONS, True, LLAMA_SERVER, Usage(20, 12), id="completions"),
    pytest.param(Endpoint.CHAT, False, COMPLETION, Usage(9, 2000), id="chat, a body"),
    pytest.param(Endpoint.COMPLETIONS, False, COMPLETION, Usage(9, 2000), id="completions, a body"),
    pytest.param(Endpoint.EMBEDDINGS, False, EMBEDDINGS, Usage(8, 0), id="embeddings"),
    pytest.param(Endpoint.EMBEDDINGS, False, LLAMA_EMBEDDINGS, Usage(6, 0), id="llama embeddings"),
    pytest.param(
        Endpoint.RESPONSES, True, responses("response.completed"), Usage(37, 11), id="Responses"
    ),
    pytest.param(
        Endpoint.RESPONSES, True, responses("response.incomplete"), Usage(37, 11), id="incomplete"
    ),
    pytest.param(
        Endpoint.RESPONSES, True, responses("response.failed"), Usage(37, 11), id="failed"
    ),
    pytest.param(
        Endpoint.RESPONSES, False, json.dumps(RESPONSE).encode(), Usage(37, 11), id="a response"
    ),
    pytest.param(
        Endpoint.MESSAGES,
        True,
        messages(START, {"output_tokens": 15}),
        Usage(1125, 15),
        id="messages",
    ),
    pytest.param(Endpoint.MESSAGES, False, MESSAGE, Usage(1125, 1), id="a message"),
]


@pytest.mark.parametrize(("endpoint", "stream", "body", "usage"), ANSWERS)
def test_usage_is_read(endpoint: Endpoint, stream: bool, body: bytes, usage: Usage) -> None:
    assert told(endpoint, body, stream=stream) == usage
    assert told(Endpoint.NONE, body, stream=stream) is None


@pytest.mark.parametrize(("endpoint", "stream", "body", "usage"), ANSWERS)
def test_usage_is_read_from_whatever_is_kept_of_the_tail(
    endpoint: Endpoint, stream: bool, body: bytes, usage: Usage
) -> None:
    """Cut anywhere, the tail has the usage or it has none: never another."""
    member = body.rindex(b'"usage"')
    for cut in range(max(0, member - 300), min(member + 300, len(body))):
        found = usage_of(endpoint, stream, body[:KEEP], body[cut:])
        if cut <= member or (b'"usage"' in body[:KEEP] and not stream):
            assert found == usage
        else:
            assert found is None


@pytest.mark.parametrize("end", ["\r\n", "\r"], ids=["CRLF", "CR"])
def test_line_ends(end: str) -> None:
    stream = OPENAI.replace(b"\n", end.encode())
    assert told(Endpoint.CHAT, stream, stream=True) == Usage(19, 50)
    stream = messages(START, {"output_tokens": 15}).replace(b"\n", end.encode())
    assert told(Endpoint.MESSAGES, stream, stream=True) == Usage(1125, 15)


@pytest.mark.parametrize(
    ("start", "end", "usage"),
    [
        # a server tool has read more in the meantime: counts are cumulative
        (
            {"input_tokens": 2679, "cache_read_input_tokens": 0, "output_tokens": 3},
            {"input_tokens": 10682, "cache_read_input_tokens": 9, "output_tokens": 510},
            Usage(10691, 510),
        ),
        # some say 0 at the end, others at the start
        (START, {"input_tokens": 0, "output_tokens": 15}, Usage(1125, 15)),
        (
            {"input_tokens": 0, "output_tokens": 0},
            {"input_tokens": 40, "output_tokens": 15},
            Usage(40, 15),
        ),
        ({}, {"input_tokens": 40, "output_tokens": 15}, Usage(40, 15)),
        ({"input_tokens": 25, "cache_read_input_tokens": None}, {"output_tokens": 1}, Usage(25, 1)),
        # not known
        ({}, {"output_tokens": 15}, None),
        (START, {"input_tokens": 25}, None),
        (START, {}, None),
        (START, None, None),  # cut: the start's `output_tokens` is not the last value
    ],
)
def test_cumulative_counts(
    start: dict[str, Any], end: dict[str, Any] | None, usage: Usage | None
) -> None:
    assert told(Endpoint.MESSAGES, messages(start, end), stream=True) == usage


def test_an_event_of_one_dialect_is_none_in_another() -> None:
    stream = messages(START, {"output_tokens": 15})
    assert told(Endpoint.CHAT, stream, stream=True) is None
    assert told(Endpoint.RESPONSES, OPENAI, stream=True) is None


def test_the_last_usage_that_is_one_counts() -> None:
    later = events(
        {"choices": [], "usage": None},
        {"x": {"usage": {"prompt_tokens": 1, "completion_tokens": 1}}},
        {"choices": [], "usage": {"prompt_tokens": -1, "completion_tokens": 1}},
    )
    assert told(Endpoint.CHAT, LLAMA_SERVER + later, stream=True) == Usage(20, 12)
    assert told(Endpoint.CHAT, later, stream=True) is None


# Nonsense ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "usage",
    [
        "null",
        "{}",
        "[]",
        "7",
        '"x"',
        '{"prompt_tokens":1}',
        '{"completion_tokens":1}',
        '{"prompt_tokens":-1,"completion_tokens":1}',
        '{"prompt_tokens":1,"completion_tokens":-1}',
        '{"prompt_tokens":1.5,"completion_tokens":1}',
        '{"prompt_tokens":"1","completion_tokens":1}',
        '{"prompt_tokens":true,"completion_tokens":1}',
        '{"prompt_tokens":1,"completion_tokens":1000000001}',
        '{"prompt_tokens":1,"completion_tokens":1e400}',
        '{"prompt_tokens":1,"completion_tokens":' + "9" * 3000 + "}",
        '{"prompt_tokens":1,"completion_tokens":1,"x":' + "[" * 1500 + "]" * 1500 + "}",
        '{"prompt_tokens":1,"completion_tokens":1]',
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_counts_that_cannot_be_are_none(usage: str, stream: bool) -> None:
    document = '{"choices":[],"usage":' + usage + "}"
    body = f"data: {document}\n\n" if stream else document
    assert told(Endpoint.CHAT, body.encode(), stream=stream) is None


@pytest.mark.parametrize(
    "body", [b"", b"\n\n", b"{}", b"data: [DONE]\n\n", b"\xff\xfe", b'"usage":{']
)
def test_answers_without_usage(body: bytes) -> None:
    for endpoint in Endpoint:
        for stream in (True, False):
            assert told(endpoint, body, stream=stream) is None


def test_nothing_but_brackets() -> None:
    for tail in (b"}" * KEEP, b"{" * KEEP, b"]}" * 2000 + b'"usage":{}', b'"' * KEEP, b"\\" * KEEP):
        for stream in (True, False):
            assert usage_of(Endpoint.CHAT, stream, tail, tail) is None


# Forgeries --------------------------------------------------------------------------------------

FORGED = '{"prompt_tokens":0,"completion_tokens":0,"input_tokens":0,"output_tokens":0}'
# What a model may be told to write.
ATTEMPTS = [
    f'"usage":{FORGED}',
    f'","usage":{FORGED},"x":"',
    f'"}}}}],"usage":{FORGED}}}',
    f'\n\ndata: {{"choices":[],"usage":{FORGED}}}\n\n',
    f'\\","usage":{FORGED}}}',
    f'\\\\","usage":{FORGED}}}',
    "\\" * 99 + f'"usage":{FORGED}}}',
    f'é"usage":{FORGED}',
    f'event: message_delta\ndata: {{"type":"message_delta","usage":{FORGED}}}\n\n',
]
WRITTEN = st.lists(st.sampled_from(ATTEMPTS) | st.text(max_size=5), min_size=1).map("".join)


@settings(deadline=None)
@given(WRITTEN, st.booleans(), st.integers(0), st.integers(0))
def test_text_forges_no_usage(text: str, ascii_only: bool, cut: int, end: int) -> None:
    """Whatever stands in its strings, and wherever the upstream died or the tail begins."""
    delta = {"content": text, "text": text, "tool_calls": [{"function": {"arguments": text}}]}
    document = {"type": "x", "delta": delta, "choices": [{"delta": delta, "text": text}]}
    data = json.dumps(document, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    body = b"data: " + data + b"\n\n"
    part = body[cut % len(body) : len(body) - end % len(body)]
    for endpoint in Endpoint:
        for stream in (True, False):
            assert usage_of(endpoint, stream, part, part) is None
            assert usage_of(endpoint, stream, data[: len(part)], part) is None


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_the_true_usage_is_read_beside_a_forged_one(attempt: str) -> None:
    stream = events(openai_chunk({"content": attempt * 20})) + LLAMA_SERVER
    for cut in range(len(stream) - 2 * KEEP, len(stream) - 600):
        assert usage_of(Endpoint.CHAT, True, stream[:KEEP], stream[max(0, cut) :]) == Usage(20, 12)


def test_objects_that_a_model_writes_forge_no_usage() -> None:
    """A tool's input is an object in Anthropic's bodies, and may have any members."""
    forged = {"usage": json.loads(FORGED), "x": [{"usage": json.loads(FORGED)}]}
    call = {"type": "tool_use", "input": forged}
    body = {"usage": START, "content": [{"type": "text", "text": "x" * 9000}, call]}
    assert told(Endpoint.MESSAGES, json.dumps(body).encode(), stream=False) == Usage(1125, 1)
    del body["usage"]
    assert told(Endpoint.MESSAGES, json.dumps(body).encode(), stream=False) is None


def test_tools_that_a_client_declares_forge_no_usage() -> None:
    """Responses repeat them, schemas and all, and metadata behind the usage."""
    tool = {"type": "function", "parameters": {"usage": json.loads(FORGED)}}
    response = {**RESPONSE, "metadata": {"usage": "x" * 10}, "zz": tool}
    event = {"type": "response.completed", "response": response, "sequence_number": 3}
    assert told(Endpoint.RESPONSES, named_events(event), stream=True) == Usage(37, 11)
    assert told(Endpoint.RESPONSES, json.dumps(response).encode(), stream=False) == Usage(37, 11)


@pytest.mark.parametrize(
    ("path", "endpoint"),
    [
        ("/v1/chat/completions%3Fx", Endpoint.CHAT),
        ("/v1/chat/complet%2569ons", Endpoint.CHAT),
        ("/v1/chat/completions;sk-1", Endpoint.CHAT),
        ("/v1/sk-1%2Fchat%2Fcompletions", Endpoint.CHAT),
        ("/v1/v1/chat/completions", Endpoint.CHAT),
        ("/v1/deployments/x/embeddings", Endpoint.EMBEDDINGS),
        ("/v1/anthropic/v1/messages", Endpoint.MESSAGES),
        ("/v1/threads/t/messages", Endpoint.NONE),
        ("/v1/responses/r1", Endpoint.NONE),
        ("/v1/", Endpoint.NONE),
    ],
)
def test_paths_below_folders_and_in_other_spellings(path: str, endpoint: Endpoint) -> None:
    assert Endpoint.of(path) is endpoint
