"""Which models are listed, how upstreams are asked for theirs, and who shares what they said."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any, Self, cast

import pytest

from proxy import catalog, config
from proxy.auth import Client
from proxy.catalog import Catalog
from proxy.connection import UpstreamConnection
from proxy.errors import ProxyError
from proxy.exchange import Ask, Exchange, Outcome
from proxy.forward import Forwarder
from proxy.framing import Header, ResponseHead
from proxy.routing import Router
from proxy.upstreams import Upstream
from tests.canaries import CLIENT_KEY

ALL = config.Limits()
EVERYBODY = Client("anonymous", "", ALL)
BEARER: Header = (b"Authorization", b"Bearer " + CLIENT_KEY.encode())
DEAD = ProxyError("upstream_unreachable", "Upstream 'a' could not be reached.")
FULL = ProxyError("no_upstream_available", "All are full.")


def only(pattern: str) -> Client:
    return Client("web", "", ALL, re.compile(pattern + r"\Z"))


def ask(*headers: Header, target: bytes = b"/models", method: str = "GET") -> Ask:
    return Ask(method, target, headers)


def listing(*names: str, **more: Any) -> bytes:
    """An upstream's body that lists these."""
    return json.dumps({"object": "list", "data": [{"id": each} | more for each in names]}).encode()


class Answer:
    """An upstream's answer, as far as a catalog looks at it."""

    def __init__(self, body: bytes, status: int = 200) -> None:
        self.head = ResponseHead(1, status, b"", ())
        self.succeeded = 200 <= status < 300
        self.closed = False
        self._body = body

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.closed = True

    async def read(self, most: int) -> bytes:
        return self._body[:most]


Said = Answer | ProxyError | Callable[[], Awaitable[Answer]]


class Story:
    """A catalog over upstreams a, b and c that say what they are told to. All routes are given by
    their patterns, candidates and alias: `("gpt-*", "a b", None)`."""

    def __init__(self, *routes: tuple[str, str, str | None], key: str | None = "k") -> None:
        self.now = 0.0
        self.said: dict[str, Said] = {}
        self.asked: list[tuple[str, Ask]] = []
        self.clients: list[str] = []
        self.upstreams = {
            name: Upstream(
                name,
                config.Upstream.model_validate({"base_url": "http://up.example", "api_key": key}),
                nowhere,
            )
            for name in "abc"
        }
        built = [
            config.Route(models=tuple(models.split()), upstreams=tuple(to.split()), model=alias)
            for models, to, alias in routes or [("*", "a b c", None)]
        ]
        self.catalog = Catalog(
            Router(built), built, cast(Forwarder, self), self.upstreams, lambda: self.now
        )

    async def fetch(self, upstream: Upstream, ask: Ask, exchange: Exchange) -> Answer:
        """What the forwarder does."""
        self.asked.append((upstream.name, ask))
        self.clients.append(exchange.client)
        said = self.said.get(upstream.name, DEAD)
        if isinstance(said, ProxyError):
            raise said
        return said if isinstance(said, Answer) else await said()

    def lists(self, name: str, *models: str) -> Answer:
        answer = self.said[name] = Answer(listing(*models, owned_by=name))
        return answer

    async def document(
        self,
        client: Client = EVERYBODY,
        *headers: Header,
        exchange: Exchange | None = None,
    ) -> Any:
        exchange = exchange or record()
        return json.loads(await self.catalog.models(ask(*headers), client, exchange))

    async def names(self, client: Client = EVERYBODY, *headers: Header) -> list[str]:
        return [each["id"] for each in (await self.document(client, *headers))["data"]]

    @property
    def counts(self) -> dict[str, int]:
        """How often each upstream was asked."""
        names = [name for name, _ in self.asked]
        return {name: names.count(name) for name in names}


async def nowhere() -> UpstreamConnection:
    raise AssertionError("nobody connects here")


def record() -> Exchange:
    return Exchange("id", "rid", "GET", "/v1/models", 0.0, task=asyncio.current_task())


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


