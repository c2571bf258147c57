"""Attempts over a route's candidates: who is asked, how often, and whose answer the client gets."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from email.utils import formatdate
from itertools import product

import pytest

from proxy.errors import ProxyError
from proxy.exchange import Outcome
from tests.canaries import CLIENT_KEY, UPSTREAM_KEY
from tests.flow.several import (
    DONE,
    USAGE,
    USED,
    Begin,
    Candidate,
    Several,
    after,
    error_in,
    error_of,
    refusal,
    said,
    several_upstreams,  # noqa: F401  # the fixture `several`
    source_of,
    stream_of,
    text_of,
)
from tests.flow.wire import (
    LAST,
    PATIENCE,
    STREAM,
    Client,
    Close,
    Reset,
    Step,
    Until,
    UntilGone,
    chunked,
    get,
    json_answer,
    post,
)

OK = json_answer(b'{"choices":[]}')
BUSY = refusal(b"503 Busy", "from a")
NAMED = "from a"  # what must not be seen where another one answers
REFUSED = refusal(b"401 Unauthorized", f"Incorrect API key provided: {UPSTREAM_KEY}")
MANY = "1000000/87600h"  # in ten years: nothing comes back while a test runs

CHAT_ERROR = b'data: {"error":{"message":"from a","type":"server_error"}}\n\n'
MESSAGES_ERROR = (
    b"event: error\n"
    b'data: {"type":"error","error":{"type":"overloaded_error","message":"from a"}}\n\n'
)
RESPONSES_ERROR = (
    b"event: error\n"
    b'data: {"type":"error","code":"busy","message":"from a","param":null,"sequence_number":0}\n\n'
)
RESPONSES_FAILED = (
    b"event: response.failed\n"
    b'data: {"type":"response.failed","response":{"status":"failed","error":{"code":"x"}}}\n\n'
)


def key(name: str) -> str:
    return f"api_key: {UPSTREAM_KEY}-{name}"


async def begin(three: Several, upstream: Candidate, request: bytes) -> Client:
    """Sends a request and waits until `upstream` has it."""
    upstream.got_request.clear()
    client = await three.connect()
    await client.send(request)
    await upstream.has_request()
    return client


# What is tried on the next candidate ---------------------------------------------------------

NO_ANSWER: dict[str, tuple[Step, ...]] = {
    "closed": (Close(),),
    "reset": (Reset(),),
    "closed behind an interim head": (b"HTTP/1.1 103 Early Hints\r\n\r\n", Close()),
    "closed inside its head": (b"HTTP/1.1 200 OK\r\nX-Name: from a\r\nCont", Close()),
    "closed behind a stream's head": (STREAM, Close()),
    "reset behind a comment": (STREAM, chunked(b": from a\n\n"), Reset()),
    "closed inside its first event": (STREAM, chunked(b'data: {"from a"'), Close()),
    "ended without an event": (STREAM, chunked(b": from a\n\n"), Close()),
    "401 to our key": (REFUSED,),
    "429": (refusal(b"429 Too Many Requests", NAMED),),
    "500": (refusal(b"500 Oops", NAMED),),
    "503 until close": (b"HTTP/1.1 503 Busy\r\n\r\nfrom a", Close()),
    "503 without an end": (b"HTTP/1.1 503 Busy\r\n\r\nfrom a", UntilGone()),
    "529": (refusal(b"529 Overloaded", NAMED),),
    "an error as the first event": (STREAM, chunked(CHAT_ERROR), LAST),
    "an error, and nothing behind it": (STREAM, chunked(CHAT_ERROR), UntilGone()),
    "an error behind comments": (STREAM, chunked(b": from a\n\n:\n", CHAT_ERROR, DONE), LAST),
    "an error behind what is no event": (STREAM, chunked(b"event: x\nid: 1\n\n", CHAT_ERROR), LAST),
    "an error behind a BOM": (STREAM, chunked(b"\xef\xbb\xbf" + CHAT_ERROR), LAST),
    "an error in pieces": (STREAM, chunked(*(CHAT_ERROR[i : i + 1] for i in range(75))), LAST),
    "an error with CRLF": (STREAM, chunked(CHAT_ERROR.replace(b"\n", b"\r\n")), LAST),
    "an error with CR": (STREAM, chunked(CHAT_ERROR.replace(b"\n", b"\r")), LAST),
    "an error of Anthropic": (STREAM, chunked(MESSAGES_ERROR), LAST),
    "an error of Responses": (STREAM, chunked(RESPONSES_ERROR), LAST),
    "a failed response": (STREAM, chunked(RESPONSES_FAILED), LAST),
}  # fmt: skip


@pytest.mark.parametrize("steps", NO_ANSWER.values(), ids=NO_ANSWER)
async def test_no_answer_is_tried_on_the_next(several: Begin, steps: tuple[Step, ...]) -> None:
    three = await several(a=key("a"), b=key("b"))
    three.a.plays(*steps)
    three.b.plays(STREAM, stream_of("b"), LAST)
    reply = await three.ask(post())
    assert (reply.status, reply.body, reply.whole) == (200, text_of("b"), True)
    assert NAMED.encode() not in b"".join(b"%b: %b" % pair for pair in reply.headers)
    assert source_of(reply) == ("b", 2)
    assert three.asked == {"a": 1, "b": 1}
    record = await three.record()
    assert (record.outcome, record.upstream) == (Outcome.COMPLETED, "b")
    assert [name for name, _ in record.attempt_results] == ["a", "b"]
    if UntilGone() in steps:
        await three.a.is_left()


@pytest.mark.parametrize("how", ["absent", "mute"])
async def test_nobody_there_is_tried_on_the_next(several: Begin, how: str) -> None:
    three = await several(**{how: "a"}, a="timeouts: {connect: 100ms}")
    three.a.plays(UntilGone())
    three.b.plays(STREAM, stream_of("b"), LAST)
    reply = await three.ask(post())
    assert (reply.body, reply.whole, source_of(reply)) == (text_of("b"), True, ("b", 2))


@pytest.mark.parametrize("request_", [get("/v1/files"), get("/v1/files/x", method="DELETE")])
async def test_requests_without_a_body_are_tried_too(several: Begin, request_: bytes) -> None:
    three = await several()
    three.a.plays(BUSY)
    three.b.plays(OK)
    reply = await three.ask(request_, method="GET")
    assert (reply.status, source_of(reply)) == (200, ("b", 2))


async def test_both_get_the_same_request_each_with_its_own_key(several: Begin) -> None:
    three = await several(a=key("a"), b=key("b") + ", auth: x-api-key, headers: {X-Own: '1'}")
    three.a.plays(BUSY)
    three.b.plays(OK)
    body = b'{ "model" : "m",\r\n\t"\\u0070rompt": "\xc3\xbc", "stream":false }  '
    fields = ("X-Odd: 1", "x-odd: 2", "X-Request-Id: mine", "Cookie: a=1", "X-Own: 0")
    await three.ask(post(body, *fields))
    (first,), (second,) = three.a.requests, three.b.requests
    assert (first.line, first.body) == (second.line, second.body)
    assert second.body == body
    own = {b"host", b"authorization", b"x-api-key", b"x-own"}
    others = [
        [pair for pair in each.headers if pair[0].lower() not in own] for each in (first, second)
    ]
    assert others[0] == others[1]
    assert (b"x-odd", b"2") in others[0]
    for request, upstream in (first, three.a), (second, three.b):
        assert request.values("host") == [b"127.0.0.1:%d" % upstream.port]
    assert first.values("authorization") == [f"Bearer {UPSTREAM_KEY}-a".encode()]
    assert (first.values("x-api-key"), second.values("authorization")) == ([], [])
    assert second.values("x-api-key") == [f"{UPSTREAM_KEY}-b".encode()]
    assert (first.values("x-own"), second.values("x-own")) == ([b"0"], [b"1"])
    assert CLIENT_KEY.encode() not in repr((first.headers, second.headers)).encode()


async def test_a_large_body_goes_up_again_whole(several: Begin) -> None:
    three = await several()
    three.a.plays(BUSY)
    three.b.plays(OK)
    body = b'{"model":"m","prompt":"%b"}' % (b"x" * 3_000_000)
    assert (await three.ask(post(body))).status == 200
    assert three.a.requests[0].body == three.b.requests[0].body == body


# What is not ---------------------------------------------------------------------------------

STATUSES = [b"301 Moved", b"400 Bad", b"403 No", b"404 None", b"408 Late", b"409 Twice", b"422 Odd"]


@pytest.mark.parametrize("status", STATUSES)
async def test_other_statuses_are_answers(several: Begin, status: bytes) -> None:
    three = await several()
    three.a.plays(json_answer(b"no", status=status))
    reply = await three.ask(post())
    assert (b"%d %b" % (reply.status, reply.reason), reply.body) == (status, b"no")
    assert (source_of(reply), three.asked) == (("a", 1), {"a": 1})


async def test_a_401_to_the_clients_own_key_is_an_answer(several: Begin) -> None:
    three = await several()
    three.a.plays(json_answer(b'{"error":"whose?"}', status=b"401 Unauthorized"))
    reply = await three.ask(post())
    assert (reply.status, reply.body) == (401, b'{"error":"whose?"}')
    assert three.asked == {"a": 1}
    assert three.a.requests[0].values("api-key") == [CLIENT_KEY.encode()]


@pytest.mark.parametrize(
    ("timeouts", "steps", "clock"),
    [
        ("first_byte: 100ms", (UntilGone(),), "first_byte"),
        ("first_byte: 100ms", (b"HTTP/1.1 200 OK\r\nX:", UntilGone()), "first_byte"),
        ("total: 100ms", (UntilGone(),), "total"),
        ("total: 100ms", (STREAM, UntilGone()), "total"),
        ("idle: 100ms", (STREAM, UntilGone()), "idle"),
        ("idle: 100ms", (STREAM, chunked(b":\n"), UntilGone()), "idle"),
        ("stall: 100ms", (STREAM, chunked(b":\n"), UntilGone()), "stall"),
    ],
)
async def test_what_ran_out_of_time_may_have_been_billed(
    several: Begin, timeouts: str, steps: tuple[Step, ...], clock: str
) -> None:
    three = await several(each=f"timeouts: {{{timeouts}}}")
    three.a.plays(*steps)
    reply = await three.ask(post())
    error = error_of(reply)
    assert (reply.status, error["type"], error["code"]) == (
        504,
        "timeout_error",
        "upstream_timeout",
    )
    assert clock in error["message"]
    assert three.asked == {"a": 1}
    await three.a.is_left()
    assert (await three.record()).outcome is Outcome(f"{clock}_timeout")


async def test_what_is_no_http_is_not_asked_of_the_next(several: Begin) -> None:
    three = await several()
    three.a.plays(b"SSH-2.0-OpenSSH\r\n", UntilGone())
    reply = await three.ask(post())
    assert (reply.status, error_of(reply)["code"]) == (502, "upstream_invalid")
    assert three.asked == {"a": 1}


async def test_an_upload_has_one_attempt(several: Begin) -> None:
    three = await several()
    upload = post(b"", "Transfer-Encoding: chunked", content_type="audio/wav")
    three.a.plays(BUSY)
    reply = await three.ask(upload + chunked(b"RIFF", b"data") + LAST)
    assert (reply.status, source_of(reply)) == (503, ("a", 1))
    assert error_of(reply)["message"] == NAMED
    three.a.plays(Close())
    reply = await three.ask(upload + chunked(b"RIFF", b"data") + LAST)
    assert (reply.status, error_of(reply)["code"]) == (502, "upstream_aborted")
    assert three.asked == {"a": 2}


async def test_once_an_event_was_relayed_never(several: Begin) -> None:
    three = await several()
    gate = asyncio.Event()
    three.a.plays(STREAM, chunked(said("one")), Until(gate), Close())
    client = await three.connect()
    await client.send(post())
    await client.until(said("one"))
    gate.set()
    reply = await client.reply()
    assert reply.body.startswith(said("one"))
    assert error_in(reply.body[len(said("one")) :])["code"] == "upstream_aborted"
    assert (reply.whole, three.asked) == (False, {"a": 1})
    assert (await three.record()).outcome is Outcome.UPSTREAM_TRUNCATED


@pytest.mark.parametrize("error", [CHAT_ERROR, MESSAGES_ERROR, RESPONSES_FAILED])
async def test_an_error_behind_an_event_is_part_of_the_answer(several: Begin, error: bytes) -> None:
    three = await several()
    three.a.plays(STREAM, chunked(said("one"), error), LAST)
    reply = await three.ask(post())
    assert (reply.body, reply.whole) == (said("one") + error, True)
    assert three.asked == {"a": 1}


# How many ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "asked"),
    [
        ("attempts: 1", "a"),
        ("attempts: 2", "ab"),
        ("", "ab"),
        ("attempts: 3", "abc"),
        ("attempts: 9", "abc"),
    ],
)
async def test_as_many_as_attempts_say_in_order_and_nobody_twice(
    several: Begin, route: str, asked: str
) -> None:
    three = await several(route)
    for each in (three.a, three.b, three.c):
        each.plays(refusal(b"500 Oops", f"from {each.name}"))
    reply = await three.ask(post())
    assert (reply.status, error_of(reply)["message"]) == (500, f"from {asked[-1]}")
    assert source_of(reply) == (asked[-1], len(asked))
    assert three.asked == dict.fromkeys(asked, 1)
    record = await three.record()
    assert [name for name, _ in record.attempt_results] == list(asked)
    assert (record.attempts, record.outcome) == (len(asked), Outcome.UPSTREAM_ERROR)
    for name in "abc":
        counted = three.metric("sluice_upstream_attempts_total", upstream=name)
        assert counted == (name in asked)


async def test_candidates_are_tried_in_the_routes_order(several: Begin) -> None:
    three = await several(among="c, a, b")
    for each in (three.a, three.b, three.c):
        each.plays(BUSY)
    await three.ask(post())
    record = await three.record()
    assert [name for name, _ in record.attempt_results] == ["c", "a", "b"]


async def test_a_kept_connection_that_died_is_replaced_within_the_attempt(several: Begin) -> None:
    three = await several()
    three.a.plays(OK)
    assert (await three.ask(post(b"{}"))).status == 200
    three.a.plays_first(Close())
    reply = await three.ask(post(b"{}"))
    assert (reply.status, source_of(reply)) == (200, ("a", 1))
    assert (three.a.connections, three.asked) == (2, {"a": 3})


async def test_its_replacement_may_die_too(several: Begin) -> None:
    three = await several()
    three.a.plays(OK)
    three.b.plays(OK)
    assert (await three.ask(post(b"{}"))).status == 200
    three.a.plays(Close())
    reply = await three.ask(post(b"{}"))
    assert (reply.status, source_of(reply)) == (200, ("b", 2))
    assert three.asked == {"a": 3, "b": 1}


# None left -----------------------------------------------------------------------------------


async def test_the_last_response_is_relayed_as_it_is(several: Begin) -> None:
    three = await several("attempts: 2")
    three.a.plays(BUSY)
    answer = refusal(b"429 Slower", "from b", b"Retry-After: 7", b"X-Own: 1", b"X-Own: 2")
    three.b.plays(answer)
    reply = await three.ask(post())
    assert (reply.status, reply.reason, reply.whole) == (429, b"Slower", True)
    assert answer.endswith(reply.body)
    assert (reply.values("retry-after"), reply.values("x-own")) == ([b"7"], [b"1", b"2"])
    assert source_of(reply) == ("b", 2)


HELD: dict[str, tuple[tuple[Step, ...], bytes]] = {
    "sized": ((BUSY,), BUSY.partition(b"\r\n\r\n")[2]),
    "large": ((json_answer(b"x" * 1_000_000, status=b"503 Busy"),), b"x" * 1_000_000),
    "chunked": (
        (b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n", chunked(b"from", b" a"), LAST),
        b"from a",
    ),
    "until close": ((b"HTTP/1.1 503 Busy\r\n\r\nfrom a", Close()), b"from a"),
}


@pytest.mark.parametrize(("steps", "body"), HELD.values(), ids=HELD)
@pytest.mark.parametrize("then", ["absent", "closed"])
async def test_a_response_is_relayed_though_a_later_candidate_gave_none(
    several: Begin, steps: tuple[Step, ...], body: bytes, then: str
) -> None:
    three = await several("attempts: 2", absent="b" if then == "absent" else "")
    three.a.plays(*steps)
    three.b.plays(Close())
    reply = await three.ask(post())
    assert (reply.status, reply.body, reply.whole) == (503, body, True)
    assert source_of(reply) == ("a", 2)
    record = await three.record()
    assert (record.outcome, record.upstream) == (Outcome.UPSTREAM_ERROR, "a")


@pytest.mark.parametrize(("steps", "body"), HELD.values(), ids=HELD)
async def test_it_may_be_held_for_longer_than_any_silence(
    several: Begin, steps: tuple[Step, ...], body: bytes
) -> None:
    """While it waits for another's answer, nobody waits for it."""
    three = await several("attempts: 2", each="timeouts: {idle: 200ms}")
    three.a.plays(*steps)
    three.b.plays(after(0.7), Close())
    reply = await three.ask(post())
    assert (reply.status, reply.body, reply.whole) == (503, body, True)


