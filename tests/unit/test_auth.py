"""Who asks: by key, or by address where everybody may."""

from __future__ import annotations

import re
from hashlib import sha256
from ipaddress import ip_network
from typing import Any

import pytest
from multidict import CIMultiDict

from proxy import config
from proxy.auth import Auth, Client
from proxy.config.values import Rate
from proxy.errors import ProxyError
from proxy.exchange import Ask

TEN = (Rate(10, 60.0),)
FIVE = (Rate(5, 1.0),)
LIMITS = config.Limits.model_validate({"requests": "10/minute", "tokens": "5/second"})


def client(name: str, **settings: Any) -> config.Client:
    return config.Client.model_validate({"name": name, **settings})


def digest(key: str) -> str:
    return sha256(key.encode()).hexdigest()


AUTH = Auth(
    [
        client("web", key="sk-web"),
        client("ui", key_sha256=digest("sk-ui"), models=["gpt-4o*", "o1"], user_header="X-User"),
        client("batch", key="sk-batch", limits={"requests": None, "streams": 3}),
    ],
    LIMITS,
    (),
)


def ask_of(auth: Auth, peer: str, fields: dict[str, str]) -> Client:
    headers = CIMultiDict({key.replace("_", "-"): value for key, value in fields.items()})
    return auth.identify(headers, peer)


def identify(**fields: str) -> Client:
    return ask_of(AUTH, "192.0.2.1", fields)


def refused(**fields: str) -> ProxyError:
    with pytest.raises(ProxyError) as caught:
        identify(**fields)
    assert caught.value.code == "invalid_api_key"
    assert caught.value.headers()["WWW-Authenticate"] == "Bearer"
    return caught.value


@pytest.mark.parametrize(
    "fields",
    [
        {"Authorization": "Bearer sk-web"},
        {"Authorization": "bearer  sk-web "},
        {"x-api-key": "sk-web"},
        {"api-key": "sk-web"},
        {"Authorization": "Basic eA==", "api-key": "sk-web"},  # of a front, and none of ours
        {"Authorization": "Bearer sk-web", "x-api-key": "wrong", "api-key": "sk-ui"},
        {"x-api-key": "sk-web", "api-key": "sk-ui"},
    ],
)
def test_the_first_credential_counts(fields: dict[str, str]) -> None:
    assert identify(**fields).name == "web"


def test_a_key_is_known_by_its_digest_too() -> None:
    assert identify(Authorization="Bearer sk-ui").name == "ui"
    assert digest("sk-ui") not in repr(identify(Authorization="Bearer sk-ui"))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer sk-WEB"},
        {"Authorization": f"Bearer {digest('sk-ui')}"},
        {"Authorization": "Bearer wrong", "x-api-key": "sk-web"},
        {"Authorization": "Bearer \udcff"},
    ],
)
def test_everybody_else_is_refused(fields: dict[str, str]) -> None:
    error = refused(**fields)
    assert "sk-" not in error.message and "wrong" not in error.message.replace("is wrong", "")


def test_a_clients_own_limits_go_over_the_common_ones_key_by_key() -> None:
    assert identify(Authorization="Bearer sk-web").limits == LIMITS
    batch = identify(Authorization="Bearer sk-batch").limits
    assert (batch.requests, batch.tokens, batch.streams) == (None, FIVE, 3)


def test_a_clients_users_are_counted_apart() -> None:
    def scope(**fields: str) -> str:
        return identify(Authorization="Bearer sk-ui", **fields).scope

    assert scope(X_User="a") == scope(X_User="a")
    assert len({scope(X_User="a"), scope(X_User="b"), scope()}) == 3
    web = identify(Authorization="Bearer sk-web", X_User="a").scope
    assert web == identify(Authorization="Bearer sk-web").scope  # only where it is configured


def test_a_scope_names_nobody() -> None:
    for fields in ({"Authorization": "Bearer sk-web"}, {"api-key": "sk-ui", "X_User": "ada" * 999}):
        assert re.fullmatch("[0-9a-f]{32}", identify(**fields).scope)