# Which requests ------------------------------------------------------------------------------

ONE = ("gpt-* *", "a", None)


@pytest.mark.parametrize(
    ("routes", "client", "served"),
    [
        ([ONE], EVERYBODY, False),
        ([ONE, ("b", "a", None)], EVERYBODY, False),  # one upstream, whatever the routes
        ([ONE], only("gpt-4o"), True),
        ([ONE, ("b", "b", None)], EVERYBODY, True),
        ([("*", "a b", None)], EVERYBODY, True),
        ([("gpt-*", "a", None)], EVERYBODY, True),  # no route would take it
    ],
)
def test_it_serves_where_no_upstreams_own_list_would_do(
    routes: list[tuple[str, str, str | None]], client: Client, served: bool
) -> None:
    assert Story(*routes).catalog.serves(ask(), client) == served


@pytest.mark.parametrize(
    ("method", "target", "served"),
    [
        ("GET", b"/models", True),
        ("GET", b"/models?limit=1&a=%2f", True),
        ("GET", b"/models?", True),
        ("GET", b"/models/", False),
        ("GET", b"/models/gpt-4o", False),
        ("GET", b"/model%73", False),
        ("GET", b"/Models", False),
        ("GET", b"/x?/models", False),
        ("HEAD", b"/models", False),
        ("POST", b"/models", False),
        ("DELETE", b"/models", False),
    ],
)
def test_it_serves_one_path_and_method(method: str, target: bytes, served: bool) -> None:
    assert Story().catalog.serves(ask(target=target, method=method), EVERYBODY) == served


# Which models --------------------------------------------------------------------------------

A, B = "gpt-4o gpt-5", "llama gpt-5"


@pytest.mark.parametrize(
    ("routes", "listed"),
    [
        ([("*", "a b", None)], "gpt-4o:a gpt-5:a llama:b"),
        ([("*", "b a", None)], "llama:b gpt-5:b gpt-4o:a"),
        # Only where its own route leads.
        ([("gpt-*", "a", None), ("*", "b", None)], "gpt-4o:a gpt-5:a llama:b"),
        ([("gpt-*", "b", None), ("*", "a", None)], "gpt-5:b"),
        ([("llama", "a", None), ("*", "a b", None)], "gpt-4o:a gpt-5:a"),
        ([("gpt-4o", "a", None), ("llama", "b", None)], "gpt-4o:a llama:b"),
        ([("gpt-?", "a b", None)], "gpt-5:a"),
        ([("GPT-*", "a b", None)], ""),
        ([("gpt-5", "b", None), ("*", "a", None)], "gpt-5:b gpt-4o:a"),
        # A candidate that does not list it leaves it to the next one.
        ([("llama", "a b", None), ("nobody", "a b", None)], "llama:b"),
        # Aliases: a literal one, a list of them, one that nobody lists.
        ([("fast slow", "b", "llama"), ("*", "a", None)], "gpt-5:a gpt-4o:a fast:b slow:b"),
        ([("fast", "b a", "gpt-4o"), ("*", "b", None)], "llama:b gpt-5:b fast:a"),
        ([("fast", "b", "gpt-4o"), ("*", "a", None)], "gpt-5:a gpt-4o:a"),
        # One that an earlier route takes is none.
        ([("f*", "a", None), ("fast", "b", "llama"), ("*", "b", None)], "gpt-5:b llama:b"),
        # One with a wildcard adds no names, but takes those of others.
        ([("x-*", "b", "llama"), ("*", "a", None)], "gpt-5:a gpt-4o:a"),
        ([("gpt-*", "b", "llama"), ("*", "a", None)], "gpt-5:b gpt-4o:b"),
        ([("*", "a b", "llama")], "gpt-4o:b gpt-5:b llama:b"),
        ([("*", "a b", "none")], ""),
    ],
)
async def test_what_is_listed(routes: list[tuple[str, str, str | None]], listed: str) -> None:
    story = Story(*routes)
    story.lists("a", *A.split())
    story.lists("b", *B.split())
    data = (await story.document())["data"]
    found = [f"{each['id']}:{each['owned_by']}" for each in data]
    assert found == listed.split()


