"""Which route takes a model's name, and which name goes up."""

from __future__ import annotations

import json

import pytest

from tests.canaries import CLIENT_KEY
from tests.flow.several import (
    Begin,
    Several,
    error_of,
    refusal,
    said,
    several_upstreams,  # noqa: F401  # the fixture `several`
    source_of,
)
from tests.flow.wire import LAST, STREAM, Reply, chunked, get, json_answer, post

OK = json_answer(b"{}")
KEY = f"Authorization: Bearer {CLIENT_KEY}-web"


async def told(three: Several, body: bytes, *fields: str) -> Reply:
    """Sends a body; every upstream says yes."""
    for each in (three.a, three.b, three.c):
        each.plays(OK)
    return await three.ask(post(body, *fields))


# Aliases -------------------------------------------------------------------------------------

RENAMED = {
    "plainly": (b'{"model":"fast"}', b'{"model":"real"}'),
    "spaced": (b' {\r\n\t"model" :\t"fast" ,"n":1 }\n', b' {\r\n\t"model" :\t"real" ,"n":1 }\n'),
    "last": (b'{"n": 1.50e+01,"model":"fast"}', b'{"n": 1.50e+01,"model":"real"}'),
    "escaped": (b'{"\\u006dodel":"f\\u0061st"}', b'{"\\u006dodel":"real"}'),
    "not what is inside": (
        b'{"messages":[{"model":"fast","content":"\\"model\\":\\"fast\\""}],"model":"fast"}',
        b'{"messages":[{"model":"fast","content":"\\"model\\":\\"fast\\""}],"model":"real"}',
    ),
    "not what is behind": (
        b'{"model":"fast","metadata":{"model":"fast"},"stop":"fast"}',
        b'{"model":"real","metadata":{"model":"fast"},"stop":"fast"}',
    ),
    "doubled others": (
        b'{"n":1,"model":"fast","n":2,"x":"\xc3\xbc\\u00fc"}',
        b'{"n":1,"model":"real","n":2,"x":"\xc3\xbc\\u00fc"}',
    ),
    "large": (
        b'{"prompt":"%b","model":"fast"}' % (b"x" * 1_000_000),
        b'{"prompt":"%b","model":"real"}' % (b"x" * 1_000_000),
    ),
}


@pytest.mark.parametrize(("sent", "expected"), RENAMED.values(), ids=RENAMED)
async def test_only_the_values_bytes_change(several: Begin, sent: bytes, expected: bytes) -> None:
    three = await several("model: real")
    assert (await told(three, sent)).status == 200
    (request,) = three.a.requests
    assert request.body == expected
    assert request.values("content-length") == [b"%d" % len(expected)]


async def test_an_alias_can_not_be_dodged(several: Begin) -> None:
    """A body too intricate to be changed does not go up as it is, to a dearer model."""
    three = await several(routes="[{models: [fast], model: real, upstreams: [a]}]")
    reply = await told(three, b'{"model":"fast","x":[%b0]}' % (b"[]," * 50_001))
    assert (reply.status, error_of(reply)["param"], three.asked) == (400, "model", {})


@pytest.mark.parametrize("name", ["a longer name than before", 'gr"\\ün/日本', "m"])
async def test_any_name_arrives_as_it_is(several: Begin, name: str) -> None:
    three = await several(f"model: {json.dumps(name)}")
    await told(three, b'{"model":"fast","stream":false}')
    (request,) = three.a.requests
    assert json.loads(request.body) == {"model": name, "stream": False}
    assert request.body.startswith(b'{"model":"') and request.body.endswith(b',"stream":false}')


async def test_every_candidate_is_asked_by_that_name(several: Begin) -> None:
    three = await several("model: real")
    three.a.plays(refusal(b"503 Busy", "no"))
    three.b.plays(OK)
    await three.ask(post(b'{"model": "fast"}'))
    assert three.a.requests[0].body == three.b.requests[0].body == b'{"model": "real"}'


async def test_the_answer_is_the_upstreams(several: Begin) -> None:
    three = await several("model: real")
    event = said("x").replace(b"{", b'{"model":"real",', 1)
    three.a.plays(STREAM, chunked(event), LAST)
    assert (await three.ask(post(b'{"model":"fast","stream":true}'))).body == event
    three.a.plays(json_answer(b'{"model":"real"}'))
    assert (await three.ask(post(b'{"model":"fast"}'))).body == b'{"model":"real"}'


async def test_records_tell_the_name_that_the_client_sent(several: Begin) -> None:
    three = await several(routes="[{models: [fast], upstreams: [a], model: real}]")
    await told(three, b'{"model":"fast"}')
    record = await three.record()
    assert (record.model, record.route) == ("fast", "fast")
    assert three.metric("sluice_requests_total", model="fast", route="fast") == 1
    assert three.metric("sluice_requests_total", model="real") == 0


async def test_an_alias_and_usage_that_we_ask_for(several: Begin) -> None:
    three = await several("model: real", settings="limits: {tokens: 1000000/day}")
    three.a.plays(STREAM, chunked(said("x"), b"data: [DONE]\n\n"), LAST)
    await three.ask(post(b'{ "stream":true, "model":"fast" }'))
    document = json.loads(three.a.requests[0].body)
    assert document == {
        "stream": True,
        "model": "real",
        "stream_options": {"include_usage": True},
    }


