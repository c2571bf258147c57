"""What a configured upstream wants in its requests, and which key it gets."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from proxy import config
from proxy.connection import UpstreamConnection
from proxy.errors import ProxyError
from proxy.framing import Header
from proxy.upstreams import Upstream, build


async def nowhere() -> UpstreamConnection:
    raise AssertionError("nobody connects here")


def upstream(base_url: str = "https://up.example/v1", **settings: Any) -> Upstream:
    return Upstream("up", config.Upstream(base_url=base_url, **settings), nowhere)


@pytest.mark.parametrize(
    ("base_url", "host", "prefix"),
    [
        ("https://up.example/v1", b"up.example", b"/v1"),
        ("https://up.example/v1/", b"up.example", b"/v1"),
        ("http://up.example", b"up.example", b""),
        ("http://up.example/", b"up.example", b""),
        ("http://up.example:8443/a/b", b"up.example:8443", b"/a/b"),
        ("http://[::1]:11434/v1", b"[::1]:11434", b"/v1"),
    ],
)
def test_where_its_requests_go(base_url: str, host: bytes, prefix: bytes) -> None:
    up = upstream(base_url)
    assert (up.rules.host, up.prefix) == (host, prefix)


@pytest.mark.parametrize(
    ("base_url", "prefix"),
    [
        ("https://up.example/v1", b"/v1"),
        ("http://up.example/v1/", b"http://up.example/v1"),
        ("http://up.example:8080", b"http://up.example:8080"),
        ("http://[::1]:11434/v1", b"http://[::1]:11434/v1"),
    ],
)
def test_a_forward_proxy_is_told_the_whole_url_but_in_a_tunnel(
    base_url: str, prefix: bytes
) -> None:
    up = upstream(base_url, egress="http://proxy.example:3128")
    assert up.prefix == prefix
    assert up.rules.host == upstream(base_url).rules.host


@pytest.mark.parametrize(
    ("base_url", "egress", "looked_up", "place"),
    [
        ("http://up.example", None, ("up.example", 80), "up.example:80"),
        ("https://up.example:8443", None, ("up.example", 8443), "up.example:8443"),
        (
            "https://up.example",
            "http://p.example:3128",
            ("p.example", 3128),
            "up.example:443 through p.example:3128",
        ),
    ],
)
async def test_where_its_connections_go(
    monkeypatch: pytest.MonkeyPatch,
    base_url: str,
    egress: str | None,
    looked_up: tuple[str, int],
    place: str,
) -> None:
    asked = []

    def look_up(host: str, port: int, **_: object) -> Any:
        asked.append((host, port))
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    settings = config.Upstream.model_validate({"base_url": base_url, "egress": egress})
    up = build(config.Config(store="memory", upstreams={"up": settings}), lambda: nowhere)["up"]
    with pytest.raises(ProxyError) as caught:
        await up.pool.acquire()
    assert asked == [looked_up]
    assert caught.value.detail == f"{place}: [Errno -2] unknown"


@pytest.mark.parametrize(
    ("settings", "credential"),
    [
        ({}, None),
        ({"api_key": "k"}, (b"Authorization", b"Bearer k")),
        ({"api_key": "k", "auth": "bearer"}, (b"Authorization", b"Bearer k")),
        ({"api_key": "k", "auth": "x-api-key"}, (b"x-api-key", b"k")),
        ({"api_key": "k", "auth": "api-key"}, (b"api-key", b"k")),
        ({"auth": "none"}, None),
    ],
)
def test_its_credential(settings: dict[str, Any], credential: Header | None) -> None:
    up = upstream(**settings)
    assert up.credential() == credential
    assert up.injects == (credential is not None)
    assert up.rules.drops_credentials == up.injects
    assert (b"authorization" in up.dropped) == up.injects


def test_a_key_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("first\n")
    up = upstream(api_key_file=path)
    assert up.credential() == (b"Authorization", b"Bearer first")


def test_fixed_headers() -> None:
    up = upstream(headers={"X-Org": "ours", "User-Agent": "us"})
    assert up.rules.fixed == ((b"X-Org", b"ours"), (b"User-Agent", b"us"))
    assert {b"x-org", b"user-agent"} <= up.dropped
    assert not up.injects


@pytest.mark.parametrize("name", ["Authorization", "x-api-key", "API-Key"])
def test_a_credential_among_the_fixed_headers_is_one_of_ours(name: str) -> None:
    # interface.md, §3: `with an injected key no client credential goes up`; config agrees.
    settings = config.Upstream.model_validate(
        {"base_url": "http://up.example", "headers": {name: "ours"}}
    )
    assert settings.injects
    up = Upstream("up", settings, nowhere)
    assert {b"authorization", b"x-api-key", b"api-key"} <= up.dropped


def test_no_key_is_shown() -> None:
    up = upstream(api_key="sk-secret", headers={"X": "sk-secret"})
    assert repr(up) == "<Upstream up <Pool idle=0>>"
    assert "sk-secret" not in repr(vars(up)["_key"])


async def test_the_demo_upstream_is_given_its_connections() -> None:
    asked = []

    def demo() -> Any:
        asked.append(True)
        return nowhere

    settings = {
        "demo": config.Upstream(base_url="demo://"),
        "up": config.Upstream(base_url="http://127.0.0.1:9"),
    }
    built = build(config.Config(store="memory", upstreams=settings), demo)
    assert list(built) == ["demo", "up"]
    assert [up.name for up in built.values()] == ["demo", "up"]
    assert len(asked) == 1
    with pytest.raises(AssertionError, match="nobody connects"):
        await built["demo"].pool.acquire()
