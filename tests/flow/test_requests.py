"""What an upstream is asked, and what it never is."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.flow.conftest import Sluice, Start
from tests.flow.wire import LAST, Close, Until, UntilGone, chunked, get, json_answer, post

OK = json_answer(b"{}")


async def test_a_request_arrives_as_it_was_sent(start: Start) -> None:
    sluice = await start(up="api_key: sk-ours")
    sluice.upstream.plays(OK)
    body = b'{ "model" : "m\\u0041", "n": 1.0,  "x": "\xc3\xbc" }\n'
    fields = [
        "x-stainless-lang: py",
        "X-Dup: 1",
        "x-dup: 2",
        "Accept-Encoding: gzip",
        "Cookie: a=b",
    ]
    secrets = ["Authorization: Bearer theirs", "x-api-key: theirs", "api-key: theirs"]
    hop = [
        "Connection: keep-alive, X-Hop",
        "X-Hop: 1",
        "Keep-Alive: 5",
        "TE: trailers",
        "Upgrade: h2c",
    ]
    claims = ["X-Forwarded-For: 6.6.6.6", "X-Forwarded-Proto: https", "X-Request-Id: r-1"]
    await sluice.ask(
        post(body, *fields, *secrets, *hop, *claims, path="/v1/chat/completions?a=%2F&a")
    )
    (request,) = sluice.upstream.requests
    assert request.line == b"POST /v1/chat/completions?a=%2F&a HTTP/1.1"
    assert request.body == body
    assert request.headers == [
        (b"Host", b"127.0.0.1:%d" % sluice.upstream.port),
        (b"Content-Type", b"application/json"),
        (b"x-stainless-lang", b"py"),
        (b"X-Dup", b"1"),
        (b"x-dup", b"2"),
        (b"Accept-Encoding", b"gzip"),
        (b"Cookie", b"a=b"),
        (b"X-Request-Id", b"r-1"),
        (b"Authorization", b"Bearer sk-ours"),
        (b"Content-Length", b"%d" % len(body)),
        (b"Via", b"1.1 sluice"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("auth", "header"),
    [("bearer", b"authorization"), ("x-api-key", b"x-api-key"), ("api-key", b"api-key")],
)
async def test_the_key_goes_where_the_upstream_looks(
    start: Start, auth: str, header: bytes
) -> None:
    sluice = await start(up=f"api_key: sk-ours, auth: {auth}")
    sluice.upstream.plays(OK)
    await sluice.ask(post(b"{}", "Authorization: Bearer theirs", "X-Api-Key: theirs"))
    sent = {key.lower(): value for key, value in sluice.upstream.requests[0].headers}
    assert sent[header] == (b"Bearer sk-ours" if auth == "bearer" else b"sk-ours")
    assert b"theirs" not in b"".join(sent.values())


async def test_without_a_key_the_clients_own_passes(sluice: Sluice) -> None:
    sluice.upstream.plays(OK)
    await sluice.ask(post(b"{}", "Authorization: Bearer theirs"))
    assert sluice.upstream.requests[0].values("authorization") == [b"Bearer theirs"]


async def test_a_key_file_is_read_again_when_it_changes(start: Start, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sk-one\n")
    sluice = await start(up=f"api_key_file: '{key}'")
    sluice.upstream.plays(OK)
    await sluice.ask(post(b"{}"))
    key.write_text("sk-another\n")
    await sluice.ask(post(b"{}"))
    sent = [request.values("authorization") for request in sluice.upstream.requests]
    assert sent == [[b"Bearer sk-one"], [b"Bearer sk-another"]]


async def test_configured_headers_replace_the_clients(start: Start) -> None:
    sluice = await start(up='headers: {OpenAI-Organization: ours, User-Agent: "us"}')
    sluice.upstream.plays(OK)
    await sluice.ask(post(b"{}", "openai-organization: theirs", "User-Agent: them"))
    (request,) = sluice.upstream.requests
    assert request.values("openai-organization") == [b"ours"]
    assert request.values("user-agent") == [b"us"]


async def test_a_stream_is_asked_for_uncompressed(sluice: Sluice) -> None:
    sluice.upstream.plays(OK)
    await sluice.ask(post(b'{"stream":true}', "Accept-Encoding: gzip, br"))
    await sluice.ask(post(b'{"stream":false}', "Accept-Encoding: gzip, br"))
    first, second = sluice.upstream.requests
    assert first.values("accept-encoding") == [b"identity"]
    assert second.values("accept-encoding") == [b"gzip, br"]


@pytest.mark.parametrize("base", ["", "/v1", "/deep/er/v1"])
async def test_paths_map_below_the_base_url(start: Start, base: str) -> None:
    sluice = await start(base=base)
    sluice.upstream.plays(OK)
    for path in ("/", "/models/gpt-4.1", "/a%20b/%2Fc//d;x=1?q=%00&%zz"):
        await sluice.ask(get("/v1" + path), method="GET")
    sent = [request.line.split(b" ")[1] for request in sluice.upstream.requests]
    assert sent == [
        (base + path).encode() for path in ("/", "/models/gpt-4.1", "/a%20b/%2Fc//d;x=1?q=%00&%zz")
    ]


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_any_method_passes(sluice: Sluice, method: str) -> None:
    sluice.upstream.plays(OK)
    await sluice.ask(get("/v1/files/1", method=method), method=method)
    assert sluice.upstream.requests[0].line.startswith(method.encode() + b" ")


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (get("/v1/../admin"), 400, "invalid_path"),
        (get("/v1/%2e%2E/admin"), 400, "invalid_path"),
        (get("/v1/..%2fadmin"), 400, "invalid_path"),
        (get("/v1/%252e%252e/x"), 400, "invalid_path"),
        (get("/v1/a\\b"), 400, "invalid_path"),
        (get("/v1//models"), 400, "invalid_path"),
        (get("/v1"), 404, "unknown_url"),
        (get("/favicon.ico"), 404, "unknown_url"),
        (get("/v1/models", method="TRACE"), 405, "method_not_allowed"),
        (get("/livez", method="POST"), 405, "method_not_allowed"),
        (get("/v1/models", "Via: 1.0 other, 1.1 sluice"), 508, "loop_detected"),
        (post(b"{}", "Expect: something"), 417, "expectation_failed"),
        (get("/v1/" + "a" * 20_000), 414, "uri_too_long"),
        (get("/v1/models", "X: " + "a" * 40_000), 431, "headers_too_large"),
        (get("/v1/models", *["X: 1"] * 500), 431, "headers_too_large"),
        (b"GET /v1/models HTTP/1.1\r\nHost : x\r\n\r\n", 400, "invalid_request"),
        (b"nonsense\r\n\r\n", 400, "invalid_request"),
    ],
)
async def test_what_is_refused_asks_nobody(
    sluice: Sluice, request_bytes: bytes, status: int, code: str
) -> None:
    reply = await sluice.ask(request_bytes, method="GET")
    assert reply.status == status
    assert b'"code":"%b"' % code.encode() in reply.body
    assert reply.values("content-type") == [b"application/json"]
    assert len(reply.values("sluice-request-id")) == 1
    assert not sluice.upstream.requests


async def test_a_double_slash_at_the_very_start_is_an_invalid_path(sluice: Sluice) -> None:
    for path in ("//v1/models", "//evil.example/v1/models"):
        reply = await sluice.ask(get(path), method="GET")
        assert (reply.status, b"invalid_path" in reply.body) == (400, True)


async def test_anthropic_errors_have_their_own_shape(start: Start) -> None:
    sluice = await start("routes: [{models: [claude-*], upstreams: [up]}]")
    reply = await sluice.ask(post(b'{"model":"gpt-9"}', path="/v1/messages"))
    assert reply.status == 404
    assert reply.body.startswith(b'{"type":"error","error":{"message":"No route takes')


async def test_the_model_chooses_the_route(start: Start) -> None:
    routes = (
        "{name: gpt, models: ['gpt-*', o1], upstreams: [up]}, {models: ['*-mini'], upstreams: [up]}"
    )
    sluice = await start(f"routes: [{routes}]")
    sluice.upstream.plays(OK)
    for model in ("gpt-5", "o1", "x-mini"):
        await sluice.ask(post(b'{"model":"%b"}' % model.encode()))
    assert [record.route for record in sluice.ended] == ["gpt", "gpt", "*-mini"]
    for body in (b'{"model":"GPT-5"}', b'{"model":7}', b"{}", b"not JSON"):
        reply = await sluice.ask(post(body))
        assert (reply.status, b"model_not_found" in reply.body) == (404, True)
    assert len(sluice.upstream.requests) == 3


async def test_other_bodies_stream_up_as_they_come(sluice: Sluice) -> None:
    sluice.upstream.plays(OK)
    client = await sluice.connect()
    head = post(b"", "Transfer-Encoding: chunked", content_type="multipart/form-data; boundary=x")
    await client.send(head + chunked(b"first"))
    await asyncio.wait_for(sluice.upstream.got_head.wait(), 5)
    assert not sluice.upstream.got_request.is_set()
    await client.send(chunked(b" second") + LAST)
    assert (await client.reply()).status == 200
    (request,) = sluice.upstream.requests
    assert (request.body, request.complete) == (b"first second", True)
    assert request.values("transfer-encoding") == [b"chunked"]
    assert not request.values("content-length")


async def test_an_upload_of_known_length_keeps_it(sluice: Sluice) -> None:
    sluice.upstream.plays(OK)
    await sluice.ask(post(b"x" * 100_000, content_type="audio/wav"))
    (request,) = sluice.upstream.requests
    assert request.values("content-length") == [b"100000"]
    assert request.body == b"x" * 100_000


async def test_a_compressed_body_is_not_inflated(sluice: Sluice) -> None:
    sluice.upstream.plays(OK)
    await sluice.ask(post(b"\x1f\x8bnot really", "Content-Encoding: gzip"))
    (request,) = sluice.upstream.requests
    assert request.body == b"\x1f\x8bnot really"
    assert request.values("content-encoding") == [b"gzip"]


async def test_a_client_that_asks_first_is_told_to_go_on(sluice: Sluice) -> None:
    sluice.upstream.plays(OK)
    client = await sluice.connect()
    body = b'{"model":"m"}'
    head = post(b"", "Expect: 100-continue").replace(b"Content-Length: 0", b"Content-Length: 13")
    await client.send(head)
    await client.until(b"HTTP/1.1 100 Continue\r\n\r\n")
    await client.send(body)
    assert (await client.reply()).status == 200
    assert sluice.upstream.requests[0].body == body
    assert not sluice.upstream.requests[0].values("expect")


async def test_what_is_too_large_is_refused_before_it_is_sent(start: Start) -> None:
    sluice = await start("max_body: 1KiB")
    client = await sluice.connect()
    head = post(b"", "Expect: 100-continue").replace(b"Length: 0", b"Length: 2000")
    await client.send(head)
    reply = await client.reply()
    assert (reply.status, b"request_too_large" in reply.body) == (413, True)
    assert reply.values("connection") == [b"close"]
    assert not sluice.upstream.requests


@pytest.mark.parametrize("content_type", ["application/json", "audio/wav"])
async def test_a_body_that_grows_too_large_is_cut_off(start: Start, content_type: str) -> None:
    sluice = await start("max_body: 1KiB")
    sluice.upstream.plays(UntilGone())
    client = await sluice.connect()
    head = post(b"", "Transfer-Encoding: chunked", content_type=content_type)
    await client.send(head + chunked(b"x" * 900, b"y" * 900))
    reply = await client.reply()
    assert (reply.status, b"request_too_large" in reply.body) == (413, True)
    assert not any(request.complete for request in sluice.upstream.requests)


async def test_a_body_that_stands_still_is_given_up(start: Start) -> None:
    sluice = await start("client_timeouts: {body: 100ms}")
    client = await sluice.connect()
    await client.send(post(b"{}").replace(b"Content-Length: 2", b"Content-Length: 9"))
    reply = await client.reply()
    assert (reply.status, b"request_timeout" in reply.body) == (408, True)
    assert reply.values("connection") == [b"close"]


async def test_a_head_that_drips_is_given_up(start: Start) -> None:
    sluice = await start("client_timeouts: {head: 100ms}")
    silent, dripping = await sluice.connect(), await sluice.connect()
    await dripping.send(b"GET /v1/models HT")
    await asyncio.sleep(0.15)
    sluice.server.sweep()
    assert b"408 Request Timeout" in await dripping.rest()
    assert await silent.rest() == b""


async def test_a_client_that_pauses_its_upload_is_no_silence_of_the_upstream(start: Start) -> None:
    sluice = await start(up="timeouts: {first_byte: 150ms}")
    sluice.upstream.plays(OK)
    client = await sluice.connect()
    head = post(b"", "Transfer-Encoding: chunked", content_type="audio/wav")
    await client.send(head + chunked(b"first"))
    await asyncio.sleep(0.3)
    await client.send(chunked(b" second") + LAST)
    assert (await client.reply()).status == 200


@pytest.mark.parametrize("content_type", ["application/json", "audio/wav"])
async def test_a_body_that_goes_wrong_later_is_refused_at_once(
    sluice: Sluice, content_type: str
) -> None:
    sluice.upstream.plays(UntilGone())
    client = await sluice.connect()
    head = post(b"", "Transfer-Encoding: chunked", content_type=content_type)
    await client.send(head + chunked(b"first"))
    await asyncio.sleep(0.05)
    await client.send(b"ZZ\r\n")
    async with asyncio.timeout(2):
        reply = await client.reply()
    assert (reply.status, b"invalid_request" in reply.body) == (400, True)
    assert not any(request.complete for request in sluice.upstream.requests)


async def test_the_rest_of_a_refused_body_is_no_late_head(start: Start) -> None:
    sluice = await start("client_timeouts: {head: 50ms}")
    client = await sluice.connect()
    request = post(b"", path="/nowhere").replace(b"Content-Length: 0", b"Content-Length: 9")
    await client.send(request)
    assert (await client.reply()).status == 404
    await client.send(b"part")
    await asyncio.sleep(0.1)
    sluice.server.sweep()
    await client.send(b" rest" + get("/livez"))
    assert (await client.reply("GET")).status == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        post(b"", "Transfer-Encoding: gzip, chunked") + LAST,
        post(b"", "Transfer-Encoding: chunked").replace(b"HTTP/1.1", b"HTTP/1.0") + LAST,
        get("/v1/models").replace(b"HTTP/1.1", b"HTTP/2.0"),
    ],
)
async def test_what_can_be_framed_in_two_ways_is_refused(
    sluice: Sluice, request_bytes: bytes
) -> None:
    reply = await sluice.ask(request_bytes)
    assert (reply.status, b"invalid_request" in reply.body) == (400, True)
    assert not sluice.upstream.requests


async def test_a_long_model_is_routed_whole_and_shown_in_part(start: Start) -> None:
    sluice = await start("routes: [{models: ['*z'], upstreams: [up]}]")
    sluice.upstream.plays(OK)
    reply = await sluice.ask(post(b'{"model":"%bz"}' % (b"x" * 4_000)))
    assert reply.status == 200
    model = (await sluice.record()).model
    assert model is not None and len(model) == 128


async def test_pipelined_requests_are_answered_in_turn(sluice: Sluice) -> None:
    gate = asyncio.Event()
    sluice.upstream.plays_first(Until(gate), json_answer(b"1"))
    sluice.upstream.scripts.append([json_answer(b"2")])
    client = await sluice.connect()
    await client.send(get() + get())
    gate.set()
    assert [(await client.reply("GET")).body for _ in range(2)] == [b"1", b"2"]


async def test_a_connection_that_died_while_idle_is_replaced(sluice: Sluice) -> None:
    sluice.upstream.plays(OK)
    assert (await sluice.ask(post(b"{}"))).status == 200
    # The kept connection dies at the very moment of the next request: no byte of an answer comes.
    sluice.upstream.scripts = [[Close()], [OK]]
    reply = await sluice.ask(post(b'{"a":1}'))
    assert reply.status == 200
    assert reply.values("sluice-attempts") == [b"1"]
    assert [request.body for request in sluice.upstream.requests][1:] == [b'{"a":1}'] * 2
    assert sluice.upstream.connections == 2


async def test_a_fresh_connection_that_dies_is_not_replaced(sluice: Sluice) -> None:
    sluice.upstream.plays(Close())
    reply = await sluice.ask(post(b"{}"))
    assert (reply.status, b"upstream_aborted" in reply.body) == (502, True)
    assert len(sluice.upstream.requests) == 1


async def test_bytes_on_an_idle_connection_reach_nobody(sluice: Sluice) -> None:
    gate = asyncio.Event()
    stray = json_answer(b'"somebody else\'s"')
    sluice.upstream.plays(OK, Until(gate), stray)
    assert (await sluice.ask(post(b"{}"))).body == b"{}"
    gate.set()
    await asyncio.sleep(0.05)
    sluice.upstream.plays(OK)
    assert (await sluice.ask(post(b"{}"))).body == b"{}"
    assert sluice.upstream.connections == 2


async def test_bytes_behind_an_answer_reach_nobody(sluice: Sluice) -> None:
    sluice.upstream.plays(OK + json_answer(b'"somebody else\'s"'))
    for _ in range(2):
        assert (await sluice.ask(post(b"{}"))).body == b"{}"
    assert sluice.upstream.connections == 2
