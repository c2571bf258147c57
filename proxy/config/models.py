"""F1 config.models: the schema: what may stand in the file, with its defaults and meanings."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from proxy.config.addresses import BaseUrl, CaPath, Egress, Host, Networks, Origins
from proxy.config.keys import KeyFile, KeyPath, KeySource
from proxy.config.values import (
    FROZEN,
    Count,
    Duration,
    HeaderName,
    Headers,
    Key,
    Name,
    OneOf,
    Patterns,
    Pause,
    Port,
    Rates,
    Sha256,
    Size,
    Store,
    Switch,
    Text,
)
from proxy.headers import CREDENTIALS

_SECRET = re.compile("key|token|secret|auth|cookie|password", re.IGNORECASE)


class Part(BaseModel):
    """A mapping with fixed keys in the file."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True
    )


class Listen(Part):
    """Where clients are served."""

    host: Host = "127.0.0.1"
    """Address or host name to listen on."""
    port: Port = 8080
    """0: any free one."""


class Admin(Part):
    """Metrics and the admin API."""

    host: Host = "127.0.0.1"
    """Address of the admin port."""
    port: Port | None = None
    """Serves /metrics and /admin there instead of on the main port."""
    key: Key | None = None
    """Bearer key of /admin; without one there is no /admin."""


class ClientTimeouts(Part):
    """How long clients may take."""

    head: Duration = 10.0
    """For a whole request head."""
    body: Duration = 30.0
    """Between two reads of a request body."""
    keep_alive: Duration = 75.0
    """Idle between two requests."""
    write: Duration = 120.0
    """A reader that takes nothing."""


class Cors(Part):
    """Which web pages of other origins may call."""

    origins: Origins = ()
    """["*"], or exact origins like https://chat.example.com."""


class Timeouts(Part):
    """How long an upstream may take."""

    connect: Duration = 5.0
    """For the name, TCP, a forward proxy's tunnel and TLS."""
    first_byte: Duration = 600.0
    """From the request to the first byte of the answer."""
    idle: Duration = 60.0
    """No byte at all, while the client is reading."""
    stall: Duration = 300.0
    """Only comments, pings and empty deltas, while the client is reading."""
    total: Duration | None = None
    """The whole answer; null: no limit."""


class Circuit(Part):
    """When an upstream is taken out, and for how long."""

    failures: Count = 5
    """This many in a row take it out."""
    rest: Duration = 30.0
    """After this one probe may bring it back."""


