"""F2 routing: which route takes a request. A pure lookup."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import translate

from proxy.config import Route
from proxy.errors import ProxyError

_SHOWN = 100  # characters of an unknown model's name that an error repeats


class Router:
    """The routes in their order; the first whose patterns match the model takes the request."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = [
            (route, "*" in route.models, re.compile("|".join(map(translate, route.models))))
            for route in routes
        ]

    def resolve(self, model: str | None) -> Route:
        """The route for a model name as the client sent it (fnmatch, case-sensitive).

        Requests without a model are taken by routes with the pattern `*` only. Raises ProxyError
        (model_not_found) where no route matches.
        """
        for route, takes_all, pattern in self._routes:
            if takes_all or (model is not None and pattern.match(model)):
                return route
        if model is None:
            raise ProxyError(
                "model_not_found",
                "No model can be read from the request (`model` in a JSON body sent with "
                "Content-Type: application/json), and no route has the pattern '*', which takes "
                "such requests.",
                param="model",
            )
        raise ProxyError(
            "model_not_found",
            f"No route takes the model '{model[:_SHOWN]}'. Check its spelling, or add it to a "
            "route's `models`.",
            param="model",
        )
