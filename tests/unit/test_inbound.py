"""From a client's request to what an upstream may be asked."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from proxy.errors import ProxyError
from proxy.exchange import Ask, Upload
from proxy.inbound import Bounds, _peek, path_of, read_ask, unknown_url, upstream_target
from proxy.payload import Payload

# Paths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "mapped"),
    [
        ("/v1/chat/completions", b"/chat/completions"),
        ("/v1/models", b"/models"),
        ("/v1/", b"/"),
        ("/v1/a/", b"/a/"),
        ("/v1/a//b", b"/a//b"),
        ("/v1/a%2Fb", b"/a%2Fb"),
        ("/v1/a%2fb%20c", b"/a%2fb%20c"),
        ("/v1/gpt-4.1", b"/gpt-4.1"),
        ("/v1/...", b"/..."),
        ("/v1/.well-known", b"/.well-known"),
        ("/v1/a..b/c.", b"/a..b/c."),
        ("/v1/%2e%2ex", b"/%2e%2ex"),
        ("/v1/a;b=c/d", b"/a;b=c/d"),
        ("/v1/a%", b"/a%"),
        ("/v1/a%zz", b"/a%zz"),
        ("/v1/a%00b", b"/a%00b"),
        ("/v1/\u00fc", b"/\xc3\xbc"),
        ("/v1/\udcfc", b"/\xfc"),  # a byte that is no UTF-8, as aiohttp hands it on
        ("/v1/%C3%BC", b"/%C3%BC"),
        ("/v1/a?b", b"/a?b"),
        ("/v1/a?", b"/a?"),
        ("/v1/a??b?c", b"/a??b?c"),
        ("/v1/a?b=../..//%2e%2e\\&c=%c0%ae", b"/a?b=../..//%2e%2e\\&c=%c0%ae"),
        ("/v1/a?url=https://x.example//y", b"/a?url=https://x.example//y"),
        ("/v1/v1/a", b"/v1/a"),
        ("/v1/https://x.example/", b"/https://x.example/"),
        ("http://sluice.example/v1/models?a=b", b"/models?a=b"),
        ("https://u:p@sluice.example:8080/v1/models", b"/models"),
    ],
)
def test_paths_that_are_mapped(target: str, mapped: bytes) -> None:
    assert upstream_target(target) == mapped


DOTS = [
    ".", "..", "%2e", "%2E%2e", ".%2e", "%2e.", "%252e%252e", "%25252e%25252e", "%2525%32e.",
    "..;", "..;a=b", ".;", "%2e%2e%3b", "..%3Bx", "%c0%ae%c0%ae", "%c0%ae.", "%e0%80%ae.",
    "..%00", "..%23", "%2e%2e%3f",
    "%f0%80%80%ae.", "%25c0%25ae", "..%2f", "..%2fetc", "x%2f..", "x%2f..%2fy", "x%252f..%252fy",
    "x%c0%afy", "..%5c", "\\", "a\\b", "%5c", "%5C..", "%255c", "..\\", "\u005c",
]  # fmt: skip


@pytest.mark.parametrize("segment", DOTS)
@pytest.mark.parametrize("path", ["/v1/{}", "/v1/{}/models", "/v1/a/{}/b", "/v1/a/{}?q"])
def test_paths_that_could_lead_elsewhere(segment: str, path: str) -> None:
    with pytest.raises(ProxyError) as caught:
        upstream_target(path.format(segment))
    assert caught.value.code == "invalid_path"


@pytest.mark.parametrize(
    "target",
    [
        "/v1//models",
        "/v1///models",
        "/v1//x.example/models",
        "//x.example/v1/models",
        "//v1/models",
        "http://sluice.example//v1/models",
        "http://sluice.example/v1//models",
        "http://sluice.example/v1/../models",
        "/../v1/models",
        "/v1/models#fragment",
        "/v1/models?a#b",
        "/v1/..",
        "/v1/.",
    ],
)
def test_other_paths_that_are_refused(target: str) -> None:
    with pytest.raises(ProxyError) as caught:
        upstream_target(target)
    assert caught.value.code == "invalid_path"


@pytest.mark.parametrize(
    "target",
    ["/", "", "*", "/v1", "/v1?a", "/v10/models", "/V1/models", "/%761/models", "/v2/models",
     "/v1%2fmodels", "v1/models", "http://sluice.example", "http://v1/models", "a://b", "?/v1/a"],
)  # fmt: skip
def test_what_is_not_below_the_prefix(target: str) -> None:
    with pytest.raises(ProxyError) as caught:
        upstream_target(target)
    assert caught.value.code == "unknown_url"
    assert caught.value.message == unknown_url().message


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/a/b", "/a/b"),
        ("/a?b", "/a"),
        ("/a?b://c/d", "/a"),
        ("/a://b/c", "/a://b/c"),
        ("http://x/a?b", "/a"),
        ("http://x", "/"),
        ("http://x?a/b", "/"),
        ("*", "*"),
        ("", ""),
    ],
)
def test_the_path_of_a_target(target: str, path: str) -> None:
    assert path_of(target) == path


# Bodies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b'{"model":"m","stream":true}', ("m", True)),
        (
            b' \n{ "stream" : true , "x":[{}], "model" : "gr\\u00fc\xc3\x9f" } ',
            ("gr\u00fc\u00df", True),
        ),
        (b'{"model":"m"}', ("m", False)),
        (b'{"model":"m","stream":false}', ("m", False)),
        (b'{"model":"m","stream":null}', ("m", False)),
        (b'{"model":"m","stream":1}', ("m", False)),
        (b'{"model":"m","stream":"true"}', ("m", False)),
        (b'{"model":""}', ("", False)),
        (b'{"model":null,"stream":true}', (None, True)),
        (b'{"model":"%b"}' % (b"m" * 4094), ("m" * 4094, False)),
        (b'{"model":"%b","stream":true}' % (b"m" * 4095), (None, True)),
        (b'{"model":5,"stream":true}', (None, True)),
        (b'{"model":["m"]}', (None, False)),
        (b'{"MODEL":"m"}', (None, False)),
        (b'{"a":{"model":"m"}}', (None, False)),
        (b"{}", (None, False)),
        (b"", (None, False)),
        (b"[]", (None, False)),
        (b'["model","m"]', (None, False)),
        (b'"model"', (None, False)),
        (b"null", (None, False)),
        (b'{"model":"m"', (None, False)),
        (b'{"model":"m"}x', (None, False)),
        (b'{"model":"m",}', (None, False)),
        (b"{'model':'m'}", (None, False)),
        (b'{"model":"m","x":NaN}', (None, False)),
        (b'{"model":"m","x":Infinity}', (None, False)),
        (b'\xef\xbb\xbf{"model":"m"}', (None, False)),
        (b'{"model":"\xff"}', (None, False)),
        (b'{"model":"\\ud800"}', (None, False)),
        ('{"model":"m"}'.encode("utf-16"), (None, False)),
        (b"\x00\xff\xfe", (None, False)),
    ],
)
def test_model_and_stream(body: bytes, found: tuple[str | None, bool]) -> None:
    assert _peek(body) == found


@pytest.mark.parametrize(
    "member",
    [
        b'"x":' + b"[" * 100_000 + b"]" * 100_000,
        b'"x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'"model":' + b"[" * 100_000 + b"]" * 100_000,
        b'"x":' + b"9" * 100_000,
        b'"x":1e999999',
        b'"x":-1e-999999',
        b'"x":"\\ud800"',
        b'"x":"\xff"',
        b'"x":"\\u0000"',
        b'"x":' + b'"' + b"a" * 1_000_000 + b'"',
        b'"model":' + b"9" * 10_000,
        b'"model":1e999999',
    ],
)
@pytest.mark.parametrize("body", [b'{"model":"m",%b}', b'{%b,"model":"m"}', b"{%b}"])
def test_hostile_bodies_are_at_worst_unread(body: bytes, member: bytes) -> None:
    model, stream = _peek(body % member)
    assert model in {"m", None}
    assert stream is False


def test_a_model_named_twice_is_never_a_third_one() -> None:
    assert _peek(b'{"model":"a","model":"b"}')[0] in {"a", "b", None}


@pytest.mark.parametrize("key", [b"model", b"stream", b"x"])
@pytest.mark.parametrize("items", [b"{}", b'{"a":1}', b'"a"', b"1.5"])
def test_nothing_is_built_of_what_is_not_asked_for(key: bytes, items: bytes) -> None:
    body = b'{"%b":[%b]}' % (key, b",".join([items] * 100_000))
    tracemalloc.start()
    try:
        assert _peek(body) == (None, False)
        assert tracemalloc.get_traced_memory()[1] < 100_000  # bytes; one for each item
    finally:
        tracemalloc.stop()


# Whole requests -------------------------------------------------------------------------------

BOUNDS = Bounds(max_body=10, body_timeout=0.01)


def asking(
    method: str = "POST",
    target: str = "/v1/x",
    *pieces: bytes,
    error: ProxyError | None = None,
    ends: bool = True,
    old: bool = False,
    **fields: str,
) -> web.BaseRequest:
    """A request whose body comes in these pieces."""
    payload: Any = EMPTY_PAYLOAD
    if pieces or error or not ends:
        payload = Payload(lambda: None)
        for piece in pieces:
            payload.feed(piece)
        if error:
            payload.fail(error)
        elif ends:
            payload.end()
    headers = CIMultiDict({name.replace("_", "-"): value for name, value in fields.items()})
    return make_mocked_request(
        method,
        target,
        headers=headers,
        payload=payload,
        version=HttpVersion10 if old else HttpVersion11,
    )


async def refused(request: web.BaseRequest) -> ProxyError:
    with pytest.raises(ProxyError) as caught:
        await read_ask(request, BOUNDS)
    return caught.value


async def test_a_json_body_is_read_whole() -> None:
    body = json.dumps({"model": "m"}).encode()
    request = asking("POST", "/v1/x?y", body[:5], body[5:], Content_Type="application/json")
    ask = await read_ask(request, Bounds(100, 1))
    assert ask == Ask("POST", b"/x?y", request.raw_headers, body, "m", stream=False)


@pytest.mark.parametrize(
    ("content_type", "whole"),
    [
        ("application/json", True),
        ("APPLICATION/JSON ; charset=utf-8", True),
        ("application/vnd.api+json", True),
        ("", False),
        ("application/jsonl", False),
        ("multipart/form-data; boundary=application/json", False),
        ("text/plain", False),
    ],
)
async def test_everything_else_streams(content_type: str, whole: bool) -> None:
    ask = await read_ask(asking("POST", "/v1/x", b"{}", b"!", Content_Type=content_type), BOUNDS)
    if whole:
        assert (ask.body, ask.model) == (b"{}!", None)
        return
    assert isinstance(ask.body, Upload)
    assert ask.body.length is None
    assert b"".join([piece async for piece in ask.body.pieces]) == b"{}!"


async def test_a_declared_length_goes_up() -> None:
    ask = await read_ask(asking("POST", "/v1/x", b"abc", Content_Length="3"), BOUNDS)
    assert isinstance(ask.body, Upload)
    assert ask.body.length == 3


async def test_requests_without_a_body() -> None:
    assert (await read_ask(asking("GET"), BOUNDS)).body is None
    assert (await read_ask(asking("POST", Content_Length="0"), BOUNDS)).body == b""


@pytest.mark.parametrize("content_type", ["application/json", "text/plain"])
async def test_a_body_that_says_it_is_too_large(content_type: str) -> None:
    request = asking("POST", "/v1/x", b"abc", Content_Length="11", Content_Type=content_type)
    error = await refused(request)
    assert (error.code, error.close) == ("request_too_large", True)
    assert "10 bytes" in error.message


async def test_a_body_that_is_too_large_without_saying_so() -> None:
    request = asking("POST", "/v1/x", b"abcdef", b"ghijkl", Content_Type="application/json")
    assert (await refused(request)).code == "request_too_large"
    ask = await read_ask(asking("POST", "/v1/x", b"abcdef", b"ghijkl"), BOUNDS)
    assert isinstance(ask.body, Upload)
    with pytest.raises(ProxyError) as caught:
        [piece async for piece in ask.body.pieces]
    assert caught.value.code == "request_too_large"


async def test_a_body_of_just_the_size() -> None:
    request = asking("POST", "/v1/x", b"12345", b"67890", Content_Type="application/json")
    assert (await read_ask(request, BOUNDS)).body == b"1234567890"


async def test_a_body_that_stands_still() -> None:
    request = asking("POST", "/v1/x", b"12", ends=False, Content_Type="application/json")
    error = await refused(request)
    assert (error.code, error.close) == ("request_timeout", True)


async def test_a_body_that_breaks() -> None:
    error = ProxyError("invalid_request", "malformed", close=True)
    request = asking("POST", "/v1/x", b"12", error=error, Content_Type="application/json")
    assert await refused(request) is error


@pytest.mark.parametrize("method", ["CONNECT", "TRACE"])
async def test_methods_that_are_not_forwarded(method: str) -> None:
    error = await refused(asking(method))
    assert error.code == "method_not_allowed"
    assert method not in error.headers()["Allow"]


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
async def test_methods_that_are(method: str) -> None:
    assert (await read_ask(asking(method), BOUNDS)).method == method


async def test_loops() -> None:
    assert (await refused(asking(Via="1.1 sluice"))).code == "loop_detected"


# Expect: 100-continue ---------------------------------------------------------------------------


def written(request: web.BaseRequest) -> list[bytes]:
    assert request.transport is not None
    return [call.args[0] for call in request.transport.write.call_args_list]  # type: ignore[attr-defined]


async def test_an_expectation_is_met_when_the_body_is_read() -> None:
    request = asking("POST", "/v1/x", b"ab", Expect="100-Continue")
    ask = await read_ask(request, BOUNDS)
    assert written(request) == []
    assert isinstance(ask.body, Upload)
    assert [piece async for piece in ask.body.pieces] == [b"ab"]
    assert written(request) == [b"HTTP/1.1 100 Continue\r\n\r\n"]


async def test_an_old_client_expects_nothing() -> None:
    request = asking(
        "POST", "/v1/x", b"{}", old=True, Expect="100-continue", Content_Type="application/json"
    )
    await read_ask(request, BOUNDS)
    assert written(request) == []


async def test_nothing_is_promised_for_what_will_be_refused() -> None:
    request = asking("POST", "/v1/x", ends=False, Expect="100-continue", Content_Length="11")
    assert (await refused(request)).code == "request_too_large"
    assert written(request) == []
    assert (await refused(asking(Expect="miracles"))).code == "expectation_failed"


def test_a_path_that_is_encoded_again_and_again_costs_little() -> None:
    with pytest.raises(ProxyError) as caught:
        upstream_target("/v1/%" + "25" * 8000)
    assert (caught.value.code, "again and again" in caught.value.message) == ("invalid_path", True)


async def test_a_body_in_crumbs_costs_its_own_size() -> None:
    crumbs = [b"ab"] * 50_000
    request = asking("POST", "/v1/x", *crumbs, Content_Type="application/json")
    assert len((await read_ask(request, Bounds(200_000, 1))).body or b"") == 100_000  # type: ignore[arg-type]


async def test_an_upload_that_is_malformed_already_asks_nobody() -> None:
    error = ProxyError("invalid_request", "malformed", close=True)
    request = asking("POST", "/v1/x", error=error, Content_Type="text/plain")
    assert await refused(request) is error