UNREADABLE = {
    "doubled": b'{"model":"fast","model":"other"}',
    "doubled alike": b'{"model":"fast","model":"fast"}',
    "doubled by an escape": b'{"model":"fast","\\u006dodel":"other"}',
    "a number": b'{"model":7}',
    "null": b'{"model":null}',
    "an object": b'{"model":{"model":"fast"}}',
    "none": b'{"n":1}',
    "no object": b'["model","fast"]',
    "no JSON": b'{"model":"fast"',
    "half a character": b'{"model":"fast\\ud800"}',
    "no UTF-8": b'{"model":"fast\xff"}',
    "empty": b"",
}


@pytest.mark.parametrize("body", UNREADABLE.values(), ids=UNREADABLE)
async def test_a_model_that_cant_be_read_goes_up_unchanged_on_the_open_route(
    several: Begin, body: bytes
) -> None:
    three = await several(
        routes="[{models: [fast, other], upstreams: [a], model: real}, "
        "{name: all, models: ['*'], upstreams: [b], model: real}]"
    )
    reply = await told(three, body)
    assert (reply.status, source_of(reply)) == (200, ("b", 1))
    assert three.b.requests[0].body == body
    assert (await three.record()).route == "all"


@pytest.mark.parametrize("body", UNREADABLE.values(), ids=UNREADABLE)
async def test_no_other_route_takes_it(several: Begin, body: bytes) -> None:
    three = await several(routes="[{models: ['f*', '?*'], upstreams: [a], model: real}]")
    reply = await told(three, body)
    assert (reply.status, error_of(reply)["code"]) == (404, "model_not_found")
    assert not three.asked


@pytest.mark.parametrize("content_type", ["text/plain", "multipart/form-data; boundary=x"])
async def test_what_streams_up_keeps_its_bytes(several: Begin, content_type: str) -> None:
    three = await several("model: real")
    three.a.plays(OK)
    body = b'{"model":"fast"}'
    await three.ask(post(body, content_type=content_type))
    assert three.a.requests[0].body == body


async def test_requests_without_a_body_have_no_model(several: Begin) -> None:
    three = await several("model: real")
    three.a.plays(OK)
    reply = await three.ask(get("/v1/files?model=fast"), method="GET")
    assert reply.status == 200
    assert three.a.requests[0].line == b"GET /v1/files?model=fast HTTP/1.1"


# Routes --------------------------------------------------------------------------------------

ROUTES = """[
  {name: exact, models: [gpt-4o], upstreams: [a]},
  {name: pattern, models: ["gpt-*", "o[13]", "?-small"], upstreams: [b]},
  {name: shadowed, models: [gpt-5], upstreams: [c]},
  {name: own, models: ["Claude*"], upstreams: [c]},
]"""


@pytest.mark.parametrize(
    ("model", "route", "upstream"),
    [
        ("gpt-4o", "exact", "a"),
        ("gpt-4o-mini", "pattern", "b"),
        ("gpt-5", "pattern", "b"),
        ("gpt-", "pattern", "b"),
        ("o3", "pattern", "b"),
        ("x-small", "pattern", "b"),
        ("Claude", "own", "c"),
        ("Claude/3\\nü", "own", "c"),
    ],
)
async def test_the_first_match_takes_it(
    several: Begin, model: str, route: str, upstream: str
) -> None:
    three = await several(routes=ROUTES)
    reply = await told(three, b'{"model":"%b"}' % model.encode())
    assert source_of(reply) == (upstream, 1)
    assert (await three.record()).route == route


@pytest.mark.parametrize("model", ["GPT-4o", "claude", "o2", "gpt", "xx-small", " gpt-4o", "*", ""])
async def test_no_match(several: Begin, model: str) -> None:
    three = await several(routes=ROUTES)
    reply = await told(three, b'{"model":"%b"}' % model.encode())
    error = error_of(reply)
    assert (reply.status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert not three.asked
    record = await three.record()
    assert (record.route, record.outcome) == ("none", None)


async def test_routes_see_the_name_before_the_alias(several: Begin) -> None:
    three = await several(
        routes="[{models: [fast], upstreams: [a], model: slow}, "
        "{models: [slow], upstreams: [b], model: fast}]"
    )
    assert source_of(await told(three, b'{"model":"fast"}')) == ("a", 1)
    assert source_of(await told(three, b'{"model":"slow"}')) == ("b", 1)
    assert three.a.requests[0].body == b'{"model":"slow"}'
    assert three.b.requests[0].body == b'{"model":"fast"}'


async def test_so_do_the_clients_models(several: Begin) -> None:
    three = await several(
        "model: real", settings=f"clients: [{{name: web, key: {CLIENT_KEY}-web, models: [fast]}}]"
    )
    assert (await told(three, b'{"model":"fast"}', KEY)).status == 200
    reply = await told(three, b'{"model":"real"}', KEY)
    assert (reply.status, error_of(reply)["code"]) == (403, "model_not_allowed")
    assert (await told(three, UNREADABLE["doubled"], KEY)).status == 403
    assert three.asked == {"a": 1}


async def test_every_route_has_terms_of_its_own(several: Begin) -> None:
    three = await several(
        routes="[{models: [once], upstreams: [a, b], attempts: 1}, "
        "{models: [twice], upstreams: [a, b], attempts: 2}]"
    )
    three.a.plays(refusal(b"503 Busy", "no"))
    three.b.plays(OK)
    assert source_of(await three.ask(post(b'{"model":"once"}'))) == ("a", 1)
    assert source_of(await three.ask(post(b'{"model":"twice"}'))) == ("b", 2)
