"""What a client sees while its upstream thinks: real statuses, early heads, heartbeats, and clocks."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from proxy.errors import ProxyError
from proxy.exchange import Outcome
from tests.canaries import UPSTREAM_KEY
from tests.flow.several import (
    DONE,
    USED,
    Begin,
    Several,
    after,
    error_in,
    error_of,
    paced,
    refusal,
    said,
    several_upstreams,  # noqa: F401  # the fixture `several`
    source_of,
    stream_of,
    text_of,
)
from tests.flow.wire import (
    LAST,
    STREAM,
    Client,
    Close,
    Reply,
    Step,
    Until,
    UntilGone,
    chunked,
    json_answer,
    post,
)

BEAT = b":\n"
EARLY = "attempts: 3, commit_after: 50ms, heartbeat: 20ms"
ASKING = post(b'{"model":"m","stream":true}')
OK = json_answer(b'{"choices":[]}')
COMPRESSED = STREAM.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")


def without_beats(body: bytes | bytearray) -> bytes:
    """What is behind the heartbeats at the beginning."""
    while body.startswith(BEAT):
        body = body[len(BEAT) :]
    return bytes(body)


async def early(three: Several, request: bytes = ASKING, beats: int = 2) -> Client:
    """A client that has got a head, and so many heartbeats, before there is an answer."""
    client = await three.connect()
    await client.send(request)
    await client.until(b"\r\n\r\n" + chunked(BEAT) * beats)
    return client


# The head ------------------------------------------------------------------------------------


async def test_a_real_status_that_comes_in_time_is_the_clients(several: Begin) -> None:
    three = await several("attempts: 1, commit_after: 20s, heartbeat: 50ms")
    three.a.plays(after(0.3), refusal(b"400 Bad", "too long"))
    client = await three.connect()
    await client.send(ASKING)
    first = await client.reader.read(12)
    assert first == b"HTTP/1.1 400"  # and no heartbeat before it
    client.seen += first
    assert error_of(await client.reply())["message"] == "too long"


async def test_the_head_goes_out_when_nothing_has_come_for_too_long(several: Begin) -> None:
    three = await several(EARLY, settings="limits: {requests: 9/hour}\ncors: {origins: ['*']}")
    gate = asyncio.Event()
    three.a.plays(Until(gate), STREAM, stream_of("a"), LAST)
    client = await early(three, post(b'{"stream":true}', "Origin: https://x", "X-Request-Id: mine"))
    gate.set()
    reply = await client.reply()
    assert (reply.status, reply.reason, reply.whole) == (200, b"OK", True)
    assert without_beats(reply.body) == text_of("a")
    assert source_of(reply) == ("a", 1)
    for name, value in {
        "content-type": b"text/event-stream",
        "cache-control": b"no-cache, no-transform",
        "x-accel-buffering": b"no",
        "transfer-encoding": b"chunked",
        "sluice-request-id": b"mine",
        "x-ratelimit-remaining-requests": b"8",
        "access-control-allow-origin": b"*",
    }.items():
        assert reply.values(name) == [value], name
    assert not reply.values("content-length")
    record = await three.record()
    assert (record.outcome, record.status) == (Outcome.COMPLETED, 200)
    assert record.bytes_down == len(text_of("a"))


async def test_once_the_head_is_out_nobody_waits_for_it(several: Begin) -> None:
    three = await several(EARLY.replace("heartbeat: 20ms", "heartbeat: 0"))
    three.a.plays(STREAM, chunked(said("one")), after(0.2), chunked(said("two")), LAST)
    reply = await three.ask(ASKING)
    assert (reply.body, reply.whole) == (said("one") + said("two"), True)


@pytest.mark.parametrize("body", [b'{"model":"m"}', b'{"stream":false}', b'{"stream":1}', b"[]"])
async def test_who_asks_for_no_stream_waits_for_the_status(several: Begin, body: bytes) -> None:
    three = await several("attempts: 1, commit_after: 50ms, heartbeat: 50ms")
    three.a.plays(after(0.3), refusal(b"503 Busy", "no"))
    reply = await three.ask(post(body))
    assert (reply.status, error_of(reply)["message"]) == (503, "no")


async def test_an_old_client_gets_an_early_head_too(several: Begin) -> None:
    three = await several(EARLY)
    gate = asyncio.Event()
    three.a.plays(Until(gate), STREAM, stream_of("a"), LAST)
    client = await three.connect()
    await client.send(ASKING.replace(b"HTTP/1.1", b"HTTP/1.0"))
    await client.until(b"\r\n\r\n" + BEAT)
    gate.set()
    head, _, body = (await client.rest()).partition(b"\r\n\r\n")
    assert without_beats(body) == text_of("a")
    assert b"chunked" not in head


# Behind an early head ------------------------------------------------------------------------

NO_ANSWER: dict[str, tuple[Step, ...]] = {
    "closed": (Close(),),
    "429": (refusal(b"429 Slower", "from a"),),
    "503": (refusal(b"503 Busy", "from a"),),
    "an error stream": (STREAM, chunked(b'data: {"error":{"message":"from a"}}\n\n'), LAST),
    "a stream that dies": (STREAM, chunked(b": from a\n\n"), Close()),
}


@pytest.mark.parametrize("steps", NO_ANSWER.values(), ids=NO_ANSWER)
async def test_the_next_may_still_be_tried(several: Begin, steps: tuple[Step, ...]) -> None:
    three = await several(EARLY)
    gate = asyncio.Event()
    three.a.plays(Until(gate), *steps)
    three.b.plays(STREAM, stream_of("b"), LAST)
    client = await early(three)
    gate.set()
    reply = await client.reply()
    assert (without_beats(reply.body), reply.whole) == (text_of("b"), True)
    assert source_of(reply) == ("a", 1)  # who was being asked then
    assert three.asked == {"a": 1, "b": 1}
    record = await three.record()
    assert (record.upstream, record.attempts, record.outcome) == ("b", 2, Outcome.COMPLETED)


async def test_a_head_that_is_held_is_not_held_longer(several: Begin) -> None:
    """The upstream's own comments are not relayed before its first event: it may be an error."""
    three = await several(EARLY)
    gate = asyncio.Event()
    three.a.plays(STREAM, chunked(b": from a\n\n"), Until(gate), chunked(b'data: {"error":1}\n\n'))
    three.b.plays(STREAM, stream_of("b"), LAST)
    client = await early(three)
    gate.set()
    reply = await client.reply()
    assert (without_beats(reply.body), reply.whole) == (text_of("b"), True)
    await three.a.is_left()


