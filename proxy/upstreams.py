"""F2 upstreams: the configured upstreams, ready to be asked."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from proxy import config
from proxy.connection import Origin, connect
from proxy.framing import Header
from proxy.headers import UpstreamRules
from proxy.pool import Connect, Pool
from proxy.resolver import Resolver

_DEFAULT_PORTS = {"http": 80, "https": 443}


class Upstream:
    """One upstream: where it is, what its requests bear, and its connections.

    `last_error` is the code of the last failed attempt, None after a success: reported by /readyz.
    """

    def __init__(
        self,
        name: str,
        settings: config.Upstream,
        connect: Connect | None,
        *,
        has_clients: bool = False,
    ) -> None:
        url = urlsplit(settings.base_url)
        fixed = tuple(
            (key.encode("latin-1"), value.get_secret_value().encode("latin-1"))
            for key, value in settings.headers.items()
        )
        self.name = name
        self.timeouts = settings.timeouts
        self.prefix = _target_prefix(settings).encode("ascii")
        self._key = settings.key_source()
        self._auth = settings.auth
        self.injects = settings.injects  # a key of ours goes up, and so no client's does
        # Where there are clients, what they send are keys to this proxy, whatever the upstream wants.
        self.rules = UpstreamRules(
            url.netloc.encode("ascii"), fixed, drops_credentials=self.injects or has_clients
        )
        self.dropped = self.rules.dropped
        self.pool = Pool(connect) if connect else _pool(name, settings)
        self.last_error: str | None = None

    def __repr__(self) -> str:
        return f"<Upstream {self.name} {self.pool!r}>"

    def credential(self) -> Header | None:
        """The header that bears our key, as the key is now."""
        if self._key is None or self._auth == "none":
            return None
        key = self._key.value().encode("ascii")
        match self._auth:
            case "bearer":
                return (b"Authorization", b"Bearer " + key)
            case "x-api-key":
                return (b"x-api-key", key)
            case "api-key":
                return (b"api-key", key)


def build(settings: config.Config, demo: Callable[[], Connect]) -> dict[str, Upstream]:
    """All upstreams by name; `demo` gives the connections to the embedded one."""
    has_clients = bool(settings.clients)
    return {
        name: Upstream(name, each, demo() if each.demo else None, has_clients=has_clients)
        for name, each in settings.upstreams.items()
    }


def _target_prefix(settings: config.Upstream) -> str:
    """What stands in a request line before the target that the client asked for."""
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
