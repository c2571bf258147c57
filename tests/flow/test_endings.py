"""However an answer ends, its reader can tell a whole one from a cut one."""

from __future__ import annotations

import asyncio
import json

import pytest

from proxy.exchange import Outcome
from tests.flow.conftest import Sluice, Start
from tests.flow.wire import (
    LAST,
    STREAM,
    Close,
    Reset,
    Step,
    Until,
    UntilGone,
    Upstream,
    chunked,
    get,
    json_answer,
    post,
)

EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


def error_in(event: bytes | bytearray) -> dict[str, object]:
    """The error object of a chat error event."""
    assert event.startswith(b"data: ") and event.endswith(b"\n\n")
    error: dict[str, object] = json.loads(event[6:])["error"]
    return error


@pytest.mark.parametrize("end", [Close(), Reset()], ids=["closed", "reset"])
async def test_a_cut_between_events_is_an_error_event_and_a_cut(sluice: Sluice, end: Step) -> None:
    gate = asyncio.Event()
    sluice.upstream.plays(STREAM, chunked(EVENT), Until(gate), end)
    client = await sluice.connect()
    await client.send(post())
    await client.until(EVENT)
    gate.set()
    reply = await client.reply()
    assert not reply.whole
    assert reply.body.startswith(EVENT)
    error = error_in(reply.body[len(EVENT) :])
    assert (error["type"], error["code"]) == ("upstream_error", "upstream_aborted")
    assert b"[DONE]" not in reply.body
    assert (await sluice.record()).outcome is Outcome.UPSTREAM_TRUNCATED


async def test_a_cut_before_the_first_event_is_one_too(sluice: Sluice) -> None:
    sluice.upstream.plays(STREAM, Close())
    reply = await sluice.ask(post())
    assert (error_in(reply.body)["code"], reply.whole) == ("upstream_aborted", False)


@pytest.mark.parametrize("half", [b"data: {", b"data: 1\n", b": comm", b"event: x\n"])
async def test_a_cut_inside_an_event_adds_nothing(sluice: Sluice, half: bytes) -> None:
    sluice.upstream.plays(STREAM, chunked(EVENT + half), Close())
    reply = await sluice.ask(post())
    assert (reply.body, reply.whole) == (EVENT + half, False)


async def test_a_cut_behind_a_whole_comment_is_between_events(sluice: Sluice) -> None:
    sluice.upstream.plays(STREAM, chunked(EVENT + b": ping\n"), Close())
    reply = await sluice.ask(post())
    assert error_in(reply.body.removeprefix(EVENT + b": ping\n"))["code"] == "upstream_aborted"


@pytest.mark.parametrize(
    ("answer", "came"),
    [
        (json_answer(b'{"a":1}')[:-3], b'{"a"'),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b'{"a":'), b'{"a":'),
    ],
)
async def test_a_cut_json_body_is_only_cut(sluice: Sluice, answer: bytes, came: bytes) -> None:
    sluice.upstream.plays(answer, Close())
    reply = await sluice.ask(post(b"{}"))
    assert (reply.body, reply.whole) == (came, False)


async def test_a_compressed_stream_gets_no_additions(sluice: Sluice) -> None:
    head = STREAM.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
    sluice.upstream.plays(head, chunked(b"\x1f\x8b\n\n"), Close())
    reply = await sluice.ask(post())
    assert (reply.body, reply.whole) == (b"\x1f\x8b\n\n", False)


@pytest.mark.parametrize(
    ("path", "last"),
    [
        ("/v1/chat/completions", DONE),
        ("/v1/messages", b'event: message_stop\ndata: {"type":"message_stop"}\n\n'),
        ("/v1/responses", b'event: response.completed\ndata: {"sequence_number":9}\n\n'),
    ],
)
async def test_a_stream_that_said_it_is_done_is_whole(
    sluice: Sluice, path: str, last: bytes
) -> None:
    sluice.upstream.plays(STREAM, chunked(EVENT, last), Close())
    reply = await sluice.ask(post(path=path))
    assert (reply.body, reply.whole) == (EVENT + last, True)
    assert (await sluice.record()).outcome is Outcome.COMPLETED


async def test_a_stream_without_done_is_whole_by_its_framing(sluice: Sluice) -> None:
    sluice.upstream.plays(STREAM, chunked(EVENT), LAST)
    reply = await sluice.ask(post())
    assert (reply.body, reply.whole) == (EVENT, True)


async def test_the_error_event_speaks_the_paths_protocol(sluice: Sluice) -> None:
    numbered = b'event: x\ndata: {"type":"x","sequence_number":41}\n\n'
    sluice.upstream.plays(STREAM, chunked(numbered), Close())
    reply = await sluice.ask(post(path="/v1/messages"))
    name, data = reply.body.removeprefix(numbered).split(b"\n", 1)
    assert (name, json.loads(data[6:])["type"]) == (b"event: error", "error")
    assert json.loads(data[6:])["error"]["code"] == "upstream_aborted"
    reply = await sluice.ask(post(path="/v1/responses"))
    name, data = reply.body.removeprefix(numbered).split(b"\n", 1)
    event = json.loads(data[6:])
    assert name == b"event: error"
    assert (event["type"], event["code"]) == ("error", "upstream_aborted")
    assert event["sequence_number"] == 42