# Without clients --------------------------------------------------------------------------------

OPEN = Auth([], LIMITS, (ip_network("10.0.0.0/8"),))


def scope_of(peer: str, **fields: str) -> str:
    return ask_of(OPEN, peer, fields).scope


def test_everybody_may_call_and_is_told_apart_by_address() -> None:
    found = ask_of(OPEN, "192.0.2.1", {"Authorization": "Bearer whatever"})
    assert (found.name, found.limits.requests) == ("anonymous", TEN)
    assert scope_of("192.0.2.1") != scope_of("192.0.2.2")


def test_a_network_of_ipv6_is_one_caller() -> None:
    assert scope_of("2001:db8::1") == scope_of("2001:db8::ffff:2") == scope_of("2001:db8::1%eth0")
    assert scope_of("2001:db8::1") != scope_of("2001:db8:0:1::1")
    assert scope_of("::ffff:192.0.2.1") == scope_of("192.0.2.1")


def test_a_trusted_proxy_says_who_calls() -> None:
    assert scope_of("10.0.0.1", X_Forwarded_For="192.0.2.9, 10.1.1.1") == scope_of("192.0.2.9")
    assert scope_of("192.0.2.1", X_Forwarded_For="192.0.2.9") == scope_of("192.0.2.1")
    assert scope_of("10.0.0.1", X_Forwarded_For="nonsense") != scope_of("10.0.0.1")


def test_without_limits_it_does_not_matter_who_calls() -> None:
    nobody = Auth([], config.Limits(), ())
    assert ask_of(nobody, "192.0.2.1", {}) is ask_of(nobody, "192.0.2.2", {})


# Models -----------------------------------------------------------------------------------------


def ask(model: str | None, body: bytes = b"{}") -> Ask:
    return Ask("POST", b"/x", (), body, model)


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4o-mini", "o1"])
def test_models_that_a_client_may_use(model: str) -> None:
    identify(Authorization="Bearer sk-ui").check_model(ask(model))


@pytest.mark.parametrize(
    "asked",
    [
        ask("gpt-4"),
        ask("o1-mini"),
        ask("GPT-4o"),
        ask(""),
        ask(None),
        ask("gpt-4o", b'{"model":"gpt-4","model":"gpt-4o"}'),
        ask("gpt-4o", b'{"mod\\u0065l":"gpt-4","model":"gpt-4o"}'),
    ],
)
def test_models_that_it_may_not(asked: Ask) -> None:
    with pytest.raises(ProxyError) as caught:
        identify(Authorization="Bearer sk-ui").check_model(asked)
    assert (caught.value.status, caught.value.code) == (403, "model_not_allowed")
    assert "ui" in caught.value.message


def test_a_client_that_may_use_all() -> None:
    web = identify(Authorization="Bearer sk-web")
    for asked in (ask("anything"), ask(""), ask(None)):
        web.check_model(asked)


def test_a_model_in_the_path_counts_too() -> None:
    client = identify(Authorization="Bearer sk-ui")
    for path, allowed in (
        (b"/deployments/gpt-4o-mini/chat/completions", True),
        (b"/deployments/o1-pro/chat/completions", False),
        (b"/engines/o1%2Dpro/completions?x", False),
        (b"/%64eployments//o1-pro/chat/completions", False),
        (b"/chat/completions?x=/engines/o1-pro", True),
    ):
        asked = Ask("POST", path, (), b"{}", "gpt-4o")
        if allowed:
            client.check_model(asked)
        else:
            with pytest.raises(ProxyError):
                client.check_model(asked)


def test_what_has_no_body_names_no_model() -> None:
    identify(Authorization="Bearer sk-ui").check_model(Ask("GET", b"/models", ()))


def test_limits_as_they_are_now() -> None:
    assert AUTH.limits_of("web") == LIMITS
    assert AUTH.limits_of("nobody") is None
    assert OPEN.limits_of("anonymous") == LIMITS