async def test_one_that_is_half_there_may_be_held_as_long(several: Begin) -> None:
    """What an upstream sends while nobody reads from it is no silence of its own."""
    three = await several("attempts: 2", each="timeouts: {idle: 300ms}")
    head = json_answer(b"12345678", status=b"503 Busy")
    three.a.plays(head[:-4], after(0.1), head[-4:])
    three.b.plays(after(0.8), Close())
    reply = await three.ask(post())
    assert (reply.status, reply.body, reply.whole) == (503, b"12345678", True)


@pytest.mark.parametrize("where", ["last", "held"])
async def test_a_stream_that_begins_with_an_error_is_a_response_too(
    several: Begin, where: str
) -> None:
    three = await several("attempts: 2", absent="b" if where == "held" else "")
    theirs = three.a if where == "held" else three.b
    stream = b": first\n\n" + CHAT_ERROR + said("and more") + DONE
    three.a.plays(Close())
    theirs.plays(STREAM, chunked(stream), LAST)
    reply = await three.ask(post())
    assert (reply.status, reply.body, reply.whole) == (200, stream, True)
    assert source_of(reply) == (theirs.name, 2)
    assert (await three.record()).outcome is Outcome.UPSTREAM_ERROR


async def test_without_any_response_the_last_failure_is_told(several: Begin) -> None:
    three = await several("attempts: 2", absent="a")
    three.b.plays(Close())
    reply = await three.ask(post())
    assert (reply.status, error_of(reply)["code"]) == (502, "upstream_aborted")
    record = await three.record()
    assert (record.outcome, record.attempts) == (Outcome.UPSTREAM_ERROR, 2)