async def test_what_was_held_behind_it_comes_to_the_byte(several: Begin) -> None:
    three = await several(EARLY)
    gate = asyncio.Event()
    three.a.plays(STREAM, chunked(b": hi\n\nda"), Until(gate), chunked(b"ta: 1\n\n", DONE), LAST)
    client = await early(three)
    gate.set()
    reply = await client.reply()
    assert without_beats(reply.body) == b": hi\n\ndata: 1\n\n" + DONE
    assert (reply.whole, three.asked) == (True, {"a": 1})


@pytest.mark.parametrize(
    ("steps", "code", "outcome"),
    [
        ((Close(),), "upstream_aborted", Outcome.UPSTREAM_ERROR),
        ((b"SSH-2.0\r\n", UntilGone()), "upstream_invalid", Outcome.UPSTREAM_ERROR),
        ((UntilGone(),), "upstream_timeout", Outcome.FIRST_BYTE_TIMEOUT),
    ],
)
async def test_a_failure_is_an_event_and_a_cut(
    several: Begin, steps: tuple[Step, ...], code: str, outcome: Outcome
) -> None:
    three = await several(
        "attempts: 1, commit_after: 50ms, heartbeat: 20ms", each="timeouts: {first_byte: 1s}"
    )
    gate = asyncio.Event()
    three.a.plays(Until(gate), *steps)
    client = await early(three)
    gate.set()
    reply = await client.reply()
    assert error_in(without_beats(reply.body))["code"] == code
    assert not reply.whole
    record = await three.record()
    assert (record.outcome, record.status, three.asked) == (outcome, 200, {"a": 1})


