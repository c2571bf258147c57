"""F0 members: where a JSON object's own members stand in its bytes.

A body belongs to its sender. Where the config wants another model's name in it, or usage asked for,
only those bytes change: no document is built and written out again, so numbers, escapes, order and
spaces stay as they came. Three observations make the places cheap to find:

- Within a JSON string a quote is always escaped. In `_plain` text, where each `\\\\` and `\\"` is
  overwritten by as many harmless bytes, every quote that is left begins or ends a string, and
  strings can be skipped without looking at them. All else stands where it stood.
- Outside of strings, brackets alone say how deep something stands. A valid document needs no look at
  which closes which, and msgspec tells what is valid faster than anything written here could.
- For the same reason a document can be read backwards from its end, even if its beginning is
  missing and the first byte at hand stands within a string (`find_from_end`).

Work is bounded: a body of more than `_MAX_STEPS` brackets and members, or nested so deep that
msgspec refuses it, counts as unreadable.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

_MAX_STEPS = 100_000  # of a scan: about 40 ms. A conversation of 1 MB has some thousands

_MEMBER = re.compile(rb'\s*+[{,]\s*+"([^"]*+)"\s*+:\s*+')
_SCALAR = re.compile(rb'"[^"]*+"|[^\s"\[\]{},]++')
# The next bracket, or nothing where the text ends before it does.
_BRACKET = re.compile(rb'[^"\[\]{}]*+(?:"[^"]*+"[^"\[\]{}]*+)*+([\[\]{}]|)')
_STEP = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}
# The same language read backwards, where a name follows its colon.
_BACKWARDS = re.compile(rb':\s*+"([^"]*+)"|"[^"]*+"|[\[\]{},]')

_EMPTY_OBJECT = re.compile(rb"\s*+\{\s*+\}")
_ESCAPED_ASCII = re.compile(rb"\\u00[4-7]")  # letters and the underscore: nobody has to escape them
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class _Object(msgspec.Struct):
    """Any JSON object: all members are checked and skipped, none is built."""


class _Streamed(msgspec.Struct):
    stream_options: msgspec.Raw = msgspec.Raw()


class _StreamOptions(msgspec.Struct):
    include_usage: msgspec.Raw = msgspec.Raw()


_object = msgspec.json.Decoder(_Object)
_streamed = msgspec.json.Decoder(_Streamed)
_stream_options = msgspec.json.Decoder(_StreamOptions)
_string = msgspec.json.Decoder(str)

_TRUE = msgspec.Raw(b"true")
_INCLUDE_USAGE = b'"include_usage":true'


def find(body: bytes, name: str, *, any_case: bool = False) -> list[slice] | None:
    """Where the values of the members called `name` (ASCII) stand, in the body's order.

    Names are compared as they read, not as they are spelled (`"mod\\u0065l"`), with `any_case`
    whatever the case of their letters. None if the body is no JSON object, or too much of one.
    """
    steps = iter(range(_MAX_STEPS))
    try:
        _object.decode(body)
        spans = [
            value
            for key, value in _members(_plain(body), steps)
            if _reads(body[key], name, any_case=any_case)
        ]
    except _UNREADABLE:
        return None
    return None if next(steps, None) is None else spans


def find_in_head(head: bytes, name: str) -> slice | None:
    """Where the first value called `name` stands in an object of which `head` is the beginning;
    None unless all of it is there."""
    for key, value in _members(_plain(head), iter(range(_MAX_STEPS))):
        if head[key] == name.encode():
            return value
    return None


def find_from_end(tail: bytes, name: str, depth: int) -> slice | None:
    """Where the last value called `name` stands, `depth` brackets deep, in the JSON object that
    ends `tail`. Its beginning may be missing; None if the member is not there."""
    reverse, wanted = _plain(tail)[::-1], name.encode()[::-1]
    level, begin = 0, 0
    for token in _BACKWARDS.finditer(reverse):
        mark = reverse[token.start() : token.start() + 1]
        if mark in _STEP:
            level -= _STEP[mark]
            if level <= 0:
                return None  # the object's own beginning
        if level == depth and mark in b",}":
            begin = token.end()
        if level == depth and token[1] == wanted:
            return slice(len(tail) - token.start(), len(tail) - begin)
    return None


def doubled(body: bytes, name: str) -> bool:
    """Whether `name` (ASCII) stands more than once, so that an upstream could read another value
    than we do. Case does not count, since Go's encoding/json ignores it. True also if that can't be
    told."""
    lower = body.lower()
    if lower.count(b'"' + name.encode() + b'"') < 2 and not _ESCAPED_ASCII.search(lower):
        return False
    spans = find(body, name, any_case=True)
    return spans is None or len(spans) > 1


def with_model(body: bytes, model: str) -> bytes:
    """The body with another model's name. One that is doubled, no string or not there is left as
    it is, and so is a body that can't be read."""
    spans = find(body, "model")
    if spans is None or len(spans) != 1 or body[spans[0]][:1] != b'"':
        return body
    return _replaced(body, spans[0], msgspec.json.encode(model))