async def test_nobody_is_there_at_all(several: Begin) -> None:
    three = await several(absent="abc")
    reply = await three.ask(post())
    assert (reply.status, error_of(reply)["code"]) == (502, "upstream_unreachable")
    assert (await three.record()).attempts == 3


@pytest.mark.parametrize(
    ("a", "b"),
    [((REFUSED,), (REFUSED,)), ((BUSY,), (REFUSED,)), ((REFUSED,), (Close(),))],
    ids=["only", "last", "last response"],
)
async def test_a_refusal_of_our_key_is_never_shown(
    several: Begin, a: tuple[Step, ...], b: tuple[Step, ...]
) -> None:
    three = await several("attempts: 2", each=f"api_key: {UPSTREAM_KEY}")
    three.a.plays(*a)
    three.b.plays(*b)
    reply = await three.ask(post())
    assert (reply.status, error_of(reply)["code"]) == (502, "upstream_auth")
    assert UPSTREAM_KEY.encode() not in reply.body
    assert three.asked == {"a": 1, "b": 1}


async def test_a_refusal_of_our_key_makes_way_for_a_later_response(several: Begin) -> None:
    three = await several("attempts: 2", each=f"api_key: {UPSTREAM_KEY}")
    three.a.plays(REFUSED)
    three.b.plays(BUSY)
    reply = await three.ask(post())
    assert (reply.status, error_of(reply)["message"]) == (503, NAMED)


