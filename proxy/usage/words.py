"""F0 usage.words: which endpoints generate, and what a generation costs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from urllib.parse import unquote


class Endpoint(Enum):
    """What answers to a path, as far as it uses tokens."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"
    RESPONSES = "/v1/responses"
    MESSAGES = "/v1/messages"
    NONE = ""

    @classmethod
    def of(cls, path: str) -> Endpoint:
        """The endpoint of a request path (without its query), in whatever spelling an upstream may
        understand, and below whatever folder: no limit is passed by writing
        `/v1/chat/complet%69ons/`, and some have `/v1/deployments/NAME/chat/completions`."""
        return _ENDPOINTS.get(path) or _found(path)


_ENDPOINTS = {endpoint.value: endpoint for endpoint in Endpoint if endpoint.value}


_MAX_ENCODINGS = 4  # rounds of percent-decoding; more are refused as a path
_STOPS = re.compile(r"[;?#\0]")  # where some servers take a segment's name to end


def _found(path: str) -> Endpoint:
    for _ in range(_MAX_ENCODINGS):
        path = unquote(path)
    segments = [_STOPS.split(segment)[0] for segment in path.lower().split("/")]
    names = [segment for segment in segments if segment not in ("", "v1")]
    if names[-2:] == ["chat", "completions"]:
        return Endpoint.CHAT
    if "threads" in names and names[-1] == "messages":  # those generate nothing
        return Endpoint.NONE
    return _ENDPOINTS.get(f"/v1/{names[-1]}", Endpoint.NONE) if names else Endpoint.NONE


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the prompt (cached ones included) and of what was written."""

    input: int
    output: int

    @property
    def total(self) -> int:
        return self.input + self.output


# What states a usage holds this, and no string does: its quotes would be escaped.
STATED = re.compile(rb'"usage"\s*:\s*\{')


def tokens_of(characters: int) -> int:
    """How many tokens that much text is, by the estimate that holds everywhere: a quarter, rounded
    up."""
    return -(-characters // 4)
