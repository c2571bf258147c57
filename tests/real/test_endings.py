"""The official SDKs, and curl, read heartbeats, in-band errors and cuts as they are meant.

Each speaks to a real proxy process, and that to an upstream which the test scripts. Beside the SDK
a raw client asks the same a moment later, and shows the bytes that such a question is answered with.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anthropic
import openai
import pytest
import pytest_asyncio
import yaml

from tests import canaries
from tests.canaries import COMPLETION, PROMPT
from tests.flow.conftest import listening
from tests.flow.wire import (
    LAST,
    PATIENCE,
    STREAM,
    Client,
    Close,
    Reply,
    Step,
    Until,
    UntilGone,
    Upstream,
    chunked,
    json_answer,
    post,
)
from tests.parts import need
from tests.real.processes import CLIENT_KEY, KEY, Process, free_port, get, running

# One upstream and one proxy for all: a test chooses its settings by the name of its model.
pytestmark = pytest.mark.asyncio(loop_scope="module")

Json = dict[str, Any]

BEAT = b":\n"  # nothing else in these answers looks like one
BEAT_EVERY = 0.05  # seconds
FIRST, SECOND = COMPLETION[:8], COMPLETION[8:]  # what the upstream says, in two events


# ---------------------------------------------------------------- what the upstream says


@dataclass(frozen=True, slots=True)
class Speech:
    """A whole stream in the protocol of `path`: what comes before the words, them, what follows."""

    path: str
    opening: bytes
    first: bytes
    second: bytes
    closing: bytes

    @property
    def events(self) -> bytes:
        return self.opening + self.first + self.second + self.closing


def chunk(delta: Json, finish_reason: str | None = None) -> bytes:
    about = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return b"data: %b\n\n" % json.dumps({**about, "choices": [choice]}).encode()


CHAT = Speech(
    "/v1/chat/completions",
    chunk({"role": "assistant", "content": ""}),
    chunk({"content": FIRST}),
    chunk({"content": SECOND}),
    chunk({}, "stop") + b"data: [DONE]\n\n",
)


def typed(type: str, **more: Any) -> bytes:
    """An event that bears its type as its name too."""
    return b"event: %b\ndata: %b\n\n" % (type.encode(), json.dumps({"type": type, **more}).encode())


_RESPONSE = {"id": "r", "object": "response", "created_at": 1, "model": "m", "output": []}


def response_delta(text: str, number: int) -> bytes:
    place = {"item_id": "i", "output_index": 0, "content_index": 0, "sequence_number": number}
    return typed("response.output_text.delta", delta=text, **place)


RESPONSES = Speech(
    "/v1/responses",
    typed("response.created", sequence_number=0, response={**_RESPONSE, "status": "in_progress"}),
    response_delta(FIRST, 1),
    response_delta(SECOND, 2),
    typed("response.completed", sequence_number=3, response={**_RESPONSE, "status": "completed"}),
)

_MESSAGE = {"id": "m", "type": "message", "role": "assistant", "model": "m", "content": []}


def block_delta(text: str) -> bytes:
    return typed("content_block_delta", index=0, delta={"type": "text_delta", "text": text})


MESSAGES = Speech(
    "/v1/messages",
    typed("message_start", message={**_MESSAGE, "usage": {"input_tokens": 3, "output_tokens": 1}})
    + typed("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    block_delta(FIRST),
    block_delta(SECOND),
    typed("content_block_stop", index=0)
    + typed("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 3})
    + typed("message_stop"),
)


# ---------------------------------------------------------------- what an SDK makes of it


@dataclass(slots=True)
class Heard:
    """What a program gets to see. `raised` is the exception's name, and empty for a stream that
    seemed whole; `error` the error object as the SDK shows it."""

    text: str = ""
    raised: str = ""
    status: int | None = None
    error: Json | None = None
    message: str = ""


Read = Callable[[str, str, int, Heard], None]
"""Asks the proxy at a URL for a stream of a model, with that many retries, and reads it."""

QUESTION: Any = [{"role": "user", "content": PROMPT}]


def openai_sdk(url: str, retries: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=CLIENT_KEY, max_retries=retries, timeout=30)


def anthropic_sdk(url: str, retries: int) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key=CLIENT_KEY, max_retries=retries, timeout=30)


def openai_chat(url: str, model: str, retries: int, heard: Heard) -> None:
    with openai_sdk(url, retries) as sdk:
        for chunk in sdk.chat.completions.create(model=model, messages=QUESTION, stream=True):
            heard.text += chunk.choices[0].delta.content or ""


def openai_responses(url: str, model: str, retries: int, heard: Heard) -> None:
    with openai_sdk(url, retries) as sdk:
        for event in sdk.responses.create(model=model, input=PROMPT, stream=True):
            if event.type == "response.output_text.delta":
                heard.text += event.delta
            elif event.type == "error":  # not raised, but handed over like any other event
                heard.error = event.model_dump()


def anthropic_create(url: str, model: str, retries: int, heard: Heard) -> None:
    with anthropic_sdk(url, retries) as sdk:
        for event in sdk.messages.create(model=model, max_tokens=9, messages=QUESTION, stream=True):
            if event.type == "content_block_delta" and event.delta.type == "text_delta":
                heard.text += event.delta.text


def anthropic_stream(url: str, model: str, retries: int, heard: Heard) -> None:
    with (
        anthropic_sdk(url, retries) as sdk,
        sdk.messages.stream(model=model, max_tokens=9, messages=QUESTION) as stream,
    ):
        for text in stream.text_stream:
            heard.text += text


def in_node(api: str) -> Read:
    def read(url: str, model: str, retries: int, heard: Heard) -> None:
        argv: list[str | Path] = [need("node"), Path(__file__).with_name("endings.mjs")]
        argv += [f"{url}/v1", CLIENT_KEY, model, PROMPT, api, str(retries)]
        printed = subprocess.run(argv, check=True, stdout=subprocess.PIPE, timeout=60).stdout
        for name, value in json.loads(printed).items():
            setattr(heard, name, value)

    return read


def hear(sdk: Sdk, url: str, model: str, retries: int) -> Heard:
    heard = Heard()
    try:
        sdk.read(url, model, retries, heard)
    except Exception as error:  # of whatever type: the test tells which it should be
        heard.raised = f"{type(error).__module__.partition('.')[0]}.{type(error).__name__}"
        heard.status = getattr(error, "status_code", None)
        heard.message = str(error)
        if isinstance(body := getattr(error, "body", None), dict):
            heard.error = body.get("error", body)  # openai-python takes it out, anthropic does not
    return heard


@dataclass(frozen=True, slots=True)
class Sdk:
    """One SDK's way of streaming, and what it raises: `told` at an error event, `cut` where a
    stream ends without its last chunk."""

    read: Read
    speech: Speech
    told: str
    cut: str


# anthropic-python's APIStatusError bears the status 200, that of the head. Its cuts, like those of
# openai-node ("terminated", says Node's fetch), are no exceptions of the SDK's own.
SDKS = {
    "openai-chat": Sdk(openai_chat, CHAT, "openai.APIError", "openai.APIConnectionError"),
    "openai-responses": Sdk(
        openai_responses, RESPONSES, "openai.APIConnectionError", "openai.APIConnectionError"
    ),
    "anthropic-create": Sdk(
        anthropic_create, MESSAGES, "anthropic.APIStatusError", "httpx2.RemoteProtocolError"
    ),
    "anthropic-stream": Sdk(
        anthropic_stream, MESSAGES, "anthropic.APIStatusError", "httpx2.RemoteProtocolError"
    ),
    "node-chat": Sdk(in_node("chat"), CHAT, "APIError", "TypeError"),
    "node-responses": Sdk(in_node("responses"), RESPONSES, "APIError", "TypeError"),
}


@pytest.fixture(params=SDKS)
def sdk(request: pytest.FixtureRequest) -> Sdk:
    if request.param.startswith("node-"):
        need("node")
        need("openai-node")
    return SDKS[request.param]


one_of_each = pytest.mark.parametrize(
    "sdk", ["openai-chat", "anthropic-create", "node-chat"], indirect=True
)


# ---------------------------------------------------------------- the stage


@dataclass(frozen=True, slots=True)
class Stage:
    """The proxy process, and the one server that its upstreams lead to."""

    upstream: Upstream
    proxy: Process

    async def hear(self, sdk: Sdk, model: str, *, retries: int = 2) -> Heard:
        """What the SDK makes of one stream; left to itself, it would retry twice."""
        return await asyncio.to_thread(hear, sdk, self.proxy.url, model, retries)

    @asynccontextmanager
    async def asking(self, speech: Speech, model: str) -> AsyncIterator[Client]:
        """The same question, by a client that shows every byte."""
        client = await Client.connect(urlsplit(self.proxy.url).port or 0)
        body = {"model": model, "messages": QUESTION, "input": PROMPT, "stream": True}
        try:
            await client.send(post(json.dumps(body).encode(), path=speech.path))
            yield client
        finally:
            client.abort()

    async def reply(self, speech: Speech, model: str) -> Reply:
        async with self.asking(speech, model) as client:
            return await client.reply()

    async def play(self, sdk: Sdk, model: str, *gates: asyncio.Event) -> tuple[Heard, Reply]:
        """One stream, as the SDK and as a raw client gets it. Each gate opens at the second
        heartbeat to the raw client, and so behind as many to the SDK, which has asked before."""
        hearing = asyncio.create_task(self.hear(sdk, model))
        async with asyncio.timeout(30):  # on a busy machine node takes long to start
            while not self.upstream.requests:
                await asyncio.sleep(0.01)
        async with self.asking(sdk.speech, model) as client:
            for gate in gates:
                await two_heartbeats(client)
                gate.set()
            return await hearing, await client.reply()


async def two_heartbeats(client: Client) -> None:
    wanted = client.seen.count(BEAT) + 2
    async with asyncio.timeout(PATIENCE):
        while client.seen.count(BEAT) < wanted:
            data = await client.reader.read(65536)
            assert data, client.seen
            client.seen += data


@contextmanager
def start_proxy(folder: Path, upstream: int) -> Iterator[Process]:
    """A proxy whose routes, each called by its model, differ in patience."""
    port = free_port()
    up: Json = {
        "base_url": f"http://127.0.0.1:{upstream}/v1",
        "api_key": KEY,
        "circuit": {"failures": 1000},  # what fails in one test is there in the next
    }
    hasty: Json = {**up, "timeouts": {"first_byte": "300ms", "idle": "300ms"}}
    early: Json = {"commit_after": BEAT_EVERY, "heartbeat": BEAT_EVERY}
    pair: Json = {"attempts": 2}
    config = {
        "listen": {"host": "127.0.0.1", "port": port},
        "drain_timeout": "1s",
        "upstreams": {
            "up": up,
            "second": up,
            "hasty": hasty,
            "hasty-second": hasty,
            "narrow": {**up, "max_streams": 1},
            "nowhere": {**up, "base_url": f"http://127.0.0.1:{free_port()}/v1"},
        },
        "routes": [
            {"models": ["early"], "upstreams": ["up"], **early},
            {"models": ["early-hasty"], "upstreams": ["hasty"], **early},
            {"models": ["pair"], "upstreams": ["up", "second"], **pair},
            {"models": ["hasty-pair"], "upstreams": ["hasty", "hasty-second"], **pair},
            {"models": ["hasty"], "upstreams": ["hasty"]},
            {"models": ["narrow"], "upstreams": ["narrow"]},
            {"models": ["nowhere"], "upstreams": ["nowhere"]},
            {"models": ["*"], "upstreams": ["up"]},
        ],
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    argv: list[str | Path] = [sys.executable, "-m", "proxy", "--config", file]
    with running(argv, f"http://127.0.0.1:{port}", "/livez", folder / "proxy.log") as process:
        yield process
    assert process.child.returncode == 0, process.log.read_text()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def theatre(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    async with listening(Upstream()) as upstream:
        with start_proxy(tmp_path_factory.mktemp("proxy"), upstream.port) as proxy:
            yield Stage(upstream, proxy)
            canaries.search(get(proxy.url + "/metrics"), "the metrics of tests/real")


@pytest.fixture
def stage(theatre: Stage) -> Stage:
    theatre.upstream.requests.clear()
    return theatre


# ---------------------------------------------------------------- heartbeats


async def test_a_whole_stream_is_whole(stage: Stage, sdk: Sdk) -> None:
    stage.upstream.plays(STREAM, chunked(sdk.speech.events), LAST)
    heard, reply = await stage.play(sdk, "m")
    assert heard == Heard(text=COMPLETION)
    assert (reply.body, reply.whole) == (sdk.speech.events, True)


async def test_heartbeats_are_not_heard(stage: Stage, sdk: Sdk) -> None:
    """They come before the answer and between events, but into an event, however slow, never."""
    speech, head, second, half = sdk.speech, *(asyncio.Event() for _ in range(3))
    stage.upstream.plays(
        Until(head),
        STREAM,
        chunked(speech.opening + speech.first),
        Until(second),
        chunked(speech.second[:-9]),
        Until(half),
        chunked(speech.second[-9:] + speech.closing),
        LAST,
    )

    async def dawdle() -> None:
        await second.wait()
        await asyncio.sleep(4 * BEAT_EVERY)
        half.set()

    dawdling = asyncio.create_task(dawdle())
    heard, reply = await stage.play(sdk, "early", head, second)
    await dawdling
    assert heard == Heard(text=COMPLETION)
    assert reply.body.startswith(BEAT * 2)
    assert speech.opening + speech.first + BEAT * 2 in reply.body
    assert speech.second in reply.body
    assert (reply.body.replace(BEAT, b""), reply.whole) == (speech.events, True)


# ---------------------------------------------------------------- errors in the stream


DRY: Json = {"message": "the well is dry", "type": "server_error", "param": None, "code": "dry"}
ABORTED: Json = {"type": "upstream_error", "code": "upstream_aborted"}
TIMEOUT: Json = {"type": "timeout_error", "code": "upstream_timeout"}


def refusal(speech: Speech, status: bytes, *fields: bytes) -> bytes:
    """An upstream's error answer, in the form of its API."""
    document: Json = {"error": DRY}
    if speech is MESSAGES:
        document["type"] = "error"
    return json_answer(json.dumps(document).encode(), *fields, status=status)