async def test_a_reset_of_a_body_until_close_is_a_reset(sluice: Sluice) -> None:
    """An old client's stream has no other end than the connection's."""
    gate = asyncio.Event()
    sluice.upstream.plays(STREAM, chunked(EVENT), Until(gate), Close())
    client = await sluice.connect()
    await client.send(post().replace(b"HTTP/1.1", b"HTTP/1.0"))
    await client.until(EVENT)
    gate.set()
    with pytest.raises(ConnectionResetError):
        while await client.reader.read(1000):
            pass


async def test_a_relayed_failure_is_no_answer(sluice: Sluice) -> None:
    for status in (b"429 Slow down", b"503 Busy"):
        sluice.upstream.plays(json_answer(b"{}", b"Retry-After: 3", status=status))
        reply = await sluice.ask(post(b"{}"))
        assert reply.values("retry-after") == [b"3"]
    sluice.upstream.plays(STREAM, chunked(b'data: {"error":{"message":"busy"}}\n\n', DONE), LAST)
    assert (await sluice.ask(post())).whole
    assert [record.outcome for record in sluice.ended] == [Outcome.UPSTREAM_ERROR] * 3


@pytest.mark.parametrize(
    ("up", "steps", "clock", "outcome"),
    [
        ("first_byte: 100ms", [UntilGone()], "first_byte", Outcome.FIRST_BYTE_TIMEOUT),
        ("first_byte: 100ms", [b"HTTP/1.1 200 OK\r\nX:"], "first_byte", Outcome.FIRST_BYTE_TIMEOUT),
        ("total: 100ms", [UntilGone()], "total", Outcome.TOTAL_TIMEOUT),
    ],
)
async def test_an_upstream_that_does_not_answer_in_time(
    start: Start, up: str, steps: list[Step], clock: str, outcome: Outcome
) -> None:
    sluice = await start(up=f"timeouts: {{{up}}}")
    sluice.upstream.plays(*steps, UntilGone())
    reply = await sluice.ask(post())
    error = json.loads(reply.body)["error"]
    assert (reply.status, error["type"], error["code"]) == (
        504,
        "timeout_error",
        "upstream_timeout",
    )
    assert clock in error["message"]
    assert len(sluice.upstream.requests) == 1
    assert (await sluice.record()).outcome is outcome


@pytest.mark.parametrize(
    ("up", "clock", "outcome"),
    [
        ("idle: 100ms", "idle", Outcome.IDLE_TIMEOUT),
        ("total: 200ms", "total", Outcome.TOTAL_TIMEOUT),
    ],
)
async def test_a_stream_that_stands_still(
    start: Start, up: str, clock: str, outcome: Outcome
) -> None:
    sluice = await start(up=f"timeouts: {{{up}}}")
    sluice.upstream.plays(STREAM, chunked(EVENT), UntilGone())
    reply = await sluice.ask(post())
    error = error_in(reply.body.removeprefix(EVENT))
    assert (error["code"], reply.whole) == ("upstream_timeout", False)
    assert clock in str(error["message"])
    assert (await sluice.record()).outcome is outcome
    await asyncio.wait_for(sluice.upstream.gone.wait(), 1)


async def test_a_stream_may_last_longer_than_any_silence_in_it(start: Start) -> None:
    sluice = await start(up="timeouts: {idle: 200ms}")
    gates = [asyncio.Event() for _ in range(4)]
    steps = [step for gate in gates for step in (Until(gate), chunked(EVENT))]
    sluice.upstream.plays(STREAM, *steps, LAST)
    client = await sluice.connect()
    await client.send(post())
    for gate in gates:
        await asyncio.sleep(0.1)
        gate.set()
    reply = await client.reply()
    assert (reply.body, reply.whole) == (EVENT * 4, True)


async def test_a_reset_upstream_has_not_ended_its_body_until_close(sluice: Sluice) -> None:
    gate = asyncio.Event()
    sluice.upstream.plays(b"HTTP/1.1 200 OK\r\n\r\nhalf of", Until(gate), Reset())
    client = await sluice.connect()
    await client.send(post())
    await client.until(b"half of")
    gate.set()
    reply = await client.reply()
    assert (reply.body, reply.whole) == (b"half of", False)


async def test_a_reader_that_pauses_is_no_silence_of_the_upstream(start: Start) -> None:
    sluice = await start(up="timeouts: {idle: 150ms}")
    body = b"x" * 20_000_000
    sluice.upstream.plays(STREAM, chunked(body), LAST)
    client = await sluice.connect(limit=1024)
    await client.send(post())
    await client.until(b"\r\n\r\n")
    await asyncio.sleep(0.5)
    reply = await client.reply()
    assert (len(reply.body), reply.whole) == (len(body), True)


