"""F2 routing: which route takes a request, and under which name its model goes up. Pure lookups."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import translate

from proxy.config import Route
from proxy.errors import ProxyError
from proxy.exchange import Ask
from proxy.members import doubled, with_model

_SHOWN = 100  # characters of an unknown model's name that an error repeats


class Router:
    """The routes in their order; the first whose patterns match the model takes the request."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = [
            (route, "*" in route.models, re.compile("|".join(map(translate, route.models))))
            for route in routes
        ]

    def resolve(self, ask: Ask) -> Route:
        """The route for a model's name as the client sent it (fnmatch, case-sensitive).

        Requests without a model are taken by routes with the pattern `*` only; so are those that name
        one twice, since nobody knows which of the two an upstream would read. Raises ProxyError
        (model_not_found) where no route matches.
        """
        model = ask.model
        for route, takes_all, pattern in self._routes:
            if takes_all:
                return route
            if model is not None and pattern.match(model):
                if not _named_twice(ask):
                    return route
                model = None
        if model is None:
            raise ProxyError(
                "model_not_found",
                "No model can be read from the request (`model`, once, in a JSON body sent with "
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


def aliased(ask: Ask, route: Route) -> Ask:
    """The request with the model's name that the route has for its upstreams; unchanged where it has
    none, or where the request's own can't be read, or is there twice: such come here by `*` only.

    Raises ProxyError (invalid_request) where the name chose the route and can't be replaced.
    """
    if route.model is None or ask.model is None or _named_twice(ask):
        return ask
    assert isinstance(ask.body, bytes)  # a model was read from it
    body = with_model(ask.body, route.model)
    if body is ask.body and "*" not in route.models:
        raise ProxyError(
            "invalid_request",
            "The body is too intricate: the place of `model` in it could not be found.",
            param="model",
        )
    return replace(ask, body=body)


def _named_twice(ask: Ask) -> bool:
    return isinstance(ask.body, bytes) and doubled(ask.body, "model")
