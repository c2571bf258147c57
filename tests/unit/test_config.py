"""What a config file may say, and what is said of one that is wrong."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import ssl
import traceback
from hashlib import sha256
from pathlib import Path

import pytest
import yaml
from pydantic import SecretStr

from proxy.config import Config, ConfigError, load, render, schema
from proxy.config.environment import expand
from proxy.config.keys import KeyFile
from proxy.config.values import Rate, rate, seconds, size

ROOT = Path(__file__).parents[2]
CANARY = "sk-CANARY"
MINIMAL = "upstreams: {a: {base_url: http://a}}\n"
WITH_KEY = "upstreams: {a: {base_url: http://a, api_key: k}}\n"


@pytest.fixture
def config(tmp_path):
    """Loads a text, from a directory with a good and a blank key and a file without certificate."""

    def load_text(text, environ=None, **overrides):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return load(path, environ or {}, **overrides)

    return load_text


@pytest.fixture
def problems(config, tmp_path):
    """The lines that are said of a text, without the file's name."""

    def problems_of(text, environ=None, **overrides):
        with pytest.raises(ConfigError) as caught:
            config(text, environ, **overrides)
        assert CANARY not in "".join(traceback.format_exception(caught.value))
        return str(caught.value).replace(f"{tmp_path / 'c.yaml'}:", "").split("\n")

    return problems_of


def upstream(**settings):
    """A text with one upstream, from its settings as they stand in YAML."""
    settings = {"base_url": "http://a", **settings}
    return "upstreams:\n  a:\n" + "".join(f"    {key}: {settings[key]}\n" for key in settings)


def route(**settings):
    settings = {"models": "[m]", "upstreams": "[a]", **settings}
    return MINIMAL + "routes:\n  -\n" + "".join(f"    {key}: {settings[key]}\n" for key in settings)


# What is good -------------------------------------------------------------------------------


def test_defaults(config):
    found = config(MINIMAL)
    assert (found.listen.host, found.listen.port) == ("127.0.0.1", 8080)
    assert (found.admin.host, found.admin.port, found.admin.key) == ("127.0.0.1", None, None)
    assert (found.open, found.drain_notice, found.drain_timeout) == (False, 0, 300)
    assert found.max_body == 32 * 1024 * 1024
    assert found.client_timeouts.model_dump() == {
        "head": 10, "body": 30, "keep_alive": 75, "write": 120,
    }  # fmt: skip
    assert (found.trusted_proxies, found.cors.origins, found.default_model) == ((), (), None)
    assert (found.clients, found.limits.requests, found.limits.tokens) == ((), None, None)
    assert (found.limits.streams, found.store, found.store_failure) == (None, "memory", "allow")
    assert found.store_timeout == 0.5
    assert found.resume is not None
    assert found.resume.model_dump() == {
        "keep": 300, "grace": 30, "max_bytes": 4 * 2**20, "max_total": 256 * 2**20,
    }  # fmt: skip
    assert (found.log.format, found.log.level) == ("auto", "info")


def test_defaults_of_an_upstream(config):
    a = config(MINIMAL).upstreams["a"]
    assert (a.api_key, a.api_key_file, a.auth, dict(a.headers)) == (None, None, "bearer", {})
    assert (a.ca_file, a.egress, a.max_streams) == (None, None, None)
    assert a.timeouts.model_dump() == {
        "connect": 5, "first_byte": 600, "idle": 60, "stall": 300, "total": None,
    }  # fmt: skip
    assert a.circuit.model_dump() == {"failures": 5, "rest": 30}
    assert (a.demo, a.injects, a.key_source()) == (False, False, None)


def test_defaults_of_a_route(config):
    found = config(route(models="['gpt-*', 'o*']")).routes[0]
    assert found.name == "gpt-*"
    assert found.models == ("gpt-*", "o*")
    assert (found.model, found.attempts, found.on_disconnect) == (None, 2, "cancel")
    assert (found.finish_cap, found.commit_after, found.heartbeat) == (300, 30, 15)


SEVERAL = (
    "upstreams:\n"
    "  a: {base_url: http://a, max_streams: 5, circuit: {failures: 2, rest: 500ms}}\n"
    "  b: {base_url: http://b, timeouts: {stall: 90}}\n"
    "routes:\n"
    "  - {models: [m], upstreams: [b, a], model: x, attempts: 3, on_disconnect: finish, finish_cap: 1m,\n"
    "     commit_after: 1500ms, heartbeat: 0}\n"
    "  - {models: ['*'], upstreams: [a], attempts: '${ONE}', heartbeat: '${PAUSE}', model: null}\n"
)


def test_several_candidates(config):
    found = config(SEVERAL, {"ONE": "1", "PAUSE": "2s"})
    a, b = found.upstreams.values()
    assert (a.max_streams, b.max_streams) == (5, None)
    assert a.circuit.model_dump() == {"failures": 2, "rest": 0.5}
    assert (a.timeouts.stall, b.timeouts.stall) == (300, 90)
    first, second = found.routes
    assert (first.upstreams, first.model, first.attempts) == (("b", "a"), "x", 3)
    assert (first.on_disconnect, first.finish_cap) == ("finish", 60)
    assert (first.commit_after, first.heartbeat) == (1.5, 0)
    assert (second.model, second.attempts, second.heartbeat) == (None, 1, 2)


def test_without_routes_everything_goes_to_the_first_upstream(config):
    found = config("upstreams: {b: {base_url: http://b}, a: {base_url: http://a}}\n")
    (only,) = found.routes
    assert (only.name, only.models, only.upstreams) == ("default", ("*",), ("b",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://api.openai.com/v1", "https://api.openai.com/v1"),
        ("https://api.openai.com/v1//", "https://api.openai.com/v1"),
        ("HTTP://Host.Example:8080", "http://host.example:8080"),
        ('"http://[::1]:8080/v1"', "http://[::1]:8080/v1"),
        ("http://my_service/a..b/.well", "http://my_service/a..b/.well"),
        ("demo://", "demo://"),
    ],
)
def test_base_url(config, text, expected):
    assert config(upstream(base_url=text)).upstreams["a"].base_url == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://proxy.example:3128", "http://proxy.example:3128"),
        ("HTTP://Proxy.Example:3128/", "http://proxy.example:3128"),
        ('"http://[fd00::1]:3128"', "http://[fd00::1]:3128"),
        ("null", None),
    ],
)
def test_egress(config, text, expected):
    assert config(upstream(egress=text)).upstreams["a"].egress == expected


def test_tls_is_verified_and_not_old(config):
    assert config(upstream()).upstreams["a"].tls() is None
    context = config(upstream(base_url="https://a")).upstreams["a"].tls()
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_values_are_what_they_mean(config):
    found = config(
        MINIMAL + "drain_timeout: 1.5\n"
        "max_body: 64KiB\n"
        "trusted_proxies: [10.0.0.0/8, 192.0.2.1, 'fd00::/8']\n"
        "cors: {origins: ['HTTPS://Chat.Example', 'http://localhost:3000']}\n"
    )
    assert found.drain_timeout == 1.5
    assert found.max_body == 65536
    assert found.trusted_proxies == (
        ipaddress.ip_network("10.0.0.0/8"),
        ipaddress.ip_network("192.0.2.1/32"),
        ipaddress.ip_network("fd00::/8"),
    )
    assert found.cors.origins == ("https://chat.example", "http://localhost:3000")
    assert config(MINIMAL + "cors: {origins: ['*']}").cors.origins == ("*",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[("500ms", 0.5), ("570ms", 0.57), ("30s", 30), ("5m", 300), ("1h", 3600), ("1.5s", 1.5)],
        *[(30, 30), (0.25, 0.25), ("30", 30), ("0s", 0)],
    ],
)
def test_seconds(text, expected):
    assert seconds(text) == expected


