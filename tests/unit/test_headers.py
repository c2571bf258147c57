"""Which header fields cross the proxy, in both directions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.framing import Header, ResponseHead
from proxy.headers import (
    CREDENTIALS,
    HOP_BY_HOP,
    STREAM_HEADERS,
    UpstreamRules,
    client_address,
    is_loop,
    request_headers,
    request_id,
    response_headers,
    retry_after,
)

HOST = (b"Host", b"up.example:8443")
VIA = (b"Via", b"1.1 sluice")
PLAIN = UpstreamRules(b"up.example:8443", (), drops_credentials=False)
INJECTING = UpstreamRules(b"up.example:8443", (), drops_credentials=True)
OURS = (b"Authorization", b"Bearer ours")


def up(
    *inbound: Header,
    rules: UpstreamRules = PLAIN,
    credential: Header | None = None,
    framing: Header | None = None,
    identity: bool = False,
) -> list[Header]:
    """What goes up, between the Host that we write first and the Via that we write last."""
    first, *between, last = request_headers(
        inbound,
        rules,
        dropped=rules.dropped,
        credential=credential,
        framing=framing,
        identity=identity,
    )
    assert (first, last) == (HOST, VIA)
    return between


def down(*upstream: Header, status: int = 200, stream: bool = False) -> list[Header]:
    return response_headers(upstream, status=status, stream=stream)


def test_no_content_has_no_length() -> None:
    length = (b"content-length", b"6")
    assert down(length, status=204) == []
    assert down(length, status=304) == [length]


def test_a_length_cannot_be_nominated_away() -> None:
    length = (b"Content-Length", b"6")
    assert down((b"Connection", b"content-length, x"), length, (b"X", b"1")) == [length]


# Hop by hop ---------------------------------------------------------------------------------

HOPS = [
    b"Connection",
    b"Keep-Alive",
    b"Proxy-Connection",
    b"Proxy-Authenticate",
    b"Proxy-Authorization",
    b"TE",
    b"Trailer",
    b"Transfer-Encoding",
    b"Upgrade",
]


def test_the_table_is_complete() -> None:
    assert {name.lower() for name in HOPS} == HOP_BY_HOP


@pytest.mark.parametrize("spelled", [bytes.lower, bytes.upper, bytes.title, bytes.swapcase])
@pytest.mark.parametrize("name", HOPS)
def test_hop_by_hop_fields_stay_here(name: bytes, spelled: object) -> None:
    assert callable(spelled)
    field = (spelled(name), b"x")
    assert up(field) == []
    assert down(field) == []
    assert down(field, stream=True) == []


@pytest.mark.parametrize(
    "options",
    [
        [b"X-Private"],
        [b"x-private"],
        [b"close, X-PRIVATE"],
        [b"X-Private,close"],
        [b" , ,x-private\t,"],
        [b"close", b"x-private"],
        [b"", b",,x-private"],
    ],
)
def test_connection_nominates_more(options: list[bytes]) -> None:
    fields = [(b"X-Private", b"1"), (b"x-pRiVaTe", b"2"), (b"X-Private-Not", b"3")]
    fields += [(b"cOnNeCtIoN", option) for option in options]
    assert up(*fields) == [(b"X-Private-Not", b"3")]
    assert down(*fields) == [(b"X-Private-Not", b"3")]


def test_connection_cannot_nominate_away_what_we_write() -> None:
    nominations = (b"Connection", b"host, via, authorization, content-length, accept-encoding")
    rules = UpstreamRules(HOST[1], ((b"X-Fixed", b"1"),), drops_credentials=True)
    length = (b"Content-Length", b"5")
    assert up(nominations, rules=rules, credential=OURS, framing=length, identity=True) == [
        (b"X-Fixed", b"1"),
        OURS,
        (b"Accept-Encoding", b"identity"),
        length,
    ]


# Up -----------------------------------------------------------------------------------------


def test_order_duplicates_and_spelling_are_kept() -> None:
    fields = [
        (b"aCCept", b"text/event-stream"),
        (b"X-A", b"1"),
        (b"Cookie", b"theirs=1"),
        (b"X-a", b"2"),
        (b"accept", b"*/*"),
        (b"X-A", b""),
        (b"X-Bytes", b"\xfc\xff"),
        (b"Accept-Encoding", b"gzip, br"),
        (b"X-Request-Id", b"abc"),
        (b"Via", b"1.0 fred"),
        (b"Forwarded", b"for=1.2.3.4"),
    ]
    assert up(*fields) == fields


@pytest.mark.parametrize(
    "name", [b"Host", b"Content-Length", b"Expect", b"X-Forwarded-For", b"x-forwarded-PROTO"]
)
def test_what_is_restated_or_not_to_be_believed(name: bytes) -> None:
    assert up((name, b"x"), (name.lower(), b"y")) == []


@pytest.mark.parametrize("name", [b"Authorization", b"x-api-key", b"API-KEY"])
def test_a_clients_credential_passes_only_where_we_have_none(name: bytes) -> None:
    assert name.lower() in CREDENTIALS
    field = (name, b"theirs")
    assert up(field) == [field]
    assert up(field, rules=INJECTING, credential=OURS) == [OURS]
    # A key file can be empty for a moment: then none goes up at all.
    assert up(field, rules=INJECTING, credential=None) == []


def test_fixed_fields_replace_the_clients() -> None:
    fixed = ((b"OpenAI-Organization", b"ours"), (b"X-Fixed", b"1"))
    rules = UpstreamRules(HOST[1], fixed, drops_credentials=False)
    assert up(
        (b"openai-ORGANIZATION", b"theirs"),
        (b"A", b"1"),
        (b"OpenAI-Organization", b"theirs too"),
        rules=rules,
    ) == [(b"A", b"1"), *fixed]


def test_identity_replaces_the_clients_accept_encoding() -> None:
    fields = [(b"accept-encoding", b"gzip"), (b"Accept-Encoding", b"br"), (b"A", b"1")]
    assert up(*fields) == fields
    assert up(*fields, identity=True) == [(b"A", b"1"), (b"Accept-Encoding", b"identity")]


@pytest.mark.parametrize(
    "framing", [None, (b"Content-Length", b"0"), (b"Transfer-Encoding", b"chunked")]
)
def test_the_framing_is_ours(framing: Header | None) -> None:
    theirs = [(b"Content-Length", b"9"), (b"Transfer-Encoding", b"gzip, chunked")]
    assert up(*theirs, framing=framing) == ([framing] if framing else [])


def test_inbound_fields_are_left_alone() -> None:
    inbound = [(b"Connection", b"a"), (b"A", b"1")]
    request_headers(
        iter(inbound),
        PLAIN,
        dropped=PLAIN.dropped,
        credential=None,
        framing=None,
        identity=True,
    )
    assert inbound == [(b"Connection", b"a"), (b"A", b"1")]


# Down ---------------------------------------------------------------------------------------

ANSWER = [
    (b"Content-Type", b"text/event-stream"),
    (b"content-length", b"9"),
    (b"ETag", b'"x"'),
    (b"Last-Modified", b"yesterday"),
    (b"Cache-Control", b"max-age=60"),
    (b"X-Accel-Buffering", b"yes"),
    (b"x-request-id", b"theirs"),
    (b"Set-Cookie", b"a=1"),
    (b"set-cookie", b"b=2"),
    (b"Server", b"uvicorn"),
    (b"Date", b"now"),
]


def test_an_answer_keeps_its_fields() -> None:
    assert down(*ANSWER) == ANSWER


def test_a_stream_loses_what_would_be_a_lie() -> None:
    assert down(*ANSWER, stream=True) == [ANSWER[0], *ANSWER[6:]]
    assert STREAM_HEADERS == (
        (b"Cache-Control", b"no-cache, no-transform"),
        (b"X-Accel-Buffering", b"no"),
    )


@pytest.mark.parametrize(
    "name",
    [
        b"Access-Control-Allow-Origin",
        b"access-control-expose-headers",
        b"ACCESS-CONTROL-ALLOW-CREDENTIALS",
        b"Sluice-Upstream",
        b"sluice-request-id",
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_upstream_cannot_speak_for_us(name: bytes, stream: bool) -> None:
    assert down((name, b"*"), (b"A", b"1"), stream=stream) == [(b"A", b"1")]


# How long to stay away ------------------------------------------------------------------------

NOW = datetime(1994, 11, 6, 8, 49, 0, tzinfo=UTC)


def wait(*fields: Header) -> float | None:
    return retry_after(ResponseHead(1, 429, b"", fields), NOW)


@pytest.fixture(params=["UTC", "America/New_York", "Asia/Kathmandu"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine's own time zone is none of an upstream's business."""
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"0", 0.0),
        (b"120", 120.0),
        (b"1.5", 1.5),
        (b"999999999", 999999999.0),
        # RFC 9110 5.6.7: a date in its one format, and in the two old ones
        (b"Sun, 06 Nov 1994 08:49:37 GMT", 37.0),
        (b"Sunday, 06-Nov-94 08:49:37 GMT", 37.0),
        (b"Sun Nov  6 08:49:37 1994", 37.0),
        (b"Sun, 06 Nov 1994 09:49:37 +0100", 37.0),  # what RFC 5322 allows more
        (b"Sun, 06 Nov 1994 08:49:37 -0000", 37.0),
        (b"Sun, 06 Nov 1994 08:48:37 GMT", 0.0),  # over
    ],
)
def test_seconds_or_a_date(value: bytes, seconds: float) -> None:
    assert wait((b"Retry-After", value)) == seconds