RESPONSES: dict[str, tuple[Step, ...]] = {
    "an answer": (OK,),
    "a stream": (STREAM, chunked(said("x"), DONE), LAST),
    "400": (json_answer(b"{}", status=b"400 Bad"),),
    "401": (REFUSED,),
    "429": (json_answer(b"{}", status=b"429 Slower"),),
    "503": (BUSY,),
    "an error stream": (STREAM, chunked(CHAT_ERROR), LAST),
    "closed": (Close(),),
    "no HTTP": (b"SSH-2.0\r\n", Close()),
}
ANSWERS = {"an answer": 200, "a stream": 200, "400": 400}
HELD_BACK = {"429": 429, "503": 503, "an error stream": 200}
FAILED = {"401": "upstream_auth", "closed": "upstream_aborted", "no HTTP": "upstream_invalid"}


def foretold(kinds: Sequence[str], attempts: int) -> tuple[int, str | None, int, Outcome]:
    """What becomes of a request by interface §3: status, whose answer it is or which error, the
    number of attempts, outcome."""
    last: tuple[int, str] | None = None
    failure, asked = "", 0
    for name, kind in zip("abc"[:attempts], kinds, strict=False):
        asked += 1
        if kind in ANSWERS:
            return ANSWERS[kind], name, asked, Outcome.COMPLETED
        if kind == "no HTTP":
            return 502, FAILED[kind], asked, Outcome.UPSTREAM_ERROR
        if kind in HELD_BACK:
            last, failure = (HELD_BACK[kind], name), ""
        elif kind == "401":
            last, failure = None, FAILED[kind]
        elif last is None and failure != "upstream_auth":
            failure = FAILED[kind]
    if last is not None:
        return *last, asked, Outcome.UPSTREAM_ERROR
    return 502, failure, asked, Outcome.UPSTREAM_ERROR


OF_EACH_SORT = ("an answer", "401", "429", "an error stream", "closed", "no HTTP")


@pytest.mark.parametrize(("attempts", "among"), [(2, tuple(RESPONSES)), (3, OF_EACH_SORT)])
async def test_every_combination(several: Begin, attempts: int, among: tuple[str, ...]) -> None:
    three = await several(
        f"attempts: {attempts}", each=f"api_key: {UPSTREAM_KEY}, circuit: {{failures: 100000}}"
    )
    for count, kinds in enumerate(product(among, repeat=attempts), 1):
        for each, kind in zip((three.a, three.b, three.c), kinds, strict=False):
            each.plays(*RESPONSES[kind])
            each.requests.clear()
        reply = await three.ask(post())
        status, whose, asked, outcome = foretold(kinds, attempts)
        record = await three.record(count)
        assert (reply.status, record.attempts, record.outcome) == (status, asked, outcome), kinds
        assert reply.whole, kinds
        if status == 502:
            assert error_of(reply)["code"] == whose, kinds
        else:
            assert source_of(reply) == (whose, asked), kinds
        assert all(1 <= each.asked <= 2 for each in (three.a, three.b, three.c)[:asked]), kinds
        assert sum(three.asked.values()) <= asked + kinds.count("closed"), kinds  # redone at most


# The first event -----------------------------------------------------------------------------


async def test_the_head_waits_for_the_first_event(several: Begin) -> None:
    three = await several()
    gate, more = asyncio.Event(), asyncio.Event()
    three.a.plays(
        STREAM, chunked(b": hi\n\n"), Until(gate), stream_of("a"), Until(more), stream_of("a"), LAST
    )
    client = await begin(three, three.a, post())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.reader.read(1), 0.2)
    gate.set()
    await client.until(text_of("a"))  # which come at once, before there is more
    more.set()
    reply = await client.reply()
    assert (reply.body, reply.whole) == (b": hi\n\n" + text_of("a") * 2, True)
    assert (source_of(reply), three.asked) == (("a", 1), {"a": 1})


