"""What a client may spend: what is taken before a request, and what it has cost in every ending."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from proxy.config import Config
from tests.flow.conftest import Sluice, Start
from tests.flow.wire import (
    LAST,
    PATIENCE,
    STREAM,
    Client,
    Close,
    Reply,
    Reset,
    Step,
    Until,
    UntilGone,
    chunked,
    get,
    json_answer,
    post,
)

SIZE = 1_000_000
MANY = f"{SIZE}/87600h"  # in ten years: nothing comes back while a test runs
TOKENS = f"limits: {{tokens: {MANY}}}"
WEB_KEY, BOT_KEY = "sk-web", "sk-bot"

OK = json_answer(b"{}")
DONE = b"data: [DONE]\n\n"
USED = b'{"prompt_tokens":7,"completion_tokens":13,"total_tokens":20}'
USAGE = b'data: {"choices":[],"usage":' + USED + b"}\n\n"

# Eight characters are two tokens; so are the completion's.
BODY = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"12345678"}]}'
PROMPT = 2


def event(text: str = "abcdefgh") -> bytes:
    return b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % text.encode()


def error_of(reply: Reply) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(reply.body)["error"]
    return error


def told(reply: Reply, kind: str) -> tuple[str, ...]:
    """Limit, remaining and reset of what the client was told; empty if it was told nothing."""
    names = (f"x-ratelimit-{name}-{kind}" for name in ("limit", "remaining", "reset"))
    return tuple(value.decode() for name in names for value in reply.values(name))


async def ask(sluice: Sluice, *fields: str, path: str = "/v1/files") -> Reply:
    return await sluice.ask(get(path, *fields), method="GET")


async def say(sluice: Sluice, body: bytes = BODY, path: str = "/v1/chat/completions") -> Reply:
    return await sluice.ask(post(body, path=path))


async def begin(sluice: Sluice, request: bytes) -> Client:
    """Sends a request and waits until the upstream has it."""
    sluice.upstream.got_request.clear()
    client = await sluice.connect()
    await client.send(request)
    await asyncio.wait_for(sluice.upstream.got_request.wait(), PATIENCE)
    return client


async def settled(sluice: Sluice) -> None:
    """Waits until no request is in progress."""
    async with asyncio.timeout(PATIENCE):
        while sluice.app.observer.in_flight:
            await asyncio.sleep(0.001)


async def received(sluice: Sluice, part: bytes) -> None:
    """Waits until the proxy has this much of the answer; what might be usage its client lacks."""
    (exchange,) = sluice.app.observer.in_flight.values()
    async with asyncio.timeout(PATIENCE):
        while exchange.bytes_down < len(part):
            await asyncio.sleep(0.001)


async def charged(sluice: Sluice) -> int:
    """The tokens that are missing, as the next request is told: it takes one itself, for as long as
    it lasts."""
    await settled(sluice)
    sluice.upstream.plays(json_answer(b'{"usage":{"prompt_tokens":0}}'))
    reply = await say(sluice, b'{"input":"x"}', path="/v1/embeddings")
    assert reply.status == 200, reply.body
    return SIZE - 1 - int(told(reply, "tokens")[1])


# Requests ------------------------------------------------------------------------------------


async def test_every_answer_tells_what_is_left(start: Start) -> None:
    sluice = await start("limits: {requests: 3/hour}")
    sluice.upstream.plays(OK)
    answers = [told(await ask(sluice), "requests") for _ in range(4)]
    assert answers == [
        ("3", "2", "20m0s"),
        ("3", "1", "40m0s"),
        ("3", "0", "1h0m0s"),
        ("3", "0", "1h0m0s"),
    ]
    assert len(sluice.upstream.requests) == 3


@pytest.mark.parametrize(
    ("rate", "reset"),
    [("1/120ms", "120ms"), ("1/second", "1s"), ("1/90s", "1m30s"), ("10/hour", "6m0s")],
)
async def test_how_a_reset_is_written(start: Start, rate: str, reset: str) -> None:
    sluice = await start(f"limits: {{requests: {rate}}}")
    sluice.upstream.plays(OK)
    assert told(await ask(sluice), "requests")[2] == reset


async def test_the_upstreams_limits_are_not_the_clients(start: Start) -> None:
    theirs = [
        b"x-ratelimit-%b-%b: 999" % (name, kind)
        for name in (b"limit", b"remaining", b"reset")
        for kind in (b"requests", b"tokens")
    ]
    sluice = await start("limits: {requests: 3/hour}")
    sluice.upstream.plays(json_answer(b"{}", *theirs))
    reply = await ask(sluice)
    assert (told(reply, "requests"), told(reply, "tokens")) == (("3", "2", "20m0s"), ())


async def test_without_limits_the_upstreams_pass(sluice: Sluice) -> None:
    sluice.upstream.plays(json_answer(b"{}", b"x-ratelimit-remaining-requests: 999"))
    assert told(await ask(sluice), "requests") == ("999",)


@pytest.mark.parametrize(
    ("rate", "wait", "should_retry"), [("1/30s", b"30", []), ("1/hour", b"3600", [b"false"])]
)
async def test_a_refusal_says_when_to_come_back(
    start: Start, rate: str, wait: bytes, should_retry: list[bytes]
) -> None:
    sluice = await start(f"limits: {{requests: {rate}}}")
    sluice.upstream.plays(OK)
    await ask(sluice)
    reply = await ask(sluice)
    error = error_of(reply)
    assert (reply.status, error["type"], error["code"]) == (429, "requests", "rate_limit_exceeded")
    assert reply.values("retry-after") == [wait]
    assert reply.values("x-should-retry") == should_retry
    assert len(sluice.upstream.requests) == 1


async def test_all_windows_hold_and_the_tightest_is_told(start: Start) -> None:
    sluice = await start("limits: {requests: [2/minute, 8/hour]}")
    sluice.upstream.plays(OK)
    assert told(await ask(sluice), "requests")[:2] == ("2", "1")
    await ask(sluice)
    reply = await ask(sluice)
    assert (reply.status, reply.values("retry-after")) == (429, [b"30"])
    assert told(reply, "requests")[:2] == ("2", "0")


async def test_a_clients_own_limits_go_over_the_common_ones_key_by_key(start: Start) -> None:
    web = f"{{name: web, key: {WEB_KEY}, limits: {{requests: 2/hour}}}}"
    bot = f"{{name: bot, key: {BOT_KEY}, limits: {{requests: null}}}}"
    sluice = await start(
        f"clients: [{web}, {bot}, {{name: other, key: sk-other}}]\n"
        f"limits: {{requests: 1/hour, tokens: {MANY}}}"
    )
    sluice.upstream.plays(json_answer(b'{"usage":' + USED + b"}"))
    for key, limit, statuses in (
        (WEB_KEY, "2", [200, 200, 429]),
        (BOT_KEY, None, [200, 200, 200]),
        ("sk-other", "1", [200, 429, 429]),
    ):
        request = post(BODY, f"Authorization: Bearer {key}")
        replies = [await sluice.ask(request) for _ in range(3)]
        assert [reply.status for reply in replies] == statuses
        assert all(told(reply, "requests")[:1] == tuple(filter(None, [limit])) for reply in replies)
        assert all(told(reply, "tokens") for reply in replies)  # which is nobody's own


async def test_what_is_refused_for_another_reason_costs_nothing(start: Start) -> None:
    web = f"{{name: web, key: {WEB_KEY}, models: [m]}}"
    sluice = await start(
        f"clients: [{web}]\nlimits: {{requests: 2/hour, tokens: {MANY}, streams: 1}}\n"
        "max_body: 1KiB\nroutes: [{models: [m], upstreams: [up]}]"
    )
    sluice.upstream.plays(OK)
    key = f"Authorization: Bearer {WEB_KEY}"
    for request, status in (
        (post(b'{"model":"n"}', key), 403),
        (post(b"[" * 2000, key), 413),
        (post(BODY, key, "Via: 1.1 sluice"), 508),
        (post(BODY, key, path="/v1/a/../b"), 400),
        (post(BODY, key, path="/nowhere"), 404),
        (post(BODY, key, "Expect: more"), 417),
        (post(BODY), 401),
    ):
        assert (await sluice.ask(request)).status == status
    reply = await sluice.ask(post(BODY, key))
    assert (reply.status, told(reply, "requests")[1]) == (200, "1")


async def test_forty_at_once_and_ten_an_hour(start: Start) -> None:
    sluice = await start("limits: {requests: 10/hour}")
    sluice.upstream.plays(OK)
    clients = [await sluice.connect() for _ in range(40)]
    for client in clients:
        await client.send(get())
    statuses = [(await client.reply("GET")).status for client in clients]
    assert (statuses.count(200), statuses.count(429)) == (10, 30)
    assert len(sluice.upstream.requests) == 10


# Slots ---------------------------------------------------------------------------------------


async def test_so_many_are_relayed_at_a_time_streamed_or_not(start: Start) -> None:
    gate = asyncio.Event()
    sluice = await start("limits: {streams: 2, requests: 9/hour}")
    sluice.upstream.plays(STREAM, chunked(event()), Until(gate), LAST)
    streaming = await begin(sluice, post())
    sluice.upstream.plays(Until(gate), OK)
    waiting = await begin(sluice, get())
    reply = await ask(sluice)
    error = error_of(reply)
    assert (reply.status, error["type"]) == (429, "requests")
    assert error["code"] == "concurrency_limit_exceeded"
    assert (reply.values("retry-after"), reply.values("x-should-retry")) == ([b"1"], [])
    assert told(reply, "requests")[1] == "7"  # what one limit refuses costs nothing of the others
    gate.set()
    assert (await streaming.reply()).whole and (await waiting.reply("GET")).whole
    assert told(await ask(sluice), "requests")[1] == "6"


async def test_a_list_of_models_costs_a_request_and_a_slot_and_no_tokens(start: Start) -> None:
    gate = asyncio.Event()
    sluice = await start(f"limits: {{tokens: {MANY}, requests: 9/hour, streams: 1}}")
    sluice.upstream.plays(Until(gate), OK)
    listing = await begin(sluice, get("/v1/models"))
    assert error_of(await say(sluice))["code"] == "concurrency_limit_exceeded"
    gate.set()
    reply = await listing.reply("GET")
    assert (told(reply, "requests")[1], told(reply, "tokens")) == ("8", ())
    assert await charged(sluice) == 0


# What is reserved ----------------------------------------------------------------------------


def chat(content: str, more: str = "") -> bytes:
    return b'{"messages":[{"role":"user","content":%b}]%b}' % (content.encode(), more.encode())


IMAGE = '{"type":"image_url","image_url":{"url":"data:image/png;base64,AAAAAAAAAAAAAAAA"}}'
FILE = '{"type":"file","file":{"file_data":"AAAAAAAAAAAAAAAAAAAAAAAAA"}}'
TEXT = '{"type":"text","text":"12345678"}'
IMAGES = b'{"type":"image","source":{}},{"type":"document"},' + TEXT.encode()
TOOLS = ',"tools":[{"type":"function","function":{"name":"f","description":"12345678"}}]'


@pytest.mark.parametrize(
    ("path", "body", "reserved"),
    [
        ("chat/completions", chat('"12345678"', ',"max_tokens":10'), 2 + 10),
        ("chat/completions", chat('"12345"', ',"max_completion_tokens":10'), 2 + 10),
        ("chat/completions", chat('"\u00fc\u00fc\u00fc\u00fc"', ',"max_tokens":10'), 1 + 10),
        ("chat/completions", chat('"12345678"'), 2 + 1024),
        ("chat/completions", chat('"12345678"', ',"max_tokens":4096'), 2 + 4096),
        ("chat/completions", chat('"12345678"', ',"max_tokens":999999'), 2 + 4096),
        ("chat/completions", chat('"12345678"', ',"n":3'), 2 + 3 * 1024),
        ("chat/completions", chat('"12345678"', ',"n":3,"max_tokens":9999'), 2 + 3 * 4096),
        ("chat/completions", chat('"12345678"', TOOLS), 2 + 1024),
        ("chat/completions", chat(f"[{TEXT},{TEXT}]"), 4 + 1024),
        ("chat/completions", chat(f"[{TEXT},{IMAGE},{IMAGE},{FILE}]"), 2 + 3000 + 1024),
        ("chat/completions", b'{"messages":[]}', 1024),
        ("chat/completions", b"no JSON.", 2 + 1024),
        ("completions", b'{"prompt":"12345678","max_tokens":1}', 2 + 1),
        ("completions", b'{"prompt":["1234","1234"],"n":2,"max_tokens":1}', 2 + 2),
        ("embeddings", b'{"input":["1234","12345"]}', 3),
        ("responses", b'{"instructions":"1234","input":"1234","max_output_tokens":5}', 2 + 5),
        ("responses", b'{"input":[{"role":"user","content":[%b]}]}' % TEXT.encode(), 2 + 1024),
        (
            "messages",
            b'{"system":"1234","messages":[{"role":"user","content":[%b]}],"max_tokens":5}'
            % IMAGES,
            1 + 2 + 2000 + 5,
        ),
        ("messages", chat('"12345678"', ',"max_tokens":5') + b" " * 4000, 2 + 5),
    ],
)
async def test_what_a_request_reserves(start: Start, path: str, body: bytes, reserved: int) -> None:
    sluice = await start(TOKENS)
    sluice.upstream.plays(OK)
    reply = await say(sluice, body, f"/v1/{path}")
    limit, remaining, _ = told(reply, "tokens")
    assert (int(limit), SIZE - int(remaining)) == (SIZE, reserved)


async def test_more_than_the_bucket_holds_is_not_asked_of_it(start: Start) -> None:
    sluice = await start("limits: {tokens: 1000/87600h}")
    sluice.upstream.plays(json_answer(b'{"usage":' + USED + b"}"))
    for _ in range(2):
        reply = await say(sluice, chat('"12345678"', ',"max_tokens":4096,"n":9'))
        if reply.status != 200:
            break
        assert told(reply, "tokens")[:2] == ("1000", "0")
    # Only a full bucket has it all; 20 were used.
    assert (reply.status, told(reply, "tokens")[:2]) == (429, ("1000", "980"))


@pytest.mark.parametrize("path", ["/v1/models", "/v1/files", "/v1/chat/completions/id/messages"])
async def test_what_generates_nothing_reserves_nothing(start: Start, path: str) -> None:
    sluice = await start(TOKENS)
    sluice.upstream.plays(json_answer(b'{"usage":' + USED + b"}"))
    assert told(await ask(sluice, path=path), "tokens") == ()
    assert await charged(sluice) == 0


@pytest.mark.parametrize("framing", ["sized", "chunked"])
async def test_another_content_type_does_not_dodge_the_limit(start: Start, framing: str) -> None:
    sluice = await start(TOKENS)
    sluice.upstream.plays(json_answer(b'{"usage":' + USED + b"}"))
    if framing == "sized":
        request = post(BODY, content_type="text/plain")
    else:
        head = post(b"", "Transfer-Encoding: chunked", content_type="text/plain")
        request = head + chunked(BODY) + LAST
    reply = await sluice.ask(request)
    assert SIZE - int(told(reply, "tokens")[1]) >= 1024
    assert sluice.upstream.requests[0].body == BODY
    assert await charged(sluice) == 20


async def test_a_race_for_tokens(start: Start) -> None:
    gate = asyncio.Event()
    sluice = await start("limits: {tokens: 1000/87600h}")
    sluice.upstream.plays(Until(gate), json_answer(b'{"usage":' + USED + b"}"))
    clients = [await sluice.connect() for _ in range(40)]
    for client in clients:
        await client.send(post(chat('"12345678"', ',"max_tokens":98')))
    async with asyncio.timeout(PATIENCE):
        while len(sluice.ended) < 30 or len(sluice.upstream.requests) < 10:
            await asyncio.sleep(0.001)
    gate.set()
    statuses = [(await client.reply()).status for client in clients]
    assert (statuses.count(200), statuses.count(429)) == (10, 30)
    assert len(sluice.upstream.requests) == 10
    await settled(sluice)
    reply = await say(sluice, b'{"input":"x"}', path="/v1/embeddings")
    assert told(reply, "tokens")[1] == str(1000 - 10 * 20 - 1)


async def test_a_debt_refuses_what_costs_tokens_and_nothing_else(start: Start) -> None:
    sluice = await start("limits: {tokens: 1000/hour, requests: 9/hour, streams: 1}")
    sluice.upstream.plays(json_answer(b'{"usage":{"prompt_tokens":1000,"completion_tokens":1800}}'))
    assert (await say(sluice, chat('"12345678"', ',"max_tokens":1'))).status == 200
    for _ in range(3):
        reply = await say(sluice, chat('"12345678"', ',"max_tokens":98'))
        error = error_of(reply)
        assert (reply.status, error["type"]) == (429, "tokens")
        assert error["code"] == "rate_limit_exceeded"
        assert told(reply, "tokens")[:2] == ("1000", "0")
        assert told(reply, "requests")[1] == "8"
        # 1,800 below zero, and 100 are wanted: 1,900 of 1,000 an hour.
        assert reply.values("retry-after") == [b"%d" % (1900 * 3.6)]
        assert reply.values("x-should-retry") == [b"false"]
    listing = await ask(sluice, path="/v1/models")
    assert (listing.status, told(listing, "requests")[1]) == (200, "7")


# Asking before sending (Expect) --------------------------------------------------------------


@pytest.mark.parametrize("used_up", ["requests", "streams", "tokens"])
async def test_who_asks_first_is_refused_before_it_sends(start: Start, used_up: str) -> None:
    gate = asyncio.Event()
    limits = {"requests": "1/hour", "streams": "1", "tokens": "1000/87600h"}
    sluice = await start(f"limits: {{{used_up}: {limits[used_up]}}}")
    sluice.upstream.plays(
        STREAM, chunked(event()), Until(gate), chunked(USAGE.replace(b"13", b"1300")), LAST
    )
    first = await begin(sluice, post(BODY))
    if used_up != "streams":
        gate.set()
        await first.reply()
        await settled(sluice)
    client = await sluice.connect()
    await client.send(post(b"", "Expect: 100-continue").replace(b"Length: 0", b"Length: 9"))
    seen = await client.rest()
    assert seen.startswith(b"HTTP/1.1 429 Too Many Requests\r\n") and b"100 Continue" not in seen
    assert len(sluice.upstream.requests) == 1


async def test_asking_first_costs_nothing_by_itself(start: Start) -> None:
    sluice = await start(f"limits: {{requests: 9/hour, streams: 1, tokens: {MANY}}}")
    sluice.upstream.plays(json_answer(b'{"usage":' + USED + b"}"))
    client = await sluice.connect()
    head = post(BODY, "Expect: 100-continue").removesuffix(BODY)
    await client.send(head)
    await client.until(b"100 Continue\r\n\r\n")
    await client.send(BODY)
    reply = await client.reply()
    assert (reply.status, told(reply, "requests")[1]) == (200, "8")
    assert await charged(sluice) == 20


# What is settled -----------------------------------------------------------------------------


def sse(*events: bytes) -> tuple[Step, ...]:
    return (STREAM, *map(chunked, events), LAST)


def named(name: str, **fields: Any) -> bytes:
    """An event of Anthropic's or of Responses."""
    data = json.dumps({"type": name, **fields})
    return f"event: {name}\ndata: {data}\n\n".encode()