@pytest.mark.parametrize(
    "value",
    [
        *(b"", b" ", b"-1", b"+1", b"1e3", b"0x10", b"1.", b".5", b"1,5", b"1 2", b"soon", b"NaN"),
        b"\xd9\xa1",  # a digit elsewhere
        b"1" * 5000,
        b"Sun, 99 Nov 1994 08:49:37 GMT",
        b"Sun, 06 Nov 1994 25:61:61 GMT",
        b"Sun, 06 Nov 99999 08:49:37 GMT",
        b"Sun, 06 Nov 1994 08:49:37 +999999999",
        b"Sun, 06 Nov 1994 08:49:37 +99999999999999999999",
    ],
)
def test_what_cannot_be_read_says_nothing(value: bytes) -> None:
    assert wait((b"Retry-After", value)) is None


def test_the_end_of_all_dates_is_far_away_in_any_zone() -> None:
    for zone in b"GMT", b"+0100", b"-0100":
        assert (wait((b"Retry-After", b"Fri, 31 Dec 9999 23:59:59 " + zone)) or 0.0) > 1e11


@given(st.one_of(st.binary(max_size=40), st.text("Sun, 06Nov1994:8+-GMTJa./", max_size=40)))
def test_no_value_is_a_reason_to_fail(value: bytes | str) -> None:
    value = value if isinstance(value, bytes) else value.encode()
    assert (wait((b"Retry-After", value)) or 0.0) >= 0.0


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ([], None),
        ([(b"retry-after-ms", b"250")], 0.25),
        ([(b"Retry-After-Ms", b"1500.5")], 1.5005),
        ([(b"Retry-After", b"1"), (b"retry-after-ms", b"250")], 0.25),  # the finer one
        ([(b"retry-after-ms", b"soon"), (b"Retry-After", b"7")], 7.0),
        ([(b"Retry-After", b"soon"), (b"retry-after", b"7")], 7.0),
        ([(b"Retry-After", b"7"), (b"retry-after", b"9")], 7.0),
        ([(b"x-ratelimit-reset-requests", b"1s")], None),
    ],
)
def test_who_says_how_long(fields: list[Header], seconds: float | None) -> None:
    assert wait(*fields) == seconds