def check_told(sdk: Sdk, heard: Heard, error: Json, word: str = "") -> None:
    """The SDK has raised as it does at an error event, and shows at least this `error`."""
    assert heard.raised == sdk.told
    assert heard.error is not None
    if sdk.speech is RESPONSES:  # the event is flat: its type is the event's
        assert isinstance(heard.error["sequence_number"], int)
        error = {**error, "type": "error"}
    assert heard.error | error == heard.error
    assert word in heard.error["message"]
    if sdk.told != sdk.cut:
        assert heard.error["message"] in heard.message


@pytest.mark.parametrize(
    ("model", "end", "error", "word"),
    [("m", Close(), ABORTED, ""), ("hasty", UntilGone(), TIMEOUT, "idle")],
    ids=["dead", "silent"],
)
async def test_a_failure_between_events_is_told(
    stage: Stage, sdk: Sdk, model: str, end: Step, error: Json, word: str
) -> None:
    begun = sdk.speech.opening + sdk.speech.first
    stage.upstream.plays(STREAM, chunked(begun), end)
    heard, reply = await stage.play(sdk, model)
    assert heard.text == FIRST
    check_told(sdk, heard, error, word)
    assert reply.body.startswith(begun)
    assert not reply.whole
    assert len(stage.upstream.requests) == 2  # the SDK's and ours: what has begun is not retried


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (lambda speech: refusal(speech, b"500 Dry"), DRY),
        (lambda speech: refusal(speech, b"429 Too Many Requests"), DRY),
        (lambda _: Close(), ABORTED),
    ],
    ids=["500", "429", "dead"],
)
async def test_a_failure_behind_an_early_head_is_told(
    stage: Stage, sdk: Sdk, end: Callable[[Speech], Step], error: Json
) -> None:
    gate = asyncio.Event()
    stage.upstream.plays(Until(gate), end(sdk.speech))
    heard, reply = await stage.play(sdk, "early", gate)
    assert heard.text == ""
    check_told(sdk, heard, error)
    assert (reply.status, reply.whole) == (200, False)
    assert reply.body.startswith(BEAT * 2)


