"""A fuzzer of requests: mutated bytes go through the real proxy to three real upstream servers.

    python -m tests.hostile.fuzz [--inputs 100000] [--seed 1] [--only NUMBER]

h11, which shares no line with the proxy, reads the same bytes. Found is:

- *smuggled*: an upstream read a request that h11 does not read there, or read it otherwise,
- *ambiguous*: a request was forwarded that h11 refuses, or whose spelling others read otherwise,
- *broken*: the client's answers are not one for each request, or not HTTP/1.1,
- *crashed*: the process, or somebody else's request behind the input.

An input is made from the seed and its number alone, and printed as it was sent: one of `--only`.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from tests.hostile.corpus import CORPUS
from tests.hostile.figures import Figures, Problem
from tests.hostile.lanes import Lane, open_lane
from tests.hostile.mutation import Vocabulary, mutate, split
from tests.hostile.reading import (
    Answer,
    End,
    Malformed,
    Reading,
    Request,
    plain_request,
    read_requests,
)
from tests.hostile.upstreams import STARTERS, Seen

Segments = tuple[bytes, ...]
KINDS = ("smuggled", "ambiguous", "broken", "crashed")

_HEAD = b"Host: sluice\r\nAuthorization: Bearer sk-client\r\nUser-Agent: OpenAI/Python\r\n"
_BODY = b'{"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello\\n"}]}'
_VALID = [
    b"POST /v1/chat/completions HTTP/1.1\r\n" + _HEAD + b"Accept: application/json\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(_BODY) + _BODY,
    b"POST /v1/chat/completions?a=%2F HTTP/1.1\r\n" + _HEAD + b"Content-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(_BODY) + _BODY + b"\r\n0\r\n\r\n",
    b"POST /v1/files HTTP/1.1\r\n" + _HEAD + b"Content-Type: application/octet-stream\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n1\r\n!\r\n0\r\nX: y\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\n" + _HEAD + b"Connection: keep-alive\r\n\r\n",
    b"DELETE /v1/files/1 HTTP/1.1\r\n" + _HEAD + b"Content-Length: 2\r\n\r\n{}",
    b"HEAD /v1/models HTTP/1.1\r\n" + _HEAD + b"\r\n",
]  # fmt: skip
_LARGE = 4096  # bytes: entries beyond prove bounds, which a mutation rarely touches
_CORPUS = [entry.data for entry in CORPUS if len(entry.data) < _LARGE]
_SERVED = [entry.data for entry in CORPUS if entry.reached and len(entry.data) < _LARGE]

_WORDS = [
    *(bytes([byte]) for byte in b"\x00\t\n\x0b\x0c\r !\"#%'()*+,-./0159:;<=>?@[\\]_`a{}\x7f\x80\x85\xa0\xff"),
    *(b"\r\n", b"\r\n\r\n", b"\n\n", b"\r\n ", b"\r\n\t", b"\x00\r\n", b"\xe2\x84\xaa", b"\xef\xbb\xbf"),
    *(b"chunked", b", chunked", b"identity, ", b"close", b", 5", b"0x", b"+0", b"-1", b";a=b", b";\n"),
    *(b"0\r\n\r\n", b"0\r\n", b"5\r\nhello\r\n", b"ffffffffffffffff", b"X: y\r\n", b"HEAD ", b"POST "),
    *(b" HTTP/1.1", b" HTTP/1.0", b" HTTP/0.9", b" HTTP/2.0", b"/../", b"%2e%2e", b"//", b"http://a"),
    *(b"GET /v1/next HTTP/1.1\r\nHost: sluice\r\n\r\n", b"POST /v1/b HTTP/1.1\r\nHost: b\r\n"),
]  # fmt: skip
_LINES = [
    *(b"Content-Length: 5", b"Content-Length: 0", b"content-length:5", b"Content-Length : 5"),
    *(b"Content-Length: +5", b"Content-Length: 5, 5", b"Content-Length: 39", b" Content-Length: 0"),
    *(b"Transfer-Encoding: chunked", b"transfer-encoding:CHUNKED", b"Transfer-Encoding: identity"),
    *(b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding : chunked", b"Transfer-Encoding:"),
    *(b"Connection: close", b"Connection: Content-Length", b"Connection: Transfer-Encoding, Host"),
    *(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"Upgrade: websocket", b"Expect: x"),
    *(b"Host: other", b"Host:", b"Host: a b", b"Expect: 100-continue", b"Trailer: X", b"TE: trailers"),
    *(b"Content-Encoding: gzip", b"Content-Type: application/json", b"X: y\x00", b" folded", b"", b"X"),
]  # fmt: skip
_VOCABULARY = Vocabulary(_WORDS, _LINES)


def make_input(seed: int, number: int) -> Segments:
    """Input `number` of a run: one or two requests, mutated and cut into segments."""
    rng = random.Random(f"{seed} {number}")
    first, second = (
        rng.choice(rng.choice((_CORPUS, _SERVED, _SERVED, _VALID, _VALID))) for _ in range(2)
    )
    data = first
    match rng.randrange(5):
        case 0:
            data = first + second
        case 1:  # a splice: the beginning of the one, the end of the other
            data = first[: rng.randint(0, len(first))] + second[rng.randint(0, len(second)) :]
    return split(rng, mutate(rng, data, _VOCABULARY))


# ---------------------------------------------------------------- the judgement

_OWN = {200, 204, 400, 403, 404, 405, 413, 414, 417, 431, 508}  # what the proxy may say by itself


def judge(
    reading: Reading, answers: Sequence[Answer], *, closed: bool, seen: Sequence[Seen]
) -> Problem | None:
    """What is wrong with the course of an input, if anything: each request that h11 reads has one
    answer, and those that were relayed are what the upstream saw, in order and in full."""
    arrived = [each.request for each in seen if each.whole]
    finals = [answer for answer in answers if answer.status >= 200]
    for number, answer in enumerate(finals):
        if number and finals[number - 1].closes:
            return Problem("broken", f"another answer behind the last: {answer}")
        if answer.value(b"sluice-attempts") is None:
            if answer.status not in _OWN:
                return Problem("crashed", f"the proxy's own {answer.status}: {answer.body!r}")
            continue
        if number >= len(reading.requests):
            if reading.begun and answer.status >= 400:  # an upload that was refused on its way
                continue
            return Problem("ambiguous", f"answer {number} is to what h11 reads as no request")
        if not plain_request(reading.spellings[number]):
            return Problem("ambiguous", f"forwarded: {reading.spellings[number]!r}")
        if answer.status >= 400:  # an upstream's own scruples, such as nginx's about %00
            continue
        request = _mapped(reading.requests[number])
        if not arrived or arrived.pop(0) != request:
            return Problem(
                "smuggled", f"{request} was read otherwise, or the input before was: {seen}"
            )
        if answer.value(b"x-read") != f"{request.method} {request.target}":
            return Problem("smuggled", f"the answer to {request} is another's: {answer}")
    if arrived:
        return Problem("smuggled", f"nobody asked for this, unless the input before did: {arrived}")
    # Behind an answer of its own the proxy drops the body, and ends if that is malformed.
    last = finals[-1] if finals else None
    ended = closed and last and (last.closes or last.value(b"sluice-attempts") is None)
    if len(finals) < len(reading.requests) and not ended:
        return Problem("broken", f"{len(reading.requests)} requests, answers: {finals}")
    return None


def _mapped(request: Request) -> Request:
    """What the upstream must see: its base URL is one level below /v1, as the client's is."""
    target = re.sub(r"(?i)^https?://[^/?#]*", "", request.target)
    return Request(request.method, target, request.body)


