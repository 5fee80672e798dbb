"""Access: what a key must allow for each route, declared at the route. A route that declares nothing is refused."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from fastapi import FastAPI
from starlette.routing import BaseRoute, Match
from starlette.types import Scope as ASGIScope

Endpoint = TypeVar("Endpoint", bound=Callable[..., object])


class Scope(Enum):
    """Who may ask: everybody, who has any valid key, or who has one of this scope."""

    OPEN = "open"
    ANY = "any"
    INFER = "infer"
    ADMIN = "admin"


@dataclass(frozen=True)
class Access:
    """The scope of a route, and whether its requests count against the rate and the concurrency of their key."""

    scope: Scope
    is_counted: bool = False


UNKNOWN = Access(Scope.ANY)  # of addresses that are not served: what there is, only keys may find out
_DECLARED = "qhub_access"


def access(scope: Scope, *, counted: bool = False) -> Callable[[Endpoint], Endpoint]:
    """Declare who may ask what the decorated function answers; below the decorator of its route."""

    def mark(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, _DECLARED, Access(scope, counted))
        return endpoint

    return mark


def declare(route: BaseRoute, found: Access) -> None:
    """Declare it of a route without an endpoint of its own, such as a mounted folder."""
    setattr(route, _DECLARED, found)


def declared(route: BaseRoute) -> Access:
    """What was declared at a route. Raises LookupError if nothing was: it must not be served."""
    found = getattr(route, _DECLARED, None) or getattr(getattr(route, "endpoint", None), _DECLARED, None)
    if not isinstance(found, Access):
        raise LookupError(f"route {getattr(route, 'path', route)} declares no access: decorate it with @access(...)")
    return found


class Routes:
    """The routes of an application once all are there, each with what it declares. Raises LookupError as `declared`."""

    def __init__(self, app: FastAPI) -> None:
        self._routes = [(route, declared(route)) for route in app.routes]

    def access(self, scope: ASGIScope) -> Access:
        """What is declared at the route that a request goes to; where the method is unknown, at its path's first."""
        others = None
        for route, found in self._routes:
            match = route.matches(scope)[0]
            if match is Match.FULL:
                return found
            if match is Match.PARTIAL:
                others = others or found
        return others or UNKNOWN