LONG = "The answer once more. " * 500
CHOICE = b'"choices":[{"delta":{},"finish_reason":"stop"}]'
RESPONSE_USAGE = {"input_tokens": 5, "output_tokens": 6, "total_tokens": 11}
MESSAGE_USAGE = {
    "input_tokens": 5,
    "cache_creation_input_tokens": 2,
    "cache_read_input_tokens": 3,
    "output_tokens": 1,
}
RESPONSE = {"output": [{"content": [{"text": LONG}]}], "usage": RESPONSE_USAGE, "user": None}


@pytest.mark.parametrize(
    ("path", "body", "answer", "used"),
    [
        ("chat/completions", b"{}", [json_answer(b'{"choices":[],"usage":%b}' % USED)], (7, 13)),
        ("chat/completions", BODY, sse(event(), USAGE, DONE), (7, 13)),
        # llama-server, transformers serve (no [DONE]), and one that repeats itself (vLLM)
        (
            "chat/completions",
            BODY,
            sse(event(), USAGE.replace(b"}\n\n", b',"timings":{"predicted_n":9}}\n\n'), DONE),
            (7, 13),
        ),
        (
            "chat/completions",
            BODY,
            sse(event(), b"data: {%b,%b}\n\n" % (CHOICE, b'"usage":' + USED)),
            (7, 13),
        ),
        (
            "chat/completions",
            BODY,
            sse(
                b'data: {"choices":[{"delta":{"content":"a"}}],"usage":{"prompt_tokens":7,'
                b'"completion_tokens":1}}\n\n',
                b'data: {"choices":[{"delta":{"content":"b"}}],"usage":null}\n\n',
                USAGE,
                DONE,
            ),
            (7, 13),
        ),
        ("completions", b"{}", [json_answer(b'{"choices":[],"usage":%b}' % USED)], (7, 13)),
        (
            "completions",
            b'{"stream":true}',
            sse(b'data: {"choices":[{"text":"a"}]}\n\n', USAGE, DONE),
            (7, 13),
        ),
        (
            "embeddings",
            b'{"input":"x"}',
            [json_answer(b'{"data":[%b],"usage":{"prompt_tokens":8,"total_tokens":8}}' % USED)],
            (8, 0),
        ),
        ("responses", b"{}", [json_answer(json.dumps(RESPONSE).encode())], (5, 6)),
        (
            "responses",
            b'{"stream":true}',
            sse(
                named("response.created", sequence_number=0, response={"usage": None}),
                named("response.output_text.delta", sequence_number=1, delta="a"),
                named("response.completed", sequence_number=2, response=RESPONSE),
            ),
            (5, 6),
        ),
        (
            "messages",
            b"{}",
            [json_answer(json.dumps({"content": [], "usage": MESSAGE_USAGE}).encode())],
            (10, 1),
        ),
        (
            "messages",
            b'{"stream":true}',
            sse(
                named("message_start", message={"id": "m", "usage": MESSAGE_USAGE}),
                named("ping"),
                named("content_block_delta", delta={"text": "a"}),
                named("message_delta", delta={}, usage={"output_tokens": 4}),
                named("message_delta", delta={}, usage={"output_tokens": 9}),
                named("message_stop"),
            ),
            (10, 9),
        ),
    ],
)
async def test_a_whole_answer_costs_what_its_upstream_says(
    start: Start, path: str, body: bytes, answer: Sequence[Step], used: tuple[int, int]
) -> None:
    sluice = await start(TOKENS)
    sluice.upstream.plays(*answer)
    assert (await say(sluice, body, f"/v1/{path}")).whole
    record = await sluice.record()
    assert (record.tokens_in, record.tokens_out, record.tokens_source) == (*used, "upstream")
    assert await charged(sluice) == sum(used)


