"""F2 auth: who asks, and what it may use.

A client is known by the SHA-256 of its key, looked up in a table: how long that takes says something
about the digest of what was offered, and nothing about any key. Where no clients are configured
everybody may call, and is told apart by address.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from hashlib import sha256
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import unquote

from multidict import MultiMapping

from proxy import config
from proxy.errors import ProxyError
from proxy.exchange import Ask
from proxy.headers import client_address
from proxy.members import doubled

ANONYMOUS = "anonymous"
# Azure's API, and OpenAI's first one, name the model there, and do not heed the body's.
_IN_PATH = re.compile("/(?:deployments|engines)/+([^/]+)", re.IGNORECASE)
_SHOWN = 100  # characters of a model's name that an error repeats
_NETWORK = (
    64  # bits of an IPv6 address: a household has so many addresses that each is worth nothing
)


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks. `scope` is what its limits are counted under, made of its name, or address, and user;
    empty if it has none."""

    name: str
    scope: str
    limits: config.Limits
    models: re.Pattern[str] | None = None  # None: all

    def check_model(self, ask: Ask) -> None:
        """Raises ProxyError (model_not_allowed), also where the model can't be read, or is named
        twice: nobody knows which of them the upstream would take."""
        if self.models is None or ask.body is None:  # without a body nothing is generated
            return
        twice = isinstance(ask.body, bytes) and doubled(ask.body, "model")
        if ask.model is None or twice:
            raise _not_allowed(
                "The request does not say, once and in JSON (Content-Type: application/json), which "
                f"model it is for, and the client '{self.name}' may not use all."
            )
        path = unquote(ask.target.partition(b"?")[0].decode("ascii", "replace"))
        for model in (ask.model, *_IN_PATH.findall(path)):
            if not self.models.match(model):
                shown = model[:_SHOWN]
                raise _not_allowed(f"The client '{self.name}' may not use the model '{shown}'.")


class Auth:
    """The configured clients by their keys' digests."""

    def __init__(
        self,
        clients: Sequence[config.Client],
        limits: config.Limits,
        trusted: Sequence[IPv4Network | IPv6Network],
    ) -> None:
        self._trusted = trusted
        self._limits = limits
        self._by_name = {each.name: _over(limits, each.limits) for each in clients}
        self._anonymous = Client(ANONYMOUS, "", limits)
        self._clients = {
            each.digest(): (
                Client(
                    each.name,
                    _scope(each.name),
                    self._by_name[each.name],
                    _allowed(each.models),
                ),
                each.user_header,
            )
            for each in clients
        }

    def limits_of(self, name: str) -> config.Limits | None:
        """The limits of the client of that name; None if there is none."""
        if not self._clients:
            return self._limits
        return self._by_name.get(name)

    def identify(self, headers: MultiMapping[str], peer: str) -> Client:
        """The client of a request with these headers, from the address `peer`.

        Raises ProxyError (invalid_api_key).
        """
        if not self._clients:
            if not self._limits.any:
                return self._anonymous
            forwarded_for = headers.getall("X-Forwarded-For", ())
            address = client_address(peer, forwarded_for, self._trusted)
            return Client(ANONYMOUS, _scope(_neighbourhood(address)), self._limits)
        offered = next(_credentials(headers), None)
        if offered is None:
            raise _refused("No API key was given")
        found = self._clients.get(sha256(offered.encode("utf-8", "surrogateescape")).hexdigest())
        if found is None:
            raise _refused("The API key is wrong")
        client, user_header = found
        user = headers.get(user_header) if user_header else None
        if user is None:
            return client
        return Client(client.name, _scope(client.name, user), client.limits, client.models)


def _credentials(headers: Mapping[str, str]) -> Iterator[str]:
    """What the request offers, in the order in which it counts; never from the query, which gets
    into logs and histories."""
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        yield token.strip()
    for name in ("x-api-key", "api-key"):
        if key := headers.get(name):
            yield key


def _refused(what: str) -> ProxyError:
    return ProxyError(
        "invalid_api_key",
        f"{what}. Send this proxy's key, which its operator has, as `Authorization: Bearer KEY`, "
        "`x-api-key` or `api-key`.",
        extra_headers={"WWW-Authenticate": "Bearer"},
    )


def _not_allowed(message: str) -> ProxyError:
    return ProxyError("model_not_allowed", message, param="model")


def _scope(*names: str) -> str:
    """A name for the store: it tells nobody who it is, and holds no more than so many characters."""
    return sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _over(common: config.Limits, own: config.Limits) -> config.Limits:
    """A client's own limits over the common ones, key by key; null lifts one."""
    return common.model_copy(update={key: getattr(own, key) for key in own.model_fields_set})


def _allowed(patterns: Sequence[str]) -> re.Pattern[str] | None:
    return None if "*" in patterns else re.compile("|".join(map(translate, patterns)))


def _neighbourhood(address: str) -> str:
    """An IPv4 address, or the network of an IPv6 one."""
    try:
        ip = ip_address(address.strip("[]").partition("%")[0])
    except ValueError:  # a unix socket has none
        return address
    if isinstance(ip, IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        return str(IPv6Network((ip, _NETWORK), strict=False))
    return str(ip)
