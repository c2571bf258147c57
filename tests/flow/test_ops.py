"""What operators and browsers see: health, metrics, /admin, CORS, the access line."""

from __future__ import annotations

import asyncio
import json
import logging
import re

import pytest

from proxy.exchange import Outcome
from tests.flow.conftest import Sluice, Start
from tests.flow.wire import (
    LAST,
    STREAM,
    Close,
    Reply,
    Until,
    UntilGone,
    Upstream,
    chunked,
    get,
    json_answer,
    post,
)

EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
PAGE = "Origin: https://page.example"


async def ask(sluice: Sluice, path: str, *fields: str, method: str = "GET") -> Reply:
    return await sluice.ask(get(path, *fields, method=method), method=method)


async def test_alive_and_ready(sluice: Sluice) -> None:
    reply = await ask(sluice, "/livez")
    assert (reply.status, json.loads(reply.body)) == (200, {"status": "ok", "reasons": []})
    reply = await ask(sluice, "/readyz?verbose=1")
    assert (reply.status, json.loads(reply.body)) == (200, {"status": "ready", "reasons": []})
    assert reply.values("sluice-request-id")


async def test_a_failing_upstream_is_reported_and_not_judged(sluice: Sluice) -> None:
    sluice.upstream.plays(json_answer(b"{}", status=b"500 Oops"))
    await sluice.ask(post())
    reply = await ask(sluice, "/readyz")
    assert (reply.status, json.loads(reply.body)["reasons"]) == (200, ["upstream up: server_error"])
    sluice.upstream.plays(json_answer(b"{}"))
    await sluice.ask(post())
    assert json.loads((await ask(sluice, "/readyz")).body)["reasons"] == []


async def test_draining_shows_in_ready_alone(sluice: Sluice) -> None:
    sluice.app.draining = True
    sluice.upstream.plays(json_answer(b"{}"))
    assert (await ask(sluice, "/readyz")).status == 503
    assert (await ask(sluice, "/livez")).status == 200
    assert (await sluice.ask(post())).status == 200


async def test_new_work_is_refused_while_old_goes_on(sluice: Sluice) -> None:
    gate = asyncio.Event()
    sluice.upstream.plays(STREAM, chunked(EVENT), Until(gate), chunked(EVENT), LAST)
    client, other = await sluice.connect(), await sluice.connect()
    await client.send(post())
    await client.until(EVENT)
    sluice.app.draining = sluice.app.refusing = True
    await other.send(post())
    refused = await other.reply()
    assert (refused.status, b"shutting_down" in refused.body) == (503, True)
    assert refused.values("connection") == [b"close"]
    assert refused.values("retry-after") == [b"1"]
    gate.set()
    assert (await client.reply()).whole


async def test_metrics_count_relayed_requests_only(sluice: Sluice) -> None:
    sluice.upstream.plays(STREAM, chunked(EVENT), LAST)
    await sluice.ask(post(b'{"model":"m","stream":true}'))
    await ask(sluice, "/livez")
    await ask(sluice, "/nowhere")
    reply = await ask(sluice, "/metrics")
    text = reply.body.decode()
    assert reply.values("content-type")[0].startswith(b"text/plain; version=0.0.4")
    for line in (
        'sluice_requests_total{client="anonymous",code="200",model="other",route="default"} 1.0',
        'sluice_requests_total{client="anonymous",code="404",model="other",route="none"} 1.0',
        'sluice_outcomes_total{outcome="completed",route="default"} 1.0',
        'sluice_upstream_attempts_total{result="answer",upstream="up"} 1.0',
        f'sluice_bytes_total{{direction="down"}} {float(len(EVENT))}',
        'sluice_bytes_total{direction="up"} 27.0',
        "sluice_chunks_total 1.0",
        'sluice_requests_in_flight{route="default"} 0.0',
        'sluice_time_to_first_token_seconds_count{route="default"} 1.0',
        'sluice_stream_duration_seconds_count{route="default"} 1.0',
        'sluice_overhead_seconds_count{route="default"} 1.0',
    ):
        assert line in text, line
    assert sum(map(float, re.findall(r"^sluice_requests_total\S+ (\S+)$", text, re.MULTILINE))) == 2


async def test_admin_shows_and_kills_what_is_relayed(start: Start) -> None:
    sluice = await start("admin: {key: adm}")
    sluice.upstream.plays(STREAM, chunked(EVENT), UntilGone())
    client = await sluice.connect()
    await client.send(post(b'{"model":"m","stream":true}'))
    await client.until(EVENT)
    admin = "Authorization: Bearer adm"
    (row,) = json.loads((await ask(sluice, "/admin/streams", admin)).body)["data"]
    assert row["client"] == "anonymous" and row["phase"] == "relaying"
    assert (row["route"], row["model"], row["upstream"]) == ("default", "m", "up")
    assert set(row) == {
        "id", "client", "route", "model", "upstream", "age", "phase", "tokens", "last_payload",
    }  # fmt: skip
    assert (await ask(sluice, f"/admin/streams/{row['id']}", admin, method="DELETE")).status == 204
    reply = await client.reply()
    assert (b'"code":"killed"' in reply.body, reply.whole) == (True, False)
    assert (await sluice.record()).outcome is Outcome.KILLED
    await asyncio.wait_for(sluice.upstream.gone.wait(), 1)
    gone = await ask(sluice, f"/admin/streams/{row['id']}", admin, method="DELETE")
    assert (gone.status, b"stream_not_found" in gone.body) == (404, True)


