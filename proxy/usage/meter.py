"""F0 usage.meter: how much a model has written, for answers that do not say.

Estimated are a token for each four characters of content, reasoning and tool calls. Nothing is
parsed for it: a piece is kept, and a few KiB at a time are searched for the strings under the keys
that hold such text. A string's value is what follows its key, a colon and a quote, up to the next
quote that isn't escaped.
"""

from __future__ import annotations

import re

from proxy.usage.words import Endpoint, tokens_of

_BATCH = 4 * 1024  # bytes that are looked at together; a longer line is, in parts

# Where text stands. What `delta` adds in a stream of Responses is repeated in its `.done` events
# under other keys, which are those of a body.
_CHAT = ("content", "reasoning_content", "reasoning", "refusal", "arguments")
_KEYS = {
    (Endpoint.CHAT, True): _CHAT,
    (Endpoint.CHAT, False): _CHAT,
    (Endpoint.COMPLETIONS, True): ("text",),
    (Endpoint.COMPLETIONS, False): ("text",),
    (Endpoint.RESPONSES, True): ("delta",),
    (Endpoint.RESPONSES, False): ("text", "arguments", "refusal", "input"),
    (Endpoint.MESSAGES, True): ("text", "thinking", "partial_json"),
    (Endpoint.MESSAGES, False): ("text", "thinking"),
}
_STRING = rb'([^"\\]*+(?:\\.[^"\\]*+)*+)'  # up to its closing quote, or as far as it has come
# One pattern a key, used where the key is: a literal beginning is found faster than one of several.
_VALUES = {
    kind: [
        (b'"%b":' % key.encode(), re.compile(rb'"%b": ?"%b' % (key.encode(), _STRING)))
        for key in keys
    ]
    for kind, keys in _KEYS.items()
}
# vLLM tells reasoning twice, by its new name and its old one (vllm #27755): once is enough.
_REASONING = b'"reasoning":'
_TOLD_AGAIN = re.compile(rb'"reasoning": ?"%b", ?(?="reasoning_content": ?"\1")' % _STRING)

_MAX_KEY = 32  # bytes of a key with its quotes, colon and space
_KEY = re.compile(rb'"\w++": ?\Z')
_KEY_BEGUN = re.compile(rb'"\w++"(?:: ?)?\Z')
_UNFINISHED_ESCAPE = re.compile(rb"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_HIGH_SURROGATE = re.compile(rb"\\u[dD][89abAB]")  # the first half of one character
_CONTINUATION = bytes(range(0x80, 0xC0))  # in UTF-8, all bytes of a character but its first


class Meter:
    """Counts the characters of an answer's text, streamed or not, fed in any pieces.

    Of what was fed, less than `_BATCH` bytes are kept.
    """

    __slots__ = ("_characters", "_pieces", "_size", "_values")

    def __init__(self, endpoint: Endpoint, stream: bool) -> None:
        self._values = _VALUES.get((endpoint, stream), [])
        self._characters = 0
        self._pieces: list[bytes] = []  # not counted yet; they begin outside of strings
        self._size = 0

    def feed(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._size += len(piece)
        if self._size >= _BATCH:
            self._digest()

    @property
    def tokens(self) -> int:
        """The estimate for all that was fed so far."""
        return tokens_of(self.characters)

    @property
    def characters(self) -> int:
        """How many characters of text there were in all that was fed so far."""
        waiting, _ = _cut_escape(_unquoted(b"".join(self._pieces)))
        return self._characters + self._count(waiting)

    def _digest(self) -> None:
        text = b"".join(self._pieces)
        end = text.rfind(b"\n") + 1  # no string of JSON reaches over it
        self._characters += self._count(text[:end])
        rest = text[end:]
        if len(rest) >= _BATCH:
            rest = self._digest_part(rest)
        self._pieces, self._size = [rest], len(rest)

    def _digest_part(self, text: bytes) -> bytes:
        """Counts what has come of a long line. Gives what has to stand before the rest of it, so
        that the two read like a line of their own."""
        text, escape = _cut_escape(_unquoted(text))
        self._characters += self._count(text)
        if text.count(b'"') % 2 == 0:  # between strings, and the last of them may be a key
            key = _KEY_BEGUN.search(text[-_MAX_KEY:])
            return key[0] if key else b""
        quote = text.rfind(b'"')  # within the string that begins here
        if key := _KEY.search(text, max(0, quote - _MAX_KEY), quote):
            return key[0] + b'"' + escape
        begun = text[quote:] if len(text) - quote < _MAX_KEY else b'"'  # a key itself, or no text
        return begun + escape

    def _count(self, text: bytes) -> int:
        """The characters of all values in a text that begins outside of strings."""
        if _REASONING in text:
            text = _TOLD_AGAIN.sub(b"", text)
        found: list[bytes] = []
        for key, value in self._values:
            if key in text:
                found += value.findall(text)
        values = _unquoted(b"".join(found))
        characters = len(values.translate(None, _CONTINUATION))
        if escapes := values.count(b"\\"):
            characters -= escapes + 4 * values.count(b"\\u") + len(_HIGH_SURROGATE.findall(values))
        return characters


def _unquoted(text: bytes) -> bytes:
    """The text with one harmless byte for each escaped backslash and quote: so every quote that is
    left begins or ends a string, and every backslash an escape."""
    if b"\\" not in text:
        return text
    return text.replace(b"\\\\", b".").replace(b'\\"', b".")


def _cut_escape(text: bytes) -> tuple[bytes, bytes]:
    """The text without an escape whose end is still to come, and that beginning of it."""
    escape = _UNFINISHED_ESCAPE.search(text, max(0, len(text) - len(r"\u000")))
    return (text[: escape.start()], escape[0]) if escape else (text, b"")