async def test_a_client_sees_what_it_may_use_by_the_names_that_it_sends() -> None:
    story = Story(("gpt-*", "a", None), ("fast", "b", "llama"), ("*", "b", None))
    story.lists("a", *A.split())
    story.lists("b", *B.split())
    assert await story.names(only("gpt-.*")) == ["gpt-4o", "gpt-5"]
    assert await story.names(only("fast")) == ["fast"]
    assert await story.names(only("gpt-4")) == []
    assert await story.names() == ["gpt-4o", "gpt-5", "llama", "fast"]


async def test_entries_are_as_they_came() -> None:
    story = Story(("*", "a", None), ("fast", "b", None))
    entry = {"object": "model", "id": "gpt-4o", "created": 2**70, "x": {"b": [1.5, None], "a": "ü"}}
    story.said["a"] = Answer(json.dumps({"data": [entry], "has_more": False}).encode())
    document = await story.document()
    assert document == {"object": "list", "data": [entry]}
    assert list(document["data"][0]) == list(entry)


async def test_an_alias_is_an_entry_of_its_own() -> None:
    story = Story(("fast", "a", "gpt-4o"), ("*", "a b", None))
    story.lists("a", "gpt-4o")
    assert (await story.document())["data"] == [
        {"id": "gpt-4o", "owned_by": "a"},
        {"id": "fast", "owned_by": "a"},
    ]


# What is left out ----------------------------------------------------------------------------

LEFT_OUT: dict[str, Said] = {
    "dead": DEAD,
    "404": Answer(listing("x"), 404),
    "500": Answer(listing("x"), 500),
    "a redirect": Answer(listing("x"), 302),
    "as it was": Answer(b"", 304),
    "nothing": Answer(b""),
    "no JSON": Answer(b"<html>"),
    "cut off": Answer(listing("x")[:-3]),
    "compressed": Answer(b"\x1f\x8b\x08"),
    "a list": Answer(b'[{"id":"x"}]'),
    "no data": Answer(b'{"models":[{"id":"x"}]}'),
    "no list of data": Answer(b'{"data":{"id":"x"}}'),
    "no object": Answer(b'{"data":[{"id":"x"},"y"]}'),
    "no id": Answer(b'{"data":[{"id":"x"},{"name":"y"}]}'),
    "an id that is no string": Answer(b'{"data":[{"id":"x"},{"id":7}]}'),
    "no UTF-8": Answer(b'{"data":[{"id":"x","y":"\xff"}]}'),
    "half a surrogate pair": Answer(rb'{"data":[{"id":"x","y":"\ud800"}]}'),
    "no number": Answer(b'{"data":[{"id":"x","y":1e999}]}'),
    "deep": Answer(b'{"data":[{"id":"x","y":' + b"[" * 9999 + b"]" * 9999 + b"}]}"),
    "too large": Answer(listing("x", y="." * 2**20)),
}


@pytest.mark.parametrize("said", LEFT_OUT.values(), ids=LEFT_OUT)
async def test_what_fails_is_left_out(said: Said) -> None:
    story = Story()
    story.lists("a", "m")
    story.said["b"] = said
    story.lists("c", "n")
    assert await story.names() == ["m", "n"]
    assert story.counts == {"a": 1, "b": 1, "c": 1}
    if isinstance(said, Answer):
        assert said.closed


async def test_one_that_is_slow_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_PATIENCE", 0.05)
    story = Story()
    story.lists("a", "m")
    story.said["b"] = cast(Said, asyncio.Event().wait)
    exchange = record()
    document = await story.document(exchange=exchange)
    assert [each["id"] for each in document["data"]] == ["m"]
    assert exchange.outcome is Outcome.COMPLETED
    assert ("b", "upstream_timeout") in exchange.attempt_results
    await story.names()
    assert story.counts["b"] == 1  # that is remembered too