async def test_a_body_until_close_can_only_be_reset(several: Begin) -> None:
    three = await several("attempts: 1, commit_after: 50ms, heartbeat: 20ms")
    gate = asyncio.Event()
    three.a.plays(Until(gate), Close())
    client = await three.connect()
    await client.send(ASKING.replace(b"HTTP/1.1", b"HTTP/1.0"))
    await client.until(b"\r\n\r\n" + BEAT)
    gate.set()
    with pytest.raises(ConnectionResetError):
        while await client.reader.read(1000):
            pass


@pytest.mark.parametrize(
    ("code", "outcome"), [("shutting_down", Outcome.SHUTDOWN), ("killed", Outcome.KILLED)]
)
async def test_what_ends_it_from_here_is_an_event_too(
    several: Begin, code: str, outcome: Outcome
) -> None:
    three = await several(EARLY)
    three.a.plays(UntilGone())
    client = await early(three)
    (exchange,) = three.app.observer.in_flight.values()
    exchange.interrupt(ProxyError(code, "It ends here."))
    reply = await client.reply()
    assert error_in(without_beats(reply.body))["code"] == code
    assert not reply.whole
    await three.a.is_left()
    assert (await three.record()).outcome is outcome


async def test_a_generation_that_is_no_stream_is_paid_for(several: Begin) -> None:
    """It was made for this client, though nobody can show it any more."""
    three = await several(
        "commit_after: 100ms, heartbeat: 50ms", settings="limits: {tokens: 1000000/87600h}"
    )
    gate = asyncio.Event()
    three.a.plays(Until(gate), json_answer(b'{"choices":[],"usage":%b}' % USED))
    client = await early(three)
    gate.set()
    reply = await client.reply()
    assert (reply.status, reply.whole) == (200, False)
    record = await three.record()
    assert (record.tokens_in, record.tokens_out, record.tokens_source) == (7, 13, "upstream")


@pytest.mark.parametrize("status", [b"400 Bad", b"429 Slower", b"503 Busy"])
async def test_an_error_gives_the_tokens_back(several: Begin, status: bytes) -> None:
    three = await several(
        "attempts: 1, commit_after: 50ms, heartbeat: 20ms",
        settings="limits: {tokens: 1000000/87600h}",
    )
    gate = asyncio.Event()
    three.a.plays(Until(gate), refusal(status, "no"))
    client = await early(three)
    gate.set()
    await client.reply()
    await three.settled()
    three.a.plays(OK)
    reply = await three.ask(post(b'{"input":"x"}', path="/v1/embeddings"))
    assert reply.values("x-ratelimit-remaining-tokens") == [b"999999"]


async def test_a_cut_behind_events_is_one_as_ever(several: Begin) -> None:
    three = await several(EARLY)
    gate = asyncio.Event()
    three.a.plays(Until(gate), STREAM, chunked(said("one")), Close())
    client = await early(three)
    gate.set()
    reply = await client.reply()
    body = without_beats(reply.body)
    assert body.startswith(said("one"))
    assert error_in(body.removeprefix(said("one")))["code"] == "upstream_aborted"
    assert (reply.whole, three.asked) == (False, {"a": 1})


THEIRS = {"message": "too long", "type": "bad", "param": "messages", "code": "context_length"}
ANTHROPICS = {"type": "overloaded_error", "message": "Overloaded"}


def in_messages(body: bytes) -> Any:
    name, data = body.removesuffix(b"\n\n").split(b"\n")
    assert (name, data[:6]) == (b"event: error", b"data: ")
    document = json.loads(data[6:])
    assert document["type"] == "error"
    return document["error"]


