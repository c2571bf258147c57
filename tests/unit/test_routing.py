"""Which route takes a model."""

from __future__ import annotations

import pytest

from proxy.config import Route
from proxy.errors import ProxyError
from proxy.routing import Router


def router(*patterns: tuple[str, ...]) -> Router:
    """Routes called after their first patterns."""
    return Router([Route(models=each, name=each[0], upstreams=("up",)) for each in patterns])


@pytest.mark.parametrize(
    ("model", "route"),
    [
        ("gpt-4o", "gpt-*"),
        ("gpt-", "gpt-*"),
        ("o3", "gpt-*"),
        ("o-special", "gpt-*"),  # the first match wins, not the closest
        ("claude-3", "claude-[23]"),
        ("claude-2", "claude-[23]"),
        ("claude-4", "*"),
        ("GPT-4o", "*"),  # case-sensitive
        ("my-gpt-4o", "*"),
        ("gpt-4o\n", "gpt-*"),
        ("a.b", "a.b"),
        ("axb", "*"),
        ("x\ny", "*"),
        ("", "*"),
        (None, "*"),
    ],
)
def test_the_first_match_wins(model: str | None, route: str) -> None:
    routes = router(("gpt-*", "o*"), ("o-special",), ("claude-[23]",), ("a.b",), ("*",))
    assert routes.resolve(model).name == route


def test_a_star_among_others_takes_everything() -> None:
    routes = router(("x", "*"), ("y",))
    assert routes.resolve("y").name == "x"
    assert routes.resolve(None).name == "x"


@pytest.mark.parametrize("pattern", ["**", "?*", "[!x]*", "*-mini"])
def test_requests_without_a_model_need_the_star(pattern: str) -> None:
    routes = router((pattern,))
    assert routes.resolve("gpt-4o-mini").name == pattern
    with pytest.raises(ProxyError) as caught:
        routes.resolve(None)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_no_route() -> None:
    with pytest.raises(ProxyError) as caught:
        router(("gpt-*",)).resolve("claude" + "x" * 1000)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "'claudex" in caught.value.message
    assert len(caught.value.message) < 300