@pytest.mark.parametrize("where", ["one attempt", "one candidate", "the last"])
async def test_the_head_goes_out_at_once_if_no_attempt_is_left(several: Begin, where: str) -> None:
    gate = asyncio.Event()
    three = await several(
        "attempts: 1" if where == "one attempt" else "attempts: 3",
        among={"one candidate": "b", "the last": "a, b"}.get(where, "b, c"),
    )
    three.a.plays(BUSY)
    three.b.plays(STREAM, Until(gate), chunked(CHAT_ERROR), LAST)
    client = await three.connect()
    await client.send(post())
    await client.until(b"\r\n\r\n")
    gate.set()
    reply = await client.reply()
    assert (reply.body, reply.whole) == (CHAT_ERROR, True)
    assert source_of(reply) == ("b", 2 if where == "the last" else 1)


UNREAD = {
    "compressed": STREAM.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n"),
    "not SSE": STREAM.replace(b"text/event-stream", b"application/json"),
    "without a type": STREAM.replace(b"Content-Type: text/event-stream\r\n", b""),
    "a 400": STREAM.replace(b"200 OK", b"400 Bad"),
}


@pytest.mark.parametrize("head", UNREAD.values(), ids=UNREAD)
async def test_what_is_not_a_readable_stream_is_not_looked_at(several: Begin, head: bytes) -> None:
    three = await several()
    gate = asyncio.Event()
    three.a.plays(head, Until(gate), chunked(CHAT_ERROR), LAST)
    client = await three.connect()
    await client.send(post())
    await client.until(b"\r\n\r\n")
    gate.set()
    reply = await client.reply()
    assert (reply.body, reply.whole) == (CHAT_ERROR, True)
    assert three.asked == {"a": 1}


@pytest.mark.parametrize(
    "stream",
    [
        said("x" * 300_000) + DONE,
        said("a") + said("x" * 500) * 5_000 + DONE,
        b": " + b"x" * 300_000 + b"\n\n" + said("a") + DONE,
        b"\xef\xbb\xbf\r\n\r\n" + said("a").replace(b"\n", b"\r\n"),
        b"data: not JSON\n\n",
        b'data: {"error":null,"choices":[]}\n\n' + DONE,
        b"data: no end of this event",
        b"",
    ],
    ids=[
        "long",
        "much behind it",
        "a long comment",
        "CRLF",
        "no JSON",
        "no error",
        "no event",
        "empty",
    ],
)
async def test_whatever_was_held_comes_to_the_byte(several: Begin, stream: bytes) -> None:
    three = await several()
    three.a.plays(STREAM, chunked(*filter(None, [stream[:7], stream[7:]])), LAST)
    reply = await three.ask(post())
    assert (reply.body, reply.whole) == (stream, True)
    assert three.asked == {"a": 1}


@pytest.mark.parametrize("together", [True, False])
async def test_usage_that_only_we_asked_for_is_not_in_it(several: Begin, together: bool) -> None:
    three = await several(settings=f"limits: {{tokens: {MANY}}}")
    events = [said("from a"), USAGE, DONE]
    three.a.plays(STREAM, chunked(*([b"".join(events)] if together else events)), LAST)
    reply = await three.ask(post())
    assert (reply.body, reply.whole) == (said("from a") + DONE, True)
    record = await three.record()
    assert (record.tokens_in, record.tokens_out, record.tokens_source) == (7, 13, "upstream")


# What it costs -------------------------------------------------------------------------------


async def test_one_request_and_one_slot_whatever_the_attempts(several: Begin) -> None:
    three = await several(settings=f"limits: {{requests: 9/hour, tokens: {MANY}, streams: 1}}")
    three.a.plays(BUSY)
    three.b.plays(Close())
    three.c.plays(STREAM, chunked(said("from c"), DONE), LAST)
    body = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"12345678"}]}'
    for left in (b"8", b"7"):
        reply = await three.ask(post(body))
        assert (reply.status, source_of(reply)) == (200, ("c", 3))
        assert reply.values("x-ratelimit-remaining-requests") == [left]
        await three.settled()
    three.c.plays(json_answer(b'{"usage":' + USED + b"}"))
    reply = await three.ask(post(b'{"input":"x"}', path="/v1/embeddings"))
    # A prompt of two tokens and an estimated completion of two, twice; and this one's own prompt.
    assert reply.values("x-ratelimit-remaining-tokens") == [b"%d" % (1_000_000 - 2 * 4 - 1)]


@pytest.mark.parametrize("status", [b"429 Slow", b"503 Busy"])
async def test_who_gets_no_answer_gets_its_tokens_back(several: Begin, status: bytes) -> None:
    three = await several("attempts: 2", settings=f"limits: {{tokens: {MANY}}}")
    three.a.plays(STREAM, chunked(CHAT_ERROR), LAST)
    three.b.plays(refusal(status, "no"))
    assert (await three.ask(post(b'{"max_tokens":500}'))).status == int(status[:3])
    await three.settled()
    three.b.plays(OK)
    reply = await three.ask(post(b'{"input":"x"}', path="/v1/embeddings"))
    assert reply.values("x-ratelimit-remaining-tokens") == [b"999999"]


async def test_requests_are_refused_or_have_an_outcome(several: Begin) -> None:
    three = await several("attempts: 2", settings="limits: {requests: 3/hour}")
    three.a.plays(refusal(b"500 Oops", NAMED))
    three.b.plays(STREAM, stream_of("b"), LAST)
    for _ in range(5):
        await three.ask(post())
    assert three.metric("sluice_requests_total") == 5
    assert three.metric("sluice_requests_total", code="429") == 2
    assert three.metric("sluice_outcomes_total", outcome="completed") == 3
    assert three.metric("sluice_outcomes_total") == 3
    assert three.metric("sluice_upstream_attempts_total") == 6


# Leaving amid the attempts -------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(UntilGone(),), (STREAM, chunked(b":\n"), UntilGone())])
async def test_nobody_is_asked_for_a_client_that_has_left(
    several: Begin, steps: tuple[Step, ...]
) -> None:
    three = await several()
    three.a.plays(BUSY)
    three.b.plays(*steps)
    client = await begin(three, three.b, post())
    client.abort()
    await three.b.is_left()
    record = await three.record()
    assert (record.outcome, three.asked) == (Outcome.CLIENT_GONE, {"a": 1, "b": 1})


# Circuits ------------------------------------------------------------------------------------