def in_responses(body: bytes) -> Any:
    name, data = body.removesuffix(b"\n\n").split(b"\n")
    assert (name, data[:6]) == (b"event: error", b"data: ")
    document = json.loads(data[6:])
    assert (document["type"], document["sequence_number"]) == ("error", 0)
    return {each: document[each] for each in ("code", "message", "param")}


@pytest.mark.parametrize(
    ("path", "theirs", "read", "expected"),
    [
        ("/v1/chat/completions", THEIRS, error_in, THEIRS),
        ("/v1/chat/completions", THEIRS | {"extra": [1]}, error_in, THEIRS | {"extra": [1]}),
        ("/v1/messages", ANTHROPICS, in_messages, ANTHROPICS),
        (
            "/v1/responses",
            THEIRS,
            in_responses,
            {key: THEIRS[key] for key in ("code", "message", "param")},
        ),
    ],
    ids=["chat", "more than ours", "messages", "responses"],
)
@pytest.mark.parametrize("status", [b"400 Bad", b"500 Oops"])
async def test_an_error_response_becomes_an_event_with_its_own_object(
    several: Begin, path: str, theirs: dict, read: Any, expected: dict, status: bytes
) -> None:
    three = await several("attempts: 1, commit_after: 50ms, heartbeat: 20ms")
    gate = asyncio.Event()
    body = json.dumps({"type": "error", "error": theirs}, indent=2).encode()
    three.a.plays(Until(gate), json_answer(body, status=status))
    client = await early(three, post(b'{"stream":true}', path=path))
    gate.set()
    reply = await client.reply()
    assert read(without_beats(reply.body)) == expected
    assert not reply.whole


NO_OBJECT: dict[str, tuple[Step, ...]] = {
    "HTML": (json_answer(b"<html>from a</html>", status=b"502 Bad Gateway"),),
    "no body": (json_answer(b"", status=b"500 Oops"),),
    "an array": (json_answer(b'["from a"]', status=b"500 Oops"),),
    "half of one": (json_answer(b'{"error":{"message":"from a"}}', status=b"500 Oops")[:-9], Close()),
    "a JSON answer": (OK,),
    "a list": (json_answer(b'{"data":[]}'),),
    "a redirect": (json_answer(b"", b"Location: http://x/", status=b"307 There"),),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n",),
    "compressed": (COMPRESSED, chunked(gzip.compress(said("from a"))), LAST),
}  # fmt: skip


@pytest.mark.parametrize("steps", NO_OBJECT.values(), ids=NO_OBJECT)
async def test_what_has_no_error_object_becomes_one_of_ours(
    several: Begin, steps: tuple[Step, ...]
) -> None:
    three = await several("attempts: 1, commit_after: 50ms, heartbeat: 20ms")
    gate = asyncio.Event()
    three.a.plays(Until(gate), *steps)
    client = await early(three)
    gate.set()
    reply = await client.reply()
    error = error_in(without_beats(reply.body))
    assert (error["type"], reply.whole) == ("upstream_error", False)
    assert "from a" not in str(error)


async def test_a_refusal_of_our_key_is_not_shown_there_either(several: Begin) -> None:
    three = await several(
        "attempts: 1, commit_after: 50ms, heartbeat: 20ms", a=f"api_key: {UPSTREAM_KEY}"
    )
    gate = asyncio.Event()
    three.a.plays(Until(gate), refusal(b"401 No", f"bad key {UPSTREAM_KEY}"))
    client = await early(three)
    gate.set()
    reply = await client.reply()
    assert error_in(without_beats(reply.body))["code"] == "upstream_auth"
    assert UPSTREAM_KEY.encode() not in reply.body


async def test_the_last_response_is_the_event_though_nobody_else_was_there(several: Begin) -> None:
    three = await several(EARLY, absent="bc")
    gate = asyncio.Event()
    three.a.plays(Until(gate), refusal(b"503 Busy", "from a"))
    client = await early(three)
    gate.set()
    reply = await client.reply()
    assert error_in(without_beats(reply.body))["message"] == "from a"
    assert (await three.record()).attempts == 3


