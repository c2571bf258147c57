"""Who may call: keys, models, users and addresses, and what of a credential goes where."""

from __future__ import annotations

import asyncio
import json
import logging
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from proxy import config
from tests.canaries import CLIENT_KEY
from tests.flow.conftest import Sluice, Start
from tests.flow.wire import LAST, STREAM, Reply, Until, chunked, get, json_answer, post

OK = json_answer(b"{}")
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
WEB_KEY, BOT_KEY = f"{CLIENT_KEY}-web", f"{CLIENT_KEY}-bot"
WEB, BOT = f"{{name: web, key: {WEB_KEY}}}", f"{{name: bot, key: {BOT_KEY}}}"
BEARER = f"Authorization: Bearer {WEB_KEY}"
ONCE = "limits: {requests: 1/hour}"


def error_of(reply: Reply) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(reply.body)["error"]
    return error


async def ask(sluice: Sluice, *fields: str, path: str = "/v1/files", method: str = "GET") -> Reply:
    """A request without a body, and without a key but those in its fields."""
    return await sluice.ask(get(path, *fields, method=method), method=method)


async def say(sluice: Sluice, body: bytes, content_type: str = "application/json") -> Reply:
    """A body of the client web."""
    return await sluice.ask(post(body, BEARER, content_type=content_type))


def reload(sluice: Sluice, tmp_path: Path, settings: str, **environ: str) -> None:
    """Lets other settings hold for the same upstream."""
    path = tmp_path / "reloaded.yaml"
    upstream = f"upstreams: {{up: {{base_url: 'http://127.0.0.1:{sluice.upstream.port}/v1'}}}}"
    path.write_text(f"{upstream}\n{settings}\n")
    sluice.app.reload(config.load(path, environ))


# Keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        f"key: {WEB_KEY}",
        f"key_sha256: {sha256(WEB_KEY.encode()).hexdigest()}",
        f"key: '${{UNSET:-{WEB_KEY}}}'",
    ],
    ids=["key", "digest", "variable"],
)
async def test_a_client_is_known_by_its_key(start: Start, key: str) -> None:
    sluice = await start(f"clients: [{{name: web, {key}}}]")
    sluice.upstream.plays(OK)
    assert (await ask(sluice, BEARER)).status == 200
    assert (await ask(sluice, f"{BEARER}x")).status == 401
    assert [record.client for record in sluice.ended] == ["web", "anonymous"]


@pytest.mark.parametrize(
    ("fields", "client"),
    [
        ([BEARER], "web"),
        ([f"x-api-key: {WEB_KEY}"], "web"),
        ([f"api-key: {WEB_KEY}"], "web"),
        ([f"authorization: bEARER  {WEB_KEY}"], "web"),
        ([f"api-key: {BOT_KEY}", f"x-api-key: {BOT_KEY}", BEARER], "web"),
        ([f"api-key: {BOT_KEY}", f"x-api-key: {WEB_KEY}"], "web"),
        (["Authorization: Basic dTpw", f"x-api-key: {WEB_KEY}"], "web"),
        (["Authorization: Bearer wrong", f"x-api-key: {WEB_KEY}"], None),
        (["x-api-key: wrong", f"api-key: {WEB_KEY}"], None),
        ([f"Authorization: {WEB_KEY}"], None),
        ([f"Authorization: Basic {WEB_KEY}"], None),
        ([f"X-Key: {WEB_KEY}"], None),
        ([], None),
    ],
)
async def test_the_first_credential_counts(
    start: Start, fields: list[str], client: str | None
) -> None:
    sluice = await start(f"clients: [{WEB}, {BOT}]")
    sluice.upstream.plays(OK)
    reply = await ask(sluice, *fields)
    if client is not None:
        assert (reply.status, (await sluice.record()).client) == (200, client)
        return
    error = error_of(reply)
    assert (reply.status, error["type"]) == (401, "invalid_request_error")
    assert error["code"] == "invalid_api_key"
    assert reply.values("www-authenticate") == [b"Bearer"]
    assert not sluice.upstream.requests


