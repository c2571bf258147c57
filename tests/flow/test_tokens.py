"""What tokens cost where bytes, paths or headers come in another shape than usual."""

from __future__ import annotations

import json

import pytest

from tests.flow.conftest import Start
from tests.flow.test_limits import (
    BODY,
    DONE,
    MESSAGE_USAGE,
    OK,
    TOKENS,
    USAGE,
    USED,
    ask,
    charged,
    event,
    named,
    say,
    settled,
    sse,
    told,
)
from tests.flow.wire import LAST, STREAM, chunked, get, json_answer, post


async def test_usage_is_read_however_much_comes_with_it(start: Start) -> None:
    sluice = await start(TOKENS)
    sluice.upstream.plays(STREAM, chunked(event() * 100 + USAGE + DONE) + LAST)
    assert (await say(sluice)).body == event() * 100 + DONE
    assert await charged(sluice) == 20


async def test_messages_together(start: Start) -> None:
    sluice = await start(TOKENS)
    stream = b"".join(
        [
            named("message_start", message={"id": "m", "usage": MESSAGE_USAGE}),
            *[named("content_block_delta", delta={"text": "x" * 50})] * 60,
            named("message_delta", delta={}, usage={"output_tokens": 9}),
            named("message_stop"),
        ]
    )
    sluice.upstream.plays(STREAM, chunked(stream) + LAST)
    await say(sluice, b'{"stream":true}', "/v1/messages")
    assert await charged(sluice) == 19


async def test_an_upload_that_asks_first_needs_no_tokens(start: Start) -> None:
    sluice = await start("limits: {tokens: 1000/87600h}")
    sluice.upstream.plays(json_answer(b'{"usage":{"prompt_tokens":9000,"completion_tokens":0}}'))
    await say(sluice)
    await settled(sluice)
    upload = post(b"file", path="/v1/files", content_type="multipart/form-data; boundary=x")
    assert (await sluice.ask(upload)).status == 200
    upload = post(
        b"file",
        "Expect: 100-continue",
        path="/v1/files",
        content_type="multipart/form-data; boundary=x",
    )
    assert (await sluice.ask(upload)).status == 200


@pytest.mark.parametrize("framing", ["sized", "chunked"])
async def test_a_streamed_upload_pays_for_its_prompt(start: Start, framing: str) -> None:
    sluice = await start(TOKENS)
    sluice.upstream.plays(*sse(event(), DONE))
    body = BODY.replace(b"12345678", b"x" * 100_000)
    if framing == "sized":
        request = post(body, content_type="text/plain")
    else:
        request = (
            post(b"", "Transfer-Encoding: chunked", content_type="text/plain")
            + chunked(body)
            + LAST
        )
    await sluice.ask(request)
    assert await charged(sluice) >= 25_000


@pytest.mark.parametrize("method", ["GET", "DELETE", "HEAD"])
async def test_listing_what_was_stored_reserves_nothing(start: Start, method: str) -> None:
    sluice = await start(TOKENS)
    sluice.upstream.plays(
        json_answer(b'{"object":"list","data":[{"choices":[{"message":{"content":"12345678"}}]}]}')
        if method != "HEAD"
        else b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    )
    reply = await sluice.ask(get("/v1/chat/completions", method=method), method=method)
    assert told(reply, "tokens") == ()
    assert await charged(sluice) == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [("192.0.2.1:1000", "192.0.2.1:2000"), ("[2001:db8::1]:1000", "[2001:db8::2]:2000")],
)
async def test_ports(start: Start, one: str, other: str) -> None:
    sluice = await start("trusted_proxies: [127.0.0.0/8]\nlimits: {requests: 1/hour}")
    sluice.upstream.plays(OK)
    assert (await ask(sluice, f"X-Forwarded-For: {one}")).status == 200
    assert (await ask(sluice, f"X-Forwarded-For: {other}")).status == 429


async def test_a_base_without_v1(start: Start) -> None:
    sluice = await start(TOKENS, base="")
    sluice.upstream.plays(json_answer(b'{"usage":' + USED + b"}"))
    assert told(await say(sluice, path="/v1/v1/chat/completions"), "tokens")


async def test_responses_with_much_metadata(start: Start) -> None:
    sluice = await start(TOKENS)
    meta = {f"k{i}": "v" * 500 for i in range(12)}
    r = {
        "instructions": "y" * 5000,
        "output": [],
        "usage": {"input_tokens": 5, "output_tokens": 6},
        "metadata": meta,
    }
    sluice.upstream.plays(json_answer(json.dumps(r).encode()))
    await say(sluice, b"{}", "/v1/responses")
    assert await charged(sluice) == 11


@pytest.mark.parametrize("then", ["413", "408"])
async def test_a_refusal_after_asking_tells_what_is_left(start: Start, then: str) -> None:
    sluice = await start(
        "limits: {requests: 9/hour}\nmax_body: 1KiB\nclient_timeouts: {body: 100ms}"
    )
    n = "2000" if then == "413" else "9"
    reply = await sluice.ask(
        post(b"", "Expect: 100-continue").replace(b"Length: 0", b"Length: " + n.encode())
    )
    assert reply.status == int(then)
    assert told(reply, "requests")[1:2] in ((), ("9",))