# Each plays one request (BODY) to its end, and gives what it costs.


async def completed(sluice: Sluice) -> int:
    sluice.upstream.plays(*sse(event(), USAGE, DONE))
    assert (await say(sluice)).whole
    return 20


async def completed_without_usage(sluice: Sluice) -> int:
    sluice.upstream.plays(*sse(event("abcde"), event("\u00fc\u00fc\u00fc\u00fc"), DONE))
    assert (await say(sluice)).whole
    return PROMPT + 3  # of nine characters


async def completed_compressed(sluice: Sluice) -> int:
    body = gzip.compress(b'{"usage":' + USED + b"}")
    sluice.upstream.plays(json_answer(body, b"Content-Encoding: gzip"))
    assert (await say(sluice)).body == body
    return PROMPT + -(-len(body) // 4)


async def left_before_the_head(sluice: Sluice) -> int:
    sluice.upstream.plays(UntilGone())
    (await begin(sluice, post(BODY))).abort()
    return 0


async def left_in_mid_stream(sluice: Sluice) -> int:
    sluice.upstream.plays(STREAM, chunked(event(), event()), UntilGone())
    client = await begin(sluice, post(BODY))
    await client.until(event() * 2)
    client.abort()
    return PROMPT + 4


async def left_inside_an_event(sluice: Sluice) -> int:
    part = event() + event()[:-12]
    sluice.upstream.plays(STREAM, b"1000\r\n" + part, UntilGone())
    client = await begin(sluice, post(BODY))
    await received(sluice, part)
    client.abort()
    return PROMPT + 3  # of eight characters and four


async def left_inside_a_body(sluice: Sluice) -> int:
    whole = b'{"choices":[{"message":{"content":"12345678"}}],"usage":' + USED + b"}"
    sluice.upstream.plays(json_answer(whole)[:-1], UntilGone())
    client = await begin(sluice, post(BODY))
    await client.until(USED)
    client.abort()
    return PROMPT + 2


async def left_after_the_last_byte(sluice: Sluice) -> int:
    sluice.upstream.plays(STREAM, chunked(event(), USAGE, DONE), UntilGone())
    client = await begin(sluice, post(BODY))
    await client.until(DONE)
    client.close()
    return 20


async def never_reads(sluice: Sluice) -> int:
    sluice.upstream.plays(STREAM, *[chunked(b": no words\n\n" * 10_000)] * 40, LAST)
    await begin(sluice, post(BODY))
    async with asyncio.timeout(PATIENCE):
        while sluice.app.observer.in_flight:
            sluice.server.sweep()
            await asyncio.sleep(0.02)
    return PROMPT


async def refused_by_the_upstream(sluice: Sluice, status: bytes) -> int:
    body = b'{"error":{"message":"no"},"usage":' + USED + b"}"
    sluice.upstream.plays(json_answer(body, status=status))
    assert (await say(sluice)).body == body
    return 0


async def told_of_a_bad_request(sluice: Sluice) -> int:
    return await refused_by_the_upstream(sluice, b"400 Bad Request")


async def told_of_too_many_requests(sluice: Sluice) -> int:
    return await refused_by_the_upstream(sluice, b"429 Too Many Requests")


async def told_of_a_failure(sluice: Sluice) -> int:
    return await refused_by_the_upstream(sluice, b"500 Oops")


async def began_with_an_error(sluice: Sluice) -> int:
    sluice.upstream.plays(*sse(b'data: {"error":{"message":"overloaded"}}\n\n', USAGE, DONE))
    assert (await say(sluice)).status == 200
    return 0


async def found_the_upstream_dead(sluice: Sluice) -> int:
    sluice.upstream.plays(Close())
    assert (await say(sluice)).status == 502
    return 0


async def found_the_upstream_talking_nonsense(sluice: Sluice) -> int:
    sluice.upstream.plays(b"HTTP/1.1 nonsense\r\n\r\n", Close())
    assert (await say(sluice)).status == 502
    return 0


async def waited_in_vain(sluice: Sluice) -> int:
    sluice.upstream.plays(UntilGone())
    reply = await say(sluice)
    assert (reply.status, b"first_byte" in reply.body) == (504, True)
    return 0


async def truncated(sluice: Sluice) -> int:
    sluice.upstream.plays(STREAM, chunked(event()), Close())
    assert not (await say(sluice)).whole
    return PROMPT + 2


async def reset_behind_its_usage(sluice: Sluice) -> int:
    gate = asyncio.Event()
    sluice.upstream.plays(STREAM, chunked(event()), chunked(USAGE), Until(gate), Reset())
    client = await begin(sluice, post(BODY))
    await received(sluice, event() + USAGE)
    gate.set()
    assert not (await client.reply()).whole
    return 20


async def fell_silent(sluice: Sluice) -> int:
    sluice.upstream.plays(STREAM, chunked(event()), UntilGone())
    reply = await say(sluice)
    assert (reply.whole, b"upstream_timeout" in reply.body) == (False, True)
    return PROMPT + 2


async def killed(sluice: Sluice) -> int:
    sluice.upstream.plays(STREAM, chunked(event()), UntilGone())
    client = await begin(sluice, post(BODY))
    await client.until(event())
    await kill_all(sluice)
    assert b'"code":"killed"' in (await client.reply()).body
    return PROMPT + 2


async def killed_before_the_head(sluice: Sluice) -> int:
    sluice.upstream.plays(UntilGone())
    client = await begin(sluice, post(BODY))
    await kill_all(sluice)
    assert await client.rest() == b""
    return 0


async def kill_all(sluice: Sluice) -> None:
    admin = "Authorization: Bearer adm"
    rows = json.loads((await ask(sluice, admin, path="/admin/streams")).body)["data"]
    for row in rows:
        request = get(f"/admin/streams/{row['id']}", admin, method="DELETE")
        assert (await sluice.ask(request, method="DELETE")).status == 204


@pytest.mark.parametrize(
    "ending",
    [
        completed,
        completed_without_usage,
        completed_compressed,
        left_before_the_head,
        left_in_mid_stream,
        left_inside_an_event,
        left_inside_a_body,
        left_after_the_last_byte,
        never_reads,
        told_of_a_bad_request,
        told_of_too_many_requests,
        told_of_a_failure,
        began_with_an_error,
        found_the_upstream_dead,
        found_the_upstream_talking_nonsense,
        waited_in_vain,
        truncated,
        reset_behind_its_usage,
        fell_silent,
        killed,
        killed_before_the_head,
    ],
    ids=lambda each: each.__name__,
)
async def test_every_ending_is_settled_and_frees_its_slot(
    start: Start, ending: Callable[[Sluice], Awaitable[int]]
) -> None:
    sluice = await start(
        f"limits: {{tokens: {MANY}, requests: 9/hour, streams: 1}}\n"
        "client_timeouts: {write: 200ms}\nadmin: {key: adm}",
        up="timeouts: {first_byte: 400ms, idle: 400ms}",
    )
    cost = await ending(sluice)
    assert await charged(sluice) == cost  # there is one slot, and it was free
    assert told(await ask(sluice), "requests")[1] == "6"  # the third: no ending refunds a request


# Usage that only we have asked for -----------------------------------------------------------

SPLICED = b'"stream_options":{"include_usage":true}'


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions?a=b"])
@pytest.mark.parametrize(
    ("body", "sent"),
    [
        (BODY, b"{" + SPLICED + b"," + BODY[1:]),
        (
            b' { "n" : 1.0, "x":"\\u00fc\xc3\xbc" ,"stream" : true }\n',
            b" {" + SPLICED + b', "n" : 1.0, "x":"\\u00fc\xc3\xbc" ,"stream" : true }\n',
        ),
        (
            b'{"stream":true,"stream_options":{"include_obfuscation":false}}',
            b'{"stream":true,"stream_options":{"include_usage":true,"include_obfuscation":false}}',
        ),
        (
            b'{"stream":true,"stream_options": {"include_usage" : false } }',
            b'{"stream":true,"stream_options": {"include_usage" : true } }',
        ),
        (
            b'{"stream":true,"stream_options":null}',
            b'{"stream":true,"stream_options":{"include_usage":true}}',
        ),
        (b'{"stream":true,"stream_options": {"include_usage": true}}', None),
        (b'{"stream":false}', None),
        (b'{"stream":"true"}', None),
    ],
)
async def test_usage_is_asked_for_and_no_other_byte_changes(
    start: Start, path: str, body: bytes, sent: bytes | None
) -> None:
    sluice = await start(TOKENS)
    sluice.upstream.plays(OK)
    await sluice.ask(post(body, "Accept-Encoding: gzip, br", path=path))
    (request,) = sluice.upstream.requests
    assert (request.body, request.complete) == (body if sent is None else sent, True)
    assert request.values("accept-encoding") == [b"identity"]


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ("", "/v1/chat/completions"),
        ("limits: {requests: 9/hour, streams: 9}", "/v1/chat/completions"),
        (
            f"clients: [{{name: web, key: {WEB_KEY}, limits: {{tokens: null}}}}]\n{TOKENS}",
            "/v1/chat/completions",
        ),
        (TOKENS, "/v1/responses"),
        (TOKENS, "/v1/messages"),
        (TOKENS, "/v1/embeddings"),
        (TOKENS, "/v1/audio/speech"),
    ],
)
async def test_elsewhere_nobody_asks(start: Start, settings: str, path: str) -> None:
    sluice = await start(settings)
    sluice.upstream.plays(OK)
    await sluice.ask(post(BODY, f"Authorization: Bearer {WEB_KEY}", path=path))
    assert sluice.upstream.requests[0].body == BODY


