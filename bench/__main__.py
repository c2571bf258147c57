"""python -m bench [scenario[:connections] ...]: see bench/README.md."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from bench import procfs, report
from bench.load import Order
from bench.targets import NotReady, Stage, Target, allow_files

CONNECTIONS = {"request": 16, "paced": 200, "flood": 8, "mega": 4, "memory": 2000}
_HOLD = 2.0  # seconds that the streams of `memory` stay open


@dataclass(frozen=True, slots=True)
class Plan:
    """One scenario of this run."""

    scenario: str
    connections: int

    @classmethod
    def parse(cls, text: str) -> Plan:
        name, _, connections = text.partition(":")
        if name not in CONNECTIONS or (connections and not int(connections) > 0):
            raise argparse.ArgumentTypeError(f"{text}: one of {', '.join(CONNECTIONS)}[:N]")
        return cls(name, int(connections or CONNECTIONS[name]))

    def skips(self, target: str, turn: int) -> bool:
        """Without a proxy in between there is a latency to compare with; else only a ceiling."""
        return target == "direct" and (
            self.scenario == "memory" or (self.scenario != "paced" and turn > 0)
        )


def main() -> int:
    options = _options()
    commands = {"sluice": shlex.split(options.sluice)}
    if options.base:
        commands["base"] = shlex.split(options.base)
    names = [name for name in ("direct", "nginx") if name in options.against.split(",")]
    names += sorted(commands)  # base, sluice
    about = report.about(options.rounds, options.seconds, bare=options.bare)
    runs: list[report.Run] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        stage = Stage(Path(home), commands, bare=options.bare)
        try:
            allow_files(2 * max(plan.connections for plan in options.scenarios) + 1024)
            with stage:
                for plan in options.scenarios:
                    runs += _measure(stage, plan, names, options.rounds, options.seconds)
        except NotReady as error:
            sys.exit(f"bench: {error}")
    print(report.table(about, names, runs))
    if options.json:
        Path(options.json).write_text(json.dumps({**about, "runs": runs}, indent=1) + "\n")
    return 1 if any(run["void"] for run in runs) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    parser.add_argument(
        "scenarios",
        nargs="*",
        type=Plan.parse,
        default=[Plan(*item) for item in CONNECTIONS.items()],
        metavar="scenario[:N]",
        help=f"N connections; default: {' '.join(f'{k}:{v}' for k, v in CONNECTIONS.items())}",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="measured in each run")
    parser.add_argument("--against", default="nginx,direct", help="none, one or both of these")
    parser.add_argument("--sluice", default=f"{sys.executable} -m proxy", metavar="COMMAND")
    parser.add_argument("--base", metavar="COMMAND", help="another Sluice to compare with")
    parser.add_argument("--bare", action="store_true", help="Sluice without clients and limits")
    parser.add_argument("--json", metavar="FILE", help="every single run, with its figures")
    options = parser.parse_args()
    if unknown := set(filter(None, options.against.split(","))) - {"nginx", "direct"}:
        parser.error(f"--against: unknown {', '.join(unknown)}")
    return options


def _measure(
    stage: Stage, plan: Plan, names: list[str], rounds: int, seconds: float
) -> list[report.Run]:
    """The targets take turns, so that what else the machine does strikes all of them alike."""
    runs: list[report.Run] = []
    targets: list[Target] = []
    for turn in range(rounds):
        if not targets or plan.scenario == "memory":  # memory once used hides the next growth
            _end(stage, targets)
            targets = [stage.start(name, plan.connections) for name in names]
        runs += [
            _run(stage, plan, target, turn, seconds)
            for target in targets
            if not plan.skips(target.name, turn)
        ]
    _end(stage, targets)
    return runs


def _run(stage: Stage, plan: Plan, target: Target, turn: int, seconds: float) -> report.Run:
    watch = {"mock": stage.mock_pid} | ({"proxy": target.pid} if target.pid else {})
    idle = procfs.rss_bytes(target.pid) if target.pid else 0
    order = Order(
        scenario=plan.scenario,
        port=target.port,
        mock_port=stage.mock_port,
        connections=plan.connections,
        seconds=_HOLD if plan.scenario == "memory" else seconds,
        watch=watch,
    )
    result, complaint = stage.load(order)
    said = f"{plan.scenario}:{plan.connections} round {turn + 1} {target.name}: {complaint or 'ok'}"
    print(said, file=sys.stderr)
    return {
        "scenario": plan.scenario,
        "connections": plan.connections,
        "target": target.name,
        "round": turn,
        "void": complaint,
        "figures": report.figures(plan.scenario, plan.connections, idle, result),
    }


def _end(stage: Stage, targets: list[Target]) -> None:
    for target in targets:
        if target.pid:
            stage.end(target.pid)


def leave(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)  # an exception, so that everything started is ended


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, leave)
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