def test_sizes_and_rates():
    assert [size(text) for text in (5, "5", "64KiB", "32MiB", "1GiB")] == [
        5, 5, 65536, 32 * 2**20, 2**30,
    ]  # fmt: skip
    assert rate("60/minute") == rate("60/1m") == Rate(60, 60)
    assert [str(rate(text)) for text in ("5000/day", "1/3600s", "10/90s")] == [
        "5000/day", "1/hour", "10/90s",
    ]  # fmt: skip
    for text in ("0/day", "x/day", "1/0s", "1/year", "-1/day", 5, None):
        with pytest.raises(ValueError, match="must be"):
            rate(text)


def test_everything_is_frozen(config):
    found = config(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        found.open = True
    with pytest.raises(TypeError):
        found.upstreams["b"] = found.upstreams["a"]
    with pytest.raises(TypeError):
        found.upstreams["a"].headers["x"] = SecretStr("y")


def test_anchors_and_merge_keys(config):
    found = config(
        "upstreams:\n"
        "  a: &a {base_url: http://a, auth: x-api-key, timeouts: &slow {connect: 7s, idle: 9s}}\n"
        "  b: {<<: *a, base_url: http://b}\n"
        "  c: {base_url: http://c, timeouts: {connect: 1s, <<: [*slow, {connect: 2s, total: 3s}]}}\n"
        "  d: *a\n"
    )
    b, c = found.upstreams["b"], found.upstreams["c"]
    assert (b.base_url, b.auth, b.timeouts.connect) == ("http://b", "x-api-key", 7)
    assert (c.timeouts.connect, c.timeouts.idle, c.timeouts.total) == (1, 9, 3)
    assert found.upstreams["d"] == found.upstreams["a"]


def test_a_byte_order_mark_is_no_trouble(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    load(tmp_path / "c.yaml", {})


# ${VAR} ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${A}", "a"),
        ("<${A}${B}>", "<a>"),
        ("${B:-b}${C:-c}${A:-x}", "bca"),
        ("${C:-}", ""),
        ("${C:-a-b: $$c}", "a-b: $c"),
        ("$$", "$"),
        ("$${A}", "${A}"),
        ("$$${A}", "$a"),
        ("$ $A 5$", "$ $A 5$"),
        ("${NESTED}", "${A}"),  # a value is not expanded again
    ],
)
def test_expand(text, expected):
    assert expand(text, {"A": "a", "B": "", "NESTED": "${A}"}) == expected


@pytest.mark.parametrize("text", ["${", "${}", "${A", "${A-b}", "${1}", "${ A }", "${A:-${B}}"])
def test_malformed_variables(text):
    with pytest.raises(ValueError, match=r"malformed \$\{"):
        expand(text, {"A": "a"})


def test_variables_in_a_file(config):
    found = config(
        "listen: {port: '${PORT}', host: '${HOST:-localhost}'}\n"
        "open: ${OPEN}\n"
        "drain_timeout: ${DRAIN}\n"
        "max_body: ${MAX}\n"
        "log: {level: '${LEVEL:-debug}'}\n"
        "upstreams: {'${A}': {base_url: 'http://${A}/v1'}}\n".replace("'${A}'", "a"),
        {"PORT": "9", "OPEN": "true", "DRAIN": "90", "MAX": "1MiB", "A": "b"},
    )
    assert (found.listen.port, found.listen.host, found.open) == (9, "localhost", True)
    assert (found.drain_timeout, found.max_body, found.log.level) == (90, 2**20, "debug")
    assert found.upstreams["a"].base_url == "http://b/v1"


def test_an_unset_variable_is_named_with_its_key_and_complained_of_once(problems):
    assert problems("upstreams:\n  a:\n    base_url: ${UNSET_X}\n") == [
        (
            "3: upstreams.a.base_url: the environment variable UNSET_X is not set: "
            "set it, or write ${UNSET_X:-default}"
        )
    ]


def test_keys_are_not_expanded(problems):
    (line,) = problems("upstreams: {'${A}': {base_url: http://a}}\n", {"A": "a"})
    assert line.startswith("1: upstreams....: must be a name")


# What is wrong: `(text, beginning of each line)` -----------------------------------------------

