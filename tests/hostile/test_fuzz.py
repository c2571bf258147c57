"""The fuzzer of requests: a fixed share of its inputs, and what its judgement is worth."""

from __future__ import annotations

import pytest

from tests.hostile.fuzz import fuzz, judge
from tests.hostile.lanes import Lane
from tests.hostile.reading import Answer, Request, plain_request, read_answers, read_requests
from tests.hostile.upstreams import STARTERS, Seen

INPUTS = 400


def test_nothing_gets_through(lane: Lane) -> None:
    names = list(STARTERS)
    figures = fuzz(lane, 1, range(names.index(lane.name), INPUTS, len(names)))
    assert figures.reports == []
    assert figures.courses["forwarded"] > INPUTS / 20  # or it would prove nothing


# ---------------------------------------------------------------- a proxy that failed, judged

_ASKED = b"GET /v1/a HTTP/1.1\r\nHost: sluice\r\n\r\n"


def _seen(target: str = "/v1/a", body: bytes = b"", *, whole: bool = True) -> Seen:
    return Seen(Request("GET", target, body), whole, frozenset())


def _relayed(target: str = "/v1/a") -> Answer:
    fields = ((b"sluice-attempts", b"1"), (b"x-read", f"GET {target}".encode()))
    return Answer(200, fields, b"ok\n")


_REFUSED = Answer(400, ((b"connection", b"close"),), b"{}")
_FAILED = Answer(500, (), b"{}")
_SCRUPLES = Answer(400, ((b"sluice-attempts", b"1"),), b"no")


@pytest.mark.parametrize(
    ("sent", "answers", "seen", "kind"),
    [
        (_ASKED, [_relayed()], [_seen()], None),
        (_ASKED, [_REFUSED], [], None),
        (_ASKED + b"\0", [_relayed(), _REFUSED], [_seen()], None),
        (_ASKED, [_SCRUPLES], [], None),
        (_ASKED[:-2] + b"Content-Length: 5\r\n\r\n", [_SCRUPLES], [_seen(whole=False)], None),
        (_ASKED, [_relayed()], [_seen(), _seen("/v1/b")], "smuggled"),
        (_ASKED, [_relayed()], [_seen("/v1/b")], "smuggled"),
        (_ASKED, [_relayed()], [_seen(body=b"x")], "smuggled"),
        (_ASKED, [_relayed()], [_seen(whole=False)], "smuggled"),
        (_ASKED, [_relayed("/v1/b")], [_seen()], "smuggled"),
        (_ASKED, [_REFUSED], [_seen()], "smuggled"),
        (_ASKED + b"\0", [_relayed(), _relayed()], [_seen(), _seen()], "ambiguous"),
        (b"\0" + _ASKED, [_SCRUPLES], [], "ambiguous"),
        (_ASKED.replace(b"\r", b""), [_relayed()], [_seen()], "ambiguous"),
        (_ASKED, [], [], "broken"),
        (_ASKED * 2, [_REFUSED, _relayed()], [_seen()], "broken"),
        (_ASKED, [_FAILED], [], "crashed"),
    ],
)
def test_the_judgement(
    sent: bytes, answers: list[Answer], seen: list[Seen], kind: str | None
) -> None:
    problem = judge(read_requests(sent), answers, closed=False, seen=seen)
    assert (problem and problem.kind) == kind


# ---------------------------------------------------------------- the reader


def test_it_reads_one_request_after_another() -> None:
    chunked = (
        b"POST /b HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"
    )
    last = b"\r\nGET /c HTTP/1.1\r\nHost: c\r\nConnection: x, Close\r\n\r\n"
    reading = read_requests(_ASKED + chunked + last + b"GET")
    assert [request.target for request in reading.requests] == ["/v1/a", "/b", "/c"]
    assert reading.spellings == (_ASKED, chunked, last)
    assert (reading.end.name, reading.rest) == ("CLOSE", b"GET")
    assert all(map(plain_request, reading.spellings))


@pytest.mark.parametrize(
    "spelling",
    [
        _ASKED.replace(b"\r", b""),
        _ASKED.replace(b"Host: sluice", b"Host: a b"),
        _ASKED.replace(b"Host: sluice", b"Host: sluice\r\n x: y"),
        _ASKED.replace(b"Host: sluice", b"Host: sluice\r\nContent-Length: +0"),
        _ASKED.replace(b"Host: sluice", b"Host: sluice\r\nContent-Length: 0\r\nContent-Length: 0"),
        _ASKED.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n0 \r\n\r\n"),
        _ASKED.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx!!0\r\n\r\n"),
        _ASKED.replace(b"1.1", b"1.0").replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    ],
)  # fmt: skip
def test_what_could_be_read_otherwise_is_not_plain(spelling: bytes) -> None:
    assert not plain_request(spelling)


def test_it_reads_answers_to_their_ends() -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\n"
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
    answers, rest = read_answers(interim + whole + whole + b"ok" + whole, ["HEAD", "GET"])
    assert [(answer.status, answer.body) for answer in answers] == [
        (100, b""), (200, b""), (200, b"ok"),
    ]  # fmt: skip
    assert rest == whole