FAILURES: dict[str, tuple[tuple[Step, ...], str]] = {
    "500": ((refusal(b"500 Oops", NAMED),), ""),
    "401": ((REFUSED,), ""),
    "closed": ((Close(),), ""),
    "no HTTP": ((b"SSH-2.0\r\n", UntilGone()), ""),
    "an error stream": ((STREAM, chunked(CHAT_ERROR), LAST), ""),
    "a cut stream": ((STREAM, chunked(said("x")), Close()), ""),
    "a cut body": ((OK[:-3], Close()), ""),
    "first_byte": ((UntilGone(),), "first_byte: 100ms"),
    "idle": ((STREAM, chunked(said("x")), UntilGone()), "idle: 100ms"),
    "stall": ((STREAM, chunked(said("x")), UntilGone()), "stall: 100ms"),
}


async def say(three: Several, times: int = 1) -> None:
    """Asks one after another, each to its very end."""
    for _ in range(times):
        await three.ask(post())
        await three.settled()


@pytest.mark.parametrize(("steps", "timeouts"), FAILURES.values(), ids=FAILURES)
async def test_failures_in_a_row_take_an_upstream_out(
    several: Begin, steps: tuple[Step, ...], timeouts: str
) -> None:
    three = await several(
        each="circuit: {failures: 2, rest: 1h}", a=f"{key('a')}, timeouts: {{{timeouts}}}"
    )
    three.a.plays(*steps)
    three.b.plays(OK)
    await say(three)
    assert three.up == {"a": 1, "b": 1, "c": 1}
    await say(three)
    assert three.up == {"a": 0, "b": 1, "c": 1}
    reply = await three.ask(post())
    assert (reply.status, source_of(reply), three.a.asked) == (200, ("b", 1), 2)


async def test_who_refuses_connections_is_taken_out(several: Begin) -> None:
    three = await several(each="circuit: {failures: 2, rest: 1h}", absent="a")
    three.b.plays(OK)
    await say(three, 2)
    assert three.up["a"] == 0
    assert source_of(await three.ask(post())) == ("b", 1)


NEITHER: dict[str, tuple[Step, ...]] = {
    "429": (refusal(b"429 Slower", NAMED),),
    "total": (UntilGone(),),
    "total, amid the stream": (STREAM, chunked(said("x")), UntilGone()),
}


@pytest.mark.parametrize("steps", NEITHER.values(), ids=NEITHER)
async def test_what_counts_neither_way(several: Begin, steps: tuple[Step, ...]) -> None:
    """Neither as a failure nor as the end of a row of them."""
    three = await several(each="circuit: {failures: 3, rest: 1h}", a="timeouts: {total: 200ms}")
    three.b.plays(OK)
    three.a.plays(*steps)
    await say(three, 4)
    assert three.up["a"] == 1
    three.a.plays(Close())
    await say(three, 2)
    three.a.plays(*steps)
    await say(three)
    assert three.up["a"] == 1
    three.a.plays(Close())
    await say(three)
    assert three.up["a"] == 0


@pytest.mark.parametrize(
    "steps", [(OK,), (json_answer(b"{}", status=b"404 None"),), (STREAM, stream_of("a"), LAST)]
)
async def test_an_answer_ends_the_row(several: Begin, steps: tuple[Step, ...]) -> None:
    three = await several(each="circuit: {failures: 2, rest: 1h}")
    three.b.plays(OK)
    for _ in range(3):
        three.a.plays(Close())
        await say(three)
        three.a.plays(*steps)
        await say(three)
    assert three.up["a"] == 1


@pytest.mark.parametrize("steps", [(UntilGone(),), (STREAM, chunked(said("x")), UntilGone())])
async def test_a_client_that_leaves_blames_nobody(several: Begin, steps: tuple[Step, ...]) -> None:
    three = await several(each="circuit: {failures: 1, rest: 1h}")
    three.a.plays(*steps)
    for _ in range(2):
        client = await begin(three, three.a, post())
        if len(steps) > 1:
            await client.until(said("x"))
        client.abort()
        await three.settled()
    assert three.up["a"] == 1


async def test_a_probe_brings_it_back(several: Begin) -> None:
    three = await several(each="circuit: {failures: 1, rest: 300ms}")
    gate = asyncio.Event()
    three.a.plays(BUSY)
    three.b.plays(OK)
    await say(three)
    opened = time.monotonic()
    await say(three)
    if time.monotonic() - opened < 0.3:
        assert three.a.asked == 1
    await asyncio.sleep(0.35)
    three.a.plays(Until(gate), OK)
    probe = await begin(three, three.a, post())
    assert source_of(await three.ask(post())) == ("b", 1)  # one at a time
    assert three.up["a"] == 0
    gate.set()
    assert source_of(await probe.reply()) == ("a", 1)
    await three.settled()
    assert three.up["a"] == 1
    assert source_of(await three.ask(post())) == ("a", 1)


async def test_of_a_crowd_one_probes(several: Begin) -> None:
    three = await several(each="circuit: {failures: 1, rest: 100ms}")
    gate = asyncio.Event()
    three.a.plays(BUSY)
    three.b.plays(OK)
    await say(three)
    await asyncio.sleep(0.15)
    three.a.plays(Until(gate), BUSY)
    crowd = [asyncio.create_task(three.ask(post())) for _ in range(10)]
    async with asyncio.timeout(PATIENCE):
        while len(three.ended) < 10:  # the first request, and nine of these
            await asyncio.sleep(0.001)
    assert three.a.asked == 2
    gate.set()
    replies = await asyncio.gather(*crowd)
    assert [reply.status for reply in replies] == [200] * 10
    assert sorted(source_of(reply) for reply in replies) == [("b", 1)] * 9 + [("b", 2)]


async def test_a_failed_probe_lets_it_rest_anew(several: Begin) -> None:
    three = await several(each="circuit: {failures: 3, rest: 300ms}")
    three.a.plays(BUSY)
    three.b.plays(OK)
    await say(three, 3)
    await asyncio.sleep(0.35)
    reply = await three.ask(post())  # its client does not notice
    assert (reply.status, source_of(reply)) == (200, ("b", 2))
    await three.settled()
    assert (three.up["a"], three.a.asked) == (0, 4)


