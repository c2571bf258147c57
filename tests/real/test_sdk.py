"""The official SDKs see through the proxy exactly what they see without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.real.processes import CLIENT_KEY, KEY, Process, Upstream, start_proxy

Ask = dict[str, Any]

# Different in any two answers, proxied or not. `cached_tokens`: llama.cpp keeps prompts.
PER_ANSWER = {"id", "created", "timings", "cached_tokens"}


def said(value: Any) -> Any:
    """A dumped answer without what identifies or times this one of several equal ones."""
    if isinstance(value, dict):
        return {name: said(part) for name, part in value.items() if name not in PER_ANSWER}
    return [said(part) for part in value] if isinstance(value, list) else value


def ask(text: str, **more: Any) -> Ask:
    return {
        "model": "gpt-4o",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 40,
        "temperature": 0,
        "seed": 1,
        **more,
    }


def client(url: str, key: str = CLIENT_KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


def whole(url: str, key: str, question: Ask) -> Any:
    with client(url, key) as sdk:
        return sdk.chat.completions.create(**question).model_dump()


def streamed(url: str, key: str, question: Ask) -> Any:
    with client(url, key) as sdk, sdk.chat.completions.create(**question, stream=True) as stream:
        return [chunk.model_dump() for chunk in stream]


USAGE: Ask = {"stream_options": {"include_usage": True}}
TOOLS: Ask = {
    "tools": [
        {
            "type": "function",
            "function": {"name": "depth", "parameters": {"type": "object", "properties": {}}},
        }
    ]
}


@pytest.mark.parametrize(
    ("way", "question"),
    [
        pytest.param(whole, ask("a short answer"), id="whole"),
        pytest.param(streamed, ask("a short answer"), id="streamed"),
        pytest.param(streamed, ask("a short answer", **USAGE), id="streamed-with-usage"),
    ],
)
def test_openai_gives_what_it_gives_directly(
    upstream: Upstream, proxy: Process, way: Callable[..., Any], question: Ask
) -> None:
    direct = way(upstream.process.url, KEY, question)
    relayed = way(proxy.url, CLIENT_KEY, question)
    assert said(relayed) == said(direct)
    if question.get("stream_options"):
        assert relayed[-1]["choices"] == []
        assert relayed[-1]["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("way", [whole, streamed])
def test_openai_tool_calls_too(
    aimock: Upstream, aimock_proxy: Process, way: Callable[..., Any]
) -> None:
    question = ask("a tool call", **TOOLS)
    direct = way(aimock.process.url, KEY, question)
    assert "depth" in str(direct)
    assert said(way(aimock_proxy.url, CLIENT_KEY, question)) == said(direct)


async def test_openai_async_gives_the_same(upstream: Upstream, proxy: Process) -> None:
    question = ask("a short answer")
    async with openai.AsyncOpenAI(
        base_url=f"{proxy.url}/v1", api_key=CLIENT_KEY, max_retries=0
    ) as sdk:
        answer = await sdk.chat.completions.create(**question)
        stream = await sdk.chat.completions.create(**question, **USAGE, stream=True)
        chunks = [chunk.model_dump() async for chunk in stream]
    assert said(answer.model_dump()) == said(whole(upstream.process.url, KEY, question))
    assert said(chunks) == said(streamed(upstream.process.url, KEY, {**question, **USAGE}))


def test_openai_models(upstream: Upstream, proxy: Process) -> None:
    with client(proxy.url) as through, client(upstream.process.url, KEY) as direct:
        names = [model.id for model in through.models.list()]
        assert names == [model.id for model in direct.models.list()]


@pytest.mark.parametrize("more", [{}, {"stream": True}], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("text", "error", "code"),
    [
        ("a refusal", openai.RateLimitError, "rate_limit_exceeded"),
        ("a breakdown", openai.InternalServerError, "dry"),
    ],
)
def test_upstream_errors_come_through(
    aimock: Upstream, aimock_proxy: Process, text: str, error: Any, code: str, more: Ask
) -> None:
    def caught(url: str, key: str) -> openai.APIStatusError:
        with client(url, key) as sdk, pytest.raises(error) as raised:
            sdk.chat.completions.create(**ask(text, **more))
        failure: openai.APIStatusError = raised.value
        return failure

    direct, relayed = caught(aimock.process.url, KEY), caught(aimock_proxy.url, CLIENT_KEY)
    assert relayed.code == code
    assert relayed.body == direct.body
    assert relayed.response.content == direct.response.content
    assert relayed.response.headers.get("retry-after") == direct.response.headers.get("retry-after")


def test_cut_stream_raises(aimock_proxy: Process) -> None:
    got = ""
    with client(aimock_proxy.url) as sdk:
        stream = sdk.chat.completions.create(**ask("a cut answer"), stream=True)
        with stream, pytest.raises(openai.APIError) as raised:
            for chunk in stream:
                got += chunk.choices[0].delta.content or ""
    assert got.startswith("one two")
    assert raised.value.code == "upstream_aborted"


def test_killed_upstream_raises(mortal_upstream: Upstream, tmp_path: Path) -> None:
    """A crash, seen from the client: an error in the SDK, never a short answer that looks whole."""
    endless = ask("a long answer", max_tokens=3000, extra_body={"ignore_eos": True})
    with start_proxy(tmp_path, mortal_upstream) as proxy, client(proxy.url) as sdk:
        stream = sdk.chat.completions.create(**endless, stream=True)
        with stream:
            for _ in range(3):
                next(stream)
            mortal_upstream.process.kill()
            with pytest.raises(openai.APIError):
                for _ in stream:
                    pass


def test_anthropic_gives_what_it_gives_directly(aimock: Upstream, aimock_proxy: Process) -> None:
    question: Ask = {
        "model": "claude-sonnet-5",
        "max_tokens": 100,
        "messages": [{"role": "user", "content": "a short answer"}],
    }

    def both(url: str, key: str) -> Any:
        with anthropic.Anthropic(base_url=url, api_key=key, max_retries=0) as sdk:
            answer = sdk.messages.create(**question).model_dump()
            with sdk.messages.create(**question, stream=True) as stream:
                return answer, [event.model_dump() for event in stream]

    direct = both(aimock.process.url, KEY)
    relayed = both(aimock_proxy.url, CLIENT_KEY)
    assert direct[1][-1]["type"] == "message_stop"
    assert said(list(relayed)) == said(list(direct))