STREAMED = [
    b": a comment\n\n",
    b'data: {"choices":[],"prompt_filter_results":[]}\n\n',  # Azure's first
    b'data: {"choices":[{"delta":{"content":"abcdefgh"}}],"usage":null,"obfuscation":"x"}\r\n\r\n',
    b'id: 7\ndata: {"choices":[{"delta":{"content":"\\"usage\\": {"}}]}\n\n',
]


@pytest.mark.parametrize("pieces", ["events", "together", "bytes"])
@pytest.mark.parametrize("asked", [False, True])
async def test_its_chunk_is_for_who_has_asked(start: Start, asked: bool, pieces: str) -> None:
    sluice = await start(TOKENS)
    stream = b"".join([*STREAMED, USAGE, DONE])
    match pieces:
        case "events":
            sluice.upstream.plays(*sse(*STREAMED, USAGE, DONE))
        case "together":
            sluice.upstream.plays(*sse(stream))
        case "bytes":
            sluice.upstream.plays(*sse(*(stream[at : at + 1] for at in range(len(stream)))))
    reply = await say(sluice, b"{" + SPLICED + b"," + BODY[1:] if asked else BODY)
    expected = stream if asked else stream.replace(USAGE, b"")
    assert (reply.body, reply.whole) == (expected, True)
    assert await charged(sluice) == 20


