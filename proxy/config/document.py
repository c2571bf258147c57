"""F1 config.document: a YAML file as plain data, the line of each part, and what is wrong with it.

Plain data know neither their lines nor duplicate keys, YAML nodes know both: so the data are made
from the nodes here. Every later step complains to the same `Document`, so that all problems come at
once. No complaint repeats a value: it may be a key, or have come from the environment.

A small file can hold more than fits anywhere, since aliases of aliases multiply ("billion laughs"):
so the steps of reading one are counted, and bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from proxy.config.environment import expand

_MAX_SIZE = 2**20  # bytes of a file
_MAX_STEPS = 50_000  # parts of a text, and keys and values made of them: an alias's each time
_MAX_NUMBER = 100  # characters of what is no text; base 60 (1:30:00) takes quadratic time
_MAX_PROBLEMS = 1000  # named of one file
_MAX_SPELLED = 200  # characters of a way that a problem shows

Where = tuple[str | int, ...]  # the way to a key or value: ("routes", 1, "models", 0)


class ConfigError(Exception):
    """A config that is refused, with all that is wrong: `FILE:LINE: path.to[1].key: what is wrong`."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(slots=True)
class Document:
    """A config as plain data, and the problems found so far."""

    file: str
    data: dict[str, Any] = field(default_factory=dict, repr=False)  # it holds keys
    lines: dict[Where, int] = field(default_factory=dict)
    names: dict[Where, str] = field(default_factory=dict)  # of parts not in the file: `--host`
    _problems: dict[Where, tuple[int, str]] = field(default_factory=dict)
    _around: set[Where] = field(default_factory=set)  # parts with a problem, and all around them

    def complain(self, where: Where, message: str, *given: Where) -> None:
        """Adds a problem of a part, if it is sound so far, and whatever else it was judged by."""
        if any(self._is_broken(part) for part in (where, *given)):
            return
        line = self._line(where)
        name = self.names.get(where) or f"{self.file}:{line}: {_spelled(where)}"
        self._problems[where] = (line, f"{name}: {message}")
        self._around.update(where[:depth] for depth in range(len(where) + 1))
        if len(self._problems) == _MAX_PROBLEMS:
            self.raise_problems()

    def raise_problems(self) -> None:
        if self._problems:
            by_line = sorted(self._problems.values(), key=lambda problem: problem[0])
            raise ConfigError(text for _, text in by_line)

    def _is_broken(self, where: Where) -> bool:
        """Whether the part, one that encloses it, or one inside has a problem."""
        return where in self._around or any(
            where[:depth] in self._problems for depth in range(len(where))
        )

    def _line(self, where: Where) -> int:
        """The line of a part; of one that is not there, the line of what encloses it."""
        while where not in self.lines:
            where = where[:-1]
        return self.lines[where]


def _spelled(where: Where) -> str:
    """`routes[1].models[0]`, cut where a key isn't one: in {api_key:KEY} the space is missing."""
    text = ""
    for part in where:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = re.sub(r"[^\w.<?-].*", "...", part[:_MAX_SPELLED], flags=re.DOTALL)
            text += f".{name}" if text else name
    return text if len(text) <= _MAX_SPELLED else text[:_MAX_SPELLED] + "..."