def with_usage(body: bytes) -> tuple[bytes, bool]:
    """A streamed completion's request that asks for usage, and whether it did so by itself.

    Then, and where nothing could be changed because the body or its `stream_options` can't be
    read, it comes back as it was: whatever usage the answer has is the client's.
    """
    try:
        options = _streamed.decode(body).stream_options
        if not options:
            return _with_first(body, b'"stream_options":{' + _INCLUDE_USAGE + b"}"), False
        if _asks_for_usage(options):
            return body, True
    except _UNREADABLE:
        return body, True
    changed = body
    for span in reversed(find(body, "stream_options") or []):
        changed = _replaced(changed, span, _asking(body[span]))
    return changed, changed == body


def _asks_for_usage(options: msgspec.Raw) -> bool:
    try:
        return _stream_options.decode(options).include_usage == _TRUE
    except msgspec.ValidationError:  # no object
        return False


def _asking(options: bytes) -> bytes:
    """`stream_options` that ask for usage, whatever they said of it; other than an object or null
    they stay as they are: the upstream will tell the client."""
    if options == b"null":
        return b"{" + _INCLUDE_USAGE + b"}"
    spans = find(options, "include_usage")
    if spans == []:
        return _with_first(options, _INCLUDE_USAGE)
    for span in reversed(spans or []):
        options = _replaced(options, span, b"true")
    return options


def _with_first(document: bytes, member: bytes) -> bytes:
    """An object with one member more, in front of its own."""
    begin = document.index(b"{") + 1
    comma = b"" if _EMPTY_OBJECT.match(document) else b","
    return document[:begin] + member + comma + document[begin:]


def _replaced(document: bytes, span: slice, value: bytes) -> bytes:
    return document[: span.start] + value + document[span.stop :]


def _plain(text: bytes) -> bytes:
    """The text with only those quotes left that begin or end a string."""
    if b"\\" not in text:
        return text
    return text.replace(b"\\\\", b"..").replace(b'\\"', b"..")


def _members(plain: bytes, steps: Iterator[int]) -> Iterator[tuple[slice, slice]]:
    """Names (without their quotes) and values of the object that begins `plain`: all of them, or
    as many as are whole and `steps` allow."""
    end = 0
    for _ in steps:
        member = _MEMBER.match(plain, end)
        if member is None:
            return
        begin, end = member.end(), _end_of_value(plain, member.end(), steps)
        if not end:
            return
        yield slice(*member.span(1)), slice(begin, end)


def _end_of_value(plain: bytes, begin: int, steps: Iterator[int]) -> int:
    """Where the value ends that begins there; 0 if that can't be said."""
    if scalar := _SCALAR.match(plain, begin):
        return scalar.end()
    depth = 0
    for _, bracket in zip(steps, _BRACKET.finditer(plain, begin), strict=False):
        if not bracket[1]:
            break
        depth += _STEP[bracket[1]]
        if depth == 0:
            return bracket.end()
    return 0


def _reads(spelled: bytes, name: str, *, any_case: bool) -> bool:
    if b"\\" in spelled and len(spelled) <= len(r"\u0000") * len(name):
        spelled = _string.decode(b'"' + spelled + b'"').encode()
    return (spelled.lower() if any_case else spelled) == name.encode()
