"""Fixtures: real upstreams, and the real proxy process in front of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import canaries
from tests.real.processes import STARTERS, Process, Upstream, get, start_aimock, start_proxy


@pytest.fixture(scope="session", params=STARTERS)
def upstream(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Upstream]:
    with STARTERS[request.param](tmp_path_factory.mktemp(request.param)) as started:
        yield started


@pytest.fixture(params=STARTERS)
def mortal_upstream(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Upstream]:
    """One that a test may kill."""
    with STARTERS[request.param](tmp_path) as started:
        yield started


@pytest.fixture(scope="session")
def aimock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    """For tests that need a scripted answer."""
    with start_aimock(tmp_path_factory.mktemp("aimock")) as started:
        yield started


@pytest.fixture(scope="session")
def proxy(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with start_proxy(tmp_path_factory.mktemp("proxy"), upstream) as started:
        yield started
        canaries.search(get(started.url + "/metrics"), "the metrics of tests/real")


@pytest.fixture(scope="session")
def aimock_proxy(aimock: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with start_proxy(tmp_path_factory.mktemp("proxy"), aimock) as started:
        yield started
        canaries.search(get(started.url + "/metrics"), "the metrics of tests/real")
