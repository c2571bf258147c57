"""Breaks the relay in one way after another, and expects the stories to notice each.

    python -m tests.breaks [words of a break's name]

A test that passes whatever the code does proves nothing. Each break is one small edit, of the kind
that a hurried change makes, on a copy of the tree; the named stories must then fail. Exits 1 if a
break goes unnoticed, or no longer fits the code.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Break:
    """`old` in `file` becomes `new`; the stories in `stories` must notice."""

    name: str
    file: str
    old: str
    new: str
    stories: str


BREAKS = [
    Break(
        "pieces are held back",
        "relay.py",
        "self._write(data)",
        "asyncio.get_running_loop().call_later(0.5, self._write, data)",
        "test_relay",
    ),
    Break(
        "a cut ends like a whole answer",
        "relay.py",
        "    sink.cut()\n",
        "    sink.finish()\n",
        "test_endings",
    ),
    Break(
        "a cut says nothing",
        "relay.py",
        "if readable and tap.on_event_boundary:",
        "if False:",
        "test_endings",
    ),
    Break(
        "the error event lands inside an event",
        "relay.py",
        "if readable and tap.on_event_boundary:",
        "if readable:",
        "test_endings",
    ),
    Break(
        "a stream that said [DONE] is cut",
        "relay.py",
        "readable and tap.saw_last_event",
        "False",
        "test_endings",
    ),
    Break(
        "a whole answer has no last chunk",
        "downstream.py",
        "            self._out.write(LAST_CHUNK)",
        "            pass",
        "test_relay",
    ),
    Break(
        "nobody tells the upstream that its reader is slow",
        "downstream.py",
        "        super().pause_writing()\n        if self._flow is not None:",
        "        super().pause_writing()\n        if False:",
        "test_relay",
    ),
    Break(
        "small answers pile up for a client that does not read",
        "downstream.py",
        "        await self._writer.drain()\n",
        "",
        "test_relay",
    ),
    Break(
        "nobody notices a reader that has left",
        "downstream.py",
        "handler_cancellation=True",
        "handler_cancellation=False",
        "test_disconnects",
    ),
    Break(
        "a reader that takes nothing is kept",
        "downstream.py",
        "        elif now - self._waits_since > self._timeouts.write:",
        "        elif False:",
        "test_endings",
    ),
    Break(
        "every byte is silence",
        "connection.py",
        "        self._silence.touch()\n        try:",
        "        try:",
        "test_endings",
    ),
    Break(
        "a pause of the reader is silence of the upstream",
        "connection.py",
        "            self._silence.stop()\n            self.transport.pause_reading()",
        "            self.transport.pause_reading()",
        "test_endings",
    ),
    Break(
        "a reset ends a body",
        "connection.py",
        "if not cleanly:",
        "if False:",
        "test_endings",
    ),
    Break(
        "a connection with bytes left over is used again",
        "connection.py",
        " and not body.surplus",
        "",
        "test_requests",
    ),
    Break(
        "a dead idle connection fails the request",
        "forward.py",
        "stale = connection.reused and not connection.answered",
        "stale = False",
        "test_requests",
    ),
    Break(
        "an upload that was cut off looks complete upstream",
        "answer.py",
        "            self.connection.fail(error)",
        "            self.connection.write(LAST_CHUNK)\n            self.connection.fail(error)",
        "test_requests",
    ),
    Break(
        "the refusal of our key is shown",
        "forward.py",
        "return response.head.status == 401 and response.bears_our_key",
        "return False",
        "test_endings",
    ),
    Break(
        "two lengths are as good as one",
        "framing.py",
        "    if codings and (lengths or head.minor == 0):",
        "    if False:",
        "test_endings",
    ),
    Break(
        "a chunk size may have a sign",
        "framing.py",
        'rb"([0-9A-Fa-f]{1,15})(?:;',
        'rb"([+0-9A-Fa-f]{1,15})(?:;',
        "test_endings",
    ),
    Break(
        "the client's key goes up beside ours",
        "headers.py",
        "always | CREDENTIALS if self.drops_credentials else always",
        "always",
        "test_requests",
    ),
    Break(
        "what Connection nominates goes up",
        "headers.py",
        "    dropped = dropped | _nominated(inbound)\n",
        "",
        "test_requests",
    ),
    Break(
        "a body is re-serialised",
        "inbound.py",
        "    model, stream = _peek(body)",
        "    body = msgspec.json.encode(msgspec.json.decode(body))\n    model, stream = _peek(body)",
        "test_requests",
    ),
    Break(
        "a lease outlives its request",
        "limits.py",
        "await self.counters.settle(self._given_back(), self.slot)",
        "await self.counters.settle(self._given_back(), None)",
        "test_limits",
    ),
    Break(
        "what was reserved is what is paid",
        "limits.py",
        "each.cost - used",
        "0",
        "test_limits",
    ),
    Break(
        "an error answer is charged",
        "relay.py",
        "failed = not 200 <= answer.head.status < 300 or",
        "failed =",
        "test_limits",
    ),
    Break(
        "a model that is named twice passes",
        "auth.py",
        "if ask.model is None or twice:",
        "if ask.model is None:",
        "test_clients",
    ),
    Break(
        "usage that only we asked for is shown",
        "limits.py",
        "exchange.hides_usage = not asked",
        "exchange.hides_usage = False",
        "test_limits",
    ),
    Break(
        "a body is asked for before its limits are",
        "chat.py",
        'if "Expect" in request.headers:',
        "if False:",
        "test_limits",
    ),
    Break(
        "an answer that may be paid for is bought again",
        "forward.py",
        'or error.clock == "connect"',
        "or bool(error.clock)",
        "test_attempts",
    ),
    Break(
        "a candidate is asked twice",
        "upstreams.py",
        "            if each not in tried:\n                return each",
        "            return each",
        "test_attempts",
    ),
    Break(
        "a first event that is an error is an answer",
        "sse.py",
        "self.is_error = is_error(event, first=not begin)",
        "self.is_error = False",
        "test_attempts",
    ),
    Break(
        "what was held back is lost",
        "answer.py",
        "            if held := bytes(opening.event.held):\n                receiver.payload(held)\n",
        "",
        "test_attempts",
    ),
    Break(
        "the last response is lost when a later candidate can't be reached",
        "forward.py",
        "                    failure = error\n",
        "                    failure, last = error, None\n",
        "test_attempts",
    ),
    Break(
        "a full upstream is asked",
        "upstreams.py",
        "if each.gone or each.is_full or (",
        "if each.gone or (",
        "test_attempts",
    ),
    Break(
        "an upstream's slot is kept",
        "upstreams.py",
        "        self._upstream.in_progress -= 1\n",
        "",
        "test_attempts",
    ),
    Break(
        "an upstream does not rest",
        "forward.py",
        "upstream.rest(wait or 0.0, self._clock())",
        "pass",
        "test_attempts",
    ),
    Break(
        "a stream that was cut is no failure",
        "answer.py",
        "    Outcome.UPSTREAM_TRUNCATED,\n",
        "",
        "test_attempts",
    ),
    Break(
        "an open circuit stays open",
        "circuit.py",
        "return not self._probes and now - self._rests_from >= self.settings.rest",
        "return False",
        "test_attempts",
    ),
    Break(
        "the last one in rotation is taken out",
        "upstreams.py",
        "    if rotates or not usable:\n",
        "    if True:\n",
        "test_attempts",
    ),
    Break(
        "the head waits as long as the upstream does",
        "reply.py",
        "if self._may_be_early:",
        "if False:",
        "test_patience",
    ),
    Break(
        "a heartbeat lands inside an event",
        "watch.py",
        "(self._tap is None or self._tap.is_between_events)",
        "True",
        "test_patience",
    ),
    Break(
        "pings are payload",
        "watch.py",
        "return has_payload(tail[-new:], cut=new > len(tail))",
        "return True",
        "test_patience",
    ),
    Break(
        "an upstream's own words are lost",
        "reply.py",
        "            said=_error_object(body),\n",
        "",
        "test_patience",
    ),
    Break(
        "an answer to nobody is cut off all the same",
        "relay.py",
        "        if not self._finishes:\n",
        "        if True:\n",
        "test_leaving",
    ),
    Break(
        "an answer to nobody has no end",
        "reply.py",
        "loop.call_later(self._route.finish_cap, task.cancel)",
        "loop.call_later(3600, task.cancel)",
        "test_leaving",
    ),
    Break(
        "an alias is not used",
        "routing.py",
        "return replace(ask, body=body)",
        "return ask",
        "test_aliases",
    ),
    Break(
        "a model that is named twice chooses a route",
        "routing.py",
        "                if not _named_twice(ask):\n",
        "                if True:\n",
        "test_aliases",
    ),
]


def main() -> int:
    chosen = [each for each in BREAKS if all(word in each.name for word in sys.argv[1:])]
    with ThreadPoolExecutor(2) as pool:
        unnoticed = [problem for problem in pool.map(attempt, chosen) if problem]
    print(f"{len(chosen) - len(unnoticed)} of {len(chosen)} breaks were noticed")
    return 1 if unnoticed else 0


def attempt(each: Break) -> bool:
    """Whether the break went unnoticed."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("proxy", "tests", "pyproject.toml"):
            copy(ROOT / part, Path(folder) / part)
        file = Path(folder) / "proxy" / each.file
        text = file.read_text()
        if each.old not in text:
            print(f"STALE      {each.name}: {each.file} no longer has {each.old!r}")
            return True
        file.write_text(text.replace(each.old, each.new, 1))
        story = f"tests/flow/{each.stories}.py"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--slow", "-k", "uvloop", story]
        try:
            ended = subprocess.run(
                command, cwd=folder, capture_output=True, timeout=120, check=False
            )
            noticed, by = ended.returncode == 1, failing(ended.stdout.decode())
        except subprocess.TimeoutExpired:
            noticed, by = True, "a story that never ended"
        print(f"{'noticed' if noticed else 'UNNOTICED':10} {each.name}: {by}", flush=True)
        return not noticed


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        ignored = shutil.ignore_patterns("__pycache__", "node_modules")
        shutil.copytree(source, target, ignore=ignored)
    else:
        shutil.copy(source, target)


def failing(output: str) -> str:
    """The story that failed, from pytest's summary."""
    lines = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0].partition(" - ")[0] if lines else output[-300:]


if __name__ == "__main__":
    sys.exit(main())
