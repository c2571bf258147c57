"""Real programs that some tests need: found, or skipped with the command that installs them.

On CI nothing is skipped: a missing part fails there, or a whole suite could vanish unnoticed.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

_SEARCH = os.pathsep.join(
    [
        str(
            Path(sys.executable).parent
        ),  # where `make test-deps` puts node if the machine's is old
        os.environ.get("PATH", os.defpath),
        "/usr/sbin",  # nginx; not on every user's PATH
    ]
)
_MODULES = Path(__file__).parent / "real/node_modules"
_FILES = {
    "aimock": _MODULES / "@copilotkit/aimock/dist/cli.js",
    "openai-node": _MODULES / "openai/index.mjs",
}


def find(part: str) -> Path | None:
    """The path of a program on PATH, or of an installed npm package's entry file."""
    if part in _FILES:
        return _FILES[part] if _FILES[part].exists() else None
    found = shutil.which(part, path=_SEARCH)
    return Path(found) if found else None


def need(part: str) -> Path:
    """The path of a real part; without it, the calling test is skipped, or fails on CI."""
    path = find(part)
    if path is None:
        message = f"{part} is not installed: run `make test-deps`"
        if os.environ.get("CI", "").lower() in {"true", "1"}:
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    return path
