"""Method and path to handler."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fdserve.errors import MethodNotAllowed, NotFound
from fdserve.http.error_forms import OPENAI, ErrorForm
from fdserve.http.request import Request
from fdserve.http.response import Reply

Handler = Callable[[Request, Reply], Awaitable[None]]

MAX_KNOWN = 200
"""Characters of a path that are looked at where it is unknown: no known one has so many before its parameters."""

_PARAMETER = re.compile(r"\{(\w+)(:path)?\}")


def _admit_all() -> None:
    pass


def _no_hint(path: str) -> str | None:
    return None


@dataclass(frozen=True)
class Route:
    """A handler, how requests reach it, and what goes in and out, for the description of the API.

    In a `path`, `{name}` stands for one segment and `{name:path}` for all that follows; `Request.path_parameters` has
    what they matched. A `public` route needs no key; a `counted` one takes part in the limit on concurrent requests.
    `admit` raises the ServerError with which all requests are refused now, before their bodies are read.
    `body`, `answer` and `events` are the types of the JSON body that is read, of the answer with status 200 and of the
    events of a stream: structs, unions of structs, or None where there is no JSON. A body is refused where its media
    type says that it is something else. `checked` says that a request without a body may be refused, too, for its
    query. `errors` is the form of the answer to a request that fails.
    """

    method: str
    path: str
    handler: Handler
    public: bool = False
    counted: bool = False
    admit: Callable[[], None] = _admit_all
    body: Any = None
    answer: Any = None
    events: Any = None
    checked: bool = False
    errors: ErrorForm = OPENAI

    @property
    def name(self) -> str:
        """The path as the outside writes it, with `{name}` for every parameter."""
        return self.path.replace(":path}", "}")


class Router:
    """A fixed set of routes. GET routes answer HEAD too, and every path answers OPTIONS with its methods.

    `hint` may say more about a path that is unknown, and `unserved` about one that has not the method.
    """

    def __init__(
        self,
        routes: Iterable[Route],
        hint: Callable[[str], str | None] = _no_hint,
        unserved: Callable[[str], str | None] = _no_hint,
    ) -> None:
        self._paths: dict[str, dict[str, Route]] = {}
        self._hint, self._unserved = hint, unserved
        for route in routes:
            methods = self._paths.setdefault(route.path, {})
            methods[route.method] = route
            if route.method == "GET":
                methods["HEAD"] = route
        for path, methods in self._paths.items():
            allow = ", ".join([*methods, "OPTIONS"])
            methods["OPTIONS"] = Route("OPTIONS", path, _options(allow), public=True)
        everywhere = sorted({method for methods in self._paths.values() for method in methods})
        self._paths["*"] = {"OPTIONS": Route("OPTIONS", "*", _options(", ".join(everywhere)), public=True)}
        self._patterns = [(_pattern(path), methods) for path, methods in self._paths.items() if "{" in path]

    def match(self, method: str, path: str) -> tuple[Route, dict[str, str]]:
        """The route and the path's parameters.

        Raises NotFound for an unknown path, MethodNotAllowed for a method that the path does not have.
        """
        methods, parameters = self._find(path)
        if methods is None:
            hint = self._hint(path)
            raise NotFound(f"Unknown path {path[:200]!r}.{f' {hint}' if hint else ''}", code="unknown_url")
        route = methods.get(method)
        if route is None:
            allow = ", ".join(methods)
            hint = self._unserved(path)
            message = f"{path[:200]} takes {allow}, not {method[:200]}.{f' {hint}' if hint else ''}"
            raise MethodNotAllowed(message, allow=allow)
        return route, parameters

    def error_form(self, path: str) -> ErrorForm:
        """The form of errors on the path, which is that of the nearest known one above it where it is unknown."""
        path = path[:MAX_KNOWN]
        while path:
            methods, _ = self._find(path)
            if methods is not None:
                return next(iter(methods.values())).errors
            path = path.rpartition("/")[0]
        return OPENAI

    def _find(self, path: str) -> tuple[dict[str, Route] | None, dict[str, str]]:
        if "{" not in path and path in self._paths:
            return self._paths[path], {}
        for pattern, methods in self._patterns:
            if match := pattern.fullmatch(path):
                return methods, match.groupdict()
        return None, {}


def _pattern(path: str) -> re.Pattern[str]:
    """What a path with parameters matches; everything but them is literal."""
    literals = [re.escape(literal) for literal in _PARAMETER.split(path)[::3]]
    groups = [rf"(?P<{match[1]}>.+)" if match[2] else rf"(?P<{match[1]}>[^/]+)" for match in _PARAMETER.finditer(path)]
    return re.compile("".join(part for pair in zip(literals, [*groups, ""], strict=True) for part in pair), re.DOTALL)


def _options(allow: str) -> Handler:
    async def options(request: Request, reply: Reply) -> None:
        await reply.empty(204, [(b"allow", allow.encode("ascii"))])

    return options
