"""Bytes in = bytes out, each as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from proxy.exchange import Outcome
from tests.flow.conftest import Sluice, Start
from tests.flow.wire import LAST, STREAM, AnswerEarly, Close, Until, chunked, get, json_answer, post

EVENTS = [
    b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"Gr\xc3\xbc\xc3\x9fe"}}]}\r\n\r\n',
    b": a comment\n\n",
    b"event: odd\nid: 7\ndata: [DONE]\n\n",
]


async def test_each_event_arrives_before_the_next_is_sent(sluice: Sluice) -> None:
    gates = [asyncio.Event() for _ in EVENTS]
    steps = [
        part
        for event, gate in zip(EVENTS, gates, strict=True)
        for part in (chunked(event), Until(gate))
    ]
    sluice.upstream.plays(STREAM, *steps, LAST)
    client = await sluice.connect()
    await client.send(post())
    for event, gate in zip(EVENTS, gates, strict=True):
        await client.until(event)
        gate.set()
    reply = await client.reply()
    assert reply.whole
    assert reply.body == b"".join(EVENTS)


async def test_the_head_comes_before_the_first_event(sluice: Sluice) -> None:
    gate = asyncio.Event()
    sluice.upstream.plays(STREAM, Until(gate), chunked(b"data: 1\n\n"), LAST)
    client = await sluice.connect()
    await client.send(post())
    await client.until(b"\r\n\r\n")
    gate.set()
    assert (await client.reply()).body == b"data: 1\n\n"


async def test_a_part_of_an_event_and_of_a_chunk_arrives_as_it_comes(sluice: Sluice) -> None:
    gate = asyncio.Event()
    sluice.upstream.plays(STREAM, b"9\r\ndata", Until(gate), b": 1\n\n\r\n", LAST)
    client = await sluice.connect()
    await client.send(post())
    await client.until(b"data")
    gate.set()
    reply = await client.reply()
    assert (reply.body, reply.whole) == (b"data: 1\n\n", True)


async def test_what_streams_bear(sluice: Sluice) -> None:
    head = STREAM[:-2] + b'ETag: "1"\r\nLast-Modified: now\r\nCache-Control: max-age=9\r\n\r\n'
    sluice.upstream.plays(head, chunked(b"data: 1\n\n"), LAST)
    reply = await sluice.ask(post())
    assert reply.values("cache-control") == [b"no-cache, no-transform"]
    assert reply.values("x-accel-buffering") == [b"no"]
    assert not reply.values("etag") + reply.values("last-modified")
    assert not reply.values("content-length")
    assert reply.values("sluice-upstream") == [b"up"]
    assert reply.values("sluice-attempts") == [b"1"]


async def test_a_stream_with_a_length_loses_it(sluice: Sluice) -> None:
    body = b"data: 1\n\n"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    sluice.upstream.plays(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    reply = await sluice.ask(post())
    assert (reply.body, reply.whole) == (body, True)
    assert reply.values("transfer-encoding") == [b"chunked"]


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (json_answer(b'{"a":1}'), b'{"a":1}'),
        (json_answer(b""), b""),
        (json_answer(b"x" * 300_000), b"x" * 300_000),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"ab", b"c") + LAST, b"abc"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nT: 1\r\n\r\n", b"abc"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + json_answer(b"{}"), b"{}"),
    ],
    ids=["sized", "empty", "large", "chunked", "extensions and trailers", "interim heads"],
)  # fmt: skip
async def test_bodies_of_every_framing(sluice: Sluice, answer: bytes, body: bytes) -> None:
    sluice.upstream.plays(answer)
    reply = await sluice.ask(post(b"{}"))
    assert (reply.status, reply.body, reply.whole) == (200, body, True)


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n"])
async def test_a_body_until_close(sluice: Sluice, head: bytes) -> None:
    sluice.upstream.plays(head + b"all of it", Close())
    reply = await sluice.ask(post(b"{}"))
    assert (reply.body, reply.whole) == (b"all of it", True)


async def test_small_answers_share_a_packet_with_their_head(sluice: Sluice) -> None:
    sluice.upstream.plays(json_answer(b"{}"))
    client = await sluice.connect()
    await client.send(post(b"{}"))
    assert (await client.reader.read(65536)).endswith(b"\r\n\r\n{}")


async def test_heads_are_kept_to_the_letter(sluice: Sluice) -> None:
    fields = [b"X-Odd:   spaced  ", b"set-cookie: a=1", b"Set-Cookie: b=2", b"x-request-id: theirs"]
    hop = [b"Keep-Alive: timeout=5", b"Connection: X-Private", b"X-Private: 1", b"Trailer: x"]
    cors = [b"Access-Control-Allow-Origin: *"]
    sluice.upstream.plays(json_answer(b"{}", *fields, *hop, *cors, status=b"201 Quite Created"))
    reply = await sluice.ask(post(b"{}", "X-Request-Id: mine.1"))
    assert (reply.status, reply.reason) == (201, b"Quite Created")
    assert reply.headers == [
        (b"Content-Type", b"application/json"),
        (b"X-Odd", b"spaced"),
        (b"set-cookie", b"a=1"),
        (b"Set-Cookie", b"b=2"),
        (b"x-request-id", b"theirs"),
        (b"Content-Length", b"2"),
        (b"Sluice-Request-Id", b"mine.1"),
        (b"Sluice-Upstream", b"up"),
        (b"Sluice-Attempts", b"1"),
    ]


@pytest.mark.parametrize("status", [b"301 Moved", b"400 Bad", b"401 No", b"418 Tea", b"500 Oops"])
async def test_every_status_passes_with_its_body(sluice: Sluice, status: bytes) -> None:
    sluice.upstream.plays(json_answer(b"no JSON", b"Location: http://x/", status=status))
    reply = await sluice.ask(post(b"{}"))
    assert b"%d %b" % (reply.status, reply.reason) == status
    assert reply.body == b"no JSON"
    assert reply.values("location") == [b"http://x/"]


@pytest.mark.parametrize(
    ("method", "head"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n"),
    ],
)
async def test_answers_without_a_body(sluice: Sluice, method: str, head: bytes) -> None:
    sluice.upstream.plays(head)
    client = await sluice.connect()
    for _ in range(2):  # the connections on both sides stay usable
        await client.send(get(method=method))
        reply = await client.reply(method)
        assert (reply.body, reply.whole) == (b"", True)
    assert sluice.upstream.connections == 1


async def test_connections_are_kept_on_both_sides(sluice: Sluice) -> None:
    sluice.upstream.plays(STREAM, chunked(b"data: 1\n\n"), LAST)
    client = await sluice.connect()
    for _ in range(3):
        await client.send(post())
        assert (await client.reply()).whole
    assert sluice.upstream.connections == 1


async def test_large_answers_leave_their_connection_reading(sluice: Sluice) -> None:
    body = b"x" * 150_000  # more than the high-water mark, less than one read
    sluice.upstream.plays(json_answer(body))
    client = await sluice.connect()
    for _ in range(5):
        await client.send(post(b"{}"))
        assert (await client.reply()).body == body
    assert sluice.upstream.connections == 1


async def test_answers_to_pipelined_requests_wait_for_their_reader(sluice: Sluice) -> None:
    body = b"x" * 60_000  # each alone is below the high-water mark
    sluice.upstream.plays(json_answer(body))
    client = await sluice.connect(limit=1024)
    count = 300
    client.writer.write(post(b"{}") * count)
    stood = await _until_still(lambda: len(sluice.ended))
    assert 0 < stood < count  # what the kernel's buffers hold of these 18 MB
    (connection,) = sluice.server.connections
    assert connection.transport is not None
    assert connection.transport.get_write_buffer_size() < 1_000_000
    for _ in range(count):
        assert (await client.reply()).body == body


async def test_an_old_client_gets_its_stream_until_close(sluice: Sluice) -> None:
    sluice.upstream.plays(STREAM, chunked(b"data: 1\n\n"), LAST)
    client = await sluice.connect()
    await client.send(post().replace(b"HTTP/1.1", b"HTTP/1.0"))
    seen = await client.rest()
    assert seen.endswith(b"\r\n\r\ndata: 1\n\n")
    assert b"chunked" not in seen


async def _until_still(measure: Callable[[], int]) -> int:
    """Waits until nothing moves any more; returns where it stands."""
    stood = -1
    while stood != (now := measure()):
        stood = now
        await asyncio.sleep(0.2)
    return stood


async def test_a_slow_reader_holds_its_upstream_and_loses_nothing(sluice: Sluice) -> None:
    body = bytes(range(256)) * 160_000
    sluice.upstream.plays(STREAM, chunked(body), LAST)
    client = await sluice.connect(limit=1024)
    await client.send(post())
    await client.until(b"\r\n\r\n")
    stood = await _until_still(lambda: sluice.upstream.sent)
    assert 0 < stood < 30_000_000  # what the kernel's buffers on both sides hold of these 41 MB
    (connection,) = sluice.server.connections
    assert connection.transport is not None
    assert connection.transport.get_write_buffer_size() < 1_000_000
    reply = await client.reply()
    assert (len(reply.body), reply.body == body, reply.whole) == (len(body), True, True)


async def test_a_slow_upstream_holds_the_upload(sluice: Sluice) -> None:
    gate = asyncio.Event()
    body = b"x" * 30_000_000
    sluice.upstream.plays(json_answer(b"{}"))
    sluice.upstream._read_body = _after(gate, sluice.upstream._read_body)  # type: ignore[method-assign]
    client = await sluice.connect()
    client.writer.write(post(body, content_type="audio/wav"))
    unsent = client.writer.transport.get_write_buffer_size
    assert await _until_still(unsent) > 5_000_000
    gate.set()
    assert (await client.reply()).status == 200
    assert sluice.upstream.requests[0].body == body


def _after(gate: asyncio.Event, read):
    async def wait(reader, request):
        await gate.wait()
        await read(reader, request)

    return wait


async def test_an_answer_before_the_end_of_the_upload_is_relayed(start: Start) -> None:
    sluice = await start()
    refusal = json_answer(b'{"error":"too large"}', status=b"413 Too Large")
    sluice.upstream.plays(AnswerEarly(), refusal, Close())
    client = await sluice.connect()
    await client.send(
        post(b"", "Transfer-Encoding: chunked", content_type="audio/wav") + chunked(b"x" * 10)
    )
    reply = await client.reply()
    assert (reply.status, reply.body) == (413, b'{"error":"too large"}')


async def test_time_to_first_token_is_that_of_the_first_content(sluice: Sluice) -> None:
    gate = asyncio.Event()
    sluice.upstream.plays(STREAM, chunked(EVENTS[0]), Until(gate), chunked(EVENTS[1]), LAST)
    client = await sluice.connect()
    await client.send(post())
    await client.until(EVENTS[0])
    (exchange,) = sluice.app.observer.in_flight.values()
    assert exchange.first_token is None
    gate.set()
    assert (await client.reply()).whole
    record = await sluice.record()
    assert record.first_token is not None and record.first_byte is not None
    assert record.first_token > record.first_byte
    assert record.outcome is Outcome.COMPLETED
    assert (record.chunks, record.bytes_down) == (2, len(EVENTS[0] + EVENTS[1]))
