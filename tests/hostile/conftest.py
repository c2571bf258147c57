"""Fixtures: the three lanes, for as long as the tests run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostile.lanes import Lane, open_lane
from tests.hostile.upstreams import STARTERS


@pytest.fixture(scope="session", params=STARTERS)
def lane(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lane]:
    with open_lane(request.param, tmp_path_factory.mktemp(request.param)) as opened:
        yield opened
