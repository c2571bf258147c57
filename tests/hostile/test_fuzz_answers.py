"""The fuzzer of answers: a fixed share of its inputs, and what its judgement is worth."""

from __future__ import annotations

import pytest

from tests.hostile.fuzz_answers import Ending, Heard, Script, fuzz, judge, mark
from tests.hostile.reading import plain_answer

INPUTS = 400


def test_nothing_gets_through() -> None:
    figures = fuzz(seed=1, count=INPUTS, clients=8)
    assert figures.reports == []
    assert figures.courses["whole"] > INPUTS / 10  # or it would prove nothing


# ---------------------------------------------------------------- a proxy that failed, judged

_HEAD = b"HTTP/1.1 200 OK\r\nSluice-Attempts: 1\r\n"
_SIZED = _HEAD + b"Content-Length: 8\r\n\r\n" + mark(7)
_CHUNKED = _HEAD + b"Transfer-Encoding: chunked\r\n\r\n8\r\n" + mark(7) + b"\r\n"
_UNTIL_CLOSE = _HEAD + b"\r\n" + mark(7)
_DONE = b"17\r\n~000007~\ndata: [DONE]\n\n\r\n"
_EVENTS = _HEAD + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + _DONE
_LAST = b"0\r\n\r\n"
_OWN = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 2\r\n\r\n{}"


@pytest.mark.parametrize(
    ("sent", "ending", "heard", "ended", "course"),
    [
        (_SIZED, Ending.STAY, _SIZED, Ending.STAY, "whole"),
        (_CHUNKED + _LAST, Ending.STAY, _CHUNKED + _LAST, Ending.STAY, "whole"),
        (_UNTIL_CLOSE, Ending.CLOSE, _CHUNKED + _LAST, Ending.STAY, "whole"),
        (_CHUNKED + _LAST, Ending.STAY, _UNTIL_CLOSE, Ending.CLOSE, "whole"),
        (_SIZED[:-1], Ending.CLOSE, _SIZED[:-1], Ending.CLOSE, "cut"),
        (_CHUNKED, Ending.CLOSE, _UNTIL_CLOSE, Ending.RESET, "cut"),
        (_CHUNKED, Ending.RESET, _OWN, Ending.STAY, "answered 502"),
        (_SIZED, Ending.STAY, _SIZED.replace(mark(7), mark(8)), Ending.STAY, "leaked"),
        (_SIZED, Ending.STAY, _SIZED + _SIZED, Ending.STAY, "leaked"),
        (_UNTIL_CLOSE, Ending.RESET, _CHUNKED + _LAST, Ending.STAY, "ambiguous"),
        (_CHUNKED, Ending.CLOSE, _CHUNKED + _LAST, Ending.STAY, "ambiguous"),
        (_CHUNKED, Ending.CLOSE, _UNTIL_CLOSE, Ending.CLOSE, "ambiguous"),
        (_SIZED[:-1], Ending.CLOSE, _SIZED, Ending.STAY, "ambiguous"),
        (_SIZED.replace(b"200", b"201"), Ending.STAY, _SIZED, Ending.STAY, "ambiguous"),
        (_SIZED.replace(b"\r", b""), Ending.STAY, _SIZED, Ending.STAY, "ambiguous"),
        (_SIZED, Ending.STAY, _SIZED.replace(b"\r", b""), Ending.STAY, "ambiguous"),
        (_SIZED, Ending.STAY, _SIZED[:-1], Ending.STAY, "broken"),
        (_SIZED, Ending.STAY, b"nonsense\r\n\r\n", Ending.CLOSE, "broken"),
        (_SIZED, Ending.STAY, _OWN.replace(b"502", b"500"), Ending.STAY, "crashed"),
        (_EVENTS, Ending.CLOSE, _EVENTS + _LAST, Ending.STAY, "done without an end"),
    ],
)
def test_the_judgement(
    sent: bytes, ending: Ending, heard: bytes, ended: Ending, course: str
) -> None:
    script = Script("GET", b"1.1", (sent,), ending)
    found, problem = judge(script, 7, Heard(heard, ended))
    assert found == course
    assert (problem and problem.kind) in {None, course}


@pytest.mark.parametrize(
    ("spelling", "method", "plain"),
    [
        (_SIZED, "GET", True),
        (_CHUNKED + _LAST, "GET", True),
        (_UNTIL_CLOSE, "GET", True),
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + _SIZED, "GET", True),
        (_SIZED[:-8], "HEAD", True),
        (_SIZED, "HEAD", False),
        (b"HTTP/1.1 103 Early Hints\r\nContent-Length: 1\r\n\r\n" + _SIZED, "GET", False),
        (_SIZED.replace(b": 8", b" : 8"), "GET", False),
        (_SIZED.replace(b": 8", b": 8, 8"), "GET", False),
        (_SIZED.replace(b" 200 ", b" 2000 "), "GET", False),
        (_CHUNKED, "GET", False),
        (_CHUNKED.replace(b"1.1", b"1.0") + _LAST, "GET", False),
    ],
)
def test_which_spellings_are_plain(spelling: bytes, method: str, plain: bool) -> None:
    assert plain_answer(spelling, method) is plain
