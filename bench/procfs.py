"""CPU and memory of a whole process tree, from /proc."""

from __future__ import annotations

import os
from pathlib import Path

_TICK = 1 / os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def tree(root: int) -> list[int]:
    """`root` and all its descendants that are alive."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [root]
    for pid in found:  # grows while it is walked
        found += children.get(pid, [])
    return found


def cpu_seconds(root: int) -> float:
    """User and system time of the tree so far, with the children it has already buried."""
    stats = (_stat(pid) for pid in tree(root))
    return sum(sum(map(int, fields[11:15])) for fields in stats if fields) * _TICK


def rss_bytes(root: int) -> int:
    """Resident memory of the tree; pages that its processes share count in each of them."""
    stats = (_stat(pid) for pid in tree(root))
    return sum(int(fields[21]) for fields in stats if fields) * _PAGE


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name, which may hold spaces: [0] is the state."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(")") + 2 :].split()