async def test_a_stream_that_begins_with_an_error_is_the_answer_if_none_is_left(
    several: Begin,
) -> None:
    three = await several("attempts: 1, commit_after: 50ms, heartbeat: 20ms")
    gate = asyncio.Event()
    stream = b'data: {"error":{"message":"theirs"}}\n\n' + DONE
    three.a.plays(Until(gate), STREAM, chunked(stream), LAST)
    client = await early(three)
    gate.set()
    reply = await client.reply()
    assert without_beats(reply.body) == stream


async def test_who_wants_the_connection_closed_behind_it_gets_that(several: Begin) -> None:
    three = await several(EARLY)
    gate = asyncio.Event()
    three.a.plays(Until(gate), STREAM, stream_of("a"), LAST)
    client = await early(three, post(b'{"stream":true}', "Connection: close"))
    gate.set()
    reply = await client.reply()
    assert (without_beats(reply.body), reply.whole) == (text_of("a"), True)
    assert not await client.rest()


async def test_the_next_request_of_the_connection_is_answered_as_ever(several: Begin) -> None:
    three = await several(EARLY)
    gate = asyncio.Event()
    three.a.plays(Until(gate), STREAM, stream_of("a"), LAST)
    client = await early(three)
    gate.set()
    assert (await client.reply()).whole
    three.a.plays(OK)
    await client.send(post(b"{}"))
    reply = await client.reply()
    assert (reply.status, reply.body) == (200, b'{"choices":[]}')


# Heartbeats ----------------------------------------------------------------------------------


async def relayed(three: Several, *steps: Step) -> Reply:
    three.a.plays(*steps)
    return await three.ask(ASKING)


async def test_heartbeats_stand_between_events_only(several: Begin) -> None:
    three = await several("attempts: 1, heartbeat: 100ms")
    one, two = said("one"), said("two").replace(b"\n", b"\r\n")
    reply = await relayed(
        three, STREAM, after(0.35), chunked(one), after(0.35), chunked(two), after(0.35), LAST
    )
    assert reply.whole
    pieces = [
        bytes(piece) for piece in reply.body.replace(one, b"|").replace(two, b"|").split(b"|")
    ]
    assert all(piece and not piece.replace(BEAT, b"") for piece in pieces), reply.body
    count = reply.body.count(BEAT) - (one + two).count(BEAT)
    assert count <= 12
    assert three.metric("sluice_heartbeats_total") == count
    assert (await three.record()).bytes_down == len(one + two)


async def test_each_heartbeat_is_a_chunk_of_its_own(several: Begin) -> None:
    three = await several("attempts: 1, heartbeat: 100ms")
    three.a.plays(STREAM, chunked(said("one")), UntilGone())
    client = await three.connect()
    await client.send(ASKING)
    await client.until(chunked(said("one"), BEAT, BEAT))


async def test_who_speaks_all_the_time_needs_none(several: Begin) -> None:
    three = await several("attempts: 1, heartbeat: 2s")
    reply = await relayed(three, STREAM, *paced([said("x")] * 4, 0.1), LAST)
    assert reply.body == said("x") * 4


@pytest.mark.parametrize("route", ["attempts: 1, heartbeat: 0", "attempts: 1", "heartbeat: 0"])
async def test_no_heartbeats(several: Begin, route: str) -> None:
    three = await several(f"{route}, commit_after: 100ms")
    gate = asyncio.Event()
    three.a.plays(Until(gate), STREAM, after(0.3), stream_of("a"), LAST)
    client = await three.connect()
    await client.send(ASKING)
    await client.until(b"\r\n\r\n")
    gate.set()
    reply = await client.reply()
    assert (reply.body, reply.whole) == (text_of("a"), True)
    assert three.metric("sluice_heartbeats_total") == 0


INSIDE = {
    "an event": (b"data: 1", b"\n\n"),
    "a line": (b"event: x\nda", b"ta: 1\n\n"),
    "an event's lines": (b"event: x\n", b"data: 1\n\n"),
    "a comment": (said("x") + b": pi", b"ng\n\n"),
    "a line's end": (b"data: 1\r\n\r", b"\n"),
    "a character": (b"data: \xc3", b"\xbc\n\n"),
    "a BOM": (b"\xef\xbb", b"\xbfdata: 1\n\n"),
}


