"""Which route takes a request, and under which name its model goes up."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.config import Route
from proxy.errors import ProxyError
from proxy.exchange import Ask, Upload
from proxy.routing import Router, aliased


def router(*patterns: tuple[str, ...]) -> Router:
    """Routes called after their first patterns."""
    return Router([Route(models=each, name=each[0], upstreams=("up",)) for each in patterns])


def asks(model: str | None, body: bytes | Upload | None = None) -> Ask:
    """A request of which `model` was read; `body` if it says so in another way than usual."""
    if body is None and model is not None:
        body = json.dumps({"model": model}).encode()
    return Ask("POST", b"/chat/completions", (), body, model)


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
    assert routes.resolve(asks(model)).name == route


def test_a_star_among_others_takes_everything() -> None:
    routes = router(("x", "*"), ("y",))
    assert routes.resolve(asks("y")).name == "x"
    assert routes.resolve(asks(None)).name == "x"


@pytest.mark.parametrize("pattern", ["**", "?*", "[!x]*", "*-mini"])
def test_requests_without_a_model_need_the_star(pattern: str) -> None:
    routes = router((pattern,))
    assert routes.resolve(asks("gpt-4o-mini")).name == pattern
    with pytest.raises(ProxyError) as caught:
        routes.resolve(asks(None))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_no_route() -> None:
    with pytest.raises(ProxyError) as caught:
        router(("gpt-*",)).resolve(asks("claude" + "x" * 1000))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "'claudex" in caught.value.message
    assert len(caught.value.message) < 300


# A model that is named twice ----------------------------------------------------------------------

TWICE = [
    b'{"model":"claude","model":"gpt-4o"}',
    b'{"model":"gpt-4o","messages":[],"model":"gpt-4o"}',
    b'{"Model":"claude","model":"gpt-4o"}',  # Go's encoding/json ignores the case
    b'{"mod\\u0065l":"claude","model":"gpt-4o"}',
]
# What looks like two, and is one.
ONCE = [
    b'{"model":"gpt-4o","metadata":{"model":"claude"}}',
    b'{"messages":[{"content":"\\"model\\": \\"claude\\""}],"model":"gpt-4o"}',
    b'{"a":"model","model":"gpt-4o"}',
]


@pytest.mark.parametrize("body", TWICE)
def test_a_model_named_twice_is_taken_by_the_star_only(body: bytes) -> None:
    # interface.md, §6: `A doubled or unreadable model under an alias: relayed unchanged on the * route.`
    routes = router(("gpt-*",), ("claude",), ("*",))
    assert routes.resolve(asks("gpt-4o", body)).name == "*"
    with pytest.raises(ProxyError) as caught:
        router(("gpt-*",), ("claude",)).resolve(asks("gpt-4o", body))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "gpt-4o" not in caught.value.message  # which of the two would it be?


@pytest.mark.parametrize("body", ONCE)
def test_and_one_that_only_looks_so_is_not(body: bytes) -> None:
    assert router(("gpt-*",), ("*",)).resolve(asks("gpt-4o", body)).name == "gpt-*"


def test_a_star_in_front_takes_it_without_a_look() -> None:
    assert router(("*",), ("gpt-*",)).resolve(asks("gpt-4o", TWICE[0])).name == "*"


# Aliases ------------------------------------------------------------------------------------------


def alias(model: str | None) -> Route:
    return Route(models=("*",), name="all", upstreams=("up",), model=model)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"model":"fast"}', b'{"model":"gpt-4o"}'),
        (
            b'{ "n" : 1.50e1 ,\n"model"\t:  "f\\u0061st", "messages":[{"model":"fast"}]}\n',
            b'{ "n" : 1.50e1 ,\n"model"\t:  "gpt-4o", "messages":[{"model":"fast"}]}\n',
        ),
        ('{"a":"\\u00e9é","model":"fast"}'.encode(), '{"a":"\\u00e9é","model":"gpt-4o"}'.encode()),
    ],
)
def test_only_the_models_own_bytes_change(before: bytes, after: bytes) -> None:
    ask = asks("fast", before)
    changed = aliased(ask, alias("gpt-4o"))
    assert changed.body == after
    # Logs and metrics go by the name that the client sent, and so does who may use it.
    assert (changed.model, changed.method, changed.target) == ("fast", ask.method, ask.target)
    assert ask.body == before


@pytest.mark.parametrize("name", ['say "hi"', "back\\slash", "ü", "a/b:c"])
def test_any_name_is_written_as_json(name: str) -> None:
    body: Any = aliased(asks("fast"), alias(name)).body
    assert json.loads(body) == {"model": name}


@pytest.mark.parametrize("body", TWICE)
def test_one_that_is_named_twice_stays_as_it_is(body: bytes) -> None:
    ask = asks("gpt-4o", body)
    assert aliased(ask, alias("other")) is ask


@pytest.mark.parametrize("body", [None, b"", b"{", b"[]", b'{"model":5}', b'{"x":1}'])
def test_and_what_cannot_be_read(body: bytes | None) -> None:
    ask = asks(None, body)
    assert aliased(ask, alias("other")) is ask


def test_no_alias_no_change() -> None:
    ask = asks("gpt-4o")
    assert aliased(ask, alias(None)) is ask