async def test_a_probe_that_says_nothing_is_followed_by_another(several: Begin) -> None:
    three = await several(each="circuit: {failures: 1, rest: 200ms}")
    three.a.plays(BUSY)
    three.b.plays(OK)
    await say(three)
    await asyncio.sleep(0.25)
    three.a.plays(UntilGone())
    client = await begin(three, three.a, post())
    client.abort()
    await three.settled()
    three.a.plays(OK)
    await asyncio.sleep(0.25)
    assert source_of(await three.ask(post())) == ("a", 1)


async def test_the_only_one_is_never_taken_out(several: Begin) -> None:
    three = await several(among="a", each="circuit: {failures: 1, rest: 1h}")
    three.a.plays(BUSY)
    for count in range(1, 4):
        reply = await three.ask(post())
        assert (reply.status, three.a.asked) == (503, count)
        await three.settled()


async def test_the_last_in_rotation_is_never_taken_out(several: Begin) -> None:
    three = await several(each="circuit: {failures: 1, rest: 1h}")
    for each in (three.a, three.b, three.c):
        each.plays(BUSY)
    await say(three, 4)
    assert (three.up["a"], three.up["b"]) == (0, 0)
    assert three.asked == {"a": 1, "b": 1, "c": 4}


async def test_each_route_has_its_last(several: Begin) -> None:
    three = await several(
        each="circuit: {failures: 1, rest: 1h}",
        routes="[{models: [two], upstreams: [a, b]}, {models: [one], upstreams: [a]}]",
    )
    three.a.plays(BUSY)
    three.b.plays(OK)
    await three.ask(post(b'{"model":"two"}'))
    await three.settled()
    three.a.plays(OK)
    reply = await three.ask(post(b'{"model":"one"}'))
    assert (reply.status, source_of(reply)) == (200, ("a", 1))


# Full ----------------------------------------------------------------------------------------


async def completes(three: Several, client: Client, gate: asyncio.Event) -> None:
    gate.set()
    assert (await client.reply()).whole


async def leaves(three: Several, client: Client, gate: asyncio.Event) -> None:
    client.abort()


async def is_killed(three: Several, client: Client, gate: asyncio.Event) -> None:
    (exchange,) = three.app.observer.in_flight.values()
    exchange.interrupt(ProxyError("killed", "An operator has ended this request."))
    await client.rest()


End = Callable[[Several, Client, asyncio.Event], Awaitable[None]]


@pytest.mark.parametrize("end", [completes, leaves, is_killed])
@pytest.mark.parametrize("phase", ["before its head", "amid the stream"])
async def test_a_full_upstream_is_not_asked(several: Begin, end: End, phase: str) -> None:
    three = await several(a="max_streams: 1")
    gate = asyncio.Event()
    begun = (STREAM, chunked(said("x"))) if phase == "amid the stream" else ()
    rest = (stream_of("a"),) if begun else (STREAM, stream_of("a"))
    three.a.plays(*begun, Until(gate), *rest, LAST)
    three.b.plays(OK)
    client = await begin(three, three.a, post())
    if begun:
        await client.until(said("x"))
    reply = await three.ask(post())
    assert (reply.status, source_of(reply), three.a.asked) == (200, ("b", 1), 1)
    await end(three, client, gate)
    gate.set()
    await three.settled()
    three.a.plays(OK)
    assert source_of(await three.ask(post())) == ("a", 1)


async def test_a_crowd_fills_one_and_then_the_next(several: Begin) -> None:
    three = await several(a="max_streams: 3", b="max_streams: 4")
    gate = asyncio.Event()
    for each in (three.a, three.b, three.c):
        each.plays(Until(gate), STREAM, stream_of(each.name), LAST)
    crowd = [asyncio.create_task(three.ask(post())) for _ in range(9)]
    async with asyncio.timeout(PATIENCE):
        while sum(three.asked.values()) < 9:
            await asyncio.sleep(0.001)
    assert three.asked == {"a": 3, "b": 4, "c": 2}
    gate.set()
    for reply in await asyncio.gather(*crowd):
        name, attempts = source_of(reply)
        assert (reply.body, attempts) == (text_of(name), 1)


@pytest.mark.parametrize("steps", [(BUSY,), (Close(),), (STREAM, chunked(CHAT_ERROR), LAST)])
async def test_a_failed_attempt_takes_up_no_place_behind_it(
    several: Begin, steps: tuple[Step, ...]
) -> None:
    three = await several(a="max_streams: 1")
    gate = asyncio.Event()
    three.a.plays(*steps)
    three.b.plays(Until(gate), OK)
    first = await begin(three, three.b, post())
    gate.set()
    await first.reply()
    await three.settled()
    await three.ask(post())
    assert three.a.asked == 2


async def test_a_failed_attempt_takes_up_no_place_while_others_are_asked(several: Begin) -> None:
    """Its response is kept, but nothing is in progress there."""
    three = await several("attempts: 2", a="max_streams: 1")
    gate = asyncio.Event()
    three.a.plays(BUSY)
    three.b.plays(Until(gate), OK)
    first = await begin(three, three.b, post())
    second = await begin(three, three.b, post())
    assert three.a.asked == 2
    gate.set()
    for client in first, second:
        assert source_of(await client.reply()) == ("b", 2)


async def test_all_are_full(several: Begin) -> None:
    three = await several(each="max_streams: 1", among="a, b")
    gate = asyncio.Event()
    for each in (three.a, three.b):
        each.plays(STREAM, chunked(said("x")), Until(gate), DONE, LAST)
    clients = [await begin(three, three.a, post()), await begin(three, three.b, post())]
    reply = await three.ask(post())
    error = error_of(reply)
    assert (reply.status, error["type"], error["code"]) == (
        503,
        "overloaded_error",
        "no_upstream_available",
    )
    assert int(reply.values("retry-after")[0]) >= 1
    assert three.asked == {"a": 1, "b": 1}
    record = await three.record()
    assert (record.outcome, record.attempts, record.status) == (None, 0, 503)
    for client in clients:
        client.abort()
    gate.set()