@pytest.mark.parametrize(("begin", "end"), INSIDE.values(), ids=INSIDE)
async def test_none_inside(several: Begin, begin: bytes, end: bytes) -> None:
    three = await several("attempts: 1, heartbeat: 50ms")
    reply = await relayed(three, STREAM, chunked(begin), after(0.3), chunked(end), LAST)
    assert reply.body == begin + end


async def test_none_inside_an_event_that_comes_in_many_pieces(several: Begin) -> None:
    three = await several("attempts: 1, heartbeat: 50ms")
    text = b"data: %b" % (b"x" * 50_000)
    pieces = [text[at : at + 10_000] for at in range(0, len(text), 10_000)]
    reply = await relayed(three, STREAM, *paced(pieces, 0.1), chunked(b"\n\n"), LAST)
    assert reply.body == text + b"\n\n"


@pytest.mark.parametrize(
    "head",
    [COMPRESSED, STREAM.replace(b"text/event-stream", b"application/json")],
    ids=["compressed", "JSON"],
)
async def test_none_in_other_bodies(several: Begin, head: bytes) -> None:
    three = await several("attempts: 1, heartbeat: 50ms")
    reply = await relayed(three, head, chunked(b"ab\n\n"), after(0.3), chunked(b"cd"), LAST)
    assert reply.body == b"ab\n\ncd"


async def test_none_behind_the_last_event(several: Begin) -> None:
    """What follows `[DONE]` nobody reads; a heartbeat there would do no harm, and no good."""
    three = await several("attempts: 1, heartbeat: 50ms")
    three.a.plays(STREAM, stream_of("a"), after(0.3), Close())
    reply = await three.ask(ASKING)
    assert reply.whole
    assert bytes(reply.body).replace(text_of("a"), b"").replace(BEAT, b"") == b""


async def test_streams_that_nobody_asked_for_are_kept_alive_too(several: Begin) -> None:
    """A head that came is a stream's, whatever the request said."""
    three = await several("attempts: 1, heartbeat: 50ms")
    three.a.plays(STREAM, after(0.3), stream_of("a"), LAST)
    reply = await three.ask(post(b"{}"))
    assert reply.body.startswith(BEAT)
    assert without_beats(reply.body) == text_of("a")


async def test_heartbeats_and_a_hidden_usage(several: Begin) -> None:
    three = await several("attempts: 1, heartbeat: 50ms", settings="limits: {tokens: 1000000/day}")
    usage = text_of("a")[len(said("from a")) : -len(DONE)]
    reply = await relayed(
        three, STREAM, chunked(said("a")), after(0.2), chunked(usage), after(0.2), chunked(DONE), LAST
    )  # fmt: skip
    assert bytes(reply.body).replace(BEAT, b"") == said("a") + DONE
    assert reply.body.startswith(said("a") + BEAT)


# Clocks --------------------------------------------------------------------------------------


def delta(**members: Any) -> bytes:
    return b"data: %b\n\n" % json.dumps({"choices": [{"index": 0, "delta": members}]}).encode()