@pytest.mark.parametrize("name", ["api_key", "api-key", "key", "access_token", "authorization"])
async def test_a_key_in_the_query_is_none(start: Start, name: str) -> None:
    sluice = await start(f"clients: [{WEB}]")
    reply = await ask(sluice, path=f"/v1/files?{name}={WEB_KEY}")
    assert (reply.status, WEB_KEY.encode() in reply.body) == (401, False)
    assert not sluice.upstream.requests


CREDENTIALS = ("authorization", "x-api-key", "api-key")


@pytest.mark.parametrize(
    ("clients", "up", "sent"),
    [
        (WEB, "", {}),
        (WEB, "auth: none", {}),
        (WEB, "api_key: sk-ours", {"authorization": [b"Bearer sk-ours"]}),
        (WEB, "api_key: sk-ours, auth: x-api-key", {"x-api-key": [b"sk-ours"]}),
        (WEB, "auth: none, headers: {api-key: sk-ours}", {"api-key": [b"sk-ours"]}),
        ("", "api_key: sk-ours, auth: api-key", {"api-key": [b"sk-ours"]}),
        (
            "",
            "",
            {
                "authorization": [b"Bearer " + WEB_KEY.encode()],
                "x-api-key": [BOT_KEY.encode()],
                "api-key": [BOT_KEY.encode()],
            },
        ),
    ],
    ids=lambda each: None if isinstance(each, dict) else each.partition(",")[0] or "none",
)
async def test_what_was_a_key_to_this_proxy_does_not_go_up(
    start: Start, clients: str, up: str, sent: dict[str, list[bytes]]
) -> None:
    sluice = await start(f"clients: [{clients}]", up=up)
    sluice.upstream.plays(OK)
    reply = await ask(sluice, BEARER, f"x-api-key: {BOT_KEY}", f"api-key: {BOT_KEY}")
    assert reply.status == 200
    (request,) = sluice.upstream.requests
    assert {name: request.values(name) for name in CREDENTIALS} == {
        name: sent.get(name, []) for name in CREDENTIALS
    }


async def test_a_stranger_that_asks_first_is_not_told_to_go_on(start: Start) -> None:
    sluice = await start(f"clients: [{WEB}]")
    client = await sluice.connect()
    await client.send(post(b"", "Expect: 100-continue").replace(b"Length: 0", b"Length: 9"))
    seen = await client.rest()
    assert seen.startswith(b"HTTP/1.1 401 Unauthorized\r\n") and b"100 Continue" not in seen


async def test_a_preflight_needs_no_key(start: Start) -> None:
    sluice = await start(f"clients: [{WEB}]\ncors: {{origins: ['https://page.example']}}")
    page = "Origin: https://page.example"
    wanted = ["Access-Control-Request-Method: POST", "Access-Control-Request-Headers: api-key, x-a"]
    reply = await ask(sluice, page, *wanted, method="OPTIONS")
    assert (reply.status, reply.values("access-control-allow-headers")) == (204, [b"api-key, x-a"])
    refused = await ask(sluice, page)
    assert refused.status == 401
    assert refused.values("access-control-allow-origin") == [b"https://page.example"]
    assert not sluice.upstream.requests


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
async def test_what_operators_ask_needs_no_clients_key(start: Start, path: str) -> None:
    sluice = await start(f"clients: [{WEB}]\n{ONCE}")
    for _ in range(3):
        reply = await ask(sluice, path=path)
        assert (reply.status, reply.values("x-ratelimit-limit-requests")) == (200, [])


# Models --------------------------------------------------------------------------------------

ESCAPED = b'"mod\\u0065l"'


