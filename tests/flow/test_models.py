"""`GET /v1/models`: one list where there are several upstreams, or a client that may not use all."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from proxy import catalog, config
from proxy.errors import ProxyError
from proxy.exchange import Outcome
from tests.canaries import CLIENT_KEY, UPSTREAM_KEY
from tests.flow.conftest import Start
from tests.flow.several import (
    Begin,
    Candidate,
    Several,
    error_of,
    several_upstreams,  # noqa: F401  # the fixture `several`
    source_of,
)
from tests.flow.wire import Close, Reply, Until, UntilGone, get, json_answer, post

BEARER = f"Authorization: Bearer {CLIENT_KEY}"
OURS = f"api_key: {UPSTREAM_KEY}"
SAID = json_answer(b'{"choices":[]}')
ONE_NAMED = "[{models: [m], upstreams: [a]}]"
BUSY = json_answer(b"{}", status=b"503 Busy")
NONE = json_answer(b'{"error":{"message":"from a"}}', status=b"404 Not Found")


def web(models: str, more: str = "") -> str:
    return f"clients: [{{name: web, key: {CLIENT_KEY}, models: [{models}]}}]\n{more}"


def listing(*names: str, owner: str = "them") -> bytes:
    """A list of models as upstreams send it."""
    data = [{"id": each, "object": "model", "created": 1, "owned_by": owner} for each in names]
    return json_answer(json.dumps({"object": "list", "data": data}).encode())


async def models(three: Several, *fields: str, path: str = "/v1/models") -> Reply:
    return await three.ask(get(path, *fields), method="GET")


def ids(reply: Reply) -> list[str]:
    """The names of a whole list."""
    assert (reply.status, reply.whole) == (200, True), reply.body
    assert reply.values("content-type") == [b"application/json"]
    document: dict[str, Any] = json.loads(reply.body)
    assert document["object"] == "list"
    return [each["id"] for each in document["data"]]


def play(three: Several) -> None:
    """Lets a, b and c list a model of their own, and one that all have."""
    for upstream in three.a, three.b, three.c:
        upstream.plays(listing(f"{upstream.name}-1", "all", owner=upstream.name))


# Merged --------------------------------------------------------------------------------------


async def test_the_lists_of_all_candidates_are_one(several: Begin) -> None:
    three = await several(each=OURS)
    play(three)
    reply = await models(three, "X-Request-Id: mine")
    assert ids(reply) == ["a-1", "all", "b-1", "c-1"]
    model = {"id": "all", "object": "model", "created": 1, "owned_by": "a"}  # the first one's
    assert json.loads(reply.body)["data"][1] == model
    assert reply.values("sluice-request-id") == [b"mine"]
    assert reply.values("server") == [b"sluice"]
    assert not reply.values("sluice-upstream") and not reply.values("sluice-attempts")
    assert three.asked == {"a": 1, "b": 1, "c": 1}
    for upstream in three.a, three.b, three.c:
        (request,) = upstream.requests
        assert request.line == b"GET /v1/models HTTP/1.1"
        assert request.values("accept-encoding") == [b"identity"]
        assert request.values("authorization") == [b"Bearer " + UPSTREAM_KEY.encode()]
        assert request.values("via") == [b"1.1 sluice"]


async def test_it_is_one_request_in_the_record_and_an_attempt_at_each(several: Begin) -> None:
    three = await several(each=OURS)
    play(three)
    three.c.plays(Close())
    assert ids(await models(three)) == ["a-1", "all", "b-1"]
    record = await three.record()
    assert (record.route, record.upstream, record.model) == ("none", None, None)
    assert (record.outcome, record.status) == (Outcome.COMPLETED, 200)
    assert three.metric("sluice_requests_total", route="none", code="200") == 1
    assert three.metric("sluice_outcomes_total", route="none", outcome="completed") == 1
    assert three.metric("sluice_upstream_attempts_total", result="answer") == 2
    assert three.metric("sluice_upstream_attempts_total", upstream="c") == 1


async def test_only_what_a_route_takes_by_the_name_that_it_takes(several: Begin) -> None:
    three = await several(
        routes="[{models: [fast, slow], upstreams: [b], model: b-1}, {models: ['a-*'], "
        "upstreams: [a, b]}, {models: [c-1], upstreams: [b]}]"
    )
    play(three)
    assert ids(await models(three)) == ["a-1", "fast", "slow"]
    assert three.asked == {"a": 1, "b": 1}  # c is no candidate of any
    # And each of them is answered.
    for name, upstream in ("a-1", three.a), ("fast", three.b):
        upstream.plays(SAID)
        asked = await three.ask(post(b'{"model":"%b"}' % name.encode()))
        assert source_of(asked) == (upstream.name, 1)


async def test_a_restricted_client_sees_its_own(start: Start) -> None:
    sluice = await start(web("'gpt-4o*', o1"))
    sluice.upstream.plays(listing("gpt-5", "gpt-4o", "o1", "o1-mini", "gpt-4o-mini"))
    for path in "/v1/models", "/v1/models?limit=1":
        reply = await sluice.ask(get(path, BEARER), method="GET")
        assert ids(reply) == ["gpt-4o", "o1", "gpt-4o-mini"]
    (request,) = sluice.upstream.requests  # the second time it is known
    assert request.line == b"GET /v1/models HTTP/1.1"
    assert not request.values("authorization")
    assert (await sluice.ask(get(), method="GET")).status == 401


async def test_without_a_route_for_what_names_no_model_it_is_listed_too(start: Start) -> None:
    sluice = await start("routes: [{models: ['gpt-*'], upstreams: [up]}]")
    sluice.upstream.plays(listing("gpt-5", "llama"))
    assert ids(await sluice.ask(get(), method="GET")) == ["gpt-5"]


async def test_the_sdk_reads_it(several: Begin) -> None:
    three = await several(each=OURS)
    play(three)
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{three.port}/v1", api_key=CLIENT_KEY, max_retries=0
    ) as sdk:
        listed = [(each.id, each.owned_by) async for each in sdk.models.list()]
    assert listed == [("a-1", "a"), ("all", "a"), ("b-1", "b"), ("c-1", "c")]


# Relayed -------------------------------------------------------------------------------------


async def test_one_upstreams_own_list_is_relayed(start: Start) -> None:
    body = b' {"data": [ {"id":"m"} ], "x": 1.0}\n'
    sluice = await start(web("'*'"))
    sluice.upstream.plays(json_answer(body))
    reply = await sluice.ask(get("/v1/models?limit=%31", BEARER), method="GET")
    assert (reply.body, source_of(reply)) == (body, ("up", 1))
    assert sluice.upstream.requests[0].line == b"GET /v1/models?limit=%31 HTTP/1.1"


@pytest.mark.parametrize(
    "request_",
    [
        get("/v1/models/a-1"),
        get("/v1/models/"),
        get("/v1/models", method="HEAD"),
        get("/v1/models", "Content-Length: 0", method="POST"),
    ],
)
async def test_what_else_begins_so_is_relayed_to_one(several: Begin, request_: bytes) -> None:
    three = await several()
    three.a.plays(b"HTTP/1.1 204 No Content\r\n\r\n")
    reply = await three.ask(request_, method="HEAD")
    assert (reply.status, source_of(reply)) == (204, ("a", 1))
    assert three.asked == {"a": 1}


# What fails ----------------------------------------------------------------------------------


async def test_what_fails_is_left_out(several: Begin) -> None:
    three = await several(absent="a", c=OURS)
    three.b.plays(listing("m"))
    three.c.plays(json_answer(UPSTREAM_KEY.encode(), status=b"401 Unauthorized"))
    assert ids(await models(three)) == ["m"]


async def test_the_body_is_read_up_to_a_bound(several: Begin) -> None:
    three = await several(among="a, b")
    three.a.plays(b"HTTP/1.1 200 OK\r\n\r\n", b'{"data":[{"id":"' + b"x" * 2**21, UntilGone())
    three.b.plays(listing("m"))
    assert ids(await models(three)) == ["m"]
    await three.a.is_left()


async def test_one_that_is_slow_is_left_out(
    several: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "_PATIENCE", 0.3)
    three = await several()
    three.a.plays(UntilGone())
    three.b.plays(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", UntilGone())
    three.c.plays(listing("m"))
    assert ids(await models(three)) == ["m"]
    await three.a.is_left()
    await three.b.is_left()


@pytest.mark.parametrize(
    ("step", "status", "code"),
    [
        (NONE, 502, "upstream_invalid"),
        (json_answer(b"[]"), 502, "upstream_invalid"),
        (b"SSH-2.0-x\r\n", 502, "upstream_invalid"),
        (Close(), 502, "upstream_aborted"),
    ],
)
async def test_if_all_fail_one_of_them_says_why(
    several: Begin, step: bytes | Close, status: int, code: str
) -> None:
    three = await several(among="a, b")
    three.a.plays(step)
    three.b.plays(step)
    reply = await models(three)
    error = error_of(reply)
    assert (reply.status, error["code"], "'a'" in error["message"]) == (status, code, True)
    assert b"from a" not in reply.body  # an upstream's text is not repeated
    record = await three.record()
    assert (record.upstream, record.outcome) == (None, Outcome.UPSTREAM_ERROR)
    assert three.metric("sluice_outcomes_total", route="none") == 1


async def test_full_ones_are_not_asked(several: Begin) -> None:
    three = await several(among="a, b", a="max_streams: 1", b="max_streams: 1")
    gate = asyncio.Event()
    busy = []
    for upstream in three.a, three.b:
        upstream.plays(Until(gate), SAID)
        upstream.got_request.clear()
        client = await three.connect()
        await client.send(post())
        await upstream.has_request()
        busy.append(client)
    reply = await models(three)
    assert (reply.status, error_of(reply)["code"]) == (503, "no_upstream_available")
    assert reply.values("retry-after") == [b"1"]
    assert (await three.record()).outcome is None  # nobody was asked
    gate.set()
    for client in busy:
        assert (await client.reply()).status == 200


# Credentials, and what is kept ---------------------------------------------------------------


async def test_a_clients_own_key_goes_up_where_there_is_no_other(several: Begin) -> None:
    three = await several(among="a, b", b=OURS)
    three.b.plays(listing("b"))
    for name in "first", "second":
        three.a.plays(listing(name))
        fields = [f"Authorization: Bearer {CLIENT_KEY}-{name}", f"X-Project: {name}"]
        assert ids(await models(three, *fields, 'If-None-Match: "x"')) == [name, "b"]
        asked = three.a.requests[-1]
        assert asked.values("authorization") == [f"Bearer {CLIENT_KEY}-{name}".encode()]
        assert asked.values("x-project") == [name.encode()]
        assert not asked.values("if-none-match")
    assert three.asked == {"a": 2, "b": 1}
    (asked,) = three.b.requests
    assert asked.values("authorization") == [b"Bearer " + UPSTREAM_KEY.encode()]
    assert not asked.values("x-project")


@pytest.mark.parametrize(
    ("each", "settings"), [(OURS, ""), ("", web("'*'"))], ids=["our key", "clients"]
)
async def test_else_it_is_kept_for_a_moment(several: Begin, each: str, settings: str) -> None:
    three = await several(each=each, settings=settings)
    play(three)
    for _ in range(3):
        assert ids(await models(three, BEARER)) == ["a-1", "all", "b-1", "c-1"]
    assert three.asked == {"a": 1, "b": 1, "c": 1}
    assert three.metric("sluice_outcomes_total", outcome="completed") == 3


async def test_a_reload_asks_anew(several: Begin, tmp_path: Path) -> None:
    three = await several(each=OURS)
    play(three)
    assert ids(await models(three)) == ["a-1", "all", "b-1", "c-1"]
    three.app.reload(config.load(tmp_path / "several.yaml", {}))
    three.a.plays(listing("new"))
    assert ids(await models(three)) == ["new", "b-1", "all", "c-1"]


async def begin(three: Several, upstream: Candidate) -> Any:
    """Asks for the models, and waits until `upstream` is asked."""
    upstream.got_request.clear()
    client = await three.connect()
    await client.send(get())
    await upstream.has_request()
    return client


async def test_those_who_ask_meanwhile_share_it_and_one_may_leave(several: Begin) -> None:
    three = await several(each=OURS, routes=ONE_NAMED)
    gate = asyncio.Event()
    three.a.plays(UntilGone())
    first = await begin(three, three.a)
    three.a.plays(Until(gate), listing("m"))
    others = [await three.connect() for _ in range(3)]
    for each in others:
        await each.send(get())
    while len(three.app.observer.in_flight) < 4:
        await asyncio.sleep(0.001)
    three.a.got_request.clear()
    three.a.gone.clear()
    first.abort()
    await three.a.is_left()  # what nobody waits for is not waited for
    await three.a.has_request()  # and the next one asks
    gate.set()
    for each in others:
        assert ids(await each.reply("GET")) == ["m"]
    assert three.asked == {"a": 2}
    assert (await three.record()).outcome is Outcome.CLIENT_GONE


@pytest.mark.parametrize(
    ("code", "status", "outcome"),
    [("shutting_down", 503, Outcome.SHUTDOWN), ("killed", None, Outcome.KILLED)],
)
async def test_it_can_be_ended_meanwhile(
    several: Begin, code: str, status: int | None, outcome: Outcome
) -> None:
    three = await several()
    play(three)
    three.b.plays(UntilGone())
    client = await begin(three, three.b)
    (exchange,) = three.app.observer.in_flight.values()
    exchange.interrupt(ProxyError(code, "The end."))
    if status is None:
        assert not await client.rest()
    else:
        assert (await client.reply("GET")).status == status
    await three.b.is_left()
    assert (await three.record()).outcome is outcome


async def test_a_list_is_no_news_of_how_an_upstream_generates(several: Begin) -> None:
    three = await several(among="a, b", each=f"{OURS}, circuit: {{failures: 2}}")
    three.b.plays(SAID)
    for up in 1, 0:
        three.a.plays(BUSY)
        assert source_of(await three.ask(post())) == ("b", 2)
        assert three.up["a"] == up
        three.a.plays(listing("m"))
        assert ids(await models(three)) == ["m"]


# Limits --------------------------------------------------------------------------------------


async def test_it_costs_a_request_and_a_slot_and_no_tokens(several: Begin) -> None:
    limits = "limits: {requests: 2/87600h, tokens: 1000/87600h, streams: 1}"
    three = await several(each=OURS, settings=limits)
    play(three)
    gate = asyncio.Event()
    three.b.plays(Until(gate), listing("b"))
    client = await begin(three, three.b)
    refused = await models(three)
    assert (refused.status, error_of(refused)["code"]) == (429, "concurrency_limit_exceeded")
    gate.set()
    reply = await client.reply("GET")
    assert ids(reply) == ["a-1", "all", "b", "c-1"]
    assert reply.values("x-ratelimit-remaining-requests") == [b"1"]
    assert not reply.values("x-ratelimit-remaining-tokens")
    assert (await models(three)).status == 200
    refused = await models(three)
    assert (refused.status, error_of(refused)["code"]) == (429, "rate_limit_exceeded")
    assert [each.outcome for each in three.ended] == [
        None,
        Outcome.COMPLETED,
        Outcome.COMPLETED,
        None,
    ]
    assert not any(each.tokens for each in three.ended)


async def test_a_page_of_an_allowed_origin_may_read_it(several: Begin) -> None:
    three = await several(settings="cors: {origins: ['https://page.example']}")
    play(three)
    reply = await models(three, "Origin: https://page.example")
    assert reply.values("access-control-allow-origin") == [b"https://page.example"]
    assert len(ids(reply)) == 4
