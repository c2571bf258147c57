"""Reloads, seen from outside: new requests follow the file, open streams go on untouched."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.canaries import CLIENT_KEY, COMPLETION
from tests.flow import wire
from tests.flow.conftest import listening
from tests.flow.test_tls import CERTS, server_context
from tests.flow.wire import LAST, STREAM, Client, Until, Upstream, chunked, json_answer
from tests.process import paced
from tests.process.floods import allow_descriptors, needs_proc
from tests.process.paced import Proxy, Told, key

STREAMS = 200
RELOADS = 100
CALLERS = 8  # who ask for small answers all the while, each on a connection of its own

EVENT = f'data: {{"choices":[{{"delta":{{"content":"{COMPLETION}"}}}}]}}\n\n'.encode()
DONE = chunked(b"data: [DONE]\n\n") + LAST

Settings = dict[str, Any]


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PATIENCE", 60.0)  # for many, on a busy machine


def at(port: int, **more: object) -> Settings:
    """An upstream, there."""
    return {"base_url": f"http://127.0.0.1:{port}/v1", **more}


def authorization(request: wire.Request) -> list[bytes]:
    return [value.removeprefix(b"Bearer ") for value in request.values("authorization")]


# Many -------------------------------------------------------------------------------------------


class Rotation:
    """The upstream's key changes, again and again; `number` is the last one that is known to hold."""

    def __init__(self, proxy: Proxy, rewrite: Callable[[int], Settings]) -> None:
        self.number = 0
        self.asked = 0
        self._proxy, self._rewrite = proxy, rewrite

    async def turn(self) -> None:
        """From one key to the next. The old one is revoked, for whatever the proxy sends later than
        a request that was made after the reload: see `paced`."""
        following = self.number + 1
        await self._proxy.reload(**self._rewrite(following))
        self.number = following
        reply = await self._proxy.ask(paced.post(since=following, barrier=following))
        assert reply.status == 200

    async def call(self, until: asyncio.Event) -> None:
        """Asks for small answers, one after another."""
        client = await self._proxy.connect()
        while not until.is_set():
            await client.send(paced.post(since=self.number))
            reply = await client.reply()
            assert (reply.status, reply.whole) == (200, True)
            self.asked += 1
        client.close()


def in_the_config(_: Path, port: int) -> Callable[[int], Settings]:
    return lambda number: {"upstreams": {"up": at(port, api_key=key(number))}}


def in_a_file(folder: Path, port: int) -> Callable[[int], Settings]:
    """Replaced at once, as a rotation should be: a file may be read at any moment."""

    def rewrite(number: int) -> Settings:
        new = folder / "new"
        new.write_text(key(number))
        new.rename(folder / "key")
        return {"upstreams": {"up": at(port, api_key_file=str(folder / "key"))}}

    return rewrite


@needs_proc
@pytest.mark.parametrize("kept", [in_the_config, in_a_file])
async def test_a_hundred_reloads_under_two_hundred_streams(
    tmp_path: Path, kept: Callable[[Path, int], Callable[[int], Settings]]
) -> None:
    """No stream is broken, nobody refused, no key used that is gone; and nothing is left behind."""
    allow_descriptors(4 * STREAMS)
    async with paced.upstream() as upstream:
        rewrite = kept(tmp_path, upstream.port)
        async with Proxy(tmp_path, rewrite(0)).running() as proxy:
            rotation = Rotation(proxy, rewrite)
            await rotation.turn()
            descriptors = await _lasting_descriptors(proxy, upstream.port)
            await rotation.turn()

            clients = await asyncio.gather(*(proxy.stream(1 + n % 5) for n in range(STREAMS)))
            over = asyncio.Event()
            calls = [asyncio.create_task(rotation.call(over)) for _ in range(CALLERS)]
            for _ in range(RELOADS):
                await rotation.turn()
            over.set()
            await asyncio.gather(*calls)
            await upstream.begin()
            replies = await asyncio.gather(*map(Client.reply, clients))
            tales = [Told.by(reply) for reply in replies]
            assert [tale for tale in tales if not tale.is_whole] == []
            for client in clients:
                client.close()

            seen = await upstream.seen()
            assert seen.stale == []
            assert set(seen.keys) == set(range(1, rotation.number + 1))
            assert len(seen.keys) == rotation.asked + STREAMS + rotation.number
            assert rotation.asked > RELOADS
            async with asyncio.timeout(wire.PATIENCE):
                while any((await proxy.samples("sluice_requests_in_flight")).values()):
                    await asyncio.sleep(0.01)
            outcomes = await proxy.samples("sluice_outcomes_total")
            assert outcomes == {("completed", "default"): len(seen.keys)}
            requests = await proxy.samples("sluice_requests_total")
            assert sum(requests.values()) == len(seen.keys)
            reloads = await proxy.samples("sluice_config_reloads_total")
            assert reloads == {("applied",): rotation.number + 1, ("rejected",): 0}
            async with asyncio.timeout(wire.PATIENCE):
                while await _lasting_descriptors(proxy, upstream.port) > descriptors:
                    await asyncio.sleep(0.05)