@pytest.mark.parametrize(
    ("body", "content_type", "allowed"),
    [
        (b'{"model":"gpt-4o-mini"}', "application/json", True),
        (b'{"model":"gpt-4o"}', "application/vnd.x+json; charset=utf-8", True),
        (b'{"model":"gpt\\u002d4o"}', "application/json", True),
        (b"{" + ESCAPED + b':"gpt-4o"}', "application/json", True),
        (b'{"model":"gpt-4o","x":{"model":"gpt-5"},"y":"\\"model\\":"}', "application/json", True),
        (b'{"model":"gpt-5"}', "application/json", False),
        (b'{"model":"GPT-4o"}', "application/json", False),
        (b'{"model":"a gpt-4o"}', "application/json", False),
        (b'{"model":7}', "application/json", False),
        (b'{"model":null}', "application/json", False),
        (b'{"model":["gpt-4o"]}', "application/json", False),
        (b"{}", "application/json", False),
        (b"", "application/json", False),
        (b'[{"model":"gpt-4o"}]', "application/json", False),
        (b'{"model":"gpt-4o"', "application/json", False),
        (b'{"model":"gpt-4o"}{"model":"gpt-5"}', "application/json", False),
        (b'\xef\xbb\xbf{"model":"gpt-4o"}', "application/json", False),
        (b'{"model":"gpt-4o","model":"gpt-5"}', "application/json", False),
        (b'{"model":"gpt-5","model":"gpt-4o"}', "application/json", False),
        (b'{"model":"gpt-4o",' + ESCAPED + b':"gpt-5"}', "application/json", False),
        (b"{" + ESCAPED + b':"gpt-5","model":"gpt-4o"}', "application/json", False),
        (b'{"model":"gpt-4o","Model":"gpt-5"}', "application/json", False),
        (b'{"model":"gpt-4o"}', "text/plain", False),
        (b'{"model":"gpt-4o"}', "multipart/form-data; boundary=x", False),
    ],
)
async def test_a_client_keeps_to_its_models(
    start: Start, body: bytes, content_type: str, allowed: bool
) -> None:
    sluice = await start(f"clients: [{{name: web, key: {WEB_KEY}, models: ['gpt-4o*', o1]}}]")
    sluice.upstream.plays(OK)
    reply = await say(sluice, body, content_type)
    if allowed:
        assert reply.status == 200
        assert sluice.upstream.requests[0].body == body
        return
    error = error_of(reply)
    assert (reply.status, error["type"]) == (403, "permission_error")
    assert (error["code"], error["param"]) == ("model_not_allowed", "model")
    assert not sluice.upstream.requests


async def test_a_request_without_a_body_names_no_model_and_generates_nothing(start: Start) -> None:
    sluice = await start(f"clients: [{{name: web, key: {WEB_KEY}, models: [gpt-4o]}}]")
    sluice.upstream.plays(OK)
    assert (await ask(sluice, BEARER)).status == 200


@pytest.mark.parametrize("models", ["", ", models: ['*']", ", models: [gpt-4o, '*']"])
async def test_whoever_may_use_all_models_need_not_name_one(start: Start, models: str) -> None:
    sluice = await start(f"clients: [{{name: web, key: {WEB_KEY}{models}}}]")
    sluice.upstream.plays(OK)
    for body in (b"{}", b"not JSON", b'{"model":"a","model":"b"}'):
        assert (await say(sluice, body)).status == 200
    assert (await say(sluice, b"hello", "text/plain")).status == 200
    assert (await ask(sluice, BEARER)).status == 200


# Who shares a limit --------------------------------------------------------------------------


async def test_clients_have_limits_of_their_own(start: Start) -> None:
    sluice = await start(f"clients: [{WEB}, {BOT}]\n{ONCE}")
    sluice.upstream.plays(OK)
    asked = [BEARER, f"api-key: {BOT_KEY}", f"x-api-key: {WEB_KEY}", f"api-key: {BOT_KEY}"]
    assert [(await ask(sluice, field)).status for field in asked] == [200, 200, 429, 429]


async def test_each_of_a_clients_users_is_counted_apart(start: Start) -> None:
    web = f"{{name: web, key: {WEB_KEY}, user_header: X-OpenWebUI-User-Id}}"
    sluice = await start(f"clients: [{web}]\n{ONCE}")
    sluice.upstream.plays(OK)
    ann, bob = "X-OpenWebUI-User-Id: ann", "x-openwebui-user-id: bob"
    for fields in ([ann], [bob], []):
        assert (await ask(sluice, BEARER, *fields)).status == 200
        assert (await ask(sluice, BEARER, *fields)).status == 429
    assert {record.client for record in sluice.ended} == {"web"}
    assert sluice.upstream.requests[0].values("x-openwebui-user-id") == [b"ann"]


