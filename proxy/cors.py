"""F2 cors: which pages may call this proxy from a browser (https://fetch.spec.whatwg.org/#http-cors-protocol)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from proxy.errors import ProxyError

_PREFLIGHT_AGE = "600"  # seconds: Chromium keeps a preflight for two hours at most anyway


class Cors:
    """The allowed origins: exact ones, or `*` for every one."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._all = "*" in origins
        self._origins = frozenset(origins)

    def _allows(self, origin: str | None) -> bool:
        return origin is not None and (self._all or origin in self._origins)

    def judge(self, headers: Mapping[str, str]) -> None:
        """Raises ProxyError (origin_not_allowed) for a request from another site's page.

        Without an Origin header only `Sec-Fetch-Site` tells (https://w3c.github.io/webappsec-fetch-metadata/).
        """
        if headers.get("Sec-Fetch-Site") == "cross-site" and not self._allows(
            headers.get("Origin")
        ):
            raise _not_allowed()

    def preflight(self, headers: Mapping[str, str]) -> dict[str, str]:
        """The headers of the answer to a preflight. Raises ProxyError (origin_not_allowed).

        The requested headers are echoed: SDKs send about ten of their own, and `*` would not cover
        Authorization.
        """
        if not self._allows(headers.get("Origin")):
            raise _not_allowed()
        answer = {
            "Access-Control-Allow-Methods": headers["Access-Control-Request-Method"],
            "Access-Control-Max-Age": _PREFLIGHT_AGE,
        }
        if requested := headers.get("Access-Control-Request-Headers"):
            answer["Access-Control-Allow-Headers"] = requested
        return answer

    def headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """What every answer to a request with these headers bears, errors included."""
        if not self._origins:
            return {}
        origin = headers.get("Origin")
        if origin is None or not self._allows(origin):
            return {"Vary": "Origin"}
        return {
            "Access-Control-Allow-Origin": "*" if self._all else origin,
            "Access-Control-Expose-Headers": "*",
            "Vary": "Origin",
        }


def is_preflight(method: str, headers: Mapping[str, str]) -> bool:
    return (
        method == "OPTIONS" and "Origin" in headers and "Access-Control-Request-Method" in headers
    )


def _not_allowed() -> ProxyError:
    return ProxyError(
        "origin_not_allowed",
        "Pages of this origin may not call this proxy; its operator can add the origin to "
        "`cors.origins`.",
    )