async def test_silence_behind_an_early_head_is_told(stage: Stage, sdk: Sdk) -> None:
    stage.upstream.plays(UntilGone())
    heard, reply = await stage.play(sdk, "early-hasty")
    check_told(sdk, heard, TIMEOUT, "first_byte")
    assert (reply.status, reply.whole) == (200, False)
    assert len(stage.upstream.requests) == 2


async def test_a_cut_inside_an_event_raises(stage: Stage, sdk: Sdk) -> None:
    half = sdk.speech.opening + sdk.speech.first + sdk.speech.second[:-9]
    stage.upstream.plays(STREAM, chunked(half), Close())
    heard, reply = await stage.play(sdk, "m")
    assert (heard.text, heard.raised, heard.error) == (FIRST, sdk.cut, None)
    assert (reply.body, reply.whole) == (half, False)
    assert len(stage.upstream.requests) == 2


# ---------------------------------------------------------------- errors instead of a stream


def check_failed(sdk: Sdk, heard: Heard, status: int) -> None:
    own = {503: "ServiceUnavailableError", 504: "GatewayTimeoutError"}
    names = own if sdk.speech is MESSAGES else {}
    assert heard.raised.rpartition(".")[2] == names.get(status, "InternalServerError")
    assert heard.status == status


def error_of(reply: Reply) -> Json:
    error: Json = json.loads(reply.body)["error"]
    return error


