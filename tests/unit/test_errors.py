"""The one vocabulary of errors, and how each of its words is rendered."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.errors import KINDS, Dialect, ProxyError, Source, timed_out

# interface.md, §4, as far as its codes exist yet; and two of our own, from §6 and from nowhere.
TABLE = {
    "invalid_path": (400, "invalid_request_error"),
    "invalid_request": (400, "invalid_request_error"),
    "invalid_event_id": (400, "invalid_request_error"),
    "invalid_api_key": (401, "invalid_request_error"),
    "invalid_ticket": (401, "invalid_request_error"),
    "rate_limit_exceeded": (429, "requests"),
    "concurrency_limit_exceeded": (429, "requests"),
    "model_not_allowed": (403, "permission_error"),
    "origin_not_allowed": (403, "permission_error"),
    "unknown_url": (404, "invalid_request_error"),
    "model_not_found": (404, "invalid_request_error"),
    "stream_not_found": (404, "invalid_request_error"),
    "method_not_allowed": (405, "invalid_request_error"),
    "stream_expired": (410, "invalid_request_error"),
    "request_timeout": (408, "invalid_request_error"),
    "request_too_large": (413, "invalid_request_error"),
    "uri_too_long": (414, "invalid_request_error"),
    "expectation_failed": (417, "invalid_request_error"),
    "idempotency_key_reused": (422, "invalid_request_error"),
    "headers_too_large": (431, "invalid_request_error"),
    "upstream_unreachable": (502, "upstream_error"),
    "upstream_aborted": (502, "upstream_error"),
    "upstream_invalid": (502, "upstream_error"),
    "upstream_auth": (502, "upstream_error"),
    "no_upstream_available": (503, "overloaded_error"),
    "shutting_down": (503, "overloaded_error"),
    "store_unavailable": (503, "overloaded_error"),
    "upstream_timeout": (504, "timeout_error"),
    "loop_detected": (508, "invalid_request_error"),
    "killed": (503, "overloaded_error"),
    "internal_error": (500, "server_error"),
}


@pytest.mark.parametrize("code", sorted(KINDS))
def test_codes_are_those_of_the_interface(code: str) -> None:
    assert (KINDS[code].status, KINDS[code].type) == TABLE[code]


def test_only_what_an_upstream_did_counts_against_it() -> None:
    blamed = {code for code, kind in KINDS.items() if kind.source is Source.UPSTREAM}
    assert blamed == {code for code in KINDS if code.startswith("upstream_")}
    faultless = {code for code, kind in KINDS.items() if kind.source is Source.PROXY}
    assert all(KINDS[code].status >= 500 for code in faultless)


def test_kinds_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        KINDS["new"] = KINDS["killed"]  # type: ignore[index]


def test_an_unknown_code_is_a_mistake_at_once() -> None:
    with pytest.raises(KeyError):
        ProxyError("no_such_code", "")


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v1/chat/completions", Dialect.CHAT),
        ("/v1/completions", Dialect.CHAT),
        ("/v1/messages", Dialect.MESSAGES),
        ("/v1/messages/count_tokens", Dialect.MESSAGES),
        ("/v1/responses", Dialect.RESPONSES),
        ("/v1/responses/resp_1", Dialect.RESPONSES),
        ("/v1", Dialect.CHAT),
        ("/", Dialect.CHAT),
        ("*", Dialect.CHAT),
        ("", Dialect.CHAT),
    ],
)
def test_the_path_tells_the_dialect(path: str, dialect: Dialect) -> None:
    assert Dialect.of(path) is dialect


ERROR = ProxyError("model_not_found", "No »m«.", param="model")
OBJECT = {
    "message": "No »m«.",
    "type": "invalid_request_error",
    "param": "model",
    "code": "model_not_found",
}


@pytest.mark.parametrize(
    ("dialect", "document"),
    [
        (Dialect.CHAT, {"error": OBJECT}),
        (Dialect.RESPONSES, {"error": OBJECT}),
        (Dialect.MESSAGES, {"type": "error", "error": OBJECT}),
    ],
)
def test_as_an_answer(dialect: Dialect, document: object) -> None:
    assert json.loads(ERROR.body(dialect)) == document


@pytest.mark.parametrize(
    ("dialect", "name", "document"),
    [
        (Dialect.CHAT, None, {"error": OBJECT}),
        (Dialect.MESSAGES, b"error", {"type": "error", "error": OBJECT}),
        (
            Dialect.RESPONSES,
            b"error",
            {
                "type": "error",
                "code": "model_not_found",
                "message": "No »m«.",
                "param": "model",
                "sequence_number": 7,
            },
        ),
    ],
)
def test_as_an_event(dialect: Dialect, name: bytes | None, document: object) -> None:
    *lines, blank, rest = ERROR.event(dialect, 7).split(b"\n")
    assert (blank, rest) == (b"", b"")
    fields = dict(line.split(b": ", 1) for line in lines)
    assert fields.get(b"event") == name
    assert json.loads(fields[b"data"]) == document


@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize("text", ["a\nb", "a\r\n\r\ndata: x", "\ud800", "€", '"', "\x00"])
def test_no_message_breaks_its_line(dialect: Dialect, text: str) -> None:
    error = ProxyError("internal_error", text)
    event = error.event(dialect, 0)
    assert event.count(b"\n\n") == 1
    assert event.endswith(b"\n\n")
    assert b"\r" not in event
    assert event.isascii()
    assert json.loads(error.body(dialect))["error"]["message"] == text


@pytest.mark.parametrize(
    ("retry_after", "shown"),
    [(0, "1"), (-3, "1"), (0.2, "1"), (1, "1"), (1.001, "2"), (59.5, "60"), (3600, "3600")],
)
def test_retry_after_is_rounded_up_to_whole_seconds(retry_after: float, shown: str) -> None:
    headers = ProxyError("shutting_down", "", retry_after=retry_after).headers()
    assert headers["Retry-After"] == shown


@pytest.mark.parametrize(
    ("retry_after", "shown"), [(None, None), (1, None), (60, None), (60.5, "false"), (61, "false")]
)
def test_sdks_are_kept_from_retrying_at_once_where_they_would(
    retry_after: float | None, shown: str | None
) -> None:
    headers = ProxyError("shutting_down", "", retry_after=retry_after).headers()
    assert headers.get("x-should-retry") == shown


@pytest.mark.parametrize("code", sorted(code for code in KINDS if KINDS[code].status == 503))
def test_every_503_says_when_to_come_back(code: str) -> None:
    # interface.md, §3: `429 and 503: Retry-After, whole seconds, at least 1`
    assert int(ProxyError(code, "").headers()["Retry-After"]) >= 1


def test_headers_of_an_answer() -> None:
    assert ERROR.headers() == {"Content-Type": "application/json"}
    extra = {"Allow": "GET"}
    error = ProxyError("method_not_allowed", "", extra_headers=extra, close=True)
    assert error.headers() == {
        "Content-Type": "application/json",
        "Allow": "GET",
        "Connection": "close",
    }
    assert extra == {"Allow": "GET"}


def test_what_an_error_says_of_itself() -> None:
    error = ProxyError("upstream_timeout", "Slow.", clock="idle")
    assert (error.status, error.clock, error.close) == (504, "idle", False)
    assert str(error) == "('upstream_timeout', 'Slow.')"


@pytest.mark.parametrize("clock", ["connect", "first_byte", "idle", "stall", "total"])
def test_a_timeout_says_which(clock: str) -> None:
    # interface.md, §4: `the message says which: connect, first_byte, idle, stall, total`
    error = timed_out("azure", clock, 0.5, "10.0.0.1:443")
    assert (error.status, error.code, error.clock) == (504, "upstream_timeout", clock)
    assert error.kind.source is Source.UPSTREAM
    assert error.message == f"Upstream 'azure' ran into its {clock} timeout of 0.5 s."
    assert error.detail == "10.0.0.1:443"  # for the log alone
    for dialect in Dialect:
        assert b"10.0.0.1" not in error.body(dialect) + error.event(dialect, 0)


@pytest.mark.parametrize(("after", "shown"), [(60.0, "60"), (0.25, "0.25"), (86400.0, "86400")])
def test_a_timeout_is_told_in_plain_seconds(after: float, shown: str) -> None:
    assert f" {shown} s" in timed_out("up", "idle", after).message


# What an upstream has said itself ---------------------------------------------------------------

THEIRS = {"message": "Too long.", "type": "theirs", "param": "messages", "code": "too_long"}


def data_of(event: bytes) -> Any:
    [line] = [line for line in event.splitlines() if line.startswith(b"data: ")]
    return json.loads(line.removeprefix(b"data: "))


@pytest.mark.parametrize("said", [THEIRS, {**THEIRS, "inner": {"a": [1]}}, {"message": "m"}, {}])
def test_an_upstreams_own_words_are_passed_on(said: dict[str, Any]) -> None:
    error = ProxyError("upstream_invalid", "Ours.", said=said)
    assert error.as_object() == said
    assert data_of(error.event(Dialect.CHAT, 0)) == {"error": said}
    assert data_of(error.event(Dialect.MESSAGES, 0)) == {"type": "error", "error": said}
    assert json.loads(error.body(Dialect.MESSAGES)) == {"type": "error", "error": said}


def test_an_upstreams_own_words_are_flat_in_responses() -> None:
    error = ProxyError("upstream_invalid", "Ours.", said=THEIRS)
    flat = {"code": "too_long", "message": "Too long.", "param": "messages"}
    document = {"type": "error", **flat, "sequence_number": 3}
    assert data_of(error.event(Dialect.RESPONSES, 3)) == document
    terse = ProxyError("upstream_invalid", "Ours.", said={"message": "m"})
    assert data_of(terse.event(Dialect.RESPONSES, 0)) == {
        "type": "error",
        "code": None,
        "message": "m",
        "param": None,
        "sequence_number": 0,
    }


@pytest.mark.parametrize("dialect", Dialect)
def test_an_upstreams_own_words_are_told_to_the_client_alone(dialect: Dialect) -> None:
    said = {"message": "a\nb\r\n\r\ndata: \u2028 sk-x", "code": "\ud800"}
    error = ProxyError("upstream_invalid", "Ours.", said=said)
    assert "sk-x" not in f"{error} {error!r} {error.args} {error.message} {error.detail}"
    event = error.event(dialect, 0)
    assert event.count(b"\n\n") == 1
    assert event.endswith(b"\n\n")
    assert b"\r" not in event
    assert b"sk-x" in event
    error.as_object().clear()
    assert error.event(dialect, 0) == event