# Loops, ids, addresses ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "loop"),
    [
        ([], False),
        ([b"1.1 sluice"], True),
        ([b"1.1 \tsluice"], True),
        ([b"1.0 fred, 1.1 sluice, 1.1 p.example (nginx)"], True),
        ([b"1.0 fred", b"1.1 sluice (a comment)"], True),
        ([b"HTTP/1.1 sluice"], True),
        ([b"1.1 sluiced"], False),
        ([b"1.1 my-sluice"], False),
        ([b"1.1 fred (sluice)"], False),
        ([b"sluice"], False),
        ([b""], False),
        ([b",,"], False),
    ],
)
def test_loops(values: list[bytes], loop: bool) -> None:
    assert is_loop([(b"vIa", value) for value in values]) is loop
    assert not is_loop([(b"X-Via", value) for value in values])


@pytest.mark.parametrize(
    "offered",
    ["a", "A-b_c.9", "x" * 128, "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"],
)
def test_usable_request_ids(offered: str) -> None:
    assert request_id(offered) == offered


@pytest.mark.parametrize("offered", [None, "", "x" * 129, "a b", "a\n", "ä", "a/b", "{}", "a\x00"])
def test_unusable_request_ids(offered: str | None) -> None:
    assert request_id(offered) is None


TRUSTED = [ip_network("10.0.0.0/8"), ip_network("fd00::/8"), ip_network("127.0.0.1/32")]


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "address"),
    [
        ("10.0.0.1", [], "10.0.0.1"),
        ("203.0.113.9", [], "203.0.113.9"),
        ("203.0.113.9", ["1.2.3.4"], "203.0.113.9"),  # not to be believed
        ("10.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6, 1.2.3.4"], "1.2.3.4"),  # the left one is the client's own claim
        ("10.0.0.1", ["6.6.6.6", "1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", ["1.2.3.4,10.1.1.1 , 10.2.2.2"], "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6, 10.9.9.9, 1.2.3.4, 10.1.1.1"], "1.2.3.4"),
        ("10.0.0.1", ["10.1.1.1, 10.2.2.2"], "10.1.1.1"),  # an internal client
        ("fd00::1", ["2001:db8::7"], "2001:db8::7"),
        ("fd00::1", ["[2001:db8::7]"], "[2001:db8::7]"),
        ("fd00::1", ["1.2.3.4, [fd00::2]"], "1.2.3.4"),
        ("::ffff:10.0.0.1", ["1.2.3.4"], "1.2.3.4"),  # a dual-stack socket's spelling
        ("::ffff:203.0.113.9", ["1.2.3.4"], "::ffff:203.0.113.9"),
        ("10.0.0.1", ["1.2.3.4, ::ffff:10.1.1.1"], "1.2.3.4"),
        ("10.0.0.1", ["1.2.3.4, unknown"], "unknown"),  # no address: nothing behind it counts
        ("10.0.0.1", ["1.2.3.4, 10.1.1.1:443"], "1.2.3.4"),
        ("", ["1.2.3.4"], ""),  # a UNIX socket
        ("10.0.0.1.evil", ["1.2.3.4"], "10.0.0.1.evil"),
    ],
)
def test_the_clients_address(peer: str, forwarded_for: list[str], address: str) -> None:
    assert client_address(peer, forwarded_for, TRUSTED) == address


def test_nobody_is_believed_by_default() -> None:
    assert client_address("127.0.0.1", ["1.2.3.4"], []) == "127.0.0.1"


@pytest.mark.parametrize(
    ("entry", "address"),
    [
        ("192.0.2.1:1000", "192.0.2.1"),
        ("[2001:db8::1]:1000", "[2001:db8::1]"),
        ("2001:db8::1", "2001:db8::1"),
        ("192.0.2.1", "192.0.2.1"),
    ],
)
def test_a_gateway_may_name_a_port(entry: str, address: str) -> None:
    assert client_address("10.0.0.1", [entry], [ip_network("10.0.0.0/8")]) == address
