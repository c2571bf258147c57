"""A drain, seen from outside: who is served to the end, who is cut and how, and what adds up."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.canaries import COMPLETION
from tests.flow import wire
from tests.flow.conftest import listening
from tests.flow.wire import (
    LAST,
    STREAM,
    Client,
    Reply,
    Until,
    UntilGone,
    Upstream,
    chunked,
    json_answer,
)
from tests.process import paced
from tests.process.floods import allow_descriptors
from tests.process.paced import BEAT, Proxy, Told

CROWD = 1000
HURRIED = 2.0  # seconds: the interface's one, and what a busy machine adds


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PATIENCE", 60.0)  # for a crowd, on a busy machine


def at(port: int, **settings: object) -> dict[str, object]:
    """A config with one upstream, there."""
    return {"upstreams": {"up": {"base_url": f"http://127.0.0.1:{port}/v1"}}, **settings}


# A crowd ----------------------------------------------------------------------------------------


async def test_a_thousand_streams_through_a_drain(tmp_path: Path) -> None:
    """Every other stream ends within `drain_timeout`; no other one does."""
    allow_descriptors(4 * CROWD)
    drain_timeout = 20 * BEAT
    async with (
        paced.upstream() as upstream,
        Proxy(tmp_path, at(upstream.port, drain_timeout=drain_timeout)).running() as proxy,
    ):
        lefts = [None if number % 2 else 1 + number % 5 for number in range(CROWD)]
        clients = await asyncio.gather(*map(proxy.stream, lefts))
        ending = [client for client, left in zip(clients, lefts, strict=True) if left]
        endless = [client for client, left in zip(clients, lefts, strict=True) if not left]
        fresh, used = await proxy.connect(), await proxy.connect()
        await used.send(paced.post())
        assert (await used.reply()).status == 200
        await _in_flight(proxy, CROWD)

        told = time.monotonic()
        proxy.tell(signal.SIGTERM)
        assert (await proxy.logged("draining"))["open"] == CROWD
        admin = asyncio.create_task(_until_refused(proxy.admin))
        assert await _refuses(proxy.port)
        for idle in fresh, used:
            await idle.send(paced.post())
            assert _refusal(await idle.reply()) == (503, "shutting_down", [b"close"], True)
            assert await idle.reader.read() == b""

        await upstream.begin()
        tales = [Told.by(reply) for reply in await asyncio.gather(*map(Client.reply, ending))]
        assert [tale for tale in tales if not tale.is_whole] == []
        await _in_flight(proxy, len(endless))
        counted = await proxy.samples("sluice_outcomes_total")
        assert counted == {("completed", "default"): len(ending) + 1}
        assert (await upstream.seen()).hang_ups == 0

        tales = [Told.by(reply) for reply in await asyncio.gather(*map(Client.reply, endless))]
        assert [tale for tale in tales if not tale.ends_with("shutting_down")] == []
        assert await proxy.exit_code() == 0
        answers, refused_at = await admin
        assert set(answers) == {(503, "draining")}
        assert refused_at - told >= drain_timeout

        lines = proxy.lines("request")
        outcomes = Counter(line["outcome"] for line in lines)
        assert outcomes == {"completed": len(ending) + 1, "shutdown": len(endless), None: 2}
        assert Counter(line["status"] for line in lines) == {200: CROWD + 1, 503: 2}
        assert len({line["request_id"] for line in lines}) == CROWD + 3
        async with asyncio.timeout(wire.PATIENCE):
            while (seen := await upstream.seen()).open:
                await asyncio.sleep(0.05)
        assert seen.hang_ups == len(endless)


async def _in_flight(proxy: Proxy, count: int) -> None:
    """Returns when that many requests are in progress."""
    async with asyncio.timeout(wire.PATIENCE):
        while sum((await proxy.samples("sluice_requests_in_flight")).values()) != count:
            await asyncio.sleep(0.01)


async def _refuses(port: int) -> bool:
    """Whether it comes to refuse new connections."""
    async with asyncio.timeout(wire.PATIENCE):
        while True:
            try:
                (await Client.connect(port)).abort()
            except ConnectionRefusedError:
                return True
            await asyncio.sleep(0.01)


async def _until_refused(port: int) -> tuple[list[tuple[int, str]], float]:
    """What /readyz says, asked again and again on new connections, and when the first was refused."""
    answers: list[tuple[int, str]] = []
    while True:
        try:
            reply = await paced.get(port, "/readyz")
        except (ConnectionError, AssertionError):  # closed before, or behind, the accepting
            return answers, time.monotonic()
        answers.append((reply.status, json.loads(reply.body)["status"]))
        await asyncio.sleep(0.05)


def _refusal(reply: Reply) -> tuple[int, str, list[bytes], bool]:
    code = json.loads(reply.body)["error"]["code"]
    return reply.status, code, reply.values("connection"), reply.whole


# What is left at the end of its time ------------------------------------------------------------


EVENT = f'data: {{"choices":[{{"delta":{{"content":"{COMPLETION}"}}}}]}}\n\n'.encode()
NUMBERED = b'event: response.output_text.delta\ndata: {"sequence_number":41,"delta":"a"}\n\n'
JSON = STREAM.replace(b"text/event-stream", b"application/json")
GZIP = STREAM.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
SIZED = JSON.replace(b"Transfer-Encoding: chunked", b"Content-Length: 100")
ENDLESS = JSON.replace(b"Transfer-Encoding: chunked\r\n", b"")

ERROR = {"type": "overloaded_error", "param": None, "code": "shutting_down"}
OPENAI = (b"", {"error": ERROR})
ANTHROPIC = (b"event: error\n", {"type": "error", "error": ERROR})
RESPONSES = (
    b"event: error\n",
    {"type": "error", "code": "shutting_down", "param": None, "sequence_number": 42},
)

# An upstream's head, the pieces of its body so far, the event that its client is told.
LEFT: dict[str, tuple[bytes, list[bytes], tuple[bytes, object] | None]] = {
    "between two events": (STREAM, [EVENT], OPENAI),
    "before the first event": (STREAM, [], OPENAI),
    "behind a comment": (STREAM, [EVENT, b": ping\n\n"], OPENAI),
    "behind CRLF": (STREAM, [EVENT.replace(b"\n", b"\r\n")], OPENAI),
    "inside an event": (STREAM, [EVENT, EVENT[:20]], None),
    "before an event's blank line": (STREAM, [EVENT, EVENT[:-1]], None),
    "compressed": (GZIP, [b"\x1f\x8b\x08"], None),
    "chunked, but no stream": (JSON, [b'{"a"'], None),
    "with a length": (SIZED, [b'{"a"'], None),
    "until close": (ENDLESS, [b'{"a"'], None),
    "/v1/messages": (STREAM, [b"event: ping\n" + EVENT], ANTHROPIC),
    "/v1/responses": (STREAM, [NUMBERED], RESPONSES),
}


async def test_what_is_open_is_cut_where_it_stands(tmp_path: Path) -> None:
    async with (
        listening(Upstream()) as upstream,
        Proxy(tmp_path, at(upstream.port, drain_timeout="300ms")).running() as proxy,
    ):
        clients = {}
        for name, (head, pieces, _) in LEFT.items():
            body = chunked(*pieces) if b"chunked" in head else b"".join(pieces)
            upstream.plays(head + body, UntilGone())
            client = clients[name] = await proxy.connect()
            await client.send(wire.post(path=name if "/" in name else "/v1/chat/completions"))
            await client.until(pieces[-1] if pieces else b"\r\n\r\n")
        proxy.tell(signal.SIGTERM)
        for name, (_, pieces, error) in LEFT.items():
            reply = await clients[name].reply()
            sent = b"".join(pieces)
            assert (name, bytes(reply.body[: len(sent)])) == (name, sent)
            assert (name, _last_words(reply.body[len(sent) :])) == (name, error)
            assert not reply.whole, name
        assert await proxy.exit_code() == 0
        ends = {(line["outcome"], line["status"]) for line in proxy.lines("request")}
        assert ends == {("shutdown", 200)}
        assert proxy.counts["request"] == len(LEFT)


def _last_words(said: bytearray) -> tuple[bytes, object] | None:
    """An error event's first line, if it has a name, and its data without the text for people."""
    if not said:
        return None
    name, _, data = said.rpartition(b"data: ")
    assert data.endswith(b"\n\n")
    document = json.loads(data)
    assert document.get("error", document).pop("message")
    return bytes(name), document