ALLOWED_UPSTREAM = "api_key, api_key_file, auth, base_url, ca_file, circuit, egress, headers, max_streams, timeouts"
YAML_TROUBLE = [
    ("", ["1: is empty"]),
    ("# nothing\n", ["1: is empty"]),
    ("\n- a\n", ["2: must be a mapping"]),
    ("text\n", ["1: must be a mapping"]),
    (MINIMAL + "open: [\n", ["3: is not valid YAML: a { or [ is not closed"]),
    (MINIMAL + "log:\n  level: 'info\nopen: true\n", ["3: is not valid YAML: a quote is not closed"]),
    (MINIMAL + "\topen: true\n", ["2: is not valid YAML: a tab: indent with spaces"]),
    (MINIMAL + " open: true\n", ["2: is not valid YAML: wrong indentation: keys"]),
    ("upstreams: built-in\n open: true\n", ["2: is not valid YAML: wrong indentation, a line without"]),
    ("upstreams:\n  a:\n    auth: x\n   base_url: y\n", ["4: is not valid YAML: wrong indentation"]),
    (MINIMAL + "log:\n  format: text\n  level info\n  x: y\n", ["4: is not valid YAML: a line must be `key: value`"]),
    (MINIMAL + "routes:\n  - models: [*]\n", ["3: is not valid YAML: a text that begins with *"]),
    (MINIMAL + "store: @a\n", ["2: is not valid YAML: a text that begins with @"]),
    (MINIMAL + "---\nopen: true\n", ["2: is not valid YAML: it must be one document"]),
    (MINIMAL + "open: \x01\n", [" is not valid YAML: it has a control character"]),
    ("listen: {port: ${PORT}}\n", ["1: is not valid YAML: a { or [ is not closed, or a text in it needs quotes"]),
    (f"upstreams: *{CANARY}\n", ["1: is not valid YAML: a text that begins with *"]),
    (f"upstreams: !{CANARY} x\n", ["1: upstreams: has a YAML tag"]),
    (MINIMAL + f"log: !{CANARY} {{}}\n", ["2: log: has a YAML tag"]),
    (MINIMAL + "log: =\n", ["2: log: has a YAML tag"]),
    (MINIMAL + "log: !!binary 5\n", ["2: log: has a YAML tag"]),
    (MINIMAL + "log: !!bool 5\n", ["2: log: is no value to YAML"]),
    (MINIMAL + "log: !!timestamp 5\n", ["2: log: is no value to YAML"]),
    (MINIMAL + "max_body: !!int x\n", ["2: max_body: is no value to YAML"]),
    (MINIMAL + "max_body: !!float x\n", ["2: max_body: is no value to YAML"]),
    (MINIMAL + "max_body: !!int ''\n", ["2: max_body: is no value to YAML"]),
    (MINIMAL + "max_body: !!float ''\n", ["2: max_body: is no value to YAML"]),
    (MINIMAL + "log: 2001-02-31\n", ["2: log: is no value to YAML"]),
    (MINIMAL + "log: &l {level: *l}\n", [" is nested too deeply, or an anchor is used inside"]),
    (MINIMAL + "routes: &r [*r]\n", [" is nested too deeply, or an anchor is used inside"]),
    (MINIMAL + "log: {<<: text}\n", ["2: log.<<: must be a mapping"]),
    (MINIMAL + "log: {<<: [{level: info}, 5]}\n", ["2: log.<<: must be a mapping"]),
    (MINIMAL + "log: {level: info,\n  level: info}\n", ["3: log.level: is a duplicate key, given on line 2"]),
    (MINIMAL + "upstreams: {}\n", ["2: upstreams: is a duplicate key, given on line 1 already"]),
    (MINIMAL + "on: 1\n", ["2: on: is not text to YAML"]),
    (MINIMAL + "? [a]\n: 1\n", ["2: ?: is not text to YAML"]),
    ("[" * 5000, [" is nested too deeply"]),
]  # fmt: skip
KEY_TROUBLE = [
    (MINIMAL + "opne: true\n", ["2: opne: is an unknown key: did you mean open? allowed are admin, client"]),
    (upstream(api_kye="x"), [f"4: upstreams.a.api_kye: is an unknown key: did you mean api_key? allowed are {ALLOWED_UPSTREAM}"]),
    (upstream(timeouts="{xyz: 1}"), ["4: upstreams.a.timeouts.xyz: is an unknown key: allowed are connect, first_byte"]),
    (route(modell="x"), ["6: routes[0].modell: is an unknown key: did you mean model"]),
    (MINIMAL + "built_in: demo\n", ["2: built_in: is an unknown key"]),
    (MINIMAL + '"a\\nb": 1\n', ["2: a...: is an unknown key"]),
    ("listen: {}\n", ["1: upstreams: is required"]),
    ("listen: {}\nupstreams:\n  a:\n    auth: none\n", ["3: upstreams.a.base_url: is required: http(s)://"]),
    (MINIMAL + "routes:\n  - upstreams: [a]\n", ["3: routes[0].models: is required"]),
    (MINIMAL + "routes:\n  - models: [a]\n", ["3: routes[0].upstreams: is required"]),
]  # fmt: skip
TYPE_TROUBLE = [
    (MINIMAL + "listen: {port: [1]}\n", ["2: listen.port: must be a whole number"]),
    (MINIMAL + "listen: {port: '8080'}\n", ["2: listen.port: must be a whole number, without quotes"]),
    (MINIMAL + "listen: {port: 80.0}\n", ["2: listen.port: must be a whole number"]),
    (MINIMAL + "listen: {port: yes}\n", ["2: listen.port: must be a whole number"]),
    (MINIMAL + "listen: {port: http}\n", ["2: listen.port: must be a whole number"]),
    (MINIMAL + "listen: {port: 65536}\n", ["2: listen.port: must be at most 65535"]),
    (MINIMAL + "listen: {port: -1}\n", ["2: listen.port: must be at least 0"]),
    (MINIMAL + "admin: {port: 70000}\n", ["2: admin.port: must be at most 65535"]),
    (MINIMAL + "listen: {host: ''}\n", ["2: listen.host: must not be blank"]),
    (MINIMAL + "listen: {host: '[::1]'}\n", ["2: listen.host: must be a host name"]),
    (MINIMAL + "listen: {host: a b}\n", ["2: listen.host: must be a host name"]),
    (MINIMAL + "listen: 8080\n", ["2: listen: must be a mapping"]),
    (MINIMAL + "listen:\n", ["2: listen: is empty, and must be a mapping: lines of `key: value`"]),
    (MINIMAL + "open: 'true'\n", ["2: open: must be true or false, without quotes"]),
    (MINIMAL + "open: 1\n", ["2: open: must be true or false"]),
    (MINIMAL + "log: {level: off}\n", ["2: log.level: must be text: put it in quotes"]),
    (MINIMAL + "log: {level: trace}\n", ["2: log.level: must be one of 'debug', 'info', 'warning' or 'error'"]),
    (MINIMAL + "max_body: 0\n", ["2: max_body: must be a size of at least 1"]),
    (MINIMAL + "max_body: -1\n", ["2: max_body: must be a size"]),
    (MINIMAL + "max_body: 1.5\n", ["2: max_body: must be a size"]),
    (MINIMAL + "max_body: true\n", ["2: max_body: must be a size"]),
    (MINIMAL + "max_body: 10MB\n", ["2: max_body: must be a size of at least 1: bytes, or like 64KiB"]),
    (MINIMAL + "drain_timeout: 0\n", ["2: drain_timeout: must be longer than 0"]),
    (MINIMAL + "drain_timeout: -1s\n", ["2: drain_timeout: must be a duration"]),
    (MINIMAL + "drain_timeout: -1\n", ["2: drain_timeout: must be a duration"]),
    (MINIMAL + "drain_timeout: .inf\n", ["2: drain_timeout: must be a duration"]),
    (MINIMAL + "drain_timeout: .nan\n", ["2: drain_timeout: must be a duration"]),
    (MINIMAL + "drain_timeout: 1.0e+999999\n", ["2: drain_timeout: must be a duration"]),
    (MINIMAL + "drain_timeout: 1e999999\n", ["2: drain_timeout: must be a duration"]),
    (MINIMAL + f"drain_timeout: {'9' * 100}\n", ["2: drain_timeout: must be a duration"]),
    (MINIMAL + f"drain_timeout: {'9' * 101}\n", ["2: drain_timeout: is no value to YAML"]),
    (MINIMAL + f"drain_timeout: 1{':1' * 200}.5\n", ["2: drain_timeout: is no value to YAML"]),
    (MINIMAL + "max_body: .nan\n", ["2: max_body: must be a size"]),
    (MINIMAL + "listen: {port: .inf}\n", ["2: listen.port: must be a whole number"]),
    (MINIMAL + "drain_timeout: 5 minutes\n", ["2: drain_timeout: must be a duration up to 10 years: seconds, or like"]),
    (MINIMAL + "drain_notice: null\n", ["2: drain_notice: is empty, and must be a duration"]),
    (MINIMAL + "drain_notice: on\n", ["2: drain_notice: must be a duration"]),
    (MINIMAL + "client_timeouts: {head: 0s}\n", ["2: client_timeouts.head: must be longer than 0"]),
    (MINIMAL + "trusted_proxies: 10.0.0.0/8\n", ["2: trusted_proxies: must be a list"]),
    (MINIMAL + "trusted_proxies: [10.1.2.3/8]\n", ["2: trusted_proxies[0]: must be an address, or a network like 10.0.0.0/8"]),
    (MINIMAL + "trusted_proxies:\n  - ::1\n  - proxy\n", ["4: trusted_proxies[1]: must be an address, or a network"]),
    (MINIMAL + "trusted_proxies: [5]\n", ["2: trusted_proxies[0]: must be an address"]),
    (MINIMAL + "cors: {origins: ['http://a/']}\n", ['2: cors.origins[0]: must be "*", or an origin']),
    (MINIMAL + "cors: {origins: [a.example]}\n", ["2: cors.origins[0]: must be"]),
    (MINIMAL + "cors: {origins: ['http://*.a']}\n", ["2: cors.origins[0]: must be"]),
]  # fmt: skip
UPSTREAM_TROUBLE = [
    ("upstreams: {}\n", ["1: upstreams: must be a mapping of names to upstreams, at least one"]),
    ("upstreams:\n", ["1: upstreams: is empty, and must be a mapping of names"]),
    ("upstreams: builtin\n", ["1: upstreams: must be a mapping of names to upstreams, at least one, or the word built-in"]),
    ("upstreams: [a]\n", ["1: upstreams: must be a mapping"]),
    ("upstreams: {a: http://a}\n", ["1: upstreams.a: must be a mapping"]),
    ("upstreams:\n  a b: {base_url: http://a}\n", ["2: upstreams.a...: must be a name"]),
    ("upstreams: {'': {base_url: http://a}}\n", ["1: upstreams.: must"]),
    (f"upstreams: {{{'a' * 129}: {{base_url: http://a}}}}\n", [f"1: upstreams.{'a' * 129}: must be a name"]),
    (upstream(base_url="''"), ["3: upstreams.a.base_url: must not be blank"]),
    (upstream(base_url='"http://a\\n"'), ["3: upstreams.a.base_url: must not have control characters"]),
    *(
        (upstream(base_url=f"'{url}'"), ["3: upstreams.a.base_url: must be http(s)://host[:port][/path]"])
        for url in [
            *("api.openai.com/v1", "ftp://a", "demo://x", "demo:", "http://", "http:///v1"),
            *("http://a/?x=1", "http://a?", "http://a/#x", "http://user:pw@a/v1", "http://:80/v1"),
            *("http://a:", "http://a:0", "http://a:65536", "http://a:b", "http://[::1"),
            *("http://[::1]x:80", "http://a%2fb", "http://a\\b", "http://a/\\b", "http://a b"),
            *("http://a/b c", "http://bücher.example", "http://a/ü"),
            *("http://a..b", "http://.a", "http://a.", f"http://{'a' * 64}"),
        ]
    ),
    (upstream(base_url="'http://[::1::]'"), ["3: upstreams.a.base_url: must be a host name, or an IP"]),
    (upstream(base_url="5"), ["3: upstreams.a.base_url: must be text: put it in quotes"]),
    (upstream(api_key="''"), ["4: upstreams.a.api_key: must not be blank"]),
    (upstream(api_key="' '"), ["4: upstreams.a.api_key: must not be blank"]),
    (upstream(api_key=f"{CANARY} x"), ["4: upstreams.a.api_key: must be visible ASCII"]),
    (upstream(api_key=f'"{CANARY}\\n"'), ["4: upstreams.a.api_key: must not have control"]),
    (upstream(api_key=f"{CANARY}é"), ["4: upstreams.a.api_key: must be visible ASCII"]),
    (upstream(api_key="12345"), ["4: upstreams.a.api_key: must be text: put it in quotes"]),
    (upstream(api_key=f"[{CANARY}]"), ["4: upstreams.a.api_key: must be text"]),
    (upstream(api_key=CANARY, auth="none"), ["4: upstreams.a.api_key: would not be sent: auth is none"]),
    (upstream(auth="basic"), ["4: upstreams.a.auth: must be one of 'bearer', 'x-api-key', 'api-key' or 'none'"]),
    (upstream(base_url="demo://", api_key=CANARY), ["4: upstreams.a.api_key: would not be sent: demo://"]),
    (upstream(api_key=CANARY, headers="{authorization: x}"), ["5: upstreams.a.headers.authorization: is where api_key goes"]),
    (upstream(api_key=CANARY, auth="api-key", headers="{Api-Key: x}"), ["6: upstreams.a.headers.Api-Key: is where api_key goes"]),
    *(
        (upstream(headers=f"{{{name}: {CANARY}}}"), [f"4: upstreams.a.headers.{name}: cannot be set"])
        for name in [
            *("Connection", "Keep-Alive", "Proxy-Authorization", "TE", "Trailer"),
            *("Transfer-Encoding", "upgrade", "Content-Length", "HOST", "Expect", "via"),
        ]
    ),
    (upstream(headers="text"), ["4: upstreams.a.headers: must be a mapping"]),
    (upstream(headers="{X A: b}"), ["4: upstreams.a.headers.X...: must be a header name"]),
    (upstream(headers="{X-A: 5}"), ["4: upstreams.a.headers.X-A: must be text: put it in quotes"]),
    (upstream(headers=f'{{X-A: "{CANARY}\\r\\nX: y"}}'), ["4: upstreams.a.headers.X-A: must not have control"]),
    (upstream(headers=f"{{X-A: {CANARY}é}}"), ["4: upstreams.a.headers.X-A: must be printable ASCII"]),
    (upstream(headers=f"{{X-A: [{CANARY}]}}"), ["4: upstreams.a.headers.X-A: must be text"]),
    *(
        (upstream(egress=f"'{url}'"), ["4: upstreams.a.egress: must be http://host:port of a forward proxy"])
        for url in [
            *("p.example:3128", "https://p:3128", "socks5://p:1080", "http://p", "http://p:", "http://:1"),
            *("http://p:0", "http://p:65536", f"http://u:{CANARY}@p:1", "http://p:1/x", "http://p:1?x"),
            *("http://p:1#x", "http://p q:1", "http://p:1//", "http://[::1", "http://a..b:1", "demo://"),
        ]
    ),
    (upstream(egress="'http://[::1::]:1'"), ["4: upstreams.a.egress: must be a host name, or an IP"]),
    (upstream(egress="3128"), ["4: upstreams.a.egress: must be text: put it in quotes"]),
    (upstream(base_url="demo://", egress="http://p:1"), ["4: upstreams.a.egress: would not be used: demo://"]),
    (upstream(ca_file="''"), ["4: upstreams.a.ca_file: must be a regular file"]),
    (upstream(ca_file="/dev/zero"), ["4: upstreams.a.ca_file: must be a regular file"]),
    (upstream(base_url="https://a", ca_file="/none/x.pem"), ["4: upstreams.a.ca_file: cannot be read: No such file"]),
    (upstream(api_key_file="''"), ["4: upstreams.a.api_key_file: must be a regular file"]),
    (upstream(api_key_file="/dev/zero"), ["4: upstreams.a.api_key_file: must be a regular file"]),
    (upstream(api_key_file="5"), ["4: upstreams.a.api_key_file: must be text"]),
    (upstream(api_key_file="/none/key"), ["4: upstreams.a.api_key_file: cannot be read: No such file"]),
    (upstream(timeouts="{connect: 0}"), ["4: upstreams.a.timeouts.connect: must be longer than 0"]),
    (upstream(timeouts="{idle: null}"), ["4: upstreams.a.timeouts.idle: is empty, and must be a duration"]),
]  # fmt: skip
ROUTE_TROUBLE = [
    (MINIMAL + "routes: []\n", ["2: routes: must not be empty"]),
    (MINIMAL + "routes:\n", ["2: routes: is empty, and must be a list: [a, b], or lines of `- a`"]),
    (MINIMAL + "routes: [5]\n", ["2: routes[0]: must be a mapping"]),
    (route(models="[]"), ["4: routes[0].models: must not be empty"]),
    (route(models="gpt-4"), ["4: routes[0].models: must be a list"]),
    (route(models="['']"), ["4: routes[0].models[0]: must not be blank"]),
    (route(upstreams="[]"), ["5: routes[0].upstreams: must not be empty"]),
    (route(upstreams="[b]"), ["5: routes[0].upstreams[0]: is an unknown upstream: known are a"]),
    (route(upstreams="[a, a]"), ["5: routes[0].upstreams[1]: is a candidate of this route already"]),
    (route(name="none"), ["6: routes[0].name: must not be none"]),
    (route(models="[none]"), ["4: routes[0].name: must not be none"]),
    (route(name="123"), ["6: routes[0].name: must be text: put it in quotes"]),
    (route(name="''"), ["6: routes[0].name: must not be blank"]),
    (route() + "  - {models: [m, n], upstreams: [a]}\n", ["6: routes[1].name: must be unique: routes[0]"]),
    (route() + "  - {models: [n], upstreams: [a], name: m}\n", ["6: routes[1].name: must be unique"]),
]  # fmt: skip
COMBINED_TROUBLE = [
    (MINIMAL + "admin: {port: 8080}\n", ["2: admin.port: must not be the port of listen"]),
    (MINIMAL + "listen: {port: 9, host: 0.0.0.0}\nadmin: {port: 9}\n", ["3: admin.port: must not"]),
    # Everything at once, and nothing twice: a part that is broken is not judged in combination.
    (
        ("upstreams:\n"
        f"  a: {{base_url: 'ftp://a', api_key: {CANARY}, api_key_file: '', tiemouts: {{}}}}\n"
        "  b: 5\n"
        "  c: {base_url: http://c, auth: none, api_key: x}\n"
        "routes:\n"
        "  - {models: [m], upstreams: [b]}\n"
        "  - {models: [m], upstreams: [q]}\n"
        "  - {models: ['', m], upstreams: [q]}\n"
        "  - 7\n"
        "  - {models: [m], name: m2, attempts: 0}\n"
        "listen: {host: 0.0.0.0}\n"
        "open: maybe\n"),
        [
            "2: upstreams.a.base_url: must be http(s)://",
            "2: upstreams.a.api_key_file: must be a regular file",
            "2: upstreams.a.tiemouts: is an unknown key: did you mean timeouts?",
            "3: upstreams.b: must be a mapping",
            "4: upstreams.c.api_key: would not be sent: auth is none",
            "7: routes[1].name: must be unique",
            "7: routes[1].upstreams[0]: is an unknown upstream: known are a, b, c",
            "8: routes[2].models[0]: must not be blank",
            "9: routes[3]: must be a mapping",
            "10: routes[4].upstreams: is required",
            "10: routes[4].attempts: must be at least 1",
            "12: open: must be true or false",
        ],
    ),
]  # fmt: skip
DIGEST = sha256(CANARY.encode()).hexdigest()
CLIENT_TROUBLE = [
    (MINIMAL + "store: 'redis://:se/cret@host/0'\n", ["2: store: has a malformed host or port: perc"]),
    (MINIMAL + "store: 'redis://host/a'\n", ["2: store: must have nothing but a database's number"]),
    (MINIMAL + "store: 'redis://host?ssl_password=x'\n", ["2: store: has ssl_password, which is not"]),
    (MINIMAL + "store: 'redis:///1'\n", ["2: store: must name a host"]),
    (MINIMAL + "limits: {requests: 60/min}\n", ["2: limits.requests: must be a rate: N/second"]),
    (MINIMAL + "clients: [{name: a}]\n", ["2: clients[0]: needs a key or a key_sha256"]),
    (
        MINIMAL + f"clients: [{{name: a, key: {CANARY}, key_sha256: {DIGEST}}}]\n",
        ["2: clients[0].key_sha256: must not stand beside key: choose one"],
    ),
    (
        MINIMAL + f"clients: [{{name: a, key: {CANARY}}}, {{name: b, key_sha256: {DIGEST}}}]\n",
        ["2: clients[1]: has the same key as clients[0]"],
    ),
    (
        MINIMAL + "clients: [{name: a, key: x}, {name: a, key: y}]\n",
        ["2: clients[1].name: must be unique: clients[0] has the same name"],
    ),
    (MINIMAL + "clients: [{name: a, key: ' '}]\n", ["2: clients[0].key: must not be blank"]),
    (MINIMAL + "clients: [{name: anonymous, key: x}]\n", ["2: clients[0].name: must not be"]),
    (MINIMAL + "clients: [{key: k}]\n", ["2: clients[0].name: is required"]),
    (MINIMAL + "limits: {requests: 60}\n", ["2: limits.requests: must be a rate"]),
    (MINIMAL + "limits: {tokens: [1/minute, 0/day]}\n", ["2: limits.tokens"]),
    (MINIMAL + "limits: {requests: []}\n", ["2: limits.requests: must not be empty"]),
    (MINIMAL + "store: mysql://\n", ["2: store: must be memory, redis://"]),
    (
        MINIMAL + "limits: {requests: [60/minute, 10/60s]}\n",
        ["2: limits.requests: must not have two rates over the same time"],
    ),
    (
        MINIMAL + "clients: [{name: a, key: x, limits: {tokens: [1/1h, 2/hour]}}]\n",
        ["2: clients[0].limits.tokens: must not have two rates over the same time"],
    ),
]  # fmt: skip
NOT_YET = [
    (MINIMAL + "default_model: gpt-4o\n", ["2: default_model: is not available yet: leave it out"]),
    (MINIMAL + "resume: {}\n", ["2: resume: is not available yet: leave it out"]),
]  # fmt: skip
NOT_YET_AND_WRONG = [
    (MINIMAL + "resume: {max_bytes: 1PB}\n", ["2: resume.max_bytes: must be a size"]),
]  # fmt: skip
FAILOVER_TROUBLE = [
    (upstream(max_streams="0"), ["4: upstreams.a.max_streams: must be at least 1"]),
    (upstream(max_streams="many"), ["4: upstreams.a.max_streams: must be a whole number"]),
    (upstream(max_streams="1.5"), ["4: upstreams.a.max_streams: must be a whole number"]),
    (upstream(circuit="{failures: 0}"), ["4: upstreams.a.circuit.failures: must be at least 1"]),
    (upstream(circuit="{rest: 0}"), ["4: upstreams.a.circuit.rest: must be longer than 0"]),
    (upstream(circuit="{pause: 1}"), ["4: upstreams.a.circuit.pause: is an unknown key: allowed are failures, rest"]),
    (upstream(circuit="null"), ["4: upstreams.a.circuit: is empty, and must be a mapping"]),
    (upstream(timeouts="{stall: 0}"), ["4: upstreams.a.timeouts.stall: must be longer than 0"]),
    (upstream(timeouts="{stall: null}"), ["4: upstreams.a.timeouts.stall: is empty, and must be a duration"]),
    (route(attempts="0"), ["6: routes[0].attempts: must be at least 1"]),
    (route(attempts="two"), ["6: routes[0].attempts: must be a whole number"]),
    (route(on_disconnect="continue"), ["6: routes[0].on_disconnect: must be one of 'cancel' or 'finish'"]),
    (route(finish_cap="0"), ["6: routes[0].finish_cap: must be longer than 0"]),
    (route(commit_after="-1"), ["6: routes[0].commit_after: must be a duration"]),
    (route(heartbeat="-1s"), ["6: routes[0].heartbeat: must be a duration"]),
    (route(model="''"), ["6: routes[0].model: must not be blank"]),
    (route(model="4"), ["6: routes[0].model: must be text: put it in quotes"]),
    (route(upstreams="[a, b]"), ["5: routes[0].upstreams[1]: is an unknown upstream: known are a"]),
    (route(upstreams="[]"), ["5: routes[0].upstreams: must not be empty"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    YAML_TROUBLE
    + KEY_TROUBLE
    + TYPE_TROUBLE
    + UPSTREAM_TROUBLE
    + ROUTE_TROUBLE
    + COMBINED_TROUBLE
    + CLIENT_TROUBLE
    + FAILOVER_TROUBLE,
)
def test_refused(problems, text, expected):
    found = problems(text)
    assert [line[: len(start)] for line, start in zip(found, expected, strict=False)] == expected
    assert len(found) == len(expected), found


@pytest.mark.parametrize(("text", "expected"), NOT_YET)
def test_what_is_not_available_yet_is_refused(problems, text, expected):
    found = problems(text)
    assert [line[: len(start)] for line, start in zip(found, expected, strict=True)] == expected


@pytest.mark.parametrize(("text", "expected"), NOT_YET_AND_WRONG)
def test_what_is_not_available_yet_is_checked_all_the_same(problems, text, expected):
    assert any(line.startswith(expected[0]) for line in problems(text))


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL + "default_model: null\nclients: []\nlimits: {}\nstore: memory\n",
        MINIMAL + "store_failure: allow\nresume: null\n",
    ],
)
def test_what_means_off_is_accepted_before_the_feature_is_there(config, text):
    config(text)


