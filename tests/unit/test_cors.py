"""Which pages may call from a browser, and what their browsers are told."""

from __future__ import annotations

import pytest
from multidict import CIMultiDict

from proxy.cors import Cors, is_preflight
from proxy.errors import ProxyError

GOOD = "https://chat.example"
EVIL = "https://evil.example"
NONE, SOME, ALL = Cors([]), Cors([GOOD]), Cors(["*"])


def headers(**fields: str) -> CIMultiDict[str]:
    """`Sec_Fetch_Site="cross-site"` as a header, in whatever case it is asked for."""
    return CIMultiDict({name.replace("_", "-").lower(): value for name, value in fields.items()})


@pytest.mark.parametrize("cors", [NONE, SOME, ALL], ids=["none", "some", "all"])
@pytest.mark.parametrize(
    "fields",
    [
        {},  # curl, an SDK
        {"Origin": EVIL},  # an extension, Electron, an old browser: CORS keeps its answer from it
        {"Sec_Fetch_Site": "none"},
        {"Sec_Fetch_Site": "same-origin"},
        {"Sec_Fetch_Site": "same-site", "Origin": EVIL},
    ],
)
def test_who_is_let_in(cors: Cors, fields: dict[str, str]) -> None:
    cors.judge(headers(**fields))


@pytest.mark.parametrize(
    ("cors", "origin", "allowed"),
    [
        (NONE, GOOD, False),
        (NONE, None, False),
        (SOME, GOOD, True),
        (SOME, EVIL, False),
        (SOME, None, False),  # an <img>, a form: browsers send no Origin with GET
        (SOME, "null", False),
        (SOME, GOOD + ".evil.example", False),
        (SOME, GOOD.upper(), False),
        (SOME, GOOD + ":443", False),
        (SOME, GOOD + "/", False),
        (SOME, "", False),
        (ALL, EVIL, True),
        (ALL, "null", True),
        (ALL, None, False),
    ],
)
def test_pages_of_other_sites(cors: Cors, origin: str | None, allowed: bool) -> None:
    fields = {"Sec_Fetch_Site": "cross-site"} | ({} if origin is None else {"Origin": origin})
    preflight = headers(Access_Control_Request_Method="POST", **fields)
    if allowed:
        cors.judge(headers(**fields))
        assert cors.preflight(preflight)["Access-Control-Allow-Methods"] == "POST"
        assert "Access-Control-Allow-Origin" in cors.headers(headers(**fields))
        return
    for judged in (cors.judge, cors.preflight):
        with pytest.raises(ProxyError) as caught:
            judged(preflight)
        assert caught.value.code == "origin_not_allowed"
    assert "Access-Control-Allow-Origin" not in cors.headers(headers(**fields))


def test_a_preflight_is_answered_with_what_it_asks_for() -> None:
    asked = "authorization,content-type,x-stainless-os"
    answer = SOME.preflight(
        headers(
            Origin=GOOD, Access_Control_Request_Method="PUT", Access_Control_Request_Headers=asked
        )
    )
    assert answer == {
        "Access-Control-Allow-Methods": "PUT",
        "Access-Control-Max-Age": "600",
        "Access-Control-Allow-Headers": asked,
    }


def test_a_preflight_that_asks_for_no_headers() -> None:
    answer = SOME.preflight(headers(Origin=GOOD, Access_Control_Request_Method="GET"))
    assert "Access-Control-Allow-Headers" not in answer


@pytest.mark.parametrize(
    ("cors", "origin", "expected"),
    [
        (NONE, None, {}),
        (NONE, GOOD, {}),
        (SOME, None, {"Vary": "Origin"}),
        (SOME, EVIL, {"Vary": "Origin"}),
        (
            SOME,
            GOOD,
            {
                "Access-Control-Allow-Origin": GOOD,
                "Access-Control-Expose-Headers": "*",
                "Vary": "Origin",
            },
        ),
        (
            ALL,
            EVIL,
            {
                "Access-Control-Allow-Origin": "*",
                "Access-Control-Expose-Headers": "*",
                "Vary": "Origin",
            },
        ),
    ],
)
def test_what_every_answer_bears(cors: Cors, origin: str | None, expected: object) -> None:
    assert cors.headers(headers(**({} if origin is None else {"Origin": origin}))) == expected


@pytest.mark.parametrize(
    ("method", "fields", "preflight"),
    [
        ("OPTIONS", {"Origin": GOOD, "Access_Control_Request_Method": "POST"}, True),
        ("OPTIONS", {"Origin": GOOD}, False),
        ("OPTIONS", {"Access_Control_Request_Method": "POST"}, False),
        ("POST", {"Origin": GOOD, "Access_Control_Request_Method": "POST"}, False),
    ],
)
def test_what_is_a_preflight(method: str, fields: dict[str, str], preflight: bool) -> None:
    assert is_preflight(method, headers(**fields)) is preflight