async def test_a_kill_before_the_head_is_a_connection_that_ends(start: Start) -> None:
    sluice = await start("admin: {key: adm}")
    sluice.upstream.plays(UntilGone())
    client = await sluice.connect()
    await client.send(post())
    await asyncio.wait_for(sluice.upstream.got_request.wait(), 5)
    (own_id,) = sluice.app.observer.in_flight
    await ask(sluice, f"/admin/streams/{own_id}", "Authorization: Bearer adm", method="DELETE")
    assert await client.rest() == b""  # `killed` is said inside of a stream only
    assert (await sluice.record()).outcome is Outcome.KILLED


@pytest.mark.parametrize("field", ["X: 1", "Authorization: Bearer no", "Authorization: adm"])
async def test_admin_wants_its_key(start: Start, field: str) -> None:
    sluice = await start("admin: {key: adm}")
    reply = await ask(sluice, "/admin/streams", field)
    assert (reply.status, b"invalid_api_key" in reply.body) == (401, True)
    assert reply.values("www-authenticate") == [b"Bearer"]


async def test_without_an_admin_key_there_is_no_admin(sluice: Sluice) -> None:
    reply = await ask(sluice, "/admin/streams", "Authorization: Bearer ")
    assert (reply.status, b"unknown_url" in reply.body) == (404, True)


async def test_an_admin_port_takes_metrics_away_from_the_main_one(start: Start) -> None:
    sluice = await start("admin: {port: 9, key: adm}")
    for path in ("/metrics", "/admin/streams"):
        assert (await ask(sluice, path)).status == 404
    assert (await ask(sluice, "/livez")).status == 200


async def test_a_preflight_needs_no_key_and_echoes_what_is_asked(start: Start) -> None:
    sluice = await start("cors: {origins: ['https://page.example']}")
    asked = "authorization, x-stainless-lang"
    reply = await ask(
        sluice,
        "/v1/chat/completions",
        PAGE,
        "Access-Control-Request-Method: POST",
        f"Access-Control-Request-Headers: {asked}",
        "Sec-Fetch-Site: cross-site",
        method="OPTIONS",
    )
    assert reply.status == 204
    assert reply.values("access-control-allow-origin") == [b"https://page.example"]
    assert reply.values("access-control-allow-methods") == [b"POST"]
    assert reply.values("access-control-allow-headers") == [asked.encode()]
    assert not sluice.upstream.requests


async def test_answers_and_errors_are_readable_for_an_allowed_page(start: Start) -> None:
    sluice = await start("cors: {origins: ['https://page.example']}")
    sluice.upstream.plays(json_answer(b"{}", b"Access-Control-Allow-Origin: *"))
    fields = (PAGE, "Sec-Fetch-Site: cross-site")
    for request in (post(b"{}", *fields), get("/v1/../x", *fields), get("/no", *fields)):
        reply = await sluice.ask(request, method="GET")
        assert reply.values("access-control-allow-origin") == [b"https://page.example"]
        assert b"Origin" in reply.values("vary")


@pytest.mark.parametrize("settings", ["", "cors: {origins: ['https://other.example']}"])
async def test_another_sites_page_is_refused(start: Start, settings: str) -> None:
    sluice = await start(settings)
    for fields in ((PAGE, "Sec-Fetch-Site: cross-site"), ("Sec-Fetch-Site: cross-site",)):
        reply = await sluice.ask(post(b"{}", *fields))
        assert (reply.status, b"origin_not_allowed" in reply.body) == (403, True)
    preflight = await ask(
        sluice, "/v1/models", PAGE, "Access-Control-Request-Method: GET", method="OPTIONS"
    )
    assert preflight.status == 403
    assert not sluice.upstream.requests


async def test_the_access_line_tells_everything_but_what_was_said(
    sluice: Sluice, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    sluice.upstream.plays(STREAM, chunked(b'data: {"secret completion":1}\n\n'), LAST)
    body = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"secret prompt"}]}'
    await sluice.ask(post(body, "Authorization: Bearer sk-secret", path="/v1/x?key=secret"))
    (line,) = [record for record in caplog.records if record.name == "sluice.access"]
    fields = line.__dict__["fields"]
    assert (fields["path"], fields["status"], fields["outcome"]) == ("/v1/x", 200, "completed")
    assert (fields["bytes_up"], fields["model"]) == (len(body), "m")
    assert "secret" not in str([record.__dict__ for record in caplog.records])


async def test_the_log_says_why_a_request_failed(
    start: Start, upstream: Upstream, unused_tcp_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.port = unused_tcp_port
    sluice = await start(up="api_key: sk-secret")
    await sluice.ask(post(b"{}", "X-Request-Id: r-1"))
    [line] = [record for record in caplog.records if record.getMessage() == "error"]
    fields = line.__dict__["fields"]
    assert (line.levelname, fields["request_id"], fields["upstream"]) == ("WARNING", "r-1", "up")
    assert fields["code"] == "upstream_unreachable"
    assert f"127.0.0.1:{unused_tcp_port}" in fields["detail"]
    assert "sk-secret" not in str(fields)


async def test_the_log_says_why_a_stream_was_cut(
    sluice: Sluice, caplog: pytest.LogCaptureFixture
) -> None:
    sluice.upstream.plays(STREAM, chunked(EVENT), Close())
    await sluice.ask(post())
    [line] = [record for record in caplog.records if record.getMessage() == "error"]
    assert line.__dict__["fields"]["code"] == "upstream_aborted"