async def test_a_reader_that_takes_nothing_is_let_go(start: Start) -> None:
    sluice = await start("client_timeouts: {write: 100ms}")
    sluice.upstream.plays(STREAM, *[chunked(b"x" * 1_000_000)] * 40, LAST)
    client = await sluice.connect(limit=1024)
    await client.send(post())
    while not sluice.ended:
        await asyncio.sleep(0.05)
        sluice.server.sweep()
    assert sluice.ended[0].outcome is Outcome.CLIENT_GONE
    await asyncio.wait_for(sluice.upstream.gone.wait(), 1)


async def test_an_upstream_that_is_not_there(
    start: Start, upstream: Upstream, unused_tcp_port: int
) -> None:
    upstream.port = unused_tcp_port
    sluice = await start()
    reply = await sluice.ask(post())
    error = json.loads(reply.body)["error"]
    assert (reply.status, error["code"]) == (502, "upstream_unreachable")
    assert "connection refused" in error["message"]
    assert (await sluice.record()).outcome is Outcome.UPSTREAM_ERROR


async def test_an_upstream_that_never_finishes_its_handshake(start: Start) -> None:
    sluice = await start(up="timeouts: {connect: 100ms}", scheme="https")
    sluice.upstream.plays(UntilGone())
    reply = await sluice.ask(post())
    error = json.loads(reply.body)["error"]
    assert (reply.status, error["code"]) == (504, "upstream_timeout")
    assert "connect" in error["message"]


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n folded\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\x00b\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"HTTP/1.1 102 Processing\r\n\r\n" * 10_000,
    ],
)
async def test_an_answer_that_is_none(sluice: Sluice, answer: bytes) -> None:
    sluice.upstream.plays(answer, UntilGone())
    reply = await sluice.ask(post(b"{}"))
    error = json.loads(reply.body)["error"]
    assert (reply.status, error["code"]) == (502, "upstream_invalid")
    assert "SSH" not in error["message"]


async def test_chunks_that_are_none_cut_the_answer(sluice: Sluice) -> None:
    sluice.upstream.plays(STREAM, chunked(EVENT) + b"+5\r\ndata:\r\n", UntilGone())
    reply = await sluice.ask(post())
    assert not reply.whole
    assert error_in(reply.body.removeprefix(EVENT))["code"] == "upstream_invalid"


async def test_a_refused_key_is_ours_to_explain(start: Start) -> None:
    sluice = await start(up="api_key: sk-secret")
    refusal = json_answer(b'{"error":"bad key sk-secret"}', status=b"401 Unauthorized")
    sluice.upstream.plays(refusal)
    reply = await sluice.ask(post(b"{}"))
    assert (reply.status, json.loads(reply.body)["error"]["code"]) == (502, "upstream_auth")
    assert b"sk-secret" not in reply.body


RECORDED = {
    "chunked stream": STREAM + chunked(EVENT, EVENT + b"data: 2\r\n\r\n", DONE) + LAST,
    "sized stream": b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n%b"
    % (len(EVENT + DONE), EVENT + DONE),
    "chunked JSON": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n" + chunked(b'{"choices":', b"[]}") + LAST,
    "sized JSON": json_answer(b'{"choices":[]}'),
}  # fmt: skip


@pytest.mark.parametrize("recorded", RECORDED.values(), ids=RECORDED)
async def test_an_upstream_killed_at_every_byte(sluice: Sluice, recorded: bytes) -> None:
    """No complete byte is lost, and no cut is hidden."""
    head, _, raw = recorded.partition(b"\r\n\r\n")
    is_chunked = b"chunked" in head
    for offset in range(len(recorded) + 1):
        sluice.upstream.plays(recorded[:offset], Close())
        reply = await sluice.ask(post())
        came = recorded[len(head) + 4 : offset]
        payload = _payload(came) if is_chunked else came
        if offset < len(head) + 4:
            assert reply.status == 502, offset
            continue
        assert reply.body.startswith(payload), offset
        said_done = payload.endswith(DONE) or (is_chunked and came == raw)
        complete = offset == len(recorded) or (b"event-stream" in head and said_done)
        assert reply.whole == complete, offset
        added = reply.body[len(payload) :]
        if complete or b"event-stream" not in head or (payload and not _whole_events(payload)):
            assert not added, offset
        else:
            assert error_in(added)["code"] == "upstream_aborted", offset


def _payload(came: bytes) -> bytes:
    """What a chunked body's bytes carry, also those of an unfinished chunk."""
    payload, at = b"", 0
    while (end := came.find(b"\r\n", at)) >= 0:
        size = int(came[at:end], 16)
        payload += came[end + 2 : end + 2 + size]
        at = end + 2 + size + 2
    return payload


def _whole_events(payload: bytes) -> bool:
    return payload.replace(b"\r\n", b"\n").endswith((b"\n\n", b"\n\r"))


async def test_requests_that_are_refused_are_counted_as_such(sluice: Sluice) -> None:
    await sluice.ask(get("/nowhere"), method="GET")
    await sluice.ask(b"nonsense\r\n\r\n", method="GET")
    assert [(record.status, record.route, record.outcome) for record in sluice.ended] == [
        (404, "none", None),
        (400, "none", None),
    ]