def typed(kind: str, **members: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (
        kind.encode(),
        json.dumps({"type": kind} | members).encode(),
    )


PAYLOAD = {
    "content": delta(content="a"),
    "reasoning": delta(reasoning_content="a"),
    "reasoning, called so": delta(reasoning="a"),
    "a tool's arguments": delta(tool_calls=[{"index": 0, "function": {"arguments": "{"}}]),
    "a function's": delta(function_call={"arguments": "{"}),
    "a refusal": delta(refusal="a"),
    "a legacy completion": b'data: {"choices":[{"text":"a"}]}\n\n',
    "Anthropic's text": typed("content_block_delta", delta={"type": "text_delta", "text": "a"}),
    "Anthropic's thinking": typed(
        "content_block_delta", delta={"type": "thinking_delta", "thinking": "a"}
    ),
    "Anthropic's tool": typed(
        "content_block_delta", delta={"type": "input_json_delta", "partial_json": "{"}
    ),
    "Responses' text": typed("response.output_text.delta", delta="a"),
    "Responses' reasoning": typed("response.reasoning_summary_text.delta", delta="a"),
    "Responses' arguments": typed("response.function_call_arguments.delta", delta="{"),
    "half of a long event": b"data: " + b"x" * 300_000,
}

NO_PAYLOAD = {
    "comments": b": ping\n\n",
    "heartbeats": BEAT,
    "role-only chunks": delta(role="assistant", content=""),
    "empty deltas": delta(),
    "null": delta(content=None, tool_calls=None, reasoning_content=""),
    "no choices": b'data: {"choices":[],"usage":null}\n\n',
    "padding": b'data: {"choices":[],"obfuscation":"abcdef"}\n\n',
    "Anthropic's pings": typed("ping"),
    "Anthropic's empty texts": typed("content_block_delta", delta={"type": "text_delta", "text": ""}),
    "Responses' lifecycle": typed("response.in_progress", response={"id": "r"}),
    "Responses' empty texts": typed("response.output_text.delta", delta=""),
    "ids": b"id: 1\n\n",
}  # fmt: skip


async def all_at_once(three: Several, scripts: Mapping[str, Sequence[Step]]) -> dict[str, Reply]:
    """Plays each script to a client of its own, all at the same time; what each was answered."""
    clients = {}
    for name, steps in scripts.items():
        three.a.plays(*steps)
        three.a.got_request.clear()
        client = clients[name] = await three.connect()
        await client.send(ASKING)
        await three.a.has_request()
    return {name: await client.reply() for name, client in clients.items()}


async def test_payload_feeds_both_clocks(several: Begin) -> None:
    three = await several("attempts: 1, heartbeat: 0", each="timeouts: {idle: 800ms, stall: 800ms}")
    replies = await all_at_once(
        three, {name: [STREAM, *paced([event] * 4, 0.4), LAST] for name, event in PAYLOAD.items()}
    )
    for name, event in PAYLOAD.items():
        assert (replies[name].body, replies[name].whole) == (event * 4, True), name


async def test_what_is_no_payload_feeds_the_idle_clock_alone(several: Begin) -> None:
    three = await several("attempts: 1, heartbeat: 0", each="timeouts: {idle: 800ms, stall: 1.2s}")
    replies = await all_at_once(
        three,
        {
            name: [STREAM, chunked(said("one")), *paced([event] * 100, 0.1), LAST]
            for name, event in NO_PAYLOAD.items()
        },
    )
    for name, event in NO_PAYLOAD.items():
        body = bytes(replies[name].body).removeprefix(said("one"))
        error = error_in(body[len(event) * body.count(event) :])
        assert (error["code"], error["type"]) == ("upstream_timeout", "timeout_error"), name
        assert "stall" in error["message"], name
        assert not replies[name].whole, name
    await three.settled()
    assert {record.outcome for record in three.ended} == {Outcome.STALL_TIMEOUT}


async def test_a_stall_before_the_first_payload(several: Begin) -> None:
    three = await several("attempts: 1, heartbeat: 0", each="timeouts: {stall: 300ms}")
    steps = paced([NO_PAYLOAD["role-only chunks"]] * 100, 0.05)
    reply = await relayed(three, STREAM, *steps, LAST)
    assert not reply.whole
    assert (await three.record()).outcome is Outcome.STALL_TIMEOUT


async def test_payload_in_pieces_that_tell_nothing_by_themselves(several: Begin) -> None:
    three = await several("attempts: 1, heartbeat: 0", each="timeouts: {stall: 600ms}")
    event = said("a word")
    pieces = [event[at : at + 20] for at in range(0, len(event), 20)]
    reply = await relayed(three, STREAM, *paced(pieces * 4, 0.1), LAST)
    assert (reply.body, reply.whole) == (event * 4, True)


async def test_paths_that_we_do_not_know_may_stream_whatever_they_like(several: Begin) -> None:
    three = await several("attempts: 1, heartbeat: 0", each="timeouts: {stall: 600ms}")
    event = b"data: {}\n\n"
    three.a.plays(STREAM, *paced([event] * 6, 0.2), LAST)
    reply = await three.ask(post(path="/v1/audio/speech"))
    assert (reply.body, reply.whole) == (event * 6, True)


@pytest.mark.parametrize(
    ("timeouts", "outcome"),
    [
        ("idle: 300ms, stall: 20s", Outcome.IDLE_TIMEOUT),
        ("idle: 20s, stall: 300ms", Outcome.STALL_TIMEOUT),
    ],
)
async def test_our_own_heartbeats_feed_no_clock(
    several: Begin, timeouts: str, outcome: Outcome
) -> None:
    three = await several("attempts: 1, heartbeat: 50ms", each=f"timeouts: {{{timeouts}}}")
    reply = await relayed(three, STREAM, chunked(said("one")), UntilGone())
    assert not reply.whole
    assert reply.body.startswith(said("one") + BEAT)
    assert (await three.record()).outcome is outcome


async def test_a_silence_amid_an_event_is_a_cut_alone(several: Begin) -> None:
    three = await several("attempts: 1", each="timeouts: {idle: 200ms}")
    reply = await relayed(three, STREAM, chunked(b"data: half"), UntilGone())
    assert (reply.body, reply.whole) == (b"data: half", False)
    assert (await three.record()).outcome is Outcome.IDLE_TIMEOUT


async def test_bodies_that_are_no_streams_do_not_stall(several: Begin) -> None:
    three = await several("attempts: 1", each="timeouts: {idle: 2s, stall: 200ms}")
    answer = json_answer(b'{"choices":[]}')
    reply = await relayed(three, answer[:-8], after(0.3), answer[-8:-4], after(0.3), answer[-4:])
    assert (reply.body, reply.whole) == (b'{"choices":[]}', True)


def many(event: bytes, size: int) -> Sequence[bytes]:
    """About `size` bytes of events, in chunks of 100 KB."""
    one = event * (100_000 // len(event))
    return [chunked(one)] * (size // len(one))


@pytest.mark.parametrize("timeouts", ["idle: 200ms", "stall: 200ms"])
async def test_both_clocks_stand_still_while_the_client_does_not_read(
    several: Begin, timeouts: str
) -> None:
    three = await several("attempts: 1, heartbeat: 50ms", each=f"timeouts: {{{timeouts}}}")
    steps = many(said("x" * 500), 20_000_000)
    three.a.plays(STREAM, *steps, LAST)
    client = await three.connect(limit=1024)
    await client.send(ASKING)
    await client.until(b"\r\n\r\n")
    await asyncio.sleep(0.8)
    assert three.app.observer.in_flight
    reply = await client.reply()
    assert reply.whole
    assert reply.body.count(b"data: ") == sum(step.count(b"data: ") for step in steps)


@pytest.mark.parametrize(
    ("timeouts", "outcome"),
    [("idle: 300ms", Outcome.IDLE_TIMEOUT), ("stall: 300ms", Outcome.STALL_TIMEOUT)],
)
async def test_they_go_on_when_it_reads_again(
    several: Begin, timeouts: str, outcome: Outcome
) -> None:
    three = await several("attempts: 1, heartbeat: 0", each=f"timeouts: {{{timeouts}}}")
    steps = many(said("x" * 500), 10_000_000)
    three.a.plays(STREAM, *steps, UntilGone())
    client = await three.connect(limit=1024)
    await client.send(ASKING)
    await client.until(b"\r\n\r\n")
    await asyncio.sleep(0.5)
    reply = await client.reply()
    assert not reply.whole
    assert reply.body.count(b'data: {"choices"') == sum(step.count(b"data: ") for step in steps)
    assert (await three.record()).outcome is outcome