@one_of_each
@pytest.mark.parametrize(
    ("model", "status", "code"),
    [("nowhere", 502, "upstream_unreachable"), ("hasty", 504, "upstream_timeout")],
)
async def test_a_failure_before_the_head_is_a_status(
    stage: Stage, sdk: Sdk, model: str, status: int, code: str
) -> None:
    stage.upstream.plays(UntilGone())
    heard = await stage.hear(sdk, model, retries=0)
    reply = await stage.reply(sdk.speech, model)
    assert (reply.status, error_of(reply)["code"]) == (status, code)
    check_failed(sdk, heard, status)
    assert heard.error == error_of(reply)


@one_of_each
async def test_a_full_upstream_is_a_status(stage: Stage, sdk: Sdk) -> None:
    stage.upstream.plays(STREAM, chunked(CHAT.opening), UntilGone())
    async with stage.asking(CHAT, "narrow") as occupant:
        await occupant.until(CHAT.opening)
        heard = await stage.hear(sdk, "narrow", retries=0)
        reply = await stage.reply(sdk.speech, "narrow")
    assert (reply.status, error_of(reply)["code"]) == (503, "no_upstream_available")
    assert int(reply.values("retry-after")[0]) >= 1
    check_failed(sdk, heard, 503)
    assert heard.error == error_of(reply)
    assert len(stage.upstream.requests) == 1


