"""F2 upstreams: the configured upstreams, ready to be asked, and which of a route's is asked next."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from proxy import config
from proxy.circuit import Circuit, Verdict
from proxy.config.keys import KeySource
from proxy.connection import Origin, UpstreamConnection, connect
from proxy.errors import ProxyError
from proxy.framing import Header
from proxy.headers import UpstreamRules
from proxy.pool import Connect, Pool
from proxy.resolver import Resolver

log = logging.getLogger("sluice.upstreams")

_DEFAULT_PORTS = {"http": 80, "https": 443}
_LONGEST_REST = 86400.0  # seconds: until a daily quota is there again


@dataclass(frozen=True, slots=True)
class Terms:
    """How an upstream is asked: what a config says of it, as requests need it."""

    settings: config.Upstream
    key: KeySource | None
    prefix: bytes  # what stands in a request line before the target that the client asked for
    rules: UpstreamRules
    dropped: frozenset[bytes]  # of a client's headers

    @classmethod
    def of(cls, settings: config.Upstream, *, has_clients: bool) -> Terms:
        fixed = tuple(
            (key.encode("latin-1"), value.get_secret_value().encode("latin-1"))
            for key, value in settings.headers.items()
        )
        rules = UpstreamRules(
            urlsplit(settings.base_url).netloc.encode("ascii"),
            fixed,
            # Where there are clients, what they send are keys to this proxy, whatever the upstream wants.
            drops_credentials=settings.injects or has_clients,
        )
        prefix = _target_prefix(settings).encode("ascii")
        return cls(settings, settings.key_source(), prefix, rules, rules.dropped)

    def credential(self) -> Header | None:
        """The header that bears our key, as the key is now."""
        if self.key is None or self.settings.auth == "none":
            return None
        key = self.key.value().encode("ascii")
        match self.settings.auth:
            case "bearer":
                return (b"Authorization", b"Bearer " + key)
            case "x-api-key":
                return (b"x-api-key", key)
            case "api-key":
                return (b"api-key", key)


class Upstream:
    """One upstream: how it is asked, its connections, and how it has been doing.

    It lives as long as its name is configured: a reload changes its terms, and they hold for
    whatever is sent from then on, so that no key goes up that is no longer there.
    `last_error` says how it last failed, None after a success.
    """

    def __init__(
        self,
        name: str,
        settings: config.Upstream,
        connect: Connect | None,
        *,
        has_clients: bool = False,
    ) -> None:
        self.name = name
        self.terms = Terms.of(settings, has_clients=has_clients)
        self.pool = Pool(connect) if connect else _pool(name, settings)
        self.circuit = Circuit(settings.circuit)
        self.last_error: str | None = None
        self.gone = False
        self.in_progress = 0
        self.rests_until = 0.0

    def __repr__(self) -> str:
        return f"<Upstream {self.name} {self.pool!r}>"

    def become(self, other: Upstream) -> None:
        """Takes another's terms. Connections stay if they still lead where new ones would, and so does
        what is known of its health."""
        old, new = self.terms.settings, other.terms.settings
        self.terms, self.circuit.settings = other.terms, new.circuit
        moved = (old.base_url, old.egress) != (new.base_url, new.egress)
        if moved:
            self.circuit, self.last_error, self.rests_until = other.circuit, None, 0.0
        # A file of certificates may be another one under its old name.
        if moved or new.ca_file or old.ca_file or old.timeouts.connect != new.timeouts.connect:
            self.pool.close()
            self.pool = other.pool

    def leave(self) -> None:
        """Says that it is no longer configured: what runs may end, and nothing new is sent."""
        self.gone = True
        self.pool.close()

    async def connect(self, *, fresh: bool) -> tuple[UpstreamConnection, Pool]:
        """A connection, and the pool that it goes back to. Raises ProxyError."""
        while True:
            pool = self.pool
            try:
                connection = await pool.acquire(fresh=fresh)
            except ProxyError:
                if pool is self.pool:
                    raise
            else:
                if pool is self.pool and not self.gone:
                    return connection, pool
                connection.abort()
            if self.gone:  # a reload has removed it in the meantime, else moved it
                message = f"Upstream '{self.name}' is no longer configured."
                raise ProxyError("upstream_unreachable", message)

    @property
    def is_full(self) -> bool:
        most = self.terms.settings.max_streams
        return most is not None and self.in_progress >= most

    def trouble(self, now: float) -> str | None:
        """Why it is not asked, or else how it last failed; None if all is well."""
        if not self.circuit.is_closed:
            return f"its circuit is open ({self.last_error})"
        if self.rests_until > now:
            return f"rests for {math.ceil(self.rests_until - now)} s by its own word (429)"
        if self.is_full:
            return f"full ({self.in_progress} in progress)"
        return self.last_error

    def rest(self, seconds: float, now: float) -> None:
        """Says for how long it takes no requests, by its own word."""
        self.rests_until = max(self.rests_until, now + min(seconds, _LONGEST_REST))

    def begin(self, clock: Callable[[], float], *, counts: bool = True) -> Turn:
        """Says that a request is sent, and whether its end will be news of how the upstream does."""
        return Turn(self, clock, counts=counts)


class Turn:
    """One request at an upstream, from the choice to the end: one of its `max_streams`, and news of
    how it does. `clock` gives monotonic seconds."""

    def __init__(self, upstream: Upstream, clock: Callable[[], float], *, counts: bool) -> None:
        self._upstream = upstream
        self._circuit = upstream.circuit
        self._period = self._circuit.begin() if counts else 0
        self._clock = clock
        self._counts = counts
        self._ended = False
        upstream.in_progress += 1

    def end(self, verdict: Verdict = Verdict.NEITHER, why: str | None = None) -> None:
        """Says that it is over, and how the upstream did; `why` it failed. The first word counts."""
        if self._ended:
            return
        self._ended = True
        self._upstream.in_progress -= 1
        if not self._counts:
            return
        if verdict is not Verdict.NEITHER:
            self._upstream.last_error = why if verdict is Verdict.FAILURE else None
        was_closed = self._circuit.is_closed
        self._circuit.end(verdict, self._clock(), period=self._period)
        if was_closed and not self._circuit.is_closed:
            fields = {"upstream": self._upstream.name, "after": why}
            fields["rest"] = f"{self._circuit.settings.rest:g} s"
            log.warning("circuit_opened", extra={"fields": fields})
        elif self._circuit.is_closed and not was_closed:
            log.info("circuit_closed", extra={"fields": {"upstream": self._upstream.name}})


def choose(
    candidates: Sequence[Upstream], tried: Container[Upstream], now: float
) -> Upstream | None:
    """Which of a route's candidates is asked next: the first that is available and was not tried;
    None if there is none. `now` is in monotonic seconds.

    Not available are those that are gone, full, or rest by their own word while there are others, and
    those whose circuit is open. But the last one in rotation stays, whatever its circuit says.
    """
    alone, usable, rotates = len(candidates) == 1, [], False
    for each in candidates:
        if each.gone or each.is_full or (each.rests_until > now and not alone):
            continue
        usable.append(each)
        if each.circuit.allows(now):
            rotates = True
            if each not in tried:
                return each
    if rotates or not usable:
        return None
    last = max(usable, key=lambda each: each.circuit.opened or 0.0)
    return None if last in tried else last


def wait_for_any(candidates: Sequence[Upstream], now: float) -> float:
    """In how many seconds one of them may be available; nobody knows when a full one will be."""
    if len(candidates) == 1:
        return 1.0
    return min(max(each.rests_until - now, 1.0 if each.is_full else 0.0) for each in candidates)


def build(
    settings: config.Config, demo: Callable[[], Connect], old: Mapping[str, Upstream]
) -> dict[str, Upstream]:
    """All upstreams by name; those of `old` that are still there go on under their new terms.
    `demo` gives the connections to the embedded one."""
    has_clients = bool(settings.clients)
    new = {
        name: Upstream(name, each, demo() if each.demo else None, has_clients=has_clients)
        for name, each in settings.upstreams.items()
    }
    # Nothing can fail from here on: a reload holds as a whole or not at all.
    for name in new.keys() & old.keys():
        old[name].become(new[name])
        new[name] = old[name]
    for name in old.keys() - new.keys():
        old[name].leave()
    return new


def _target_prefix(settings: config.Upstream) -> str:
    url = urlsplit(settings.base_url)
    path = url.path.rstrip("/")
    if settings.egress and url.scheme == "http":  # a forward proxy wants the whole of it
        return f"http://{url.netloc}{path}"  # (absolute form, RFC 9112 3.2.2)
    return path


def _pool(name: str, settings: config.Upstream) -> Pool:
    host, port = _host_and_port(settings.base_url)
    # Behind a forward proxy names are that one's to look up.
    resolver = Resolver(*_host_and_port(settings.egress or settings.base_url))
    origin = Origin(
        host=host,
        port=port,
        tls=settings.tls(),
        label=name,
        resolver=resolver,
        egress=settings.egress and urlsplit(settings.egress).netloc,
    )
    return Pool(lambda: connect(origin, settings.timeouts.connect), resolver)


def _host_and_port(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname is not None  # config has seen to it
    return parts.hostname, parts.port or _DEFAULT_PORTS[parts.scheme]
