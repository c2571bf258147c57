"""F4 demo: the embedded upstream (`demo://`), so that a first try needs no key and no network.

A small OpenAI-shaped server of its own. It is reached over socket pairs inside the process: nothing
listens, and the relay in front of it is the same as for any other upstream.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

import msgspec
from aiohttp import web

from proxy.connection import UpstreamConnection

MODEL = "sluice-demo"
_PACE = 0.04  # seconds a word: about as fast as people read
_SHOWN = 300  # characters of the prompt that the answer repeats


class Demo:
    """The embedded upstream; `pace` is the time between two words in seconds."""

    def __init__(self, pace: float = _PACE) -> None:
        self._pace = pace
        self._server = web.Server(self._handle, handler_cancellation=True, access_log=None)

    async def connect(self) -> UpstreamConnection:
        """A connection to it, as the pool wants one."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        await loop.connect_accepted_socket(self._server, theirs)
        _, connection = await loop.create_unix_connection(
            lambda: UpstreamConnection("demo"), sock=ours
        )
        return connection

    async def close(self) -> None:
        await self._server.shutdown(timeout=0.1)  # 0 would be no limit

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        match request.method, request.path.rstrip("/"):
            case "GET", "/models":
                return _json({"object": "list", "data": [_model()]})
            case "GET", path if path == f"/models/{MODEL}":
                return _json(_model())
            case "POST", "/chat/completions":
                return await self._complete(request)
        return _error(404, f"The demo upstream has no {request.method} {request.path}.")

    async def _complete(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            ask = msgspec.json.decode(await request.read(), type=_Request)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return _error(400, "The body must be JSON with at least one message.", "messages")
        prompt = ask.messages[-1].text
        words = _words(prompt)
        most = ask.max_completion_tokens or ask.max_tokens or len(words)
        finish_reason = "stop" if most >= len(words) else "length"
        completion = _Completion(prompt, words[:most], finish_reason)
        if not ask.stream:
            await asyncio.sleep(self._pace * len(completion.words))
            return _json(completion.whole())
        wants_usage = ask.stream_options is not None and bool(ask.stream_options.include_usage)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        async for event in self._paced(completion.events(wants_usage)):
            await response.write(b"data: " + event + b"\n\n")
        return response

    async def _paced(self, events: Sequence[bytes]) -> AsyncIterator[bytes]:
        for event in events:
            yield event
            await asyncio.sleep(self._pace)


class _Part(msgspec.Struct):
    text: str = ""


class _Message(msgspec.Struct):
    """Its content is a text or a list of parts."""

    content: str | list[_Part] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return " ".join(part.text for part in self.content if part.text)
        return self.content or ""


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Request(msgspec.Struct):
    """As much of a chat completion request as the demo understands."""

    messages: Annotated[list[_Message], msgspec.Meta(min_length=1)]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None


class _Completion:
    """One answer, in OpenAI's two shapes."""

    def __init__(self, prompt: str, words: Sequence[str], finish_reason: str) -> None:
        self.words = words
        self._finish_reason = finish_reason
        self._usage = {
            "prompt_tokens": len(prompt.split()),
            "completion_tokens": len(words),
            "total_tokens": len(prompt.split()) + len(words),
        }
        self._common = {
            "id": f"chatcmpl-demo-{time.time_ns():x}",
            "created": int(time.time()),
            "model": MODEL,
        }

    def whole(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(self.words)}
        choice = {"index": 0, "message": message, "finish_reason": self._finish_reason}
        return {
            **self._common,
            "object": "chat.completion",
            "choices": [choice],
            "usage": self._usage,
        }

    def events(self, wants_usage: bool) -> list[bytes]:
        """The data of the stream's events, `[DONE]` included."""
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        deltas += [{"content": word} for word in self.words]
        events = [self._chunk(delta, None, wants_usage) for delta in deltas]
        events.append(self._chunk({}, self._finish_reason, wants_usage))
        if wants_usage:
            usage = {"choices": [], "usage": self._usage}
            events.append({**self._common, "object": "chat.completion.chunk", **usage})
        return [msgspec.json.encode(event) for event in events] + [b"[DONE]"]

    def _chunk(
        self, delta: dict[str, Any], finish_reason: str | None, wants_usage: bool
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        chunk = {**self._common, "object": "chat.completion.chunk", "choices": [choice]}
        return {**chunk, "usage": None} if wants_usage else chunk


def _words(prompt: str) -> list[str]:
    shown = prompt if len(prompt) <= _SHOWN else prompt[:_SHOWN] + "…"
    text = (
        f"You said: “{shown}” This is Sluice's embedded demo upstream: it understands nothing, "
        "but every word reaches you as it is written, through the same relay that a real model's "
        "words take. Set OPENAI_API_KEY, or name an upstream of your own in config.yaml, to hear "
        "from one."
    )
    first, *others = text.split(" ")
    return [first, *(" " + word for word in others)]


def _model() -> dict[str, Any]:
    return {"id": MODEL, "object": "model", "created": 0, "owned_by": "sluice"}


def _json(document: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(
        status=status,
        body=msgspec.json.encode(document),
        headers={"Content-Type": "application/json"},
    )


def _error(status: int, message: str, param: str | None = None) -> web.Response:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
    return _json({"error": error}, status)
