"""Imports go down; each module has its test; what belongs to one module stays there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import proxy

ROOT = Path(proxy.__file__).parent
TESTS = Path(__file__).parent
_FLOOR = re.compile(r"F([0-6]) (\w+): \S")
# Words for what reads a file or the environment; `open` of a forwarder or an opener is none.
_READERS = {"environ", "environb", "getenv", "read_text", "read_bytes", "read_key", "expandvars"}


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def _modules() -> dict[str, list[ast.Module]]:
    """Each module by its name with its source; a package is one module of several files."""
    found = {}
    for path in ROOT.iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            files = sorted(path.rglob("*.py"), key=lambda file: file.name != "__init__.py")
            found[path.name] = [_parse(file) for file in files]
        elif path.suffix == ".py" and path.name != "__init__.py":
            found[path.stem] = [_parse(path)]
    return found


MODULES = _modules()
EVERY = pytest.mark.parametrize("name", sorted(MODULES))


def _docstring(name: str) -> str:
    return (ast.get_docstring(MODULES[name][0]) or "").partition("\n")[0]


def _floor(name: str) -> int:
    match = _FLOOR.match(_docstring(name))
    assert match, f"{name} states no floor: {_docstring(name)!r}"
    return int(match[1])


def _imports(name: str) -> set[str]:
    """The modules of proxy that a module imports, wherever in it the import stands."""
    found = set()
    for imported in _imported(name):
        first, *rest = imported.split(".")
        if first == "proxy" and rest and rest[0] in MODULES and rest[0] != name:
            found.add(rest[0])
    return found


def _imported(name: str) -> Iterator[str]:
    """Everything that a module imports, `from a import b` as `a.b`."""
    for tree in MODULES[name]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


@EVERY
def test_every_module_states_its_floor_and_name(name: str) -> None:
    assert _floor(name) in range(7)
    stated = _FLOOR.match(_docstring(name))
    assert stated is not None
    assert stated[2] == {"__main__": "process"}.get(name, name)


@EVERY
def test_imports_go_down(name: str) -> None:
    upward = {other for other in _imports(name) if _floor(other) > _floor(name)}
    assert not upward


def test_there_are_no_cycles() -> None:
    # Imports on one floor are fine, as long as one could still be put below the other.
    TopologicalSorter({name: _imports(name) for name in MODULES}).prepare()


@EVERY
def test_no_import_is_relative_or_hidden_in_a_function(name: str) -> None:
    # A relative one would go unseen here; one in a function hides a cycle. uvloop is optional.
    for tree in MODULES[name]:
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                hidden = [each for each in ast.walk(function) if isinstance(each, ast.Import)]
                assert {alias.name for each in hidden for alias in each.names} <= {"uvloop"}
                assert not [n for n in ast.walk(function) if isinstance(n, ast.ImportFrom)]
        levels = {n.level for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert levels <= {0}


@EVERY
def test_only_observe_knows_the_metrics_library(name: str) -> None:
    libraries = {imported.partition(".")[0] for imported in _imported(name)}
    assert ("prometheus_client" in libraries) == (name == "observe")


@EVERY
def test_only_config_reads_files_and_environment(name: str) -> None:
    if name == "config":
        return
    words = [
        node.attr if isinstance(node, ast.Attribute) else node.id
        for tree in MODULES[name]
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name)
    ]
    calls = {
        node.func.id
        for tree in MODULES[name]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "open" not in calls
    assert [word for word in words if word in _READERS] == ["environ"] * (name == "__main__")


@EVERY
def test_sans_io_modules_know_neither_sockets_nor_clocks(name: str) -> None:
    if _floor(name) == 0:
        libraries = {imported.partition(".")[0] for imported in _imported(name)}
        assert not libraries & {"asyncio", "socket", "time", "aiohttp", "logging", "random"}


def test_every_module_has_its_test_and_every_test_its_module() -> None:
    tests = {path.stem.removeprefix("test_") for path in TESTS.glob("test_*.py")}
    modules = {"main" if name == "__main__" else name for name in MODULES}
    parts = {
        f"{package.name}_{part.stem}"
        for package in ROOT.iterdir()
        if package.is_dir()
        for part in package.glob("*.py")
    }
    assert modules - tests == set()
    assert tests - modules - parts == {"layers"}
