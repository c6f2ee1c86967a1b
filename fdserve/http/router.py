"""Method and path to handler."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from fdserve.errors import MethodNotAllowed, NotFound
from fdserve.http.request import Request
from fdserve.http.response import Reply

Handler = Callable[[Request, Reply], Awaitable[None]]


@dataclass(frozen=True)
class Route:
    """A handler and how requests reach it.

    A `path` that ends in a slash stands for everything below it. A `public` route needs no key; a `counted` one
    takes part in the limit on concurrent requests.
    """

    method: str
    path: str
    handler: Handler
    public: bool = False
    counted: bool = False


class Router:
    """A fixed set of routes. GET routes answer HEAD too, and every path answers OPTIONS with its methods."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._paths: dict[str, dict[str, Route]] = {}
        for route in routes:
            methods = self._paths.setdefault(route.path, {})
            methods[route.method] = route
            if route.method == "GET":
                methods["HEAD"] = route
        for path, methods in self._paths.items():
            allow = ", ".join([*methods, "OPTIONS"])
            methods["OPTIONS"] = Route("OPTIONS", path, _options(allow), public=True)

    def match(self, method: str, path: str) -> Route:
        """The route; NotFound for an unknown path, MethodNotAllowed for a method that the path does not have."""
        methods = self._paths.get(path) or self._below(path)
        if methods is None:
            raise NotFound(f"Unknown path {path!r}.", code="unknown_url")
        route = methods.get(method)
        if route is None:
            allow = ", ".join(methods)
            raise MethodNotAllowed(f"{path} takes {allow}, not {method}.", allow=allow)
        return route

    def _below(self, path: str) -> dict[str, Route] | None:
        for prefix, methods in self._paths.items():
            if prefix.endswith("/") and path.startswith(prefix) and len(path) > len(prefix):
                return methods
        return None


def _options(allow: str) -> Handler:
    async def options(request: Request, reply: Reply) -> None:
        await reply.empty(204, [(b"allow", allow.encode("ascii"))])

    return options
