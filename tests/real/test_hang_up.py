"""Who hangs up on the proxy hangs up on the upstream: no generation goes on unread."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import openai
import pytest

from tests.real.processes import CLIENT_KEY, KEY, Process, Upstream, eventually


def ask(text: str, **more: Any) -> dict[str, Any]:
    return {
        "model": "gpt-4o",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 3500,
        "extra_body": {"ignore_eos": True},  # llama.cpp: go on until max_tokens
        **more,
    }


def client(url: str, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=CLIENT_KEY, max_retries=0, **more)


def test_in_mid_stream(upstream: Upstream, proxy: Process) -> None:
    before = upstream.hang_ups()
    with client(proxy.url) as sdk:
        with sdk.chat.completions.create(**ask("a long answer"), stream=True) as stream:
            for _ in range(3):
                next(stream)
        assert eventually(lambda: upstream.hang_ups() == before + 1)


def test_before_the_first_token(aimock: Upstream, aimock_proxy: Process) -> None:
    before = aimock.hang_ups()
    with client(aimock_proxy.url, timeout=1) as sdk, pytest.raises(openai.APITimeoutError):
        sdk.chat.completions.create(**ask("a late answer"), stream=True)
    assert eventually(lambda: aimock.hang_ups() == before + 1)


def test_waiting_for_a_whole_answer(aimock: Upstream, aimock_proxy: Process) -> None:
    slow = {
        "X-Test-Id": "slow"
    }  # aimock delays requests of this id only; the header passes as it is
    order = urllib.request.Request(
        f"{aimock.process.url}/__aimock/chaos",
        data=json.dumps({"latencyMs": 30_000}).encode(),
        headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **slow},
    )
    urllib.request.urlopen(order, timeout=10).close()
    before = aimock.hang_ups()
    with client(aimock_proxy.url, timeout=1) as sdk, pytest.raises(openai.APITimeoutError):
        sdk.chat.completions.create(**ask("a short answer"), extra_headers=slow)
    assert eventually(lambda: aimock.hang_ups() == before + 1)