# What would never end, or fill memory ------------------------------------------------------------


def doubled(first, line):
    """Lines that each use the one before twice: 2 to the 17th of them at the end."""
    lines = [f"a0: &a0 {first}\n", *(line.format(n=n, m=n - 1) for n in range(1, 18))]
    return MINIMAL + "".join(lines)


HOLDS_TOO_MUCH = {
    "billion laughs": doubled("[lol]", "a{n}: &a{n} [*a{m}, *a{m}]\n"),
    "of mappings": doubled("{x: lol}", "a{n}: &a{n} {{x: *a{m}, y: *a{m}}}\n"),
    "of merges": doubled("{x: lol}", "a{n}: &a{n} {{<<: [*a{m}, *a{m}]}}\n"),
    "a large mapping merged often": MINIMAL + "a: &a {" + ", ".join(f"k{n}: 1" for n in range(300)) + "}\n"
    + f"b: {{<<: [{'*a, ' * 300}]}}\n",
    "an empty mapping merged often": MINIMAL + "a: &a {}\n" + f"b: &b {{<<: [{'*a, ' * 300}]}}\n"
    + f"c: {{<<: [{'*b, ' * 300}]}}\n",
    "many values": MINIMAL + "routes: [" + "a," * 100_000,  # refused long before it is seen to be open
    "a large scalar": "upstreams: {a: {base_url: http://" + "a" * 2**20 + "}}\n",
    "a large comment": MINIMAL + "#" * 2**20,
}  # fmt: skip