@one_of_each
async def test_retries_times_attempts_is_all(stage: Stage, sdk: Sdk) -> None:
    """The SDK asks three times, as it would without the proxy, and each time two upstreams are."""
    stage.upstream.plays(refusal(sdk.speech, b"500 Dry", b"retry-after-ms: 1"))
    heard = await stage.hear(sdk, "pair")
    check_failed(sdk, heard, 500)
    assert heard.error == DRY
    assert len(stage.upstream.requests) == 3 * 2


async def test_a_timeout_is_not_multiplied(stage: Stage) -> None:
    """What may have been billed is asked again by the SDK alone."""
    sdk = SDKS["openai-chat"]
    stage.upstream.plays(UntilGone())
    heard = await stage.hear(sdk, "hasty-pair", retries=1)
    check_failed(sdk, heard, 504)
    assert len(stage.upstream.requests) == 2 * 1


@one_of_each
async def test_an_upstreams_429_is_relayed(stage: Stage, sdk: Sdk) -> None:
    stage.upstream.plays(refusal(sdk.speech, b"429 Too Many Requests", b"Retry-After: 7"))
    heard = await stage.hear(sdk, "m", retries=0)
    reply = await stage.reply(sdk.speech, "m")
    assert heard.raised.endswith("RateLimitError")
    assert (heard.status, heard.error) == (429, DRY)
    assert (reply.status, reply.values("retry-after")) == (429, [b"7"])


@one_of_each
async def test_an_upstreams_429_is_waited_for(stage: Stage, sdk: Sdk) -> None:
    """The SDK obeys the upstream's own word, sent on: without it, it would wait half a second."""
    stage.upstream.plays(STREAM, chunked(sdk.speech.events), LAST)
    stage.upstream.plays_first(refusal(sdk.speech, b"429 Too Many Requests", b"retry-after-ms: 1"))
    assert await stage.hear(sdk, "m") == Heard(text=COMPLETION)
    assert len(stage.upstream.requests) == 2


# ---------------------------------------------------------------- curl


@pytest.mark.parametrize(
    ("end", "prints", "exit_code"),
    [
        ([chunked(CHAT.second + CHAT.closing), LAST], CHAT.second + CHAT.closing, 0),
        ([Close()], b'data: {"error":', 18),
        ([chunked(CHAT.second[:-9]), Close()], CHAT.second[:-9], 18),
    ],
    ids=["whole", "cut between events", "cut inside an event"],
)
async def test_curl_shows_heartbeats_and_notices_a_cut(
    stage: Stage, end: list[Step], prints: bytes, exit_code: int
) -> None:
    """18: "Partial file. Only a part of the file was transferred." (its manual page)"""
    gate = asyncio.Event()
    stage.upstream.plays(Until(gate), STREAM, chunked(CHAT.opening + CHAT.first), *end)
    body = json.dumps({"model": "early", "stream": True, "messages": QUESTION})
    argv: list[str | Path] = [
        need("curl"),
        "-sSN",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    curl = await asyncio.create_subprocess_exec(
        *argv, stage.proxy.url + CHAT.path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert curl.stdout
    async with asyncio.timeout(30):
        assert [await curl.stdout.readline() for _ in range(2)] == [BEAT, BEAT]
        gate.set()
        printed, said = await curl.communicate()
    assert printed.replace(BEAT, b"").startswith(CHAT.opening + CHAT.first + prints)
    assert curl.returncode == exit_code
    assert said.startswith(b"curl: (18) ") == (exit_code == 18)