async def test_what_has_no_answer_yet_is_refused(tmp_path: Path) -> None:
    """Whoever waits for a head, and whoever has yet to send the rest of a request."""
    async with (
        listening(Upstream()) as upstream,
        Proxy(tmp_path, at(upstream.port, drain_timeout="300ms")).running() as proxy,
    ):
        upstream.plays(UntilGone())
        waiting, talking = await proxy.connect(), await proxy.connect()
        await waiting.send(wire.post(path="/v1/messages"))
        await upstream.got_request.wait()
        await talking.send(wire.post()[:-1])
        await _in_flight(proxy, 2)
        proxy.tell(signal.SIGTERM)
        for client in waiting, talking:
            reply = await client.reply()
            assert _refusal(reply) == (503, "shutting_down", [b"close"], True)
            assert (reply.values("content-type"), reply.values("retry-after")) == (
                [b"application/json"],
                [b"1"],
            )
            assert (json.loads(reply.body).get("type") == "error") == (client is waiting)
        await upstream.gone.wait()
        assert await proxy.exit_code() == 0
        lines = proxy.lines("request")
        assert {(line["upstream"], line["outcome"]) for line in lines} == {
            ("up", "shutdown"),
            (None, None),
        }


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/v1/chat/completions", OPENAI),
        ("/v1/messages", ANTHROPIC),
        ("/v1/responses", (RESPONSES[0], {**RESPONSES[1], "sequence_number": 0})),
    ],
)
async def test_behind_a_head_of_ours_too(
    tmp_path: Path, path: str, error: tuple[bytes, object]
) -> None:
    """Of `commit_after`, while the upstream still thinks."""
    route = {"models": ["*"], "upstreams": ["up"], "commit_after": "50ms", "heartbeat": "50ms"}
    settings = {"drain_timeout": "300ms", "routes": [route]}
    async with (
        listening(Upstream()) as upstream,
        Proxy(tmp_path, at(upstream.port, **settings)).running() as proxy,
    ):
        upstream.plays(UntilGone())
        client = await proxy.connect()
        await client.send(wire.post(path=path))
        await client.until(chunked(b":\n") * 2)
        proxy.tell(signal.SIGTERM)
        reply = await client.reply()
        beats = len(reply.body) - len(reply.body.lstrip(b":\n"))
        assert reply.body[:beats] == b":\n" * (beats // 2)
        assert _last_words(reply.body[beats:]) == error
        assert (reply.status, reply.whole) == (200, False)
        assert reply.values("content-type") == [b"text/event-stream"]
        await upstream.gone.wait()
        assert await proxy.exit_code() == 0
        (line,) = proxy.lines("request")
        assert (line["status"], line["outcome"]) == (200, "shutdown")


# Until then -------------------------------------------------------------------------------------


async def test_what_a_drain_waits_for(tmp_path: Path) -> None:
    """Answers to come, and generations that are read to their end though their client has left."""
    route = {"models": ["*"], "upstreams": ["up"], "on_disconnect": "finish"}
    settings = {"drain_timeout": "60s", "routes": [route]}
    async with (
        listening(Upstream()) as upstream,
        Proxy(tmp_path, at(upstream.port, **settings)).running() as proxy,
    ):
        drained = asyncio.Event()
        usage = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":7}}\n\n'
        end = chunked(usage, b"data: [DONE]\n\n") + LAST
        upstream.plays(STREAM + chunked(EVENT), Until(drained), end)
        leaving = await proxy.connect()
        await leaving.send(wire.post())
        await leaving.until(EVENT)
        upstream.got_request.clear()
        upstream.plays(Until(drained), json_answer(b'{"a":1}'))
        waiting = await proxy.connect()
        await waiting.send(wire.post(b'{"model":"m"}'))
        await upstream.got_request.wait()

        leaving.abort()
        await leaving.writer.wait_closed()
        await paced.get(proxy.admin, "/readyz")  # by whose answer the proxy has seen that too
        proxy.tell(signal.SIGTERM)
        assert (await proxy.logged("draining"))["open"] == 2
        assert await _refuses(proxy.port)
        drained.set()
        reply = await waiting.reply()
        assert (reply.status, reply.body, reply.whole) == (200, b'{"a":1}', True)
        assert await proxy.exit_code() == 0
        lines = {line["outcome"]: line for line in proxy.lines("request")}
        assert set(lines) == {"completed", "client_gone"}
        assert lines["client_gone"]["tokens_out"] == 7


async def test_what_comes_on_open_connections_is_refused(tmp_path: Path) -> None:
    """Behind a stream, behind half a head, behind a wait for 100 Continue; health is told."""
    end = asyncio.Event()
    async with (
        listening(Upstream()) as upstream,
        Proxy(tmp_path, at(upstream.port, drain_timeout="60s")).running() as proxy,
    ):
        upstream.plays(STREAM + chunked(EVENT), Until(end), chunked(b"data: [DONE]\n\n") + LAST)
        streaming, halfway, asking = [await proxy.connect() for _ in range(3)]
        await streaming.send(wire.post() * 2)
        await streaming.until(EVENT)
        await halfway.send(wire.post()[:50])
        proxy.tell(signal.SIGTERM)
        assert await _refuses(proxy.port)

        await halfway.send(wire.post()[50:])
        assert _refusal(await halfway.reply()) == (503, "shutting_down", [b"close"], True)
        for path, status in ("/livez", 200), ("/readyz", 503):
            await asking.send(wire.get(path))
            assert (await asking.reply("GET")).status == status
        await asking.send(wire.post(b"{}", "Expect: 100-continue")[:-2])
        assert _refusal(await asking.reply()) == (503, "shutting_down", [b"close"], True)
        end.set()
        reply = await streaming.reply()
        assert (reply.whole, reply.body) == (True, EVENT + b"data: [DONE]\n\n")
        assert _refusal(await streaming.reply()) == (503, "shutting_down", [b"close"], True)
        assert await streaming.reader.read() == b""
        assert len(upstream.requests) == 1
        assert await proxy.exit_code() == 0


async def test_a_reload_during_a_drain_does_not_end_it(tmp_path: Path) -> None:
    async with (
        paced.upstream() as upstream,
        Proxy(tmp_path, at(upstream.port, drain_timeout="60s")).running() as proxy,
    ):
        client = await proxy.stream(3)
        proxy.tell(signal.SIGTERM)
        await proxy.logged("draining")
        await proxy.reload(log={"level": "info"})
        await upstream.begin()
        assert Told.by(await client.reply()).is_whole
        assert await proxy.exit_code() == 0


# In a hurry -------------------------------------------------------------------------------------


@pytest.mark.parametrize("notice", ["0s", "60s"])
async def test_a_second_signal_ends_everything(tmp_path: Path, notice: str) -> None:
    """Streams, who waits for a head, who sends slowly, and who reads nothing of much."""
    settings = {"drain_notice": notice, "drain_timeout": "60s"}
    async with (
        listening(Upstream()) as upstream,
        Proxy(tmp_path, at(upstream.port, **settings)).running() as proxy,
    ):
        upstream.plays(STREAM + chunked(EVENT), UntilGone())
        streaming = await proxy.connect()
        await streaming.send(wire.post())
        await streaming.until(EVENT)
        upstream.plays(STREAM + chunked(EVENT * 100) * 1000, UntilGone())
        deaf = await proxy.connect(limit=1024)
        await deaf.send(wire.post())
        upstream.plays(UntilGone())
        waiting, talking = await proxy.connect(), await proxy.connect()
        await waiting.send(wire.post())
        await talking.send(wire.post()[:-1])
        await _in_flight(proxy, 4)

        proxy.tell(signal.SIGTERM)
        await proxy.logged("draining")
        hurried = time.monotonic()
        proxy.tell(signal.SIGINT)
        assert await proxy.exit_code() == 0
        assert time.monotonic() - hurried < HURRIED
        reply = await streaming.reply()
        assert (reply.whole, _last_words(reply.body[len(EVENT) :])) == (False, OPENAI)
        for client in waiting, talking:
            assert _refusal(await client.reply()) == (503, "shutting_down", [b"close"], True)
        assert proxy.counts["request"] == 4
