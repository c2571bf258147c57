"""The corpus through real sockets, at the real proxy process, before three real upstream servers."""

from __future__ import annotations

import json

import pytest

from tests.hostile.corpus import CORPUS, CUT_TARGET, STATUSES, Entry
from tests.hostile.lanes import Lane
from tests.hostile.reading import Answer, Request
from tests.hostile.upstreams import Seen

_AGAIN = b"GET /v1/again HTTP/1.1\r\nHost: sluice\r\n\r\n"


@pytest.mark.parametrize("entry", CORPUS, ids=lambda entry: entry.name)
def test_what_was_meant(lane: Lane, entry: Entry) -> None:
    meant = [STATUSES[each] if isinstance(each, str) else each for each in entry.answers]
    methods = [request.method for request in entry.reached]
    owed = sum(status >= 200 for status in meant)
    with lane.talk() as client:
        client.send(*entry.sent)
        client.answers(methods, owed)
        if entry.hangs_up:
            client.hang_up()
        if entry.again:
            client.send(_AGAIN)
            meant.append(200)
            owed += 1
        else:
            client.read_to_the_end()
        answers, rest = client.answers(methods, owed)
    seen = lane.settle()

    assert ([answer.status for answer in answers], rest) == (meant, b"")
    assert [_code(answer) for answer in answers if answer.status >= 400] == [
        each for each in entry.answers if isinstance(each, str)
    ]
    assert client.closed is not entry.again
    if entry.answers and not entry.again and len(entry.sent) == 1:  # else it was answered before
        assert answers[-1].closes
    _check_what_was_seen(seen, entry)
    assert lane.complaints() == []


def _code(answer: Answer) -> str:
    """The code of an error of the proxy's own."""
    error = json.loads(answer.body)["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    code: str = error["code"]
    return code


def _check_what_was_seen(seen: list[Seen], entry: Entry) -> None:
    # An upstream notices a cut in its own time, maybe while the next entry is tried.
    seen = [each for each in seen if each.whole or each.target != CUT_TARGET]
    assert all(each.whole for each in seen), "the upstream saw a part of a request, or garbage"
    again = [Request("GET", "/v1/again")] if entry.again else []
    assert [each.request for each in seen] == [*entry.reached, *again]
    for each in seen:
        assert not each.fields & set(entry.dropped)