def read(path: Path, environ: Mapping[str, str]) -> Document:
    """The file, with its variables replaced. ConfigError: it cannot be read as keys and values."""
    document = Document(str(path))

    def refusal(message: str, line: int | None = None) -> ConfigError:
        return ConfigError([f"{path}:{line}: {message}" if line else f"{path}: {message}"])

    try:
        with path.open("rb") as file:
            text = file.read(_MAX_SIZE + 1)
        if len(text) > _MAX_SIZE:
            raise _TooMuch
        reader = _Reader(text.decode("utf-8-sig"), document, environ)
        root = reader.get_single_node()
        if root is None:
            raise refusal("is empty: a mapping with at least `upstreams` is needed", 1)
        if not isinstance(root, yaml.MappingNode):
            raise refusal("must be a mapping: lines of `key: value`", _line_of(root))
        document.data = reader.value(root, (), _line_of(root))
    except OSError as error:
        raise refusal(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise refusal("is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise refusal(*_yaml_trouble(error)) from None
    except _TooMuch:
        raise refusal(
            "holds too much: a config has at most 1 MiB, and some ten thousand values, those of an "
            "anchor counted wherever it is used"
        ) from None
    except RecursionError:
        raise refusal("is nested too deeply, or an anchor is used inside what it names") from None
    return document


# What the parser stumbles over, and what is meant: its own words may quote a value. First match.
_YAML_TROUBLE = {
    r"'\\t'": "a tab: indent with spaces",
    r"alias|anchor": "a text that begins with * or & goes in quotes",
    r"cannot start|tag": "a text that begins with @, %, ! or ` goes in quotes",
    r"mapping values": "wrong indentation, a line without a colon and a space after it, "
    "or a colon in a text without quotes",
    r"expected ':'": "a line must be `key: value`, with a colon and a space",
    r"flow": "a { or [ is not closed, or a text in it needs quotes (${...} does)",
    r"quoted scalar": "a quote is not closed, or a backslash in it is not doubled",
    r"block": "wrong indentation: keys of one mapping, and dashes of one list, begin in one column",
    r"document": "it must be one document, without a line of --- in it",
    r"special characters": "it has a control character",
}


def _yaml_trouble(error: yaml.YAMLError) -> tuple[str, int | None]:
    """What is wrong and in which line: that of an opening bracket or quote, if one was not closed."""
    context = getattr(error, "context", None) or ""
    words = f"{context} {getattr(error, 'problem', error)}"
    found = [ours for theirs, ours in _YAML_TROUBLE.items() if re.search(theirs, words)]
    opening = re.search("flow|quoted|simple key", context)
    mark = getattr(error, "context_mark" if opening else "problem_mark", None)
    return ": ".join(["is not valid YAML", *found[:1]]), mark.line + 1 if mark else None


_TAG = "tag:yaml.org,2002:"
_PLAIN = {
    _TAG + kind for kind in ("str", "int", "float", "bool", "null", "timestamp", "map", "seq")
}


def _line_of(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


class _TooMuch(Exception):
    """The file holds more than any config does."""


class _Reader(yaml.SafeLoader):
    """Makes plain data of a YAML text, and notes the line of each; counts its steps."""

    def __init__(self, text: str, document: Document, environ: Mapping[str, str]) -> None:
        super().__init__(text)
        self._document = document
        self._environ = environ
        self._steps = 0

    def _step(self) -> None:
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise _TooMuch

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._step()
        return super().compose_node(parent, index)

    def value(self, node: yaml.Node, where: Where, line: int) -> Any:
        self._step()
        self._document.lines[where] = line
        if node.tag not in _PLAIN:
            return self._document.complain(where, "has a YAML tag, which means nothing here")
        if isinstance(node, yaml.MappingNode):
            pairs = self._pairs(node, where)
            return {key: self.value(item, (*where, key), at) for key, (item, at) in pairs.items()}
        if isinstance(node, yaml.SequenceNode):
            items = enumerate(node.value)
            return [self.value(item, (*where, index), _line_of(item)) for index, item in items]
        try:
            if node.tag != _TAG + "str" and len(node.value) > _MAX_NUMBER:
                raise ValueError
            value = self.construct_object(node)
        except (ValueError, LookupError, AttributeError, yaml.YAMLError):  # 31 February, `!!bool x`
            return self._document.complain(where, "is no value to YAML: put it in quotes")
        try:
            return expand(value, self._environ) if isinstance(value, str) else value
        except ValueError as error:
            return self._document.complain(where, str(error))

    def _pairs(self, node: yaml.MappingNode, where: Where) -> dict[str, tuple[yaml.Node, int]]:
        """The values of a mapping by key, each with the key's line; `<<` is merged in."""
        self._step()
        merged: dict[str, tuple[yaml.Node, int]] = {}
        own: dict[str, tuple[yaml.Node, int]] = {}
        for key, value in node.value:
            self._step()
            name = key.value if isinstance(key, yaml.ScalarNode) else "?"
            place = (*where, name)
            self._document.lines[place] = _line_of(key)
            if key.tag == _TAG + "merge":
                for each in reversed(value.value) if value.tag == _TAG + "seq" else [value]:
                    if isinstance(each, yaml.MappingNode):
                        merged |= self._pairs(each, where)
                    else:
                        self._document.complain(place, "must be a mapping, or a list of mappings")
            elif key.tag != _TAG + "str":
                self._document.complain(place, "is not text to YAML: put this key in quotes")
            elif name in own:
                message = f"is a duplicate key, given on line {own[name][1]} already"
                self._document.complain(place, message)
            else:
                own[name] = value, _line_of(key)
        return merged | own
