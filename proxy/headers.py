"""F0 headers: which header fields cross the proxy. Pure: an inbound list in, an outbound one out.

The inbound fields are never touched; the outbound ones are built from them by the tables below,
in their order, duplicates and spelling kept. Names in the tables are lower case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import IPv4Network, IPv6Network, ip_address

from proxy.framing import Header, ResponseHead

# Meant for one connection only (RFC 9110 7.6.1), whether or not Connection names them.
HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",  # RFC 2068 19.7.1.1; llama.cpp sends it on every answer
        b"proxy-connection",  # RFC 9110 appendix: sent by old clients to proxies
        b"proxy-authenticate",  # RFC 9110 11.7.1: between a client and its next proxy only
        b"proxy-authorization",
        b"te",
        b"trailer",  # we drop trailers, so announcing them would lie
        b"transfer-encoding",
        b"upgrade",
    }
)
# Restated by us for the next connection: how long the body is, and whom the request is for.
_FRAMING = frozenset({b"content-length", b"host"})
# Answered by us: the upstream is asked when the body is already on its way.
_OURS_TO_ANSWER = frozenset({b"expect"})
# Where clients put their keys (RFC 6750; Anthropic; Azure).
CREDENTIALS = frozenset({b"authorization", b"x-api-key", b"api-key"})
# What whoever sends can claim of itself; a proxy behind us must not believe it.
_FORWARDED_PREFIX = b"x-forwarded-"

_VIA_RECEIVED_BY = b"sluice"
VIA = (b"Via", b"1.1 " + _VIA_RECEIVED_BY)

# An event stream's length and validators would be a lie, and caches or buffers on the way would
# hold events back: no-transform keeps compressing middleware away, X-Accel-Buffering is nginx's.
_NOT_ON_STREAMS = frozenset(
    {b"content-length", b"etag", b"last-modified", b"cache-control", b"x-accel-buffering"}
)
STREAM_HEADERS: tuple[Header, ...] = (
    (b"Cache-Control", b"no-cache, no-transform"),
    (b"X-Accel-Buffering", b"no"),
)
# Two Access-Control-Allow-Origin fields are refused by browsers, and `*` from an upstream would
# open a proxy with an injected key to every page: an upstream's CORS gives way to ours.
_CORS_PREFIX = b"access-control-"
_OURS_PREFIX = b"sluice-"
# An upstream's limits are ours to spend; a client that has limits of its own is told those.
_RATE_LIMITS = frozenset(
    f"x-ratelimit-{name}-{kind}".encode()
    for name in ("limit", "remaining", "reset")
    for kind in ("requests", "tokens")
)

# Some gateways write 192.0.2.1:1234 or [2001:db8::1]:1234.
_PORT = re.compile(r"^(\[[^\]]*\]|[0-9.]+):[0-9]+\Z")

_WAIT = re.compile(rb"[0-9]{1,9}(?:\.[0-9]{1,9})?")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(frozen=True, slots=True)
class UpstreamRules:
    """What one upstream wants in every request: `fixed` fields replace the client's of that name.

    `drops_credentials`: a credential of our own goes up, or what clients send are keys to this proxy.
    """

    host: bytes
    fixed: tuple[Header, ...] = field(repr=False)  # it may hold a key
    drops_credentials: bool

    @property
    def dropped(self) -> frozenset[bytes]:
        replaced = frozenset(name.lower() for name, _ in self.fixed)
        always = HOP_BY_HOP | _FRAMING | _OURS_TO_ANSWER | replaced
        return always | CREDENTIALS if self.drops_credentials else always


def request_headers(
    inbound: Iterable[Header],
    rules: UpstreamRules,
    *,
    dropped: frozenset[bytes],
    credential: Header | None,
    framing: Header | None,
    identity: bool,
) -> list[Header]:
    """The fields of the upstream request. `dropped` is `rules.dropped`, computed once.

    `framing` is the Content-Length or Transfer-Encoding of the body as we send it. `identity` asks
    for an uncompressed answer, since a compressed stream can neither be read nor added to.
    """
    inbound = tuple(inbound)
    dropped = dropped | _nominated(inbound)
    if identity:
        dropped = dropped | {b"accept-encoding"}
    outbound: list[Header] = [(b"Host", rules.host)]
    for each in inbound:
        name = each[0].lower()
        if name not in dropped and not name.startswith(_FORWARDED_PREFIX):
            outbound.append(each)
    outbound.extend(rules.fixed)
    if credential is not None:
        outbound.append(credential)
    if identity:
        outbound.append((b"Accept-Encoding", b"identity"))
    if framing is not None:
        outbound.append(framing)
    outbound.append(VIA)
    return outbound


def response_headers(
    upstream: Iterable[Header], *, status: int, stream: bool, limited: bool = False
) -> list[Header]:
    """The fields of the client's answer, without our own and without those of its framing.
    `limited`: the client has limits of its own.

    Content-Length stays: it is the body's, also where no body follows (HEAD, 304), but must not be
    on a 204 (RFC 9110 8.6), where a lax reader would take bytes of the next answer for it.
    """
    upstream = tuple(upstream)
    # Nominated or not: the sink writes the body that it announces.
    dropped = HOP_BY_HOP | (_nominated(upstream) - {b"content-length"})
    if stream:
        dropped = dropped | _NOT_ON_STREAMS
    if status == 204:
        dropped = dropped | {b"content-length"}
    if limited:
        dropped = dropped | _RATE_LIMITS
    outbound = []
    for each in upstream:
        name = each[0].lower()
        if name not in dropped and not name.startswith((_CORS_PREFIX, _OURS_PREFIX)):
            outbound.append(each)
    return outbound


def retry_after(head: ResponseHead, now: datetime) -> float | None:
    """For how many seconds a response asks to be left alone; None if it does not, or not readably.

    It says so in seconds or as a date (RFC 9110 10.2.3); OpenAI and Azure also in milliseconds.
    """
    for name, unit in (b"retry-after-ms", 1000.0), (b"retry-after", 1.0):
        for value in head.values(name):
            if _WAIT.fullmatch(value):
                return float(value) / unit
            with suppress(ValueError, OverflowError):
                date = parsedate_to_datetime(value.decode("latin-1"))
                # Without a zone, as in asctime's format, it is in UTC (RFC 9110 5.6.7).
                date = date if date.tzinfo else date.replace(tzinfo=UTC)
                return max(0.0, (date - now).total_seconds())
    return None


def _nominated(fields: Sequence[Header]) -> frozenset[bytes]:
    """The fields that Connection declares to be hop-by-hop (RFC 9110 7.6.1)."""
    options = [value for name, value in fields if name.lower() == b"connection"]
    if not options:
        return frozenset()
    return frozenset(option.strip().lower() for option in b",".join(options).split(b","))


def is_loop(inbound: Iterable[Header]) -> bool:
    """Whether a Sluice has forwarded this request already (RFC 9110 7.6.3)."""
    for name, value in inbound:
        if name.lower() == b"via":
            for hop in value.split(b","):
                if hop.split()[1:2] == [_VIA_RECEIVED_BY]:
                    return True
    return False


def request_id(offered: str | None) -> str | None:
    """The client's own request id, if it is one that can stand in a log and a header."""
    return offered if offered and _REQUEST_ID.fullmatch(offered) else None


def client_address(
    peer: str, forwarded_for: Sequence[str], trusted: Sequence[IPv4Network | IPv6Network]
) -> str:
    """The address of the client: the right-most X-Forwarded-For entry that is no trusted proxy.

    Only a trusted peer is believed at all. `forwarded_for` holds the header's values in order.
    """
    address = peer
    entries = [
        _PORT.sub(r"\1", entry.strip()) for value in forwarded_for for entry in value.split(",")
    ]
    while entries and _is_trusted(address, trusted):
        address = entries.pop()
    return address


def _is_trusted(address: str, trusted: Sequence[IPv4Network | IPv6Network]) -> bool:
    try:
        ip = ip_address(address.strip("[]"))
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None) or ip
    return any(mapped in network for network in trusted)