async def test_what_no_request_could_name_and_more_than_anybody_has_is_not_listed() -> None:
    story = Story()
    story.lists("a", "m", "x" * 4097, "y" * 4096)
    story.lists("b", *map(str, range(3000)))
    names = await story.names()
    assert names[:3] == ["m", "y" * 4096, "0"]
    assert names[-1] == "1999"


@pytest.mark.parametrize(
    ("said", "code", "outcome"),
    [
        ({}, "upstream_unreachable", Outcome.UPSTREAM_ERROR),
        ({"a": Answer(b"", 404)}, "upstream_invalid", Outcome.UPSTREAM_ERROR),
        (
            {"a": ProxyError("upstream_timeout", "late", clock="first_byte")},
            "upstream_timeout",
            Outcome.FIRST_BYTE_TIMEOUT,
        ),
        # One that was not asked has the least to say, and if none was there is no outcome.
        ({"a": FULL, "b": Answer(b"")}, "upstream_invalid", Outcome.UPSTREAM_ERROR),
        ({"a": FULL, "b": FULL, "c": FULL}, "no_upstream_available", None),
    ],
)
async def test_if_all_fail_one_of_them_says_why(
    said: dict[str, Said], code: str, outcome: Outcome | None
) -> None:
    story, exchange = Story(), record()
    story.said = said
    for _ in range(2):  # also to those who are told later
        with pytest.raises(ProxyError) as caught:
            await story.document(exchange=exchange)
        assert (caught.value.code, exchange.outcome) == (code, outcome)
    assert story.counts == {"a": 1, "b": 1, "c": 1}


async def test_an_empty_list_is_an_answer() -> None:
    story = Story()
    story.lists("b")
    assert await story.document() == {"object": "list", "data": []}


# How it is asked, and who shares what it says ------------------------------------------------


async def test_where_our_key_goes_up_nothing_of_the_client_does() -> None:
    story = Story()
    theirs = [BEARER, (b"OpenAI-Organization", b"theirs"), (b"If-None-Match", b'"x"')]
    story.lists("a", "m")
    await story.names(EVERYBODY, *theirs)
    for _, asked in story.asked:
        assert (asked.method, asked.target, asked.body) == ("GET", b"/models", None)
        assert asked.headers == ((b"Accept", b"application/json"),)
        assert asked.identity


async def test_where_the_clients_own_credential_goes_up_so_does_the_rest() -> None:
    story = Story(key=None)
    story.lists("a", "m")
    kept = (BEARER, (b"OpenAI-Organization", b"theirs"))
    conditional = [(b"if-none-match", b'"x"'), (b"Range", b"bytes=0-1"), (b"If-Range", b'"x"')]
    await story.names(EVERYBODY, kept[0], *conditional, kept[1])
    assert story.counts == {"a": 1, "b": 1, "c": 1}
    assert {asked.headers for _, asked in story.asked} == {kept}


async def test_all_are_asked_at_once() -> None:
    story, asked, gate = Story(), asyncio.Semaphore(0), asyncio.Event()

    async def wait() -> Answer:
        asked.release()
        await gate.wait()
        return Answer(listing("m"))

    story.said = dict.fromkeys("abc", wait)
    request = asyncio.create_task(story.names())
    for _ in "abc":
        await asyncio.wait_for(asked.acquire(), 5)
    gate.set()
    assert await request == ["m"]


async def test_a_list_is_kept_for_ten_seconds_and_a_failure_for_one() -> None:
    story = Story()
    story.lists("a", "old")
    assert await story.names() == ["old"]
    story.lists("a", "new")
    story.lists("b", "back")
    story.now = 0.9
    assert await story.names(only(".*")) == ["old"]
    assert story.counts == {"a": 1, "b": 1, "c": 1}
    story.now = 1.0
    assert await story.names() == ["old", "back"]
    assert story.counts == {"a": 1, "b": 2, "c": 2}
    story.now = 9.9
    assert await story.names() == ["old", "back"]
    story.now = 10.0
    assert await story.names() == ["new", "back"]
    assert story.counts["a"] == 2


