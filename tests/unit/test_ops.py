"""What operators ask, and who may."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from proxy import config
from proxy.connection import UpstreamConnection
from proxy.errors import ProxyError
from proxy.exchange import Exchange, Phase
from proxy.limits import Limiter
from proxy.observe import Observer
from proxy.ops import Ops
from proxy.store.memory import MemoryCounters
from proxy.upstreams import Upstream

KEY = {"Authorization": "Bearer admin-key"}


async def nowhere() -> UpstreamConnection:
    raise AssertionError


class Counters(MemoryCounters):
    last_error: str | None = None  # type: ignore[assignment]


class Story:
    def __init__(self, admin_key: str | None = "admin-key") -> None:
        settings = config.Upstream(base_url="http://up.example")
        self.upstreams = {name: Upstream(name, settings, nowhere) for name in ("a", "b")}
        loaded = config.Config(upstreams={"a": settings, "b": settings}, store="memory")
        self.observer = Observer(loaded, lambda: 110.0)
        self.draining = False
        self.counters = Counters(lambda: 110.0)
        self.ops = Ops(
            self.observer,
            admin_key,
            draining=lambda: self.draining,
            upstreams=lambda: self.upstreams,
            limiter=Limiter(self.counters),
            clock=lambda: 110.0,
        )

    def ask(
        self, path: str, method: str = "GET", headers: dict[str, str] = KEY, *, admin: bool = True
    ) -> web.Response | None:
        request = make_mocked_request(method, path, headers=headers)
        if not self.ops.serves(path, admin=admin):
            return None
        return self.ops.answer(request, path)

    def read(self, path: str, method: str = "GET") -> tuple[int, Any]:
        answer = self.ask(path, method)
        assert answer is not None
        assert answer.content_type == "application/json"
        assert isinstance(answer.body, bytes)
        return answer.status, json.loads(answer.body)

    def refuses(self, path: str, method: str = "GET", headers: dict[str, str] = KEY) -> ProxyError:
        with pytest.raises(ProxyError) as caught:
            self.ask(path, method, headers)
        return caught.value

    def begins(self, id: str, **facts: Any) -> Exchange:
        exchange = Exchange(id, "r", "POST", "/v1/x", 100.0)
        for name, value in facts.items():
            setattr(exchange, name, value)
        self.observer.in_flight[id] = exchange
        return exchange


@pytest.fixture
async def story() -> Story:
    return Story()


async def test_alive_is_alive(story: Story) -> None:
    story.draining = True
    story.upstreams["a"].last_error = "upstream_unreachable"
    assert story.read("/livez") == (200, {"status": "ok", "reasons": []})


async def test_ready_reports_upstreams_and_judges_only_itself(story: Story) -> None:
    assert story.read("/readyz") == (200, {"status": "ready", "reasons": []})
    story.upstreams["b"].last_error = "upstream_unreachable"
    reasons = ["upstream b: upstream_unreachable"]
    assert story.read("/readyz") == (200, {"status": "ready", "reasons": reasons})
    story.draining = True
    assert story.read("/readyz") == (
        503,
        {"status": "draining", "reasons": ["draining", *reasons]},
    )


async def test_metrics(story: Story) -> None:
    answer = story.ask("/metrics")
    assert answer is not None
    assert isinstance(answer.body, bytes)
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert b"sluice_build_info" in answer.body


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/admin/streams"])
async def test_only_reading(story: Story, path: str) -> None:
    assert story.ask(path, "HEAD") is not None
    error = story.refuses(path, "POST")
    assert (error.code, error.headers()["Allow"]) == ("method_not_allowed", "GET, HEAD")


@pytest.mark.parametrize(
    "path",
    ["/", "/v1/models", "/livez/", "/livezx", "/metrics/", "/admin", "/admin/", "/admin/stream",
     "/admin/streamsx", "/ADMIN/streams", ""],
)  # fmt: skip
async def test_other_paths_are_not_its_own(story: Story, path: str) -> None:
    assert story.ask(path) is None


@pytest.mark.parametrize("path", ["/metrics", "/admin/streams", "/admin/streams/x"])
async def test_what_has_a_port_of_its_own_is_not_here(story: Story, path: str) -> None:
    assert story.ask(path, admin=False) is None
    assert story.ask("/livez", admin=False) is not None


@pytest.mark.parametrize("path", ["/admin/streams", "/admin/streams/x"])
async def test_without_a_key_there_is_no_admin(path: str) -> None:
    assert Story(admin_key=None).ask(path) is None


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer admin-ke"},
        {"Authorization": "Bearer admin-keyy"},
        {"Authorization": "Bearer ADMIN-KEY"},
        {"Authorization": "Basic admin-key"},
        {"Authorization": "admin-key"},
        {"Authorization": "Bearer ü"},
        {"x-api-key": "admin-key"},
    ],
)
@pytest.mark.parametrize("path", ["/admin/streams", "/admin/streams/x"])
async def test_who_is_not_the_operator(story: Story, path: str, headers: dict[str, str]) -> None:
    error = story.refuses(path, "DELETE" if path[-1] == "x" else "GET", headers)
    assert error.code == "invalid_api_key"
    assert error.headers()["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "authorization", ["Bearer admin-key", "bearer admin-key", "BEARER  admin-key"]
)
async def test_who_is(story: Story, authorization: str) -> None:
    assert story.ask("/admin/streams", headers={"Authorization": authorization}) is not None


async def test_relayed_requests_in_progress(story: Story) -> None:
    assert story.read("/admin/streams") == (200, {"data": []})
    story.begins("waiting", upstream="a", route="all", phase=Phase.WAITING)
    story.begins("reading")  # no upstream was asked for it yet
    story.begins(
        "relaying",
        upstream="b",
        route="gpt",
        model="m",
        client="web",
        phase=Phase.RELAYING,
        received=101.23456,
        last_payload=109.5,
        tokens_out=7,
    )
    _, document = story.read("/admin/streams")
    waiting, relaying = document["data"]
    assert waiting == {
        "id": "waiting",
        "client": "anonymous",
        "route": "all",
        "model": None,
        "upstream": "a",
        "age": 10.0,
        "phase": "waiting",
        "tokens": None,
        "last_payload": None,
    }
    assert list(relaying) == list(waiting)
    assert list(relaying.values()) == [
        "relaying",
        "web",
        "gpt",
        "m",
        "b",
        8.765,
        "relaying",
        7,
        0.5,
    ]


async def test_a_kill(story: Story) -> None:
    task = asyncio.create_task(asyncio.sleep(60))
    exchange = story.begins("x", upstream="a", task=task)
    answer = story.ask("/admin/streams/x", "DELETE")
    assert answer is not None
    assert answer.status == 204
    assert exchange.interruption is not None
    assert exchange.interruption.code == "killed"
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("id", ["", "unknown", "reading", "a/b"])
async def test_nothing_to_kill(story: Story, id: str) -> None:
    story.begins("reading")
    assert story.refuses(f"/admin/streams/{id}", "DELETE").code == "stream_not_found"


async def test_a_request_in_progress_can_only_be_killed(story: Story) -> None:
    error = story.refuses("/admin/streams/x", "GET")
    assert (error.code, error.headers()["Allow"]) == ("method_not_allowed", "DELETE")