# ---------------------------------------------------------------- the run

_REFUSAL = 0.05  # seconds for the refusal of what h11 refuses; the proxy may wait for more of it


def attempt(lane: Lane, segments: Segments, figures: Figures) -> Problem | None:
    """Sends one input and judges its course."""
    reading = read_requests(b"".join(segments))
    methods, owed = reading.methods, len(reading.requests)
    figures.inputs += 1
    try:
        with lane.talk() as client:
            client.send(*segments)
            client.answers(methods, owed)
            if reading.end is End.REFUSED:
                client.answers(methods, owed + 1, patience=_REFUSAL)
            seen = lane.settle()
            answers, rest = client.answers(methods, owed + 2, patience=0)
    except Malformed as error:
        return Problem("broken", f"an answer that h11 can't read: {error}")
    except (AssertionError, OSError) as error:
        return Problem("crashed", f"{type(error).__name__}: {error}")
    if complaints := lane.complaints():
        return Problem("crashed", "\n".join(complaints))
    if rest and not _is_body_of_refusal(answers, rest):
        return Problem("broken", f"an answer that is not whole: {rest!r}")
    figures.courses["forwarded"] += sum(each.whole for each in seen)
    figures.courses.update(f"answered {each.status}" for each in answers)
    return judge(reading, answers, closed=client.closed, seen=seen)


def _is_body_of_refusal(answers: Sequence[Answer], rest: bytes) -> bool:
    """The answer to what could not be read has a body, though its first word may have been HEAD."""
    return (
        bool(answers)
        and answers[-1].closes
        and answers[-1].value(b"content-length") == str(len(rest))
    )


def fuzz(lane: Lane, seed: int, numbers: Iterable[int]) -> Figures:
    """Runs the inputs of these numbers through one lane."""
    figures = Figures(KINDS)
    for number in numbers:
        segments = make_input(seed, number)
        problem = attempt(lane, segments, figures)
        if problem is not None:
            figures.report(
                problem,
                f"    before {lane.name}, --seed {seed} --only {number}\n"
                f"    sent     {segments!r}\n    smallest {minimise(lane, segments, problem)!r}",
            )
            if problem.kind == "crashed":
                break  # nothing behind it can be believed
    return figures


def minimise(lane: Lane, segments: Segments, problem: Problem) -> Segments:
    """A smaller input with a problem of the same kind: ever smaller pieces are left out."""

    def fails(shorter: Segments) -> bool:
        found = attempt(lane, shorter, Figures(KINDS))
        return found is not None and found.kind == problem.kind

    if problem.kind == "crashed" or not fails(segments):
        return segments
    joined = (b"".join(segments),)
    if len(segments) > 1 and not fails(joined):
        return segments
    (data,) = joined
    size = len(data) // 2
    while size:
        at = 0
        while at < len(data):
            shorter = data[:at] + data[at + size :]
            if fails((shorter,)):
                data = shorter
            else:
                at += size
        size //= 2
    return (data,)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.fuzz")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="the number of one input, sent to every upstream")
    options = parser.parse_args()
    began = time.monotonic()
    total = Figures(KINDS)
    with ExitStack() as stack:
        lanes = []
        for name in STARTERS:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            lanes.append(stack.enter_context(open_lane(name, folder)))
        pool = stack.enter_context(ThreadPoolExecutor(len(lanes)))
        shares: list[Iterable[int]] = [
            range(start, options.inputs, len(lanes)) for start in range(len(lanes))
        ]
        if options.only is not None:
            shares = [[options.only]] * len(lanes)
        for figures in pool.map(fuzz, lanes, [options.seed] * len(lanes), shares):
            total.add(figures)
    print(total)
    print(f"in {time.monotonic() - began:.0f} s, seed {options.seed}")
    return 1 if total.found else 0


if __name__ == "__main__":
    sys.exit(main())
