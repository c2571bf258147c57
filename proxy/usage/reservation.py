"""F0 usage.reservation: how many tokens a request may cost, before anybody knows.

The text that goes into the prompt is estimated, images and files have a fixed price, and what may
be written is what the request declares. Tools and schemas are not counted.

A request's members are decoded into types that hold its text and nothing else. That takes little
longer than skipping it, but a hostile body could be millions of empty objects: a body with more
than `_MAX_ITEMS` braces, be they text or not, is not decoded.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from proxy.usage.words import Endpoint, Usage, tokens_of

_PER_FILE = 1_000  # tokens for each image or file
_MOST_DECLARED = 4_096  # of a declared maximum that is reserved
_UNDECLARED = 1_024
_MOST_CHOICES = 128  # OpenAI's own limit of `n`
_MAX_ITEMS = 20_000  # objects, or strings of a list: 20 ms, and 3 MB for as long

_FILES = {
    # OpenAI's chat completions and Responses
    "image_url",
    "input_image",
    "input_audio",
    "input_file",
    "file",
    "computer_screenshot",
    # Anthropic's messages
    "image",
    "document",
}


class _Item(msgspec.Struct):
    """A message, a part of one, a tool call or an item of Responses: whatever of it is text."""

    type: str | None = None
    content: _Text = None
    text: _Text = None
    thinking: _Text = None
    reasoning_content: _Text = None
    refusal: _Text = None
    summary: _Text = None  # of reasoning, in Responses
    output: _Text = None  # of a tool
    tool_calls: _Text = None
    function: _Text = None
    function_call: _Text = None
    arguments: _Text = None
    input: msgspec.Raw = msgspec.Raw()  # of a tool, as JSON: Anthropic's `tool_use`


_Text: TypeAlias = str | list[_Item] | _Item | None


class _Request(msgspec.Struct):
    messages: _Text = None
    system: _Text = None
    instructions: _Text = None
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    max_completion_tokens: msgspec.Raw = msgspec.Raw()
    max_tokens: msgspec.Raw = msgspec.Raw()
    max_output_tokens: msgspec.Raw = msgspec.Raw()
    n: msgspec.Raw = msgspec.Raw()


_request = msgspec.json.Decoder(_Request)
_text = msgspec.json.Decoder(_Text)
_strings = msgspec.json.Decoder(list[str])


def reserved(endpoint: Endpoint, body: bytes) -> Usage:
    """The tokens to reserve for a request: its input as estimated, and the most it may write.

    A body that can't be read has all its bytes counted as text, and declares nothing.
    """
    if endpoint is Endpoint.NONE:
        return Usage(0, 0)
    try:
        request = _read(body)
        read = _input_of(request)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Usage(tokens_of(len(body)), _UNDECLARED)
    return Usage(read, 0 if endpoint is Endpoint.EMBEDDINGS else _output_of(request))


def _read(body: bytes) -> _Request:
    # An object and its comma are three bytes: a short body can't hold too many.
    if len(body) > 3 * _MAX_ITEMS:
        _refuse_crowds(body, b"{")
    return _request.decode(body)


def _input_of(request: _Request) -> int:
    texts: list[Any] = [request.messages, request.system, request.instructions]
    token_ids = 0
    for member in (bytes(request.prompt), bytes(request.input)):
        if b'"' in member:
            texts.append(_texts_in(member))
        elif member.startswith(b"["):  # a list of token ids, or several
            token_ids += member.count(b",") + 1
    characters, files = _measure(texts)
    return tokens_of(characters) + token_ids + _PER_FILE * files


def _texts_in(member: bytes) -> Any:
    try:
        return _text.decode(member)
    except msgspec.ValidationError:
        _refuse_crowds(member, b'"')
        return _strings.decode(member)


def _measure(texts: list[Any]) -> tuple[int, int]:
    """Characters of text and number of files in them, however deep. The list grows by what is
    found within its items."""
    characters = files = 0
    for each in texts:
        if isinstance(each, list):
            texts += each
        elif isinstance(each, _Item):
            files += each.type in _FILES
            texts += filter(None, msgspec.structs.astuple(each)[1:])  # all but the type
        elif each is not None:
            characters += len(each)
    return characters, files


def _output_of(request: _Request) -> int:
    """What is declared, under whichever name, for each of `n` choices."""
    maxima = (request.max_completion_tokens, request.max_tokens, request.max_output_tokens)
    declared = [number for each in maxima if (number := _number(each)) is not None]
    choices = _number(request.n) or 1
    return min(max(declared, default=_UNDECLARED), _MOST_DECLARED) * min(choices, _MOST_CHOICES)


def _number(member: msgspec.Raw) -> int | None:
    """A whole number that isn't negative; as good as infinite beyond nine digits."""
    digits = bytes(member)
    return int(digits[:10]) if digits.isdigit() else None


def _refuse_crowds(text: bytes, mark: bytes) -> None:
    """Raises ValidationError if there are too many of `mark`."""
    at = -1
    for _ in range(_MAX_ITEMS):
        at = text.find(mark, at + 1)
        if at < 0:
            return
    raise msgspec.ValidationError
