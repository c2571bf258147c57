"""F1 config.checks: what is right in itself and lies in combination, and what is not available yet."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from proxy.config.document import Document, Where
from proxy.config.models import Config, Limits, Part, Route, Upstream


def check(config: Config, document: Document) -> None:
    """Complains of everything that a sound config may not say either."""
    for name, upstream in config.upstreams.items():
        _key(upstream, ("upstreams", name), document)
        if upstream.ca_file and not upstream.base_url.startswith("https://"):
            message = "would not be used: base_url does not begin with https://"
            document.complain(("upstreams", name, "ca_file"), message)
        if upstream.egress and upstream.demo:
            message = "would not be used: demo:// is inside of this process"
            document.complain(("upstreams", name, "egress"), message)
    _labels("routes", [route.name for route in config.routes], "none", document)
    _labels("clients", [client.name for client in config.clients], "anonymous", document)
    _client_keys(config, document)
    _windows(config, document)
    if config.store != "memory" and find_spec("redis") is None:
        document.complain(("store",), "needs a library: pip install 'sluice-proxy[redis]'")
    for index, route in enumerate(config.routes):
        _candidates(route, ("routes", index, "upstreams"), config, document)
    _admin_port(config, document)
    _open_proxy(config, document)
    _not_yet(config, document)


def _key(upstream: Upstream, at: Where, document: Document) -> None:
    if upstream.api_key and upstream.api_key_file:
        document.complain((*at, "api_key_file"), "must not stand beside api_key: choose one")
    elif upstream.api_key or upstream.api_key_file:
        key = "api_key" if upstream.api_key else "api_key_file"
        if upstream.demo or upstream.auth == "none":
            because = "demo:// takes no key" if upstream.demo else "auth is none"
            document.complain((*at, key), f"would not be sent: {because}")
        taken = "authorization" if upstream.auth == "bearer" else upstream.auth
        for header in upstream.headers:
            if header.lower() == taken:
                document.complain((*at, "headers", header), f"is where {key} goes: choose one")


def _candidates(route: Route, at: Where, config: Config, document: Document) -> None:
    for index, name in enumerate(route.upstreams):
        if name not in config.upstreams:
            known = ", ".join(config.upstreams)
            document.complain((*at, index), f"is an unknown upstream: known are {known}")
        elif name in route.upstreams[:index]:
            document.complain((*at, index), "is a candidate of this route already")


def _labels(section: str, names: list[str], reserved: str, document: Document) -> None:
    """Metrics and logs tell routes and clients apart by their names."""
    for index, name in enumerate(names):
        at = (section, index)
        if name == reserved:
            message = f"must not be {name}: so metrics call the lack of one"
            document.complain((*at, "name"), message, at)
        elif name in names[:index]:
            message = f"must be unique: {section}[{names.index(name)}] has the same name"
            document.complain((*at, "name"), message, at)


def _client_keys(config: Config, document: Document) -> None:
    """Each client has one key, and no two the same: nobody could say whose request it is."""
    known: dict[str, int] = {}
    for index, client in enumerate(config.clients):
        at: Where = ("clients", index)
        if client.key and client.key_sha256:
            document.complain((*at, "key_sha256"), "must not stand beside key: choose one")
        elif not (client.key or client.key_sha256):
            document.complain(at, "needs a key or a key_sha256: `sluice key NAME` makes one")
        elif (first := known.setdefault(client.digest(), index)) != index:
            document.complain(at, f"has the same key as clients[{first}]", ("clients", first))


def _windows(config: Config, document: Document) -> None:
    """Of two rates over one time only the smaller would ever matter."""
    places: dict[Where, Limits] = {("limits",): config.limits}
    for index, client in enumerate(config.clients):
        places["clients", index, "limits"] = client.limits
    for at, limits in places.items():
        for kind in ("requests", "tokens"):
            lengths = [rate.per for rate in getattr(limits, kind) or ()]
            if len(lengths) > len(set(lengths)):
                document.complain((*at, kind), "must not have two rates over the same time")


def _admin_port(config: Config, document: Document) -> None:
    hosts = {config.listen.host.lower(), config.admin.host.lower()}
    same_host = len(hosts) == 1 or hosts & {"0.0.0.0", "::"}
    if config.admin.port and config.admin.port == config.listen.port and same_host:
        document.complain(("admin", "port"), "must not be the port of listen", ("listen",))


def _open_proxy(config: Config, document: Document) -> None:
    injecting = [name for name, upstream in config.upstreams.items() if upstream.spends]
    if injecting and not (config.open or config.clients or _is_loopback(config.listen.host)):
        message = (
            "is not loopback, and without clients everybody who reaches it could spend the key of "
            f"{injecting[0]}: listen on 127.0.0.1, add clients (SLUICE_KEY for the built-in), "
            "or allow it with open: true"
        )
        document.complain(("listen", "host"), message, ("open",), ("clients",))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


# Not available yet ---------------------------------------------------------------------------

# The keys, and what may be said all the same because it means "off".
NOT_YET: Mapping[type[Part], Mapping[str, object]] = {
    Config: {
        "default_model": None,
        "resume": None,
    },
}


def _not_yet(config: Config, document: Document) -> None:
    for where, part in parts(config):
        for key, off in NOT_YET.get(type(part), {}).items():
            if key in part.model_fields_set and getattr(part, key) != off:
                document.complain((*where, key), "is not available yet: leave it out")


def parts(value: object, where: Where = ()) -> Iterator[tuple[Where, Part]]:
    """A part and all that are in it, each with the way to it."""
    inside: Mapping[Any, object] = {}
    if isinstance(value, Part):
        yield where, value
        inside = {key: getattr(value, key) for key in type(value).model_fields}
    elif isinstance(value, Mapping):
        inside = value
    elif isinstance(value, tuple):
        inside = dict(enumerate(value))
    for step, each in inside.items():
        yield from parts(each, (*where, step))