@pytest.mark.parametrize("text", HOLDS_TOO_MUCH.values(), ids=HOLDS_TOO_MUCH)
def test_what_holds_too_much_is_refused(problems, text):
    (line,) = problems(text)
    assert line.startswith(" holds too much: a config has at most 1 MiB, and some ten thousand")


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL + "a: &a {<<: *a}\n",
        MINIMAL + "a: &a [*a]\n",
        MINIMAL + "a: " + "{a: " * 100_000,
        MINIMAL + "? " * 100_000,
        MINIMAL + "".join(f"{' ' * depth}a:\n" for depth in range(1000)),
    ],
)
def test_what_is_nested_too_deeply_is_refused(problems, text):
    (line,) = problems(text)
    assert line.startswith(" is nested too deeply, or an anchor is used inside what it names")


def test_a_large_config_is_none_of_those(config):
    clients = "".join(f"    u{n}: {{base_url: http://a, auth: none}}\n" for n in range(2000))
    assert len(config(f"upstreams:\n{clients}").upstreams) == 2000


def test_problems_are_bounded_in_number_and_length(problems):
    deep = "".join("{" + "k" * 100 + ": " for _ in range(100))
    found = problems(MINIMAL + f"x: {deep}[" + "'${', " * 5000 + "]" + "}" * 100)
    assert len(found) == 1000
    assert max(map(len, found)) < 400
    assert found[0].startswith("2: x.kkk")