async def test_usage_that_stands_beside_a_choice_stays(start: Start) -> None:
    sluice = await start(TOKENS)
    stream = event() + b"data: {%b,%b}\n\n" % (CHOICE, b'"usage":' + USED) + DONE
    sluice.upstream.plays(*sse(stream))
    assert (await say(sluice)).body == stream


async def test_a_compressed_stream_is_left_alone(start: Start) -> None:
    sluice = await start(TOKENS)
    stream = gzip.compress(event() + USAGE + DONE)
    head = STREAM[:-2] + b"Content-Encoding: gzip\r\n\r\n"
    sluice.upstream.plays(head, chunked(stream), LAST)
    assert (await say(sluice)).body == stream


async def test_each_event_goes_out_as_soon_as_it_is_whole(start: Start) -> None:
    gate = asyncio.Event()
    sluice = await start(TOKENS)
    sluice.upstream.plays(STREAM, chunked(event()), Until(gate), chunked(USAGE, DONE), LAST)
    client = await begin(sluice, post(BODY))
    await client.until(event())
    gate.set()
    assert (await client.reply()).body == event() + DONE


# What operators see --------------------------------------------------------------------------


async def test_metrics_and_the_access_line_tell_who_spent_what(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    limits = "{requests: 3/hour, tokens: 1100/87600h, streams: 1}"
    sluice = await start(
        f"clients: [{{name: web, key: {WEB_KEY}, limits: {limits}}}]\n"
        "routes: [{models: [m, '*'], upstreams: [up]}]"
    )
    key, gate = f"Authorization: Bearer {WEB_KEY}", asyncio.Event()
    with caplog.at_level(logging.INFO, "sluice.access"):
        sluice.upstream.plays(*sse(event(), USAGE, DONE))
        assert (await sluice.ask(post(BODY, key))).status == 200
        sluice.upstream.plays(STREAM, chunked(event(), DONE), Until(gate), LAST)
        streaming = await begin(sluice, post(BODY.replace(b'"m"', b'"unheard-of"'), key))
        assert (await sluice.ask(get("/v1/models", key))).status == 429  # no slot
        assert (await sluice.ask(post(BODY, key))).status == 429  # no tokens, which come first
        gate.set()
        await streaming.reply()
        sluice.upstream.plays(OK)
        assert (await sluice.ask(get("/v1/models", key), method="GET")).status == 200
        assert (await sluice.ask(get("/v1/models", key), method="GET")).status == 429
        await settled(sluice)
    metrics = (await ask(sluice, path="/metrics")).body.decode()
    for line in (
        'sluice_limit_rejections_total{client="web",limit="requests"} 1.0',
        'sluice_limit_rejections_total{client="web",limit="tokens"} 1.0',
        'sluice_limit_rejections_total{client="web",limit="streams"} 1.0',
        'sluice_tokens_total{client="web",model="m",source="upstream",type="input"} 7.0',
        'sluice_tokens_total{client="web",model="m",source="upstream",type="output"} 13.0',
        'sluice_tokens_total{client="web",model="other",source="estimated",type="input"} 2.0',
        'sluice_tokens_total{client="web",model="other",source="estimated",type="output"} 2.0',
        'sluice_requests_total{client="web",code="429",model="other",route="m"} 2.0',
    ):
        assert line in metrics, line
    lines = [vars(each)["fields"] for each in caplog.records if each.message == "request"]
    spent = [(line["status"], line["tokens_in"], line["tokens_out"]) for line in lines]
    assert {line["client"] for line in lines} == {"web"}
    assert [each for each in spent if each[0] == 200] == [
        (200, 7, 13),
        (200, 2, 2),
        (200, None, None),
    ]
    assert all(each[1:] == (None, None) for each in spent if each[0] == 429)


# Reload --------------------------------------------------------------------------------------


def reload(sluice: Sluice, **settings: Any) -> None:
    """Lets other settings hold for the same upstream."""
    upstream = {"base_url": f"http://127.0.0.1:{sluice.upstream.port}/v1"}
    sluice.app.reload(Config.model_validate({"upstreams": {"up": upstream}, **settings}))


async def test_changed_limits_hold_and_buckets_keep_their_level(start: Start) -> None:
    gate = asyncio.Event()
    sluice = await start("limits: {requests: 10/hour, streams: 1}")
    sluice.upstream.plays(OK)
    for _ in range(5):
        await ask(sluice)
    sluice.upstream.plays(STREAM, chunked(event()), Until(gate), LAST)
    streaming = await begin(sluice, post(BODY))  # the sixth
    await streaming.until(event())
    reload(sluice, limits={"requests": "20/hour", "streams": 2})
    sluice.upstream.plays(OK)
    assert told(await ask(sluice), "requests")[:2] == ("20", "3")  # and a second slot
    reload(sluice, limits={"requests": "2/hour", "streams": 1})
    assert error_of(await ask(sluice))["code"] == "concurrency_limit_exceeded"
    gate.set()
    assert (await streaming.reply()).body == event()
    assert told(await ask(sluice), "requests")[:2] == ("2", "1")
    reload(sluice)
    assert told(await ask(sluice), "requests") == ()
    reload(sluice, limits={"requests": "2/hour"})
    assert told(await ask(sluice), "requests")[:2] == ("2", "0")


# A thousand streams --------------------------------------------------------------------------

AT_ONCE, ROUNDS = 100, 10


@dataclass(frozen=True)
class Life:
    """One request: what its upstream plays, when its client leaves, and what it may cost."""

    script: Sequence[Step]
    costs: set[int]
    leaves_after: bytes | None = None  # what it has read by then
    turns: int | None = None  # of the loop: it leaves after as many, wherever its answer is
    killed: bool = False


def a_life(dice: random.Random) -> Life:
    """One of all endings. The usage that is told is the mock's log: the cost, to the token."""
    texts = ["x" * dice.randrange(1, 40) for _ in range(dice.randrange(1, 6))]
    read, written = dice.randrange(1, 100), dice.randrange(1, 500)
    used = b'"usage":{"prompt_tokens":%d,"completion_tokens":%d}' % (read, written)
    usage = b'data: {"choices":[],%b}\n\n' % used
    events, said = [event(text) for text in texts], read + written
    relayed = [PROMPT - (-len("".join(texts[:many])) // 4) for many in range(len(texts) + 1)]
    begun, whole = (STREAM, chunked(*events)), sse(*events, usage, DONE)
    error = b'data: {"error":{"message":"no"}}\n\n'
    status = dice.choice([b"400 Bad Request", b"429 Too Many Requests", b"500 Oops"])
    return dice.choice(
        [
            Life(whole, {said}),
            Life([json_answer(b"{%b}" % used)], {said}),
            Life((STREAM, chunked(*events, usage, DONE), Close()), {said}),
            Life((*begun, chunked(usage), Close()), {said}),
            Life((*begun, chunked(usage, DONE), UntilGone()), {said}, leaves_after=DONE),
            Life(sse(*events, DONE), {relayed[-1]}),
            Life((*begun, Close()), {relayed[-1]}),
            Life((*begun, UntilGone()), {relayed[-1]}, leaves_after=events[-1]),
            Life((*begun, UntilGone()), {relayed[-1]}, leaves_after=events[-1], killed=True),
            Life(sse(error, usage, DONE), {0}),
            Life([json_answer(b"{%b}" % used, status=status)], {0}),
            Life([b"nonsense", Close()], {0}),
            Life([UntilGone()], {0}, turns=0),
            Life(whole, {0, *relayed, said}, turns=dice.randrange(40)),
        ]
    )


async def live(sluice: Sluice, life: Life, client: Client, number: str) -> None:
    """The client's part of it."""
    if life.turns is not None:
        for _ in range(life.turns):
            await asyncio.sleep(0)
        client.abort()
        return
    if life.leaves_after is None:
        await client.reply()
        return
    await client.until(life.leaves_after)
    if life.killed:
        exchanges = sluice.app.observer.in_flight
        (own,) = (key for key, each in exchanges.items() if each.request_id == number)
        request = get(f"/admin/streams/{own}", "Authorization: Bearer adm", method="DELETE")
        assert (await sluice.ask(request, method="DELETE")).status == 204
        await client.reply()
    client.abort()


async def test_a_thousand_streams_with_random_endings(start: Start) -> None:
    # Debug mode notes the stack of every task and timer: three quarters of the time.
    asyncio.get_running_loop().set_debug(False)
    dice = random.Random(7)
    lives = [a_life(dice) for _ in range(AT_ONCE * ROUNDS)]
    sluice = await start(f"limits: {{tokens: {MANY}, streams: {AT_ONCE}}}\nadmin: {{key: adm}}")
    for first in range(0, len(lives), AT_ONCE):
        gate, playing = asyncio.Event(), lives[first : first + AT_ONCE]
        clients = []
        for number, life in enumerate(playing, first):
            sluice.upstream.plays(Until(gate), *life.script)
            clients.append(await begin(sluice, post(BODY, f"X-Request-Id: {number}")))
        gate.set()
        parts = enumerate(zip(playing, clients, strict=True), first)
        await asyncio.gather(*(live(sluice, *part, str(number)) for number, part in parts))
        await settled(sluice)

    for record in sluice.ended:
        assert record.tokens in lives[int(record.request_id)].costs, record
    assert await charged(sluice) == sum(record.tokens for record in sluice.ended[: len(lives)])
    sluice.upstream.plays(UntilGone())
    again = [await begin(sluice, post(BODY)) for _ in range(AT_ONCE)]
    assert error_of(await say(sluice))["code"] == "concurrency_limit_exceeded"
    for client in again:
        client.abort()
