"""python -m bench.instructions: user-space instructions per small request and per paced chunk.

Counted by valgrind's callgrind, so two runs of one version differ by about 1 %, whatever else the
machine does: it shows gains that vanish in the noise of CPU times. The kernel's share, half of a
chunk, is not in it. Units are counted from the access log.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import wire
from bench.__main__ import leave
from bench.load import Order
from bench.targets import NotReady, Stage, Target

_SCENARIOS = {"request": "request", "chunk": "paced"}
_CONNECTIONS = 4
_WARM, _SECONDS = 2.0, 8.0


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.instructions", description=__doc__)
    parser.add_argument("units", nargs="*", metavar="|".join(_SCENARIOS))
    parser.add_argument("--sluice", default=f"{sys.executable} -m proxy", metavar="COMMAND")
    parser.add_argument("--base", metavar="COMMAND", help="another Sluice to compare with")
    parser.add_argument("--bare", action="store_true", help="Sluice without clients and limits")
    parser.add_argument("--keep", metavar="DIR", help="for callgrind_annotate: the raw profiles")
    options = parser.parse_args()
    units = options.units or list(_SCENARIOS)
    if unknown := set(units) - _SCENARIOS.keys():
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(_SCENARIOS)}")
    commands = {"base": options.base, "sluice": options.sluice}
    for unit in units:
        try:
            counts = {
                name: _count(name, shlex.split(command), _SCENARIOS[unit], options)
                for name, command in commands.items()
                if command
            }
        except (NotReady, OSError) as error:
            sys.exit(f"bench: {error}")
        ratio = f"  {counts['sluice'] / counts['base']:.3f}" if "base" in counts else ""
        found = "  ".join(f"{name} {count:,.0f}" for name, count in counts.items())
        print(f"instructions/{unit}: {found}{ratio}", flush=True)


def _count(name: str, command: list[str], scenario: str, options: argparse.Namespace) -> float:
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        keep = Path(options.keep or home)
        keep.mkdir(parents=True, exist_ok=True)
        profile = keep / f"callgrind.{scenario}.{name}"
        valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--trace-children=yes"]
        valgrind += [f"--callgrind-out-file={profile}", *command]
        with Stage(Path(home), {"sluice": valgrind}, bare=options.bare) as stage:
            target = stage.start("sluice", _CONNECTIONS)
            _load(stage, target, scenario, _WARM)
            before = _units(Path(home) / "sluice.log", scenario)
            _switch(target, "on")
            _load(stage, target, scenario, _SECONDS)
            _switch(target, "off")
            stage.end(target.pid or 0, patience=30)  # its last words are the profile
        units = _units(Path(home) / "sluice.log", scenario) - before
        total = re.search(r"^totals: (\d+)", profile.read_text(), re.MULTILINE)
        return int(total[1]) / units if total else 0.0


def _load(stage: Stage, target: Target, scenario: str, seconds: float) -> None:
    order = Order(scenario, target.port, stage.mock_port, _CONNECTIONS, seconds, watch={})
    _, complaint = stage.load(order)
    if complaint:
        raise NotReady(complaint)


def _switch(target: Target, to: str) -> None:
    command = ["callgrind_control", "-i", to, str(target.pid)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _units(log: Path, scenario: str) -> int:
    lines = (line for line in log.read_text().splitlines() if '"event":"request"' in line)
    ended = [json.loads(line) for line in lines]
    if scenario == "request":
        return len(ended)
    return sum(line["bytes_down"] for line in ended) // wire.CHUNK_BYTES


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, leave)
    main()
