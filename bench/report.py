"""From the results of single runs to figures, and from figures to one table."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable
from statistics import median
from typing import Any, TypedDict

_MS, _US, _KB, _MB = 1e3, 1e6, 1 << 10, 1 << 20

# What the ratio to nginx must not and should not exceed; of `idle MB` the figure itself.
_GOALS = {
    ("request:16", "CPU µs/request"): (6, 3.5),
    ("paced:200", "CPU µs/chunk"): (1.6, 1.3),
    ("paced:500", "CPU µs/chunk"): (1.4, 1.2),
    ("paced:200", "added p99 ms"): (2, 1),
    ("flood:8", "CPU µs/chunk"): (1.6, 1.2),
    ("mega:4", "CPU µs/request"): (1.5, 1.0),
    ("memory:2000", "KB/stream"): (1.3, 1.0),
    ("memory:2000", "idle MB"): (45, 35),
}


class Run(TypedDict):
    """One run of one scenario against one target."""

    scenario: str
    connections: int
    target: str
    round: int
    void: str  # why its figures do not count; else empty
    figures: dict[str, float]


def about(rounds: int, seconds: float, *, bare: bool) -> dict[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "rounds": rounds,
        "seconds": seconds,
        "features": "none" if bare else "clients, limits",
        "cores": len(os.sched_getaffinity(0)),
        "load before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "kernel": platform.release(),
    }


def figures(scenario: str, connections: int, idle: int, result: dict[str, Any]) -> dict[str, float]:
    """What one run says, by the names that the table shows."""
    if not result:
        return {}
    if scenario == "memory":
        grown = result["rss_open"] - result["rss_before"]
        return {"KB/stream": grown / connections / _KB, "idle MB": idle / _MB}
    unit = "request" if scenario in ("request", "mega") else "chunk"
    found: dict[str, float] = {}
    if "proxy" in result["cpu"] and result["units"]:
        found[f"CPU µs/{unit}"] = result["cpu"]["proxy"] / result["units"] * _US
    found[f"{unit}s/s"] = result["units"] / result["seconds"]
    found |= {f"{name} ms": value for name, value in result["latency_ms"].items()}
    for name in ("proxy", "mock", "load"):
        if name in result["cpu"]:
            found[f"{name} busy %"] = result["cpu"][name] / result["seconds"] * 100
    return found


def table(about: dict[str, Any], names: list[str], runs: list[Run]) -> str:
    """Medians over the rounds; the ratio is the median of the rounds' own ratios."""
    _subtract_direct(runs)
    compared = [name for name in names if name in ("nginx", "base")]
    ratios = [title for name in compared for title in (f"sluice/{name}", "in rounds")]
    rows = [["", "", *names, *ratios, "must", "aim"]]
    for scenario in dict.fromkeys(_title(run) for run in runs):
        ours = [run for run in runs if _title(run) == scenario]
        ours.sort(key=lambda run: run["target"] == "direct")  # it has not all the figures
        title = scenario
        for measure in dict.fromkeys(name for run in ours for name in run["figures"]):
            row = [title, measure, *(_cell(ours, name, measure) for name in names)]
            for name in compared:
                row += _ratio_cells(ours, name, measure)
            goals = _GOALS.get((scenario, measure))
            rows.append(row + [f"{goal:g}" for goal in goals or ()])
            title = ""
    lines = [", ".join(f"{key} {value}" for key, value in about.items()), "", *_align(rows)]
    void = [run for run in runs if run["void"]]
    lines += [f"VOID {_title(run)} {run['target']}: {run['void']}" for run in void]
    return "\n".join(lines)


def _title(run: Run) -> str:
    return f"{run['scenario']}:{run['connections']}"


def _subtract_direct(runs: list[Run]) -> None:
    """Added latency: what the same round shows beyond the mock's and the generator's own."""
    direct = {(_title(run), run["round"]): run for run in runs if run["target"] == "direct"}
    for run in runs:
        base = direct.get((_title(run), run["round"]))
        if base is None or base is run:
            continue
        for name in ("p50", "p99"):
            if f"{name} ms" in run["figures"] and f"{name} ms" in base["figures"]:
                added = run["figures"][f"{name} ms"] - base["figures"][f"{name} ms"]
                run["figures"][f"added {name} ms"] = max(added, 0.0)


def _cell(runs: list[Run], target: str, measure: str) -> str:
    mine = [run for run in runs if run["target"] == target]
    if any(run["void"] for run in mine):
        return "VOID"
    values = [run["figures"][measure] for run in mine if measure in run["figures"]]
    return _number(median(values)) if values else "–"


def _ratio_cells(runs: list[Run], other: str, measure: str) -> list[str]:
    if measure.endswith("busy %") or any(run["void"] for run in runs):
        return ["", ""]
    base, ours = _by_round(runs, other, measure), _by_round(runs, "sluice", measure)
    ratios = [ours[turn] / value for turn, value in base.items() if turn in ours and value > 0]
    if not ratios:
        return ["", ""]
    return [f"{median(ratios):.2f}", f"{min(ratios):.2f}–{max(ratios):.2f}"]


def _by_round(runs: list[Run], target: str, measure: str) -> dict[int, float]:
    return {
        run["round"]: run["figures"][measure]
        for run in runs
        if run["target"] == target and measure in run["figures"]
    }


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _align(rows: list[list[str]]) -> Iterable[str]:
    width = max(map(len, rows))
    rows = [row + [""] * (width - len(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, range(width), strict=True)
        yield "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for c, w, i in cells).rstrip()
