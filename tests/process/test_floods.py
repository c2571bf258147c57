"""Floods: whatever strangers pour into the proxy, and whatever an upstream does, memory stays small,
a neighbour is served in time, and what the flood took is given back.

The bounds are generous: they tell a leak or a blocked loop from a busy machine, and measure
neither. Each flood prints its figures (`pytest -s`).
"""

from __future__ import annotations

import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flow.wire import get, post
from tests.process.floods import (
    ASYNCIO,
    MIB,
    SETTLED_WITHIN,
    UVLOOP,
    Proxy,
    Upstream,
    allow_descriptors,
    crowd,
    dial,
    flood,
    is_over,
    needs_proc,
    pour,
    reset,
    said,
    start_proxy,
    start_upstream,
    status,
    was_reset,
)
from tests.real.processes import answers, eventually

pytestmark = needs_proc

CROWD = 1000
JSON = "application/json"
TEXT = "text/plain"


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    with start_upstream(tmp_path_factory.mktemp("upstream")) as started:
        yield started


@pytest.fixture(scope="module")
def neighbours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    with start_upstream(tmp_path_factory.mktemp("neighbours")) as started:
        yield started


@pytest.fixture(scope="module")
def proxy(
    upstream: Upstream, neighbours: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    allow_descriptors(4 * CROWD)
    with start_proxy(tmp_path_factory.mktemp("proxy"), upstream, neighbours) as started:
        yield started


def upload(kind: str, media: str) -> bytes:
    """The head of a request whose body comes in chunks."""
    return post(b"", "Transfer-Encoding: chunked", path=f"/v1/{kind}", content_type=media)


# Connections ------------------------------------------------------------------------------------


def test_a_crowd_that_dawdles_is_sent_away(proxy: Proxy) -> None:
    """`client_timeouts`, with a word where a request has begun."""
    kinds = [
        ("nothing", b"", b""),
        ("a slow head", b"POST /v1/small HTTP/1.1\r\nX-A: ", b"408"),
        ("a stalled body", post(b"{} ")[:-1], b"408"),
        ("a stalled upload", post(b"abc", path="/v1/take-all", content_type=TEXT)[:-1], b"408"),
        ("idle after a request", get("/livez"), b"200"),
    ]
    with flood(proxy, "a crowd that dawdles"), crowd(proxy, CROWD) as dawdlers:
        for number, each in enumerate(dawdlers):
            each.sendall(kinds[number % 5][1])
        for _ in range(4):
            time.sleep(0.2)
            for each in dawdlers[1::5]:
                each.sendall(b"a")  # a byte now and then does not help a head
        for number, (name, _, answer) in enumerate(kinds):
            assert (name, {status(said(each)) for each in dawdlers[number::5]}) == (name, {answer})


def test_a_storm_of_connections(proxy: Proxy) -> None:
    with flood(proxy, "connections that end at once"):
        for number in range(1000):
            dial(proxy).close()
            reset(dial(proxy))
            cut_off = dial(proxy)
            cut_off.sendall(post(path="/v1/stream")[: number % 200])
            reset(cut_off)


def test_half_closed_connections(proxy: Proxy) -> None:
    with flood(proxy, "half-closed connections"), crowd(proxy, CROWD) as half:
        for number, each in enumerate(half):
            each.sendall((b"", b"POST /v1/s", get("/livez"))[number % 3])
            each.shutdown(socket.SHUT_WR)
        for each in half:
            said(each)  # it ends


# Readers ----------------------------------------------------------------------------------------


def test_readers_that_take_nothing(proxy: Proxy, upstream: Upstream) -> None:
    """Of an answer without an end a bounded part waits for each. Then they are sent away, with a
    reset: after a mere close the kernel would keep megabytes for each of them."""
    with flood(proxy, "readers that take nothing"), crowd(proxy, 100, takes=4096) as readers:
        for number, each in enumerate(readers):
            each.sendall(post(path="/v1/huge-stream" if number % 5 == 0 else "/v1/huge"))
        for each in readers:
            assert status(each.recv(12)) == b"200"
        assert eventually(lambda: all(map(was_reset, readers)), SETTLED_WITHIN)
    assert eventually(lambda: upstream.open() < 5)


def test_readers_that_are_slow_are_waited_for(proxy: Proxy, upstream: Upstream) -> None:
    with flood(proxy, "slow readers"), crowd(proxy, 50, takes=4096) as readers:
        for each in readers:
            each.sendall(post(path="/v1/huge"))
        for _ in range(25):
            for each in readers:
                assert each.recv(2048)
            time.sleep(0.1)
    assert eventually(lambda: upstream.open() < 5)


def test_many_pipelined_requests_are_all_answered(proxy: Proxy) -> None:
    count = 30_000
    with flood(proxy, "a pipeline"), dial(proxy) as client:
        sender = threading.Thread(target=client.sendall, args=[get("/livez") * count])
        sender.start()
        head, seen, left = b"HTTP/1.1 200 OK\r\n", 0, b""
        while seen < count:
            data = client.recv(MIB)
            assert data, f"it ended after {seen} answers"
            seen += (left + data).count(head)
            left = (left + data)[1 - len(head) :]  # too short for one to be counted twice
        sender.join()


def test_pipelines_that_are_never_read(proxy: Proxy, upstream: Upstream) -> None:
    with flood(proxy, "unread pipelines"), crowd(proxy, 30, takes=4096) as clients:
        for number, path in enumerate(("/metrics", "/v1/medium", "/v1/huge")):
            assert pour(clients[number::3], get(path) * 10_000, 0.7) < 10 * 20 * MIB
        assert eventually(lambda: all(map(is_over, clients)), SETTLED_WITHIN)
    assert eventually(lambda: upstream.open() < 5)


# Heads and bodies without an end ----------------------------------------------------------------


ENDLESS = {  # the start of a request, what follows again and again, the answer
    "request line": (b"GET /", b"a" * 65536, b"414"),
    "field": (b"GET /v1/small HTTP/1.1\r\nX-A: ", b"a" * 65536, b"431"),
    "fields": (b"GET /v1/small HTTP/1.1\r\n", b"X-A: a\r\n" * 1000, b"431"),
    "large fields": (b"GET /v1/small HTTP/1.1\r\n", b"X-A: %b\r\n" % (b"a" * 8000), b"431"),
    "chunk size": (upload("small", JSON), b"0" * 65536, b"400"),
    "chunk extension": (upload("small", JSON) + b"1;", b"a" * 65536, b"400"),
    "trailers": (upload("small", JSON) + b"0\r\n", b"X-A: a\r\n" * 1000, b"400"),
    "extension of an upload": (upload("take-all", TEXT) + b"1;", b"a" * 65536, b"400"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_has_no_end_is_refused(proxy: Proxy, name: str) -> None:
    start, piece, answer = ENDLESS[name]
    with flood(proxy, f"endless: {name}"), crowd(proxy, 20) as clients:
        for each in clients:
            each.sendall(start)
        pour(clients, piece, 0.3)
        assert {status(each.recv(65536)) for each in clients} == {answer}


def test_empty_lines_are_not_skipped_for_ever(proxy: Proxy) -> None:
    """RFC 9112 2.2 forgives some; a head must have begun and ended within its time all the same."""
    with flood(proxy, "endless: empty lines"), crowd(proxy, 20) as clients:
        pour(clients, b"\r\n" * 10_000, 0.5)
        assert {status(said(each)) for each in clients} <= {b"", b"400"}


def test_bodies_in_crumbs(proxy: Proxy) -> None:
    """Chunks of one byte take far more time than their size: others have their turn in between."""
    with flood(proxy, "bodies in crumbs"), crowd(proxy, 20) as clients:
        for number, each in enumerate(clients):
            each.sendall(upload("take-all", TEXT if number % 2 else JSON))
        pour(clients, b"1\r\na\r\n" * 10_000, 0.7)


def test_uploads_without_an_end(proxy: Proxy, upstream: Upstream) -> None:
    """They go up as fast as the upstream takes them, to `max_body`; what waits for it is bounded."""
    with flood(proxy, "uploads without an end"), crowd(proxy, 30) as clients:
        for number, each in enumerate(clients):
            each.sendall(upload("take-all" if number % 2 else "take-nothing", TEXT))
        pour(clients, b"10000\r\n%b\r\n" % (b"a" * 0x10000), 1)
        assert {status(said(each)) for each in clients[0::2]} == {b"504"}
        assert {status(said(each)) for each in clients[1::2]} <= {b"408", b"413"}
    assert eventually(lambda: upstream.open() < 20)  # who takes nothing sees no end either


# Hostile heads ----------------------------------------------------------------------------------


HEADS = {
    "%": get("/v1/" + "%" * 16_000),
    "%25": get("/v1/" + "%25" * 5_000),
    "%2525": get("/v1/%" + "25" * 7_500),
    "slashes": get("/v1/a" + "/" * 16_000),
    "Via": get("/v1/small", "Via: " + "," * 28_000),
    "Connection": get("/v1/small", "Connection: " + ",".join(f"{n:x}" for n in range(5_000))),
    "Cookie": get("/v1/small", "Cookie: " + "a=b; " * 5_500),
    "Origin": get("/v1/small", "Origin: https://" + "a." * 14_000),
    "Accept-Encoding": get("/v1/small", "Accept-Encoding: " + "gzip;q=0.1, " * 2_300),
    "many fields": get("/v1/small", *(f"X-{n}: {'v' * 200}" for n in range(120))),
}


@pytest.mark.parametrize("name", HEADS)
def test_hostile_heads(proxy: Proxy, name: str) -> None:
    """As large as they may be, and each costs no more than some requests do."""
    with flood(proxy, f"head: {name}"), dial(proxy) as client:
        for _ in range(50):
            client.sendall(HEADS[name])
            assert status(client.recv(65536)) in {b"200", b"400"}


# Upstreams --------------------------------------------------------------------------------------


def test_upstreams_without_an_end(proxy: Proxy, upstream: Upstream) -> None:
    """An error in time, or a visible cut."""
    kinds = {
        "interim": {b"502"},
        "slow-interim": {b"504"},
        "slow-head": {b"504"},
        "fat-head": {b"502", b"504"},  # whichever comes first on a busy machine
        "trailers": {b"200"},
        "extension": {b"200"},
    }
    with flood(proxy, "upstreams without an end"), crowd(proxy, 120) as clients:
        for number, each in enumerate(clients):
            each.sendall(post(path=f"/v1/{list(kinds)[number % 6]}"))
        for number, (kind, answer) in enumerate(kinds.items()):
            for each in clients[number::6]:
                reply = said(each) if answer == {b"200"} else each.recv(65536)
                assert status(reply) in answer, kind
                assert not reply.endswith(b"\r\n0\r\n\r\n"), kind
    assert eventually(lambda: upstream.open() < 5)


def test_answers_in_crumbs(proxy: Proxy, upstream: Upstream) -> None:
    with flood(proxy, "answers in crumbs"), crowd(proxy, 5, takes=4096) as readers:
        for each in readers:
            each.sendall(post(path="/v1/crumbs"))
        time.sleep(2)
    assert eventually(lambda: upstream.open() < 5)


# Hostile JSON: last, as its bodies make the heap large ------------------------------------------


BODIES = {  # a start, a piece, how often it follows, an end
    "arrays in arrays": (b"", b"[", 1_000_000, b""),
    "objects in objects": (b"", b'{"a":', 1_000_000, b""),
    "arrays as the model": (b'{"model":', b"[", 1_000_000, b"}"),
    "a number as the model": (b'{"model":', b"9", 10_000_000, b"}"),
    "surrogates": (b'{"x":"', b"\\ud800", 1_000_000, b'"}'),
    "one key again and again": (b"{", b'"model":"m",', 1_000_000, b'"x":1}'),
    "objects as the model": (b'{"model":[', b"{},", 10_000_000, b"{}]}"),
    "backslashes as the model": (b'{"model":"', b"\\\\", 15_000_000, b'"}'),
    "spaces": (b"", b" ", 30_000_000, b"{}"),
}


@pytest.mark.parametrize("name", BODIES)
def test_hostile_json(proxy: Proxy, name: str) -> None:
    """It goes up as it is; looking into it takes memory and time of its size, whatever is in it."""
    start, piece, times, end = BODIES[name]
    request = post(start + piece * times + end, path="/v1/small")
    with flood(proxy, f"JSON: {name}", below=220), dial(proxy) as client:
        for _ in range(3):
            client.sendall(request)
            assert status(client.recv(65536)) == b"200"


# Descriptors ------------------------------------------------------------------------------------

DESCRIPTORS = 64


def asks(connection: socket.socket, path: str) -> bytes:
    connection.sendall(get(path))
    return status(connection.recv(65536))


@pytest.mark.parametrize("start", [UVLOOP, ASYNCIO], ids=["uvloop", "asyncio"])
def test_more_connections_than_descriptors(
    upstream: Upstream, neighbours: Upstream, tmp_path: Path, start: list[str]
) -> None:
    """Who is connected is served, with connections to upstreams too; who comes too many is not. The
    proxy does not labour at it, nor go on about it; and it passes."""
    limited = start_proxy(tmp_path, upstream, neighbours, start=start, descriptors=DESCRIPTORS)
    with limited as proxy:
        with crowd(proxy, 8) as regulars:
            assert {asks(each, "/livez") for each in regulars} == {b"200"}
            with crowd(proxy, 2 * DESCRIPTORS):
                cpu, began = proxy.cpu(), time.monotonic()
                while time.monotonic() < began + 1.5:
                    assert {asks(each, "/v1/small") for each in regulars} == {b"200"}
                    time.sleep(0.1)
                assert proxy.cpu() - cpu < 0.75
            assert proxy.log_lines() < 300  # one for each request, and few more
        assert eventually(lambda: answers(proxy.process.url + "/livez"))
        with flood(proxy, "descriptors are free again"):
            time.sleep(0.2)


def test_no_descriptor_for_an_upstream(
    upstream: Upstream, neighbours: Upstream, tmp_path: Path
) -> None:
    """The client is told, and the next one is served."""
    with start_proxy(tmp_path, upstream, neighbours) as proxy, dial(proxy) as client:
        assert asks(client, "/livez") == b"200"
        before = resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE, (3, before[1]))
        client.sendall(get("/v1/small"))
        assert b"has no file descriptors left" in client.recv(65536)
        resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE, before)
        assert asks(client, "/v1/small") == b"200"