async def test_who_finds_nobody_pays_nothing(several: Begin) -> None:
    three = await several(
        each="max_streams: 1", among="a", settings=f"limits: {{tokens: {MANY}, streams: 2}}"
    )
    three.a.plays(STREAM, chunked(said("x")), UntilGone())
    client = await begin(three, three.a, post())
    for _ in range(3):
        assert (await three.ask(post(b'{"max_tokens":500}'))).status == 503
    client.abort()
    await three.settled()
    three.a.plays(OK)
    reply = await three.ask(post(b'{"input":"x"}', path="/v1/embeddings"))
    # What is missing is the first one's prompt and its one estimated token, and this one's own.
    left = int(reply.values("x-ratelimit-remaining-tokens")[0])
    assert 999_990 < left < 1_000_000


# Rests ---------------------------------------------------------------------------------------


def slow_down(*fields: bytes) -> bytes:
    return refusal(b"429 Slow down", NAMED, *fields)


@pytest.mark.parametrize(
    "fields",
    [
        (b"Retry-After: 20",),
        (b"retry-after-ms: 20000",),
        (b"Retry-After: " + formatdate(time.time() + 3600, usegmt=True).encode(),),
    ],
    ids=["seconds", "milliseconds", "date"],
)
async def test_a_429_lets_its_upstream_rest(several: Begin, fields: tuple[bytes, ...]) -> None:
    three = await several()
    three.a.plays(slow_down(*fields))
    three.b.plays(OK)
    assert source_of(await three.ask(post())) == ("b", 2)
    for _ in range(2):
        assert source_of(await three.ask(post())) == ("b", 1)
    assert three.a.asked == 1
    assert three.up["a"] == 1  # it is well, and busy


@pytest.mark.parametrize("field", [b"Retry-After: 1", b"retry-after-ms: 300"])
async def test_it_comes_back_when_it_said(several: Begin, field: bytes) -> None:
    three = await several()
    three.a.plays(slow_down(field))
    three.b.plays(OK)
    await three.ask(post())
    three.a.plays(OK)
    await asyncio.sleep(1.1 if b": 1" in field else 0.4)
    assert source_of(await three.ask(post())) == ("a", 1)


@pytest.mark.parametrize(
    "fields",
    [
        (),
        (b"Retry-After: soon",),
        (b"Retry-After: -5",),
        (b"Retry-After: 0",),
        (b"Retry-After: " + formatdate(0, usegmt=True).encode(),),
        (b"Retry-After: Fri, 31 Dec 99999999999999999999 23:59:59 GMT",),
    ],
    ids=["none", "a word", "negative", "nothing", "a past date", "no year of ours"],
)
async def test_without_a_time_there_is_no_rest(several: Begin, fields: tuple[bytes, ...]) -> None:
    three = await several()
    three.a.plays(slow_down(*fields))
    three.b.plays(OK)
    for _ in range(2):
        assert source_of(await three.ask(post())) == ("b", 2)


async def test_a_429_that_is_relayed_lets_it_rest_as_well(several: Begin) -> None:
    three = await several("attempts: 1")
    three.a.plays(slow_down(b"Retry-After: 20"))
    three.b.plays(OK)
    assert (await three.ask(post())).status == 429
    assert source_of(await three.ask(post())) == ("b", 1)


async def test_the_only_candidate_does_not_rest(several: Begin) -> None:
    three = await several(among="a")
    three.a.plays(slow_down(b"Retry-After: 60"))
    for _ in range(2):
        reply = await three.ask(post())
        assert (reply.status, reply.values("retry-after")) == (429, [b"60"])
    assert three.a.asked == 2


async def test_the_only_candidate_of_another_route_is_asked_all_the_same(several: Begin) -> None:
    three = await several(
        routes="[{models: [two], upstreams: [a, b]}, {models: [one], upstreams: [a]}]"
    )
    three.a.plays(slow_down(b"Retry-After: 60"))
    three.b.plays(OK)
    await three.ask(post(b'{"model":"two"}'))
    three.a.plays(OK)
    assert source_of(await three.ask(post(b'{"model":"one"}'))) == ("a", 1)
    assert source_of(await three.ask(post(b'{"model":"two"}'))) == ("b", 1)


@pytest.mark.parametrize(
    ("rests", "least", "most", "should_retry"),
    [((20, 40), 15, 20, []), ((90, 70), 65, 70, [b"false"])],
)
async def test_all_rest(
    several: Begin, rests: tuple[int, int], least: int, most: int, should_retry: list[bytes]
) -> None:
    three = await several(among="a, b", settings="limits: {requests: 9/hour}")
    for each, seconds in zip((three.a, three.b), rests, strict=True):
        each.plays(slow_down(b"Retry-After: %d" % seconds))
    assert (await three.ask(post())).status == 429
    reply = await three.ask(post())
    assert (reply.status, error_of(reply)["code"]) == (503, "no_upstream_available")
    assert least <= int(reply.values("retry-after")[0]) <= most  # when the first one is back
    assert reply.values("x-should-retry") == should_retry
    assert reply.values("x-ratelimit-remaining-requests") == [b"7"]
    assert three.asked == {"a": 1, "b": 1}
    record = await three.record(2)
    assert (record.outcome, record.attempts) == (None, 0)
    assert three.metric("sluice_requests_total") == 2
    assert three.metric("sluice_outcomes_total") == 1


async def test_one_rests_and_the_other_is_full(several: Begin) -> None:
    three = await several(among="a, b", b="max_streams: 1")
    three.a.plays(slow_down(b"Retry-After: 20"))
    three.b.plays(STREAM, chunked(said("x")), UntilGone())
    client = await begin(three, three.b, post())
    reply = await three.ask(post())
    assert (reply.status, error_of(reply)["code"]) == (503, "no_upstream_available")
    client.abort()


async def test_the_access_line_and_the_record_agree(
    several: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    three = await several()
    three.a.plays(BUSY)
    three.b.plays(OK)
    await three.ask(post())
    await three.settled()
    (line,) = [record for record in caplog.records if record.msg == "request"]
    fields = vars(line)["fields"]
    assert (fields["upstream"], fields["attempts"], fields["outcome"]) == ("b", 2, "completed")
    assert json.dumps(fields)
