"""What a person sees in a terminal: `curl -N` prints each event when the upstream says it."""

from __future__ import annotations

import json
import subprocess
import time
from itertools import pairwise

from tests.parts import need
from tests.real.processes import CLIENT_KEY, KEY, Process, Upstream

QUESTION = json.dumps(
    {
        "model": "gpt-4o",
        "stream": True,
        "messages": [{"role": "user", "content": "a paced answer"}],
    }
)


def watch(url: str, key: str) -> list[tuple[float, bytes]]:
    """Each line that curl prints, with its time."""
    argv = [str(need("curl")), "-sSN", "--fail", "-H", f"Authorization: Bearer {key}"]
    argv += ["-H", "Content-Type: application/json", "-d", QUESTION, f"{url}/v1/chat/completions"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as curl:
        assert curl.stdout
        lines = [(time.monotonic(), line) for line in curl.stdout]
    assert curl.returncode == 0
    return lines


def texts(lines: list[tuple[float, bytes]]) -> list[tuple[float, str]]:
    """The text deltas among them."""
    events = [(at, line[6:]) for at, line in lines if line.startswith(b"data: {")]
    deltas = [(at, json.loads(event)["choices"][0]["delta"].get("content")) for at, event in events]
    return [(at, text) for at, text in deltas if text]


def test_events_arrive_one_by_one(aimock: Upstream, aimock_proxy: Process) -> None:
    direct = texts(watch(aimock.process.url, KEY))
    relayed_lines = watch(aimock_proxy.url, CLIENT_KEY)
    relayed = texts(relayed_lines)
    assert relayed_lines[-2:][0][1] == b"data: [DONE]\n"
    assert [text for _, text in relayed] == [text for _, text in direct]

    # The upstream's own run is the measure: the pauses are there, not piled up at the end.
    def gaps(seen: list[tuple[float, str]]) -> list[float]:
        return [later - earlier for (earlier, _), (later, _) in pairwise(seen)]

    assert sum(gaps(relayed)) > 0.7 * sum(gaps(direct))
    pause = sum(gaps(direct)) / len(gaps(direct))
    assert sum(gap > pause / 2 for gap in gaps(relayed)) > 0.7 * len(gaps(relayed))