async def test_nothing_is_kept_where_it_depends_on_who_asks() -> None:
    story = Story(key=None)
    for name in "mine", "yours":
        story.lists("a", name)
        assert await story.names() == [name]
    story.said["a"] = DEAD
    with pytest.raises(ProxyError):
        await story.names()
    assert story.counts["a"] == 3


async def test_those_who_ask_meanwhile_share_one_answer() -> None:
    story, gate = Story(), asyncio.Event()

    async def wait() -> Answer:
        await gate.wait()
        return Answer(listing("m"))

    story.said["a"] = wait
    requests = [asyncio.create_task(story.names()) for _ in range(5)]
    await settle()
    gate.set()
    assert await asyncio.gather(*requests) == [["m"]] * 5
    assert story.counts == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize("leaving", [0, 1])
async def test_one_that_leaves_takes_nothing_from_the_others(leaving: int) -> None:
    story, gate, exchange = Story(), asyncio.Event(), record()

    async def wait() -> Answer:
        await gate.wait()
        return Answer(listing("m"))

    story.said["a"] = wait
    requests = [asyncio.create_task(story.document(exchange=exchange)) for _ in range(3)]
    await settle()
    requests[leaving].cancel()
    with pytest.raises(asyncio.CancelledError):
        await requests[leaving]
    assert exchange.outcome is Outcome.CLIENT_GONE
    await settle()
    gate.set()
    for at in {0, 1, 2} - {leaving}:
        assert [each["id"] for each in (await requests[at])["data"]] == ["m"]
    assert story.counts["a"] == (2 if leaving == 0 else 1)


async def test_nobody_waits_for_ever_behind_those_who_come_and_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(catalog, "_PATIENCE", 0.2)
    story = Story(("*", "a b", None))
    story.lists("b", "m")
    story.said["a"] = cast(Said, asyncio.Event().wait)
    crowd = [asyncio.create_task(story.names()) for _ in range(20)]
    await settle()
    request = asyncio.create_task(story.names())
    for each in crowd:
        await asyncio.sleep(0.1)
        each.cancel()
        if request.done():
            break
    assert request.done()
    assert await request == ["m"]
    for each in crowd:
        each.cancel()
    await asyncio.wait(crowd)


# The record ----------------------------------------------------------------------------------


async def test_the_record_names_no_upstream_and_counts_all() -> None:
    story, exchange = Story(), record()
    story.lists("a", "m")
    await story.document(exchange=exchange)
    assert (exchange.route, exchange.upstream, exchange.attempts) == ("none", None, 3)
    assert exchange.outcome is Outcome.COMPLETED
    assert sorted(exchange.attempt_results) == [
        ("a", "answer"),
        ("b", "upstream_unreachable"),
        ("c", "upstream_unreachable"),
    ]
    again = record()
    await story.document(exchange=again)
    assert (again.attempts, again.outcome) == (0, Outcome.COMPLETED)


async def test_upstreams_are_asked_in_the_clients_name() -> None:
    # By it the forwarder knows that a key in the headers is one of ours.
    story, exchange = Story(), record()
    exchange.client = "web"
    story.lists("a", "m")
    await story.document(exchange=exchange)
    assert set(story.clients) == {"web"}


@pytest.mark.parametrize(
    ("code", "outcome"), [("killed", Outcome.KILLED), ("shutting_down", Outcome.SHUTDOWN)]
)
async def test_a_request_can_be_ended_meanwhile(code: str, outcome: Outcome) -> None:
    story, exchange = Story(), record()
    story.said["a"] = cast(Said, asyncio.Event().wait)
    request = asyncio.create_task(story.document(exchange=exchange))
    exchange.task = request
    await settle()
    exchange.interrupt(ProxyError(code, "The end."))
    with pytest.raises(asyncio.CancelledError):
        await request
    assert (exchange.outcome, exchange.attempts) == (outcome, 3)
