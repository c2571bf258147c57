"""Where members stand: compared with what a JSON parser reads, at every awkward byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.members import doubled, find, find_from_end, find_in_head, with_model, with_usage

# Documents of any kind, written in any way ------------------------------------------------------

NAMES = st.sampled_from(
    ["model", "usage", "MODEL", "mode", "models", "", '"', "\\", "\\u006d", "é"]
)
FORGED = st.sampled_from(
    [
        '"usage":{"a":1}',
        '","usage":{"a":1}',
        '"usage":',
        '"}],"usage":{}}',
        "\\",
        '\\"',
        "}",
        "{[",
        "é",
    ]
)
TEXTS = st.lists(FORGED | st.text(max_size=3), max_size=4).map("".join)
DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=10,
)


class Pairs(list[tuple[str, Any]]):
    """The members of an object in their order, doubled ones too."""


OBJECTS = st.lists(st.tuples(NAMES, DOCUMENTS), max_size=6).map(Pairs)


def string_as_is(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def string_all_escaped(text: str) -> str:
    units = text.encode("utf-16-be").hex()
    return '"' + "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4)) + '"'


def writing(document: Any, space: str, string: Callable[[str], str]) -> str:
    """A document as somebody may write it."""
    match document:
        case Pairs() | dict():
            pairs = document if isinstance(document, Pairs) else document.items()
            members = [
                string(name) + space + ":" + space + writing(each, space, string)
                for name, each in pairs
            ]
            return "{" + space + (space + "," + space).join(members) + space + "}"
        case list():
            items = [writing(each, space, string) for each in document]
            return "[" + space + (space + "," + space).join(items) + space + "]"
        case str():
            return string(document)
    return json.dumps(document)


BODIES = st.builds(
    lambda document, space, string: (space + writing(document, space, string) + space).encode(),
    OBJECTS,
    st.sampled_from(["", " ", "\t\r\n "]),
    st.sampled_from([string_as_is, json.dumps, string_all_escaped]),
)


def parsed(text: bytes) -> Any:
    """What a JSON parser reads; objects as the list of their members."""
    return json.loads(text, object_pairs_hook=list)


@settings(deadline=None)
@given(BODIES)
def test_the_places_are_those_that_a_parser_reads(body: bytes) -> None:
    spans = find(body, "model")
    assert spans is not None
    values = [value for name, value in parsed(body) if name == "model"]
    assert [parsed(body[span]) for span in spans] == values


@pytest.mark.parametrize(
    ("body", "values"),
    [
        (b"{}", []),
        (b'{"model":"a"}', [b'"a"']),
        (b' {"x":[{"model":1}],"model" : [ 1, {"]":"}"} ] , "y":1}', [b'[ 1, {"]":"}"} ]']),
        (rb'{"mod\u0065l":"a","\u006D\u006Fdel":-1.5e3}', [b'"a"', b"-1.5e3"]),
        (rb'{"m\u00f6del":1,"\\u006dodel":2,"model\"":3,"model\\":4}', []),
        (rb'{"a":"\\","model":"\\\"","b":"\\\\"}', [rb'"\\\""']),
        (b'{"model":"a","model":null,"model":{}}', [b'"a"', b"null", b"{}"]),
        (b'{"models":1,"Model":2,"ode":3,"":4}', []),
    ],
)
def test_names_are_compared_as_they_read(body: bytes, values: list[bytes]) -> None:
    spans = find(body, "model")
    assert spans is not None
    assert [body[span] for span in spans] == values


UNREADABLE = [
    b"",
    b"[]",
    b'"model"',
    b'[{"model":"a"}]',
    b'{"model":"a"',
    b'{"model":"a"}}',
    b'{"model":"a",}',
    b'{"model":"a" "b":1}',
    b'{"model":"a"}{"model":"b"}',
    b"{'model':'a'}",
    b'{"model":"a"/*"*/}',
    b'{"x":[}],"model":"a"}',
    b'{"model":NaN}',
    b'{"model":"\n"}',
    b'\xef\xbb\xbf{"model":"a"}',
    b'{"x":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b',"model":"a"}',
    b'{"x":' + b"[" * 1_000_000,
    b'{"x":' + b'{"x":' * 1_000_000,
    b'{"x":[' + b"{}," * 100_000 + b'{}],"model":"a"}',
    b"{" + b'"x":1,' * 100_000 + b'"model":"a"}',
    b"{" + b'"x":[],' * 100_000 + b'"model":"a"}',
]


@pytest.mark.parametrize("body", UNREADABLE, ids=range(len(UNREADABLE)))
def test_what_cannot_be_read_is_left_as_it_is(body: bytes) -> None:
    assert find(body, "model") is None
    assert with_model(body, "b") == body


def test_a_name_that_is_no_text_makes_a_body_unreadable() -> None:
    # msgspec passes over members that it does not look for without reading their names.
    assert find(b'{"\xff\\"":1,"model":"a"}', "model") is None


def test_what_is_long_but_plain_can_be_read() -> None:
    body = b'{"ids":[' + b"1," * 1_000_000 + b'1],"text":"' + rb"\"" * 1_000_000 + b'","model":"a"}'
    assert find(body, "model") == [slice(len(body) - 4, len(body) - 1)]


# Doubled names ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(BODIES)
def test_a_name_is_doubled_in_whatever_case(body: bytes) -> None:
    names = [name.lower() for name, _ in parsed(body)]
    assert doubled(body, "model") == (names.count("model") > 1)


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (b'{"model":"a"}', False),
        (b'{"model":"a","x":{"model":"b"}}', False),
        (b'{"model":"a","x":"\\"model\\":"}', False),
        (b'{"model":"a","role":"model"}', False),
        (b'{"model":"a","model":"a"}', True),
        (b'{"Model":"a","model":"a"}', True),
        (rb'{"model":"a","mode\u006c":"b"}', True),
        (rb'{"model":"a","\u004DODEL":"b"}', True),
        (rb'{"model":"a","x":"\u006d"}', False),
        (b'{"model":"a","model":"b"', True),  # who knows what an upstream makes of it
    ],
)
def test_what_is_doubled(body: bytes, answer: bool) -> None:
    assert doubled(body, "model") is answer


# Another model ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(BODIES, st.text())
def test_only_the_bytes_of_the_models_name_change(body: bytes, model: str) -> None:
    changed = with_model(body, model)
    values = [value for name, value in parsed(body) if name == "model"]
    if len(values) != 1 or not isinstance(values[0], str):
        assert changed == body
        return
    [span] = find(body, "model") or []
    assert changed.startswith(body[: span.start]) and changed.endswith(body[span.stop :])
    assert parsed(changed) == [
        (name, model if name == "model" else value) for name, value in parsed(body)
    ]


# Asking for usage -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "asking"),
    [
        (b"null", b'{"include_usage":true}'),
        (b"{}", b'{"include_usage":true}'),
        (b"{ }", b'{"include_usage":true }'),
        (b'{"x":1}', b'{"include_usage":true,"x":1}'),
        (
            b'{ "x": {"include_usage":true} }',
            b'{"include_usage":true, "x": {"include_usage":true} }',
        ),
        (b'{"include_usage":false}', b'{"include_usage":true}'),
        (b'{"include_usage" : null, "x":1}', b'{"include_usage" : true, "x":1}'),
        (b'{"x":1,"include_usage":{"a":[1]}}', b'{"x":1,"include_usage":true}'),
        (b'{"include_usage":"true"}', b'{"include_usage":true}'),
        (rb'{"include\u005fusage":0}', rb'{"include\u005fusage":true}'),
        (
            b'{"include_usage":true,"include_usage":false}',
            b'{"include_usage":true,"include_usage":true}',
        ),
    ],
)
def test_options_that_do_not_ask_come_to_ask(options: bytes, asking: bytes) -> None:
    before, after = b'{"stream":true, "stream_options": ', b' ,"model":"a"}'
    assert with_usage(before + options + after) == (before + asking + after, False)


def test_without_options_they_come_first() -> None:
    asking = b'"stream_options":{"include_usage":true}'
    assert with_usage(b' { "stream":true}') == (b" {" + asking + b', "stream":true}', False)
    assert with_usage(b"{\n}") == (b"{" + asking + b"\n}", False)
    nested = b'"x":{"stream_options":{"include_usage":true}},"y":"stream_options"}'
    assert with_usage(b"{" + nested) == (b"{" + asking + b"," + nested, False)


def test_doubled_options_ask_in_every_place() -> None:
    body = b'{"stream_options":null,"stream_options":{"include_usage":false}}'
    asking = b'"stream_options":{"include_usage":true}'
    assert with_usage(body) == (b"{" + asking + b"," + asking + b"}", False)


@pytest.mark.parametrize(
    "body",
    [
        b'{"stream_options":{"include_usage":true}}',
        b'{"stream_options" : {"x":1, "include_usage" : true}, "stream":true}',
        rb'{"stream\u005foptions":{"include_us\u0061ge":true}}',
        b'{"stream_options":[]}',
        b'{"stream_options":"x"}',
        b'{"stream_options":1}',
        *UNREADABLE[:-3],
    ],
)
def test_what_asks_already_or_cannot_be_read_stays(body: bytes) -> None:
    assert with_usage(body) == (body, True)


@settings(deadline=None)
@given(BODIES, st.sampled_from([b"", b"null", b"{}", b'{"include_usage":false,"x":"}"}']))
def test_whoever_is_asked_for_usage_reads_so(body: bytes, options: bytes) -> None:
    if options:
        end = body.rindex(b"}")
        comma = b"," if parsed(body) else b""
        body = body[:end] + comma + b'"stream_options":' + options + body[end:]
    changed, asked = with_usage(body)
    assert not asked
    assert json.loads(changed)["stream_options"]["include_usage"] is True
    others = [member for member in parsed(changed) if member[0] != "stream_options"]
    assert others == [member for member in parsed(body) if member[0] != "stream_options"]


# Read from one end only -------------------------------------------------------------------------

# Their names are not escaped: what an upstream calls its members is plain.
ANSWERS = st.builds(
    lambda document, space, string: (writing(document, space, string) + space).encode(),
    OBJECTS,
    st.sampled_from(["", " ", "\n"]),
    st.sampled_from([string_as_is, json.dumps]),
)


@settings(deadline=None)
@given(ANSWERS)
def test_the_last_member_is_found_from_the_end_wherever_the_beginning_is_cut(body: bytes) -> None:
    spans = find(body, "usage")
    assert spans is not None
    for cut in range(len(body) + 1):
        tail = body[cut:]
        found = find_from_end(tail, "usage", depth=1)
        if spans and cut <= body.rindex(b'"usage"', 0, spans[-1].start):
            assert found is not None
            assert tail[found].strip() == body[spans[-1]]
            assert find_from_end(tail + b',"n":1}', "usage", depth=2) == found
        else:
            assert found is None
            assert find_from_end(tail + b',"n":1}', "usage", depth=2) is None


def test_what_stands_before_the_object_is_none_of_its_members() -> None:
    assert find_from_end(b'data: {"usage":1} {"x":{"usage":2},"y":3}\n', "usage", depth=1) is None
    assert find_from_end(b'{"usage":1}, [DONE]', "usage", depth=1) is None


@settings(deadline=None)
@given(TEXTS, TEXTS, st.integers(0), st.integers(0))
def test_text_forges_no_member_however_it_is_cut(text: str, name: str, cut: int, end: int) -> None:
    document = {"a": [{"content": text, f"x{name}": {"text": text}}], "b": text}
    for body in (json.dumps(document).encode(), string_as_is(text).join("[]").encode()):
        part = body[cut % len(body) : len(body) - end % len(body)]
        for depth in (1, 2, 3):
            assert find_from_end(part, "usage", depth) is None


@settings(deadline=None)
@given(ANSWERS)
def test_the_first_member_is_found_in_the_head_once_it_is_whole(body: bytes) -> None:
    body = body.replace(b"{", b'{"usage":{"a":"}"},', 1) if b":" in body else b'{"usage":{"a":"}"}}'
    whole = body.index(b'"}"}') + 4
    for end in range(len(body) + 1):
        span = find_in_head(body[:end], "usage")
        assert (span is not None) == (end >= whole)
        if span:
            assert body[span] == b'{"a":"}"}'


def test_a_member_of_a_member_is_not_in_the_head() -> None:
    assert find_in_head(b'{"x":{"usage":{}},"y":["usage",{"usage":{}}],"z":', "usage") is None
    assert find_in_head(b'[{"usage":{}}]', "usage") is None
    assert find_in_head(b'{"usages":{},"x":"\\"usage\\":{}","usage" : {}', "usage") is not None
