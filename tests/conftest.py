"""What all tests share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping

import pytest
import uvloop

from tests import canaries

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="more loops and seeds: see make proofs")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, LoopFactory]:
    """Stories run on the loop that production has and on the one it falls back to. Those of several
    upstreams have nothing to do with loops, and take long: with --slow only."""
    loops = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}
    if "flow" not in item.path.parts:
        del loops["uvloop"]
    elif "several" in getattr(item, "fixturenames", ()) and not config.getoption("--slow"):
        del loops["asyncio"]
    return loops


@pytest.fixture(scope="session", autouse=True)
def no_secret_is_written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails the run, at its end, for every canary in what the proxy wrote in any of its tests."""
    yield
    canaries.search_logs(tmp_path_factory.getbasetemp())
    if seen := list(canaries.sightings):
        first = "\n".join(seen[:20])
        pytest.fail(
            f"{len(seen)} places in which the proxy wrote a secret:\n{first}", pytrace=False
        )


@pytest.fixture(autouse=True)
def _log_is_searched() -> Iterator[None]:
    with canaries.listening():
        yield
