"""F1 config.environment: ${VAR}, ${VAR:-default} and $$ in a text, replaced once.

The environment comes in as an argument.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_VARIABLE = re.compile(
    r"\$(?: (?P<dollar>\$) | \{ (?P<name>[A-Za-z_][A-Za-z0-9_]*) (?: :- (?P<default>[^}]*) )? \}"
    r" | (?P<malformed>\{) )",
    re.VERBOSE,
)


class FromEnv(str):
    """Text that had a variable in it: unlike text in quotes it may stand for a number."""

    __slots__ = ()


def expand(text: str, environ: Mapping[str, str]) -> str:
    """The text with its variables' values, which are not expanded again. ValueError: it cannot be."""

    def replacement(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if match["dollar"]:
            return "$"
        if match["malformed"] or "${" in (default or ""):
            raise ValueError(
                "has a malformed ${: write ${NAME} or ${NAME:-default}, or $${ for the text ${"
            )
        if default is not None:
            return environ.get(name) or default.replace("$$", "$")
        if name not in environ:
            raise ValueError(
                f"the environment variable {name} is not set: set it, or write ${{{name}:-default}}"
            )
        return environ[name]

    expanded = _VARIABLE.sub(replacement, text)
    return FromEnv(expanded) if "${" in text.replace("$$", "") else expanded


def escape(value: object) -> object:
    """Plain data with each $ written so that expanding gives it again."""
    if isinstance(value, dict):
        return {key: escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escape(item) for item in value]
    return value.replace("$", "$$") if isinstance(value, str) else value
