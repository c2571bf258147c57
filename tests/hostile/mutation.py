"""Mutations of HTTP/1.1 bytes: small ones, of the kinds that parsers have disagreed about."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

# Where a parser decides something; and what decides where a body ends.
_BORDER = re.compile(rb"\r\n|[:;,=/ ]")
_FRAMING = re.compile(
    rb"(?:content-length|transfer-encoding)[^\r\n]*|(?<=\r\n)[0-9a-f]+(?=[;\r])|\r\n(?:0\r\n)?\r\n",
    re.IGNORECASE,
)
_LINE_ENDS = (b"\n", b"\r", b"\r\r\n", b"\n\r", b"\r\n\r\n", b"\r\n ", b"\x00\r\n", b"", b" \r\n")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What is inserted: `words` anywhere, `lines` as lines of a head."""

    words: Sequence[bytes]
    lines: Sequence[bytes]


Mutation = Callable[[Random, bytes, Vocabulary], bytes]


def mutate(rng: Random, data: bytes, vocabulary: Vocabulary) -> bytes:
    """A few mutations, one after another."""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        data = rng.choice(MUTATIONS)(rng, data, vocabulary)
    return data


def split(rng: Random, data: bytes) -> tuple[bytes, ...]:
    """Mostly one segment, sometimes up to four."""
    cuts = sorted({_anywhere(rng, data) for _ in range(rng.choice((0, 0, 0, 1, 2, 3)))})
    pieces = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    return tuple(piece for piece in pieces if piece) or (b"",)


def _anywhere(rng: Random, data: bytes) -> int:
    """A place in `data`: at a border as often as not."""
    borders = [at for match in _BORDER.finditer(data) for at in match.span()]
    return rng.choice(borders) if borders and rng.random() < 0.6 else rng.randint(0, len(data))


def _in_framing(rng: Random, data: bytes) -> int:
    """A place in what decides about the framing, if anything does."""
    found = list(_FRAMING.finditer(data))
    return rng.randint(*rng.choice(found).span()) if found else _anywhere(rng, data)


def _insert_word(rng: Random, data: bytes, vocabulary: Vocabulary) -> bytes:
    at = _anywhere(rng, data)
    return data[:at] + rng.choice(vocabulary.words) + data[at:]


def _insert_into_framing(rng: Random, data: bytes, vocabulary: Vocabulary) -> bytes:
    at = _in_framing(rng, data)
    return data[:at] + rng.choice(vocabulary.words) + data[at:]


def _overwrite_framing(rng: Random, data: bytes, vocabulary: Vocabulary) -> bytes:
    at = _in_framing(rng, data)
    return data[:at] + rng.choice(vocabulary.words) + data[at + 1 :]


def _insert_line(rng: Random, data: bytes, vocabulary: Vocabulary) -> bytes:
    heads = [match.end() for match in re.finditer(rb"[^\r\n]\r\n", data)]
    at = rng.choice(heads) if heads else 0
    return data[:at] + rng.choice(vocabulary.lines) + b"\r\n" + data[at:]


def _double_line(rng: Random, data: bytes, vocabulary: Vocabulary) -> bytes:
    lines = data.splitlines(keepends=True) or [b""]
    line = rng.choice([line for line in lines if _FRAMING.match(line)] or lines)
    lines.insert(
        lines.index(line) + rng.choice((0, 0, 1)), rng.choice((line, line, line.swapcase()))
    )
    return b"".join(lines)


def _drop_line(rng: Random, data: bytes, vocabulary: Vocabulary) -> bytes:
    lines = data.splitlines(keepends=True) or [b""]
    del lines[rng.randrange(len(lines))]
    return b"".join(lines)


def _flip(rng: Random, data: bytes, vocabulary: Vocabulary) -> bytes:
    at = _anywhere(rng, data)
    flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1])
    return data[:at] + flipped + data[at + 1 :]


def _drop(rng: Random, data: bytes, vocabulary: Vocabulary) -> bytes:
    at = _anywhere(rng, data)
    return data[:at] + data[at + rng.choice((1, 1, 2, 8)) :]


def _truncate(rng: Random, data: bytes, vocabulary: Vocabulary) -> bytes:
    return data[: _anywhere(rng, data)]


def _repeat(rng: Random, data: bytes, vocabulary: Vocabulary) -> bytes:
    start, end = sorted((_anywhere(rng, data), _anywhere(rng, data)))
    return data[:end] + data[start:end] + data[end:]


def _change_line_end(rng: Random, data: bytes, vocabulary: Vocabulary) -> bytes:
    ends = [match.start() for match in re.finditer(rb"\r\n", data)]
    if not ends:
        return data
    at = rng.choice(ends)
    return data[:at] + rng.choice(_LINE_ENDS) + data[at + 2 :]


def _change_all_line_ends(rng: Random, data: bytes, vocabulary: Vocabulary) -> bytes:
    return data.replace(b"\r\n", rng.choice((b"\n", b"\r", b"\r\r\n")))


def _change_number(rng: Random, data: bytes, vocabulary: Vocabulary) -> bytes:
    numbers = list(re.finditer(rb"[0-9]+", data))
    if not numbers:
        return data
    number = rng.choice(numbers)
    changed = max(0, int(number[0]) + rng.choice((-2, -1, 1, 2, 16)))
    return data[: number.start()] + b"%d" % changed + data[number.end() :]


MUTATIONS: Sequence[Mutation] = (
    _insert_into_framing,
    _insert_into_framing,
    _overwrite_framing,
    _insert_line,
    _insert_line,
    _double_line,
    _double_line,
    _change_number,
    _insert_word,
    _flip,
    _drop,
    _drop_line,
    _repeat,
    _truncate,
    _change_line_end,
    _change_all_line_ends,
)