def test_what_is_broken_already_is_complained_of_once(problems):
    # As often as it is used, and in a time that does not grow with the square of it.
    found = problems(MINIMAL + f"x: &x '${{'\ncors: {{origins: [{'*x, ' * 900}]}}\n")
    assert len(found) == 901


def test_a_file_without_end_is_refused():
    with pytest.raises(ConfigError, match="holds too much"):
        load(Path("/dev/zero"), {})


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"open: \xe9")
    for name, message in [
        ("none.yaml", "cannot be read: No such file or directory"),
        ("", "cannot be read: Is a directory"),
        ("latin.yaml", "is not UTF-8 text"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load(tmp_path / name, {})
        assert str(caught.value) == f"{tmp_path / name}: {message}"


def test_files_a_config_names(config, problems, tmp_path):
    (tmp_path / "key").write_text(f"\n  {CANARY} \n")
    (tmp_path / "blank").write_text(" \n")
    (tmp_path / "two").write_text(f"{CANARY}\n{CANARY}")
    (tmp_path / "bytes").write_bytes(CANARY.encode() + b"\xff")
    found = config(upstream(api_key_file=tmp_path / "key")).upstreams["a"]
    assert found.injects
    source = found.key_source()
    assert source is not None
    assert source.value() == CANARY
    for name, message in [
        ("blank", "the key in it must not be blank"),
        ("two", "the key in it must not have control characters"),
        ("bytes", "must be a text file with nothing but a key"),
    ]:
        (line,) = problems(upstream(api_key_file=tmp_path / name))
        assert line == f"4: upstreams.a.api_key_file: {message}"
    (line,) = problems(upstream(api_key_file=tmp_path / "key", api_key=CANARY))
    assert line == "4: upstreams.a.api_key_file: must not stand beside api_key: choose one"
    (line,) = problems(upstream(base_url="https://a", ca_file=tmp_path / "key"))
    assert line == "4: upstreams.a.ca_file: must be a file with certificates (PEM)"


def test_ca_file(config, problems, monkeypatch, tmp_path):
    monkeypatch.setattr(ssl, "create_default_context", lambda cafile: None)
    (tmp_path / "ca.pem").touch()
    found = config(upstream(base_url="https://a", ca_file=tmp_path / "ca.pem"))
    assert found.upstreams["a"].ca_file == tmp_path / "ca.pem"
    (line,) = problems(upstream(ca_file=tmp_path / "ca.pem"))
    assert line.startswith("4: upstreams.a.ca_file: would not be used: base_url")


# The open proxy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "'::1'", "localhost", "LocalHost"])
def test_loopback_is_not_open(config, host):
    config(WITH_KEY + f"listen: {{host: {host}}}\n")


@pytest.mark.parametrize("host", ["0.0.0.0", "'::'", "192.0.2.1", "example.com", "'0'", "'127.1'"])
def test_an_open_proxy_is_refused(config, problems, host):
    listen = f"listen: {{host: {host}}}\n"
    (line,) = problems(WITH_KEY + listen)
    assert line.startswith("2: listen.host: is not loopback")
    for way_out in ("127.0.0.1", "clients", "open: true"):
        assert way_out in line
    config(MINIMAL + listen)
    config(WITH_KEY + listen + "open: true\n")
    config(WITH_KEY + listen, host="127.0.0.1")
    (line,) = problems(WITH_KEY + listen + "open: ${NO}\n", {"NO": "false"})
    assert line.startswith("2: listen.host: is not loopback")


def test_a_header_with_a_credential_is_an_injected_key(problems):
    text = upstream(headers=f"{{X-Api-Key: {CANARY}}}") + "listen: {host: 0.0.0.0}\n"
    (line,) = problems(text)
    assert line.startswith("5: listen.host: is not loopback")


def test_the_command_line_goes_before_the_file(config, problems):
    found = config(WITH_KEY + "listen: {host: 0.0.0.0, port: 1}", host="localhost", port=0)
    assert (found.listen.host, found.listen.port) == ("localhost", 0)
    assert config(MINIMAL, port=9).listen.port == 9
    (line,) = problems(WITH_KEY, host="0.0.0.0")
    assert line.startswith("--host: is not loopback")
    assert problems(MINIMAL, host=" ", port=65536) == [
        "--host: must not be blank",
        "--port: must be at most 65535",
    ]
    (line,) = problems(MINIMAL + "listen: 5\n", port=9)
    assert line.startswith("2: listen: must be a mapping")


def test_clients_limits_and_a_store(config):
    found = config(
        MINIMAL
        + f"""clients:
- {{name: a, key: "{CANARY}", limits: {{requests: null, streams: 3}}}}
- {{name: b, key_sha256: "{"0" * 64}", models: ["gpt-*"], user_header: X-User}}
limits: {{requests: [60/minute, 5000/day], tokens: 100000/minute}}
store: redis://user:p@{CANARY}@redis:6379/1?password={CANARY}&db=1
store_failure: deny
store_timeout: 1s
"""
    )
    a, b = found.clients
    assert (a.digest(), b.digest()) == (DIGEST, "0" * 64)
    assert a.limits.model_fields_set == {"requests", "streams"}
    shown = render(found)
    assert CANARY not in shown
    assert "store: redis://***@redis:6379/1?password=***&db=1" in shown
    assert "60/minute" in shown and "5000/1d" not in shown
    again = config(shown.replace("'***'", "k"))  # secrets apart, itself a valid config
    assert [client.limits for client in again.clients] == [a.limits, b.limits]
    assert b.limits.model_fields_set == again.clients[1].limits.model_fields_set == set()


def test_a_redis_needs_its_library(problems, monkeypatch):
    monkeypatch.setattr("proxy.config.checks.find_spec", lambda _: None)
    (line,) = problems(MINIMAL + "store: redis://a\n")
    assert line.startswith("2: store: needs a library: pip install")


# The built-in choice ------------------------------------------------------------------------------


def test_built_in(config, problems):
    text = "upstreams: built-in\n"
    for environ in ({}, {"OPENAI_API_KEY": ""}, {"SLUICE_KEY": ""}):
        demo = config(text, environ)
        assert [*demo.upstreams] == ["demo"]
        assert demo.upstreams["demo"].demo
    openai = config(text, {"OPENAI_API_KEY": CANARY})
    assert [*openai.upstreams] == ["openai"]
    assert openai.upstreams["openai"].base_url == "https://api.openai.com/v1"
    assert openai.upstreams["openai"].api_key == SecretStr(CANARY)
    assert openai.routes[0].upstreams == ("openai",)
    (client,) = config(text, {"SLUICE_KEY": CANARY}).clients
    assert (client.name, client.key) == ("sluice", SecretStr(CANARY))
    assert problems(text, {"OPENAI_API_KEY": CANARY + "\n", "SLUICE_KEY": CANARY + " "}) == [
        "OPENAI_API_KEY: must not have control characters",
        "SLUICE_KEY: must be visible ASCII without spaces, to stand in a header",
    ]


def test_only_the_built_in_choice_reads_its_variables(config, problems):
    assert [*config(MINIMAL, {"SLUICE_KEY": "x", "OPENAI_API_KEY": "y"}).upstreams] == ["a"]
    (line,) = problems(upstream(api_key="${OPENAI_API_KEY}"))
    assert "OPENAI_API_KEY is not set" in line


# The shipped config ---------------------------------------------------------------------------


def test_the_shipped_config():
    for environ, chosen in ({}, "demo"), ({"OPENAI_API_KEY": "x"}, "openai"):
        assert [*load(ROOT / "config.yaml", environ).upstreams] == [chosen]


def test_what_the_shipped_config_leaves_commented_out(config):
    text = (ROOT / "config.yaml").read_text()
    assert config(re.sub(r"(?m)^#(?=[a-z])(?!upstreams|routes|clients|limits)", "", text)) == load(
        ROOT / "config.yaml", {}
    )
    everything = re.sub(r"(?m)^#(?=\S|  )", "", text.replace("\nupstreams: built-in", ""))
    found = config(everything, {"OPENAI_API_KEY": "x", "WEB_KEY": "y", "WEBUI_KEY": "z"})
    assert [client.name for client in found.clients] == ["web", "webui"]
    assert [*found.upstreams] == ["openai", "local"]
    assert [route.name for route in found.routes] == ["local", "*"]
    assert found.upstreams["openai"].timeouts == config(MINIMAL).upstreams["a"].timeouts


# Secrets ----------------------------------------------------------------------------------------

SECRETS = (
    "admin: {key: '${KEY}'}\n"
    "upstreams:\n"
    "  a: {base_url: https://a, api_key: '${KEY}', headers: {X-Secret: '${KEY}'}}\n"
)


def test_secrets_are_nowhere_to_be_seen(config):
    found = config(SECRETS, {"KEY": CANARY})
    a = found.upstreams["a"]
    for shown in (repr(found), str(found), render(found), found.model_dump_json(), repr(a)):
        assert CANARY not in shown
    assert CANARY not in repr(a.key_source())
    assert render(found).count("'***'") == 3
    assert a.headers["X-Secret"].get_secret_value() == CANARY


@pytest.mark.parametrize(
    "text",
    [
        # Wherever a variable may stand, wrongly: `problems` sees to it that no line repeats it.
        MINIMAL + "listen: {host: '${V}', port: '${V}'}\nopen: ${V}\nmax_body: ${V}\n",
        MINIMAL + "drain_timeout: ${V}\nlog: {level: '${V}', format: '${V}'}\n",
        MINIMAL + "trusted_proxies: ['${V}']\ncors: {origins: ['${V}']}\n",
        MINIMAL + "listen: '${V}'\nadmin: {key: '${V}'}\n",
        MINIMAL + "limits: {requests: '${V}', streams: '${V}'}\nstore: '${V}'\n",
        "upstreams: '${V}'\n",
        "upstreams: {a: '${V}'}\n",
        upstream(base_url="${V}", api_key="${V}", auth="${V}", timeouts="'${V}'"),
        "upstreams: {a: {base_url: http://a, api_key:${V}}}\n",  # a space is missing
        upstream(headers="{Authorization ${V}}"),  # a colon is missing
        upstream(ca_file="${V}", api_key_file="${V}", headers="{X-A: '${V}', Host: '${V}'}"),
        route(models="'${V}'", upstreams="['${V}']", name="${V}", attempts="${V}"),
    ],
)
def test_no_problem_repeats_a_value(problems, text):
    problems(text, {"V": f"{CANARY} /"})
    problems(text.replace("'${V}'", f"'{CANARY} /'").replace("${V}", f"'{CANARY} /'"))


def test_a_network_from_a_variable_is_not_repeated(problems):
    (line,) = problems(MINIMAL + "trusted_proxies: ['${V}']\n", {"V": "10.1.2.3/8"})
    assert "10.1" not in line


# Key files --------------------------------------------------------------------------------------


def test_a_key_file_is_read_again_when_it_changes(tmp_path):
    path = tmp_path / "key"
    path.write_text("one\n")
    source = KeyFile(path)
    assert source.value() == "one"
    path.write_text("two, longer".replace(", ", "-"))
    assert source.value() == "two-longer"
    other = tmp_path / "other"  # the same size and time: told by its inode
    other.write_text("six-longer")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)
    assert source.value() == "six-longer"
    assert "longer" not in repr(source)


def test_a_key_file_that_is_gone_at_the_start_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        KeyFile(tmp_path / "key")


def test_a_key_file_is_not_read_without_need(tmp_path, monkeypatch):
    path = tmp_path / "key"
    path.write_text("one")
    source = KeyFile(path)
    source.value()
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read again"))
    assert source.value() == "one"


def test_the_last_good_key_stays_and_each_change_is_logged_once(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "sluice.config")
    path = tmp_path / "key"
    path.write_text(CANARY)
    source = KeyFile(path)
    for spoil in (path.unlink, lambda: path.write_text(" \n"), lambda: path.write_text("a b")):
        spoil()
        assert [source.value(), source.value()] == [CANARY, CANARY]
    path.write_text(CANARY)
    assert [source.value(), source.value()] == [CANARY, CANARY]
    path.write_text("")
    source.value()
    assert [record.getMessage() for record in caplog.records] == [
        "key_file_unusable",
        "key_file_usable_again",
        "key_file_unusable",
    ]
    assert [record.fields["problem"] for record in caplog.records] == [
        "cannot be read: No such file or directory",
        None,
        "the key in it must not be blank",
    ]
    assert {record.fields["path"] for record in caplog.records} == {str(path)}


# Rendering ----------------------------------------------------------------------------------------

ROUND_TRIPS = [
    MINIMAL,
    SEVERAL.replace("'${ONE}'", "1").replace("'${PAUSE}'", "90s"),
    "upstreams: {a: {base_url: 'demo://'}}\nroutes: [{models: ['gpt-[34]* x', $$x], upstreams: [a]}]",
    "upstreams:\n  a:\n    base_url: https://a/$${x}\n    timeouts: {connect: 90, total: 1ms, idle: 0.0001}\n",
    MINIMAL + "trusted_proxies: [10.0.0.0/8, '::1']\nmax_body: 1000\ndrain_notice: 570ms\nopen: true\n"
    "cors: {origins: [https://a]}\nlog: {level: debug}\nadmin: {port: 9}\n",
]  # fmt: skip


@pytest.mark.parametrize("text", ROUND_TRIPS)
def test_what_is_rendered_loads_again_as_the_same(config, text):
    found = config(text)
    again = config(render(found))
    assert again == found
    assert render(again) == render(found)


def test_rendered_readably_with_defaults(config):
    found = yaml.safe_load(render(config(upstream(timeouts="{idle: 90, total: 7200}"))))
    assert found["drain_timeout"] == "5m"
    assert found["max_body"] == "32MiB"
    assert found["drain_notice"] == "0s"
    assert found["client_timeouts"] == {
        "head": "10s", "body": "30s", "keep_alive": "75s", "write": "2m",
    }  # fmt: skip
    assert found["upstreams"]["a"]["timeouts"] == {
        "connect": "5s", "first_byte": "10m", "idle": "90s", "stall": "5m", "total": "2h",
    }  # fmt: skip
    assert found["upstreams"]["a"]["max_streams"] is None
    assert found["upstreams"]["a"]["circuit"] == {"failures": 5, "rest": "30s"}
    assert found["routes"] == [
        {
            "models": ["*"], "name": "default", "upstreams": ["a"], "model": None, "attempts": 2,
            "on_disconnect": "cancel", "finish_cap": "5m", "commit_after": "30s", "heartbeat": "15s",
        }
    ]  # fmt: skip
    assert "resume" not in found


def test_the_rendered_built_in_choice_is_resolved(config):
    found = config("upstreams: built-in\n", {"OPENAI_API_KEY": CANARY})
    again = config(render(found))
    assert again.upstreams["openai"].base_url == "https://api.openai.com/v1"


# JSON Schema --------------------------------------------------------------------------------------


def objects(node):
    """All schemas of objects with fixed keys in a schema."""
    if isinstance(node, dict):
        if "properties" in node:
            yield node
        for item in node.values():
            yield from objects(item)
    elif isinstance(node, list):
        for item in node:
            yield from objects(item)


def test_schema_is_closed_and_described():
    found = schema()
    assert found["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(found["properties"]) == set(Config.model_fields)
    assert found["required"] == ["upstreams"]
    for each in objects(found):
        assert each["additionalProperties"] is False
        # What refers to a part is described there.
        assert all(item.keys() & {"description", "$ref"} for item in each["properties"].values())


def test_schema_says_what_may_be_written():
    found = schema()["properties"]
    assert found["upstreams"]["anyOf"][1]["const"] == "built-in"
    number, text = found["drain_timeout"]["anyOf"]
    assert number == {"type": "number"}
    for example in ("5m", "30", "500ms", "${VAR}"):
        assert re.search(text["pattern"], example)
    assert not re.search(text["pattern"], "5 apples")
    route = schema()["$defs"]["Route"]["properties"]
    assert route["on_disconnect"]["anyOf"][0]["enum"] == ["cancel", "finish"]
    assert route["attempts"]["anyOf"][0] == {"type": "integer", "minimum": 1}
    for name in ("heartbeat", "commit_after", "finish_cap"):
        assert re.search(route[name]["anyOf"][1]["pattern"], "1500ms")
    assert schema()["$defs"]["Listen"]["properties"]["port"]["anyOf"] == [
        {"type": "integer", "minimum": 0, "maximum": 65535},
        {"type": "string", "pattern": r"\$\{"},
    ]