async def _lasting_descriptors(proxy: Proxy, port: int) -> int:
    """How many it has without idle connections to its upstream: those close when that is removed."""
    await proxy.reload(upstreams={"other": at(port)})
    return proxy.descriptors()


# One after another ------------------------------------------------------------------------------


async def test_a_request_that_waits_for_its_connection_goes_up_with_the_new_key(
    tmp_path: Path,
) -> None:
    async with slow_to_shake_hands() as (port, arrived, goes_on, received):

        def settings(number: int) -> Settings:
            url, ca = f"https://localhost:{port}/v1", str(CERTS / "ca.pem")
            return {"upstreams": {"up": {"base_url": url, "ca_file": ca, "api_key": key(number)}}}

        async with Proxy(tmp_path, settings(1)).running() as proxy:
            client = await proxy.connect()
            await client.send(wire.post())
            await arrived.wait()
            await proxy.reload(**settings(2))
            goes_on.set()
            assert (await client.reply()).status == 200
            assert [authorization(each) for each in received] == [[key(2).encode()]]


@asynccontextmanager
async def slow_to_shake_hands() -> AsyncIterator[
    tuple[int, asyncio.Event, asyncio.Event, list[wire.Request]]
]:
    """An upstream that takes a TCP connection, and speaks TLS only later: its port; when it has
    taken one; what it then waits for; the requests it got."""
    tls = Upstream()
    tls.plays(json_answer(b"{}", b"Connection: close"), wire.Close())
    arrived, goes_on = asyncio.Event(), asyncio.Event()

    async def through(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A pipe to the one that speaks TLS, which opens late."""
        arrived.set()
        await goes_on.wait()
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", tls.port)
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(through, "127.0.0.1", 0)
    async with listening(tls, server_context("localhost")), server:
        yield server.sockets[0].getsockname()[1], arrived, goes_on, tls.requests


@asynccontextmanager
async def waiting_for_its_turn(
    folder: Path, *, of_the_second: Settings, **settings: Any
) -> AsyncIterator[tuple[Proxy, Upstream, Callable[[], Awaitable[wire.Reply]]]]:
    """A request whose first candidate thinks, to give up in the end: the proxy, the second
    candidate, and what lets the first one give up and then gives the request's answer."""
    thought = asyncio.Event()
    async with listening(Upstream()) as first, listening(Upstream()) as second:
        first.plays(Until(thought), json_answer(b'{"first":1}', status=b"503 Busy"))
        second.plays(json_answer(b'{"second":1}'))
        settings["upstreams"] = {
            "first": at(first.port),
            "second": at(second.port, **of_the_second),
        }
        settings["routes"] = [{"models": ["*"], "upstreams": ["first", "second"]}]
        async with Proxy(folder, settings).running() as proxy:
            client = await proxy.connect()
            await client.send(wire.post())
            await first.got_request.wait()

            async def turn() -> wire.Reply:
                thought.set()
                return await client.reply()

            yield proxy, second, turn


async def test_a_request_that_waits_for_its_turn_goes_up_with_the_new_key(tmp_path: Path) -> None:
    known = {"api_key": key(1)}
    async with waiting_for_its_turn(tmp_path, of_the_second=known) as (proxy, second, turn):
        renewed = {"second": at(second.port, api_key=key(2))}
        await proxy.reload(upstreams=proxy.settings["upstreams"] | renewed)
        assert (await turn()).body == b'{"second":1}'
        assert [authorization(each) for each in second.requests] == [[key(2).encode()]]


async def test_nobody_is_asked_who_is_gone_with_its_key(tmp_path: Path) -> None:
    known = {"api_key": key(1)}
    async with waiting_for_its_turn(tmp_path, of_the_second=known) as (proxy, second, turn):
        first = {"first": proxy.settings["upstreams"]["first"]}
        await proxy.reload(upstreams=first, routes=[{"models": ["*"], "upstreams": ["first"]}])
        reply = await turn()
        assert (reply.status, reply.body) == (503, b'{"first":1}')
        assert second.requests == []


async def test_a_clients_key_goes_up_to_nobody_though_clients_are_gone(tmp_path: Path) -> None:
    """It identified a client when it came (interface, §3)."""
    clients = [{"name": "web", "key": CLIENT_KEY}]
    async with waiting_for_its_turn(tmp_path, of_the_second={}, clients=clients) as (
        proxy,
        second,
        turn,
    ):
        await proxy.reload(clients=[])
        assert (await turn()).body == b'{"second":1}'
        assert [each.values("api-key") for each in second.requests] == [[]]


async def test_streams_outlive_their_upstream_and_their_route(tmp_path: Path) -> None:
    end = asyncio.Event()
    async with listening(Upstream()) as old, listening(Upstream()) as new:
        old.plays(STREAM + chunked(EVENT), Until(end), chunked(EVENT) + DONE)
        new.plays(json_answer(b'{"new":1}'))
        settings = {
            "upstreams": {"old": at(old.port)},
            "routes": [{"name": "gone", "models": ["m"], "upstreams": ["old"]}],
        }
        async with Proxy(tmp_path, settings).running() as proxy:
            client, other = await proxy.connect(), await proxy.connect()
            await client.send(wire.post())
            await client.until(EVENT)
            await proxy.reload(
                upstreams={"new": at(new.port)},
                routes=[{"name": "here", "models": ["n"], "upstreams": ["new"]}],
            )
            await other.send(wire.post())
            refused = await other.reply()
            assert (refused.status, _code(refused)) == (404, "model_not_found")
            await other.send(wire.post(b'{"model":"n"}'))
            assert (await other.reply()).values("sluice-upstream") == [b"new"]
            in_flight = await proxy.samples("sluice_requests_in_flight")
            assert (in_flight["gone",], in_flight["here",]) == (1, 0)
            end.set()
            reply = await client.reply()
            assert (reply.whole, reply.values("sluice-upstream")) == (True, [b"old"])
            assert reply.body == EVENT * 2 + b"data: [DONE]\n\n"
            assert (await proxy.logged("request", 3))["route"] == "gone"
            await old.gone.wait()  # its connection is not kept


async def test_new_limits_hold_and_buckets_keep_their_level(tmp_path: Path) -> None:
    async with listening(Upstream()) as upstream:
        upstream.plays(json_answer(b"{}"))
        settings = {"upstreams": {"up": at(upstream.port)}, "limits": {"requests": "10/hour"}}
        async with Proxy(tmp_path, settings).running() as proxy:
            for left in 9, 8, 7:
                assert await _left(proxy) == (200, [b"%d" % left])
            await proxy.reload(limits={"requests": "2/hour"})
            assert (await _left(proxy))[0] == 200
            assert (await _left(proxy))[0] == 200
            assert (await _left(proxy))[0] == 429
            await proxy.reload(limits={"requests": None})
            assert await _left(proxy) == (200, [])


async def _left(proxy: Proxy) -> tuple[int, list[bytes]]:
    reply = await proxy.ask(wire.post())
    return reply.status, reply.values("x-ratelimit-remaining-requests")


async def test_a_clients_key_changes_at_once(tmp_path: Path) -> None:
    """Also on connections that are open; a stream that began with the old one goes on."""
    end = asyncio.Event()
    async with listening(Upstream()) as upstream:
        upstream.plays(STREAM + chunked(EVENT), Until(end), DONE)
        settings = {
            "upstreams": {"up": at(upstream.port)},
            "clients": [{"name": "web", "key": CLIENT_KEY}],
        }
        async with Proxy(tmp_path, settings).running() as proxy:
            streaming, other = await proxy.connect(), await proxy.connect()
            await streaming.send(wire.post())
            await streaming.until(EVENT)
            upstream.plays(json_answer(b"{}"))
            await other.send(wire.post())
            assert (await other.reply()).status == 200
            new = f"{CLIENT_KEY}-2"
            await proxy.reload(clients=[{"name": "web", "key": new}])
            await other.send(wire.post())
            refused = await other.reply()
            assert (refused.status, _code(refused)) == (401, "invalid_api_key")
            await other.send(wire.post().replace(CLIENT_KEY.encode(), new.encode()))
            assert (await other.reply()).status == 200
            end.set()
            assert (await streaming.reply()).whole


async def test_what_needs_a_restart_is_said_and_left_alone(tmp_path: Path) -> None:
    async with listening(Upstream()) as upstream:
        upstream.plays(json_answer(b"{}"))
        async with Proxy(tmp_path, {"upstreams": {"up": at(upstream.port)}}).running() as proxy:
            admin = proxy.admin
            await proxy.reload(
                listen={"port": 1}, admin={"port": 2}, store="redis://127.0.0.1:1", drain_timeout=2
            )
            needed = {line["key"] for line in proxy.lines("restart_needed")}
            assert needed == {"listen", "admin", "store"}
            assert (await proxy.ask(wire.post())).status == 200
            assert (await paced.get(admin, "/readyz")).status == 200
            proxy.tell(signal.SIGTERM)
            assert (await proxy.logged("draining"))["timeout"] == 2  # which needed none


async def test_the_log_level_changes(tmp_path: Path) -> None:
    async with listening(Upstream()) as upstream:
        upstream.plays(json_answer(b"{}"))
        async with Proxy(tmp_path, {"upstreams": {"up": at(upstream.port)}}).running() as proxy:
            await proxy.ask(wire.post())
            assert (await proxy.logged("request"))["status"] == 200
            assert proxy.counts["received"] == 0
            await proxy.reload(log={"level": "debug"})
            await proxy.ask(wire.post())
            await proxy.logged("request", 2)
            assert proxy.counts["received"] == 1
            proxy.configure(log={"level": "warning"})
            proxy.tell(signal.SIGHUP)
            await _applied(proxy, 2)
            await proxy.ask(wire.post())
            proxy.configure(log={"level": "info"})
            proxy.tell(signal.SIGHUP)
            await proxy.logged("reloaded", 2)
            assert proxy.counts["request"] == 2  # the third was not logged


async def _applied(proxy: Proxy, times: int) -> None:
    """For a reload that may not say so."""
    async with asyncio.timeout(wire.PATIENCE):
        while (await proxy.samples("sluice_config_reloads_total"))["applied",] < times:
            await asyncio.sleep(0.01)


BROKEN = {
    "no YAML": "upstreams: [",
    "nothing": "",
    "an unknown key": "nonsense: 1\n",
    "an unknown upstream": "routes: [{models: ['*'], upstreams: [nobody]}]\n",
    "an unset variable": "default_model: ${SLUICE_NO_SUCH_VARIABLE}\n",
}


async def test_an_invalid_file_changes_nothing(tmp_path: Path) -> None:
    async with listening(Upstream()) as upstream:
        upstream.plays(json_answer(b"{}"))
        settings = {"upstreams": {"up": at(upstream.port, api_key=key(1))}}
        async with Proxy(tmp_path, settings).running() as proxy:
            valid = proxy.config.read_text()
            told = count(1)
            for name, text in BROKEN.items():
                proxy.config.write_text(text if len(text) < 15 else valid + text)
                proxy.tell(signal.SIGHUP)
                problem = (await proxy.logged("reload_rejected", next(told)))["problem"]
                assert (name, "config.yaml" in problem) == (name, True)
                assert (await proxy.ask(wire.post())).status == 200
            proxy.config.unlink()
            proxy.tell(signal.SIGHUP)
            await proxy.logged("reload_rejected", next(told))
            assert (await proxy.ask(wire.post())).status == 200
            assert {each for request in upstream.requests for each in authorization(request)} == {
                key(1).encode()
            }
            reloads = await proxy.samples("sluice_config_reloads_total")
            assert reloads == {("applied",): 0, ("rejected",): len(BROKEN) + 1}
            assert proxy.counts["reloaded"] == 0


def _code(reply: wire.Reply) -> str:
    code: str = json.loads(reply.body)["error"]["code"]
    return code