async def test_a_user_header_is_nobodys_elses(start: Start) -> None:
    sluice = await start(f"clients: [{WEB}]\n{ONCE}")
    sluice.upstream.plays(OK)
    assert (await ask(sluice, BEARER, "X-OpenWebUI-User-Id: ann")).status == 200
    assert (await ask(sluice, BEARER, "X-OpenWebUI-User-Id: bob")).status == 429


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("6.6.6.6, 192.0.2.1", "7.7.7.7, 192.0.2.1", True),  # left of it stands what it claims
        ("192.0.2.1, 127.0.0.9", "192.0.2.1", True),  # the right-most is a proxy of ours
        ("192.0.2.1, 127.0.0.9", "192.0.2.2, 127.0.0.9", False),
        ("2001:db8::1", "2001:db8:0:0:ffff::2", True),  # one household: a /64
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
    ],
)
async def test_without_clients_addresses_are_told_apart(
    start: Start, one: str, other: str, same: bool
) -> None:
    sluice = await start(f"trusted_proxies: [127.0.0.0/8]\n{ONCE}")
    sluice.upstream.plays(OK)
    assert (await ask(sluice, f"X-Forwarded-For: {one}")).status == 200
    assert (await ask(sluice, f"X-Forwarded-For: {other}")).status == (429 if same else 200)
    assert {record.client for record in sluice.ended} == {"anonymous"}


async def test_a_stranger_may_claim_any_address_and_is_not_believed(start: Start) -> None:
    sluice = await start(ONCE)
    sluice.upstream.plays(OK)
    assert (await ask(sluice, "X-Forwarded-For: 192.0.2.1")).status == 200
    assert (await ask(sluice, "X-Forwarded-For: 192.0.2.2")).status == 429


# What operators see --------------------------------------------------------------------------


async def test_metrics_and_the_access_line_name_the_client(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    web = f"{{name: web, key: {WEB_KEY}, models: [gpt-4o]}}"
    sluice = await start(f"clients: [{web}]\nroutes: [{{models: [gpt-4o], upstreams: [up]}}]")
    sluice.upstream.plays(OK)
    with caplog.at_level(logging.INFO, "sluice.access"):
        await say(sluice, b'{"model":"gpt-4o"}')
        await say(sluice, b'{"model":"gpt-5"}')
        await ask(sluice)
        await ask(sluice, "api-key: wrong")
    lines = [vars(each)["fields"] for each in caplog.records if each.message == "request"]
    assert [(line["client"], line["status"]) for line in lines] == [
        ("web", 200),
        ("web", 403),
        ("anonymous", 401),
        ("anonymous", 401),
    ]
    metrics = (await ask(sluice, path="/metrics")).body.decode()
    for line in (
        'sluice_requests_total{client="web",code="200",model="gpt-4o",route="gpt-4o"} 1.0',
        'sluice_requests_total{client="web",code="403",model="other",route="none"} 1.0',
        'sluice_requests_total{client="anonymous",code="401",model="other",route="none"} 2.0',
        "sluice_auth_failures_total 2.0",
    ):
        assert line in metrics, line


async def test_a_reload_lets_in_and_turns_away_at_once(start: Start, tmp_path: Path) -> None:
    gate = asyncio.Event()
    sluice = await start(f"clients: [{WEB}]")
    sluice.upstream.plays(STREAM, chunked(EVENT), Until(gate), chunked(EVENT), LAST)
    streaming, kept = await sluice.connect(), await sluice.connect()
    await streaming.send(post(b'{"stream":true}', BEARER))
    await streaming.until(EVENT)
    sluice.upstream.plays(OK)
    await kept.send(get("/v1/files", BEARER))
    assert (await kept.reply("GET")).status == 200

    bot = "clients: [{name: bot, key: '${BOT_KEY}', models: [gpt-4o]}]"
    reload(sluice, tmp_path, bot, BOT_KEY=BOT_KEY)
    await kept.send(get("/v1/files", BEARER))
    assert (await kept.reply("GET")).status == 401
    assert (await sluice.ask(post(b'{"model":"gpt-4o"}', f"x-api-key: {BOT_KEY}"))).status == 200
    assert (await sluice.ask(post(b'{"model":"gpt-5"}', f"x-api-key: {BOT_KEY}"))).status == 403
    gate.set()
    assert (await streaming.reply()).body == EVENT * 2