class Upstream(Part):
    """A server of chat completions."""

    base_url: BaseUrl
    """http(s)://host[:port][/path], or demo:// for the embedded demo."""
    api_key: Key | None = None
    """Sent with every request, instead of the client's."""
    api_key_file: KeyPath | None = None
    """A file with the key, re-read when it changes."""
    auth: Annotated[Literal["bearer", "x-api-key", "api-key", "none"], *OneOf] = "bearer"
    """How the key is sent."""
    headers: Headers = Field(default={}, validate_default=True)
    """Set on every request, replacing the client's."""
    ca_file: CaPath | None = None
    """Certificates (PEM) to trust instead of the system's."""
    egress: Egress | None = None
    """http://host:port of a forward proxy: CONNECT for https, the absolute form for http."""
    max_streams: Count | None = None
    """Requests in progress; a full upstream is not available."""
    timeouts: Timeouts = Timeouts()
    circuit: Circuit = Circuit()

    @property
    def demo(self) -> bool:
        return self.base_url == "demo://"

    @property
    def injects(self) -> bool:
        """Whether a credential of ours goes up with the requests of others."""
        names = {name.lower().encode() for name in self.headers}
        return bool(self.api_key or self.api_key_file or names & CREDENTIALS)

    @property
    def spends(self) -> bool:
        """Whether whoever reaches it may spend something: also what looks like a key in `headers`."""
        return self.injects or any(_SECRET.search(name) for name in self.headers)

    def tls(self) -> ssl.SSLContext | None:
        """A verifying client's context for https; None for other schemes."""
        if not self.base_url.startswith("https://"):
            return None
        context = ssl.create_default_context(cafile=self.ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2  # whatever the system's default (RFC 8996)
        context.set_alpn_protocols(["http/1.1"])
        return context

    def key_source(self) -> KeySource | None:
        """A new source of the key; None where the upstream has none."""
        if self.api_key_file:
            return KeyFile(self.api_key_file)
        return KeySource(self.api_key.get_secret_value()) if self.api_key else None


class Route(Part):
    """Which upstreams serve which models; the first route that matches is taken."""

    models: Patterns
    """Patterns (fnmatch) of the model's name as the client sent it; "*" takes requests without."""
    name: Text = Field(default_factory=lambda route: str(route["models"][0]))
    """Label in metrics and logs; default: the first pattern."""
    upstreams: Annotated[tuple[Name, ...], Field(min_length=1)]
    """Candidates, in this order."""
    model: Text | None = None
    """Another name of the model on the way up."""
    attempts: Count = 2
    """How many candidates are tried."""
    on_disconnect: Annotated[Literal["cancel", "finish"], *OneOf] = "cancel"
    """What happens to the upstream's answer when the client leaves."""
    finish_cap: Duration = 300.0
    """How long `finish` reads on."""
    commit_after: Duration = 30.0
    """Streams: how long to wait for a real status."""
    heartbeat: Pause = 15.0
    """A comment after so long without a byte; 0: none."""


class Limits(Part):
    """What each client may use; a client's own go over the global ones key by key, null lifts one."""

    requests: Rates | None = None
    """Requests, like 60/minute; a list: all must hold."""
    tokens: Rates | None = None
    """Prompt and completion, like 100000/minute; a list: all must hold."""
    streams: Count | None = None
    """Relayed requests in progress."""

    @property
    def any(self) -> bool:
        """Whether anything is limited."""
        return bool(self.requests or self.tokens or self.streams)


class Client(Part):
    """Somebody who may call."""

    name: Name
    """Label in metrics and logs."""
    key: Key | None = None
    """The client's key, or:"""
    key_sha256: Sha256 | None = None
    """its SHA-256, as `sluice key NAME` prints it."""
    models: Patterns = ("*",)
    """Patterns (fnmatch) of the models it may use."""
    user_header: HeaderName | None = None
    """The limits count for each value of this header apart."""
    limits: Limits = Limits()

    def digest(self) -> str:
        """The SHA-256 of its key, in hexadecimal digits."""
        if self.key is not None:
            return sha256(self.key.get_secret_value().encode()).hexdigest()
        return self.key_sha256 or ""


class Resume(Part):
    """Resumable streams."""

    keep: Duration = 300.0
    """How long an ended stream can be read."""
    grace: Duration = 30.0
    """How long a generation goes on without a reader."""
    max_bytes: Size = 4 * 2**20
    """The largest log of one stream."""
    max_total: Size = 256 * 2**20
    """The largest size of all logs together."""


class Log(Part):
    """What is logged, and how."""

    format: Annotated[Literal["auto", "text", "json"], *OneOf] = "auto"
    """auto: text on a terminal, else JSON lines."""
    level: Annotated[Literal["debug", "info", "warning", "error"], *OneOf] = "info"
    """The least severe that is logged."""


def _named(upstreams: object) -> object:
    if not isinstance(upstreams, Mapping) or not upstreams:
        raise ValueError(
            "must be a mapping of names to upstreams, at least one, or the word built-in"
        )
    return upstreams


def _everything_to_the_first(config: dict[str, Any]) -> tuple[Route, ...]:
    return (Route(name="default", models=("*",), upstreams=(next(iter(config["upstreams"])),)),)


class Config(Part):
    """The configuration of Sluice."""

    listen: Listen = Listen()
    admin: Admin = Admin()
    open: Switch = False
    """Everybody who reaches the proxy may use its keys."""
    drain_notice: Pause = 0.0
    """How long /readyz says 503 before new connections are refused."""
    drain_timeout: Duration = 300.0
    """How long open streams may go on after that."""
    max_body: Size = 32 * 2**20
    """The largest request body."""
    client_timeouts: ClientTimeouts = ClientTimeouts()
    trusted_proxies: Networks = ()
    """Networks whose X-Forwarded-For is believed."""
    cors: Cors = Cors()
    default_model: Text | None = None
    """The model of live_stream without `model`."""
    upstreams: Annotated[
        Mapping[Name, Upstream],
        BeforeValidator(_named, json_schema_input_type=dict[str, Upstream] | Literal["built-in"]),
        *FROZEN,
    ]
    """The servers by name. `built-in`: OpenAI if OPENAI_API_KEY is set, else the embedded demo."""
    routes: Annotated[tuple[Route, ...], Field(min_length=1)] = Field(
        default_factory=_everything_to_the_first
    )
    """First match wins; default: everything goes to the first upstream."""
    clients: tuple[Client, ...] = ()
    """Who may call; default: everybody."""
    limits: Limits = Limits()
    store: Store = Field("memory", repr=False)
    """memory, or redis://, rediss://, unix:// (not in repr: it may hold a password)."""
    store_failure: Annotated[Literal["allow", "deny"], *OneOf] = "allow"
    """While the store is out of reach."""
    store_timeout: Duration = 0.5
    """How long the store may take."""
    resume: Resume | None = Resume()
    """Resumable streams; null: off."""
    log: Log = Log()
