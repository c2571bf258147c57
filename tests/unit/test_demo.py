"""The embedded upstream, asked as the pool would ask it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from proxy.demo import MODEL, Demo
from proxy.errors import ProxyError
from proxy.sse import event_data, events_of, has_token


@pytest.fixture
async def demo() -> AsyncIterator[Demo]:
    demo = Demo(pace=0)
    yield demo
    await demo.close()


class Reader:
    def __init__(self) -> None:
        self.body = b""
        self.end: asyncio.Future[ProxyError | None] = asyncio.get_running_loop().create_future()

    def payload(self, data: bytes) -> None:
        self.body += data

    def ended(self, error: ProxyError | None) -> None:
        self.end.set_result(error)


async def ask(demo: Demo, method: str, path: str, body: bytes = b"") -> tuple[int, bytes, bytes]:
    connection = await demo.connect()
    connection.begin(method, first_byte=5, idle=5, total=None)
    connection.write(
        b"%b %b HTTP/1.1\r\nHost: \r\nContent-Length: %d\r\n\r\n%b"
        % (method.encode(), path.encode(), len(body), body)
    )
    connection.request_sent()
    try:
        head = await connection.head()
        reader = Reader()
        connection.deliver_to(reader)
        assert await reader.end is None
    finally:
        connection.abort()
    return head.status, head.content_type, reader.body


async def complete(demo: Demo, **members: Any) -> tuple[int, Any]:
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hi!"}]} | members)
    status, _, answer = await ask(demo, "POST", "/chat/completions", body.encode())
    return status, json.loads(answer)


async def stream(demo: Demo, **members: Any) -> list[bytes]:
    """The data of all events."""
    members = {"messages": [{"content": "Hi!"}], "stream": True} | members
    body = json.dumps(members).encode()
    status, content_type, answer = await ask(demo, "POST", "/chat/completions", body)
    assert (status, content_type) == (200, b"text/event-stream")
    events = events_of(answer)
    assert b"".join(events) == answer
    return [event_data(event) for event in events]


async def test_models(demo: Demo) -> None:
    status, _, body = await ask(demo, "GET", "/models")
    assert status == 200
    assert [model["id"] for model in json.loads(body)["data"]] == [MODEL]
    status, _, body = await ask(demo, "GET", f"/models/{MODEL}")
    assert (status, json.loads(body)["object"]) == (200, "model")


async def test_a_completion(demo: Demo) -> None:
    status, answer = await complete(demo)
    [choice] = answer["choices"]
    assert (status, answer["object"], answer["model"]) == (200, "chat.completion", MODEL)
    assert choice["finish_reason"] == "stop"
    assert "“Hi!”" in choice["message"]["content"]
    assert "OPENAI_API_KEY" in choice["message"]["content"]
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def test_a_stream_says_the_same(demo: Demo) -> None:
    _, whole = await complete(demo)
    *chunks, done = await stream(demo)
    documents = [json.loads(chunk) for chunk in chunks]
    text = "".join(each["choices"][0]["delta"].get("content", "") for each in documents)
    assert done == b"[DONE]"
    assert text == whole["choices"][0]["message"]["content"]
    assert documents[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert not has_token(chunks[0])
    assert has_token(chunks[1])
    assert documents[-1]["choices"][0]["finish_reason"] == "stop"
    assert len({each["id"] for each in documents}) == 1
    assert not any("usage" in each for each in documents)


async def test_a_stream_with_usage(demo: Demo) -> None:
    *_, last, done = await stream(demo, stream_options={"include_usage": True})
    assert done == b"[DONE]"
    assert json.loads(last)["choices"] == []
    assert json.loads(last)["usage"]["prompt_tokens"] == 1


@pytest.mark.parametrize("member", ["max_tokens", "max_completion_tokens"])
async def test_a_short_one(demo: Demo, member: str) -> None:
    _, answer = await complete(demo, **{member: 3})
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["content"] == "You said: “Hi!”"
    assert answer["usage"]["completion_tokens"] == 3


async def test_content_in_parts(demo: Demo) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}]
    _, answer = await complete(demo, messages=[{"role": "user", "content": parts}])
    assert "“a b”" in answer["choices"][0]["message"]["content"]


async def test_a_long_prompt_is_not_repeated_whole(demo: Demo) -> None:
    _, answer = await complete(demo, messages=[{"content": "x" * 5000}])
    assert "x" * 300 + "…" in answer["choices"][0]["message"]["content"]
    assert "x" * 301 not in answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"{}",
        b'{"messages":[]}',
        b'{"messages":null}',
        b'{"messages":{}}',
        b'{"messages":"x"}',
        b'{"messages":[1]}',
        b'{"messages":[{"content":5}]}',
        b'{"messages":[{"content":["x"]}]}',
        b'{"messages":[{"content":[{"type":"text","text":5}]}]}',
        b'{"messages":[{"content":"x"}],"stream":true,"stream_options":"x"}',
        b'{"messages":[{"content":"\xff"}]}',
    ],
)
async def test_what_it_does_not_understand(demo: Demo, body: bytes) -> None:
    status, _, answer = await ask(demo, "POST", "/chat/completions", body)
    assert status == 400
    assert json.loads(answer)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/chat/completions"), ("POST", "/embeddings"), ("GET", "/models/x")],
)
async def test_what_it_does_not_have(demo: Demo, method: str, path: str) -> None:
    status, _, answer = await ask(demo, method, path)
    assert status == 404
    assert path in json.loads(answer)["error"]["message"]


async def test_who_hangs_up_stops_it() -> None:
    demo = Demo(pace=60)
    connection = await demo.connect()
    connection.begin("POST", first_byte=5, idle=5, total=None)
    body = b'{"messages":[{"content":"x"}],"stream":true}'
    connection.write(
        b"POST /chat/completions HTTP/1.1\r\nHost: \r\nContent-Length: %d\r\n\r\n%b"
        % (len(body), body)
    )
    assert (await connection.head()).status == 200
    connection.abort()
    await demo.close()
