"""Keys, judged by an upstream that checks them: aimock refuses a request if any credential in it,
in whichever header, is not its own. A 200 therefore proves that ours went up and nobody else's.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.processes import CLIENT_KEY, KEY, Process, Upstream, start_proxy

BODY = json.dumps(
    {"model": "gpt-4o", "messages": [{"role": "user", "content": "a short answer"}]}
).encode()


def post(url: str, headers: dict[str, str]) -> tuple[int, str | None]:
    """Status, and the code of an error, of a chat completion."""
    request = urllib.request.Request(f"{url}/v1/chat/completions", data=BODY, headers=headers)
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            response.read()
            return response.status, None
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)["error"]["code"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": f"Bearer {CLIENT_KEY}"},
        {"x-api-key": CLIENT_KEY},
        {"api-key": CLIENT_KEY},
        {"Authorization": f"Bearer {CLIENT_KEY}", "x-api-key": CLIENT_KEY},
    ],
    ids=lambda headers: "+".join(headers) or "none",
)
def test_only_the_proxys_key_arrives(
    aimock: Upstream, aimock_proxy: Process, headers: dict[str, str]
) -> None:
    if headers:
        assert post(aimock.process.url, headers)[0] == 401  # it does look there
    assert post(aimock_proxy.url, headers) == (200, None)
    arrived = aimock.journal()[-1]["headers"]
    assert "authorization" in arrived
    assert arrived.keys().isdisjoint({"x-api-key", "api-key"})


def test_without_clients_and_key_the_clients_own_passes(aimock: Upstream, tmp_path: Path) -> None:
    up = {"base_url": aimock.base_url, "auth": "none"}
    with start_proxy(tmp_path, aimock, upstreams={"up": up}) as proxy:
        assert post(proxy.url, {"Authorization": f"Bearer {KEY}"}) == (200, None)
        assert post(proxy.url, {"Authorization": f"Bearer {CLIENT_KEY}"})[0] == 401


def offer(header: str, key: str) -> dict[str, str]:
    return {header: f"Bearer {key}" if header == "Authorization" else key}


@pytest.fixture(scope="module")
def guarded(aimock: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A proxy with one client, and no key to inject: what the upstream wants is a header to it."""
    up = {"base_url": aimock.base_url, "auth": "none", "headers": {"api-key": KEY}}
    clients = [{"name": "web", "key": CLIENT_KEY}]
    folder = tmp_path_factory.mktemp("guarded")
    with start_proxy(folder, aimock, upstreams={"up": up}, clients=clients) as proxy:
        yield proxy


@pytest.mark.parametrize("header", ["Authorization", "x-api-key", "api-key"])
def test_a_wrong_client_key_reaches_no_upstream(
    aimock: Upstream, guarded: Process, header: str
) -> None:
    """Nor does the upstream's own, which opens nothing here."""
    last = aimock.journal()[-1:]
    for headers in ({}, offer(header, CLIENT_KEY + "x"), offer(header, KEY)):
        assert post(guarded.url, headers) == (401, "invalid_api_key")
    assert aimock.journal()[-1:] == last
    assert post(guarded.url, offer(header, CLIENT_KEY)) == (200, None)
    assert aimock.journal()[-1:] != last


@pytest.mark.parametrize("header", ["Authorization", "x-api-key"])
def test_a_key_that_identified_a_client_never_goes_up(
    aimock: Upstream, guarded: Process, header: str
) -> None:
    assert post(guarded.url, offer(header, CLIENT_KEY)) == (200, None)
    arrived = aimock.journal()[-1]["headers"].keys()
    assert arrived & {"authorization", "x-api-key", "api-key"} == {"api-key"}
