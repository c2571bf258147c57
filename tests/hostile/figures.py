"""What a run of a fuzzer has to tell."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that must never be. `kind` is one of those that the fuzzer names."""

    kind: str
    what: str


@dataclass(slots=True)
class Figures:
    """`courses` counts the ways that inputs took, `found` the problems by their kinds; `reports`
    has the problems in full."""

    kinds: tuple[str, ...]
    inputs: int = 0
    courses: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    reports: list[str] = field(default_factory=list)

    def report(self, problem: Problem, details: str) -> None:
        self.found[problem.kind] += 1
        self.reports.append(f"{problem.kind}: {problem.what:.500}\n{details:.4000}")

    def add(self, other: Figures) -> None:
        self.inputs += other.inputs
        self.courses += other.courses
        self.found += other.found
        self.reports += other.reports

    def __str__(self) -> str:
        courses = ", ".join(f"{course} {count}" for course, count in sorted(self.courses.items()))
        found = ", ".join(f"{self.found[kind]} {kind}" for kind in self.kinds)
        return "\n".join([*self.reports, f"{self.inputs} inputs: {courses}", found])
