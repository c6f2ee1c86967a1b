"""GET /openapi.json: the API as OpenAPI 3.1, made from the routes and the structs that they name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from types import UnionType
from typing import Any, get_args

import msgspec

import fdserve
from fdserve import errors
from fdserve.errors import ServerError
from fdserve.http.request import Request
from fdserve.http.response import Reply
from fdserve.http.router import Route
from fdserve.protocol.errors import ErrorBody

PATH = "/openapi.json"

_BODY_ERRORS = (
    errors.InvalidRequest,
    errors.NotFound,
    errors.RequestTimeout,
    errors.PayloadTooLarge,
    errors.UnsupportedMediaType,
)
_COUNTED_ERRORS = (errors.RequestCancelled, errors.Overloaded)
_ANY_ERRORS = (errors.InternalError, errors.Unavailable)
_RETRIED = (errors.Overloaded, errors.Unavailable)

_REFERENCE = "#/components/schemas/"
_REQUEST_ID = {"x-request-id": {"$ref": "#/components/headers/RequestId"}}


class Description:
    """The description of a table of routes and of itself; `keys` says whether the server wants API keys."""

    def __init__(self, routes: Sequence[Route], *, keys: bool) -> None:
        self._routes = [*routes, self.route()]
        self._keys = keys

    def route(self) -> Route:
        """The route that serves it."""
        return Route("GET", PATH, self._send, public=True, answer=dict[str, Any])

    async def _send(self, request: Request, reply: Reply) -> None:
        """This description."""
        await reply.text(self.encoded, "application/json")

    @cached_property
    def encoded(self) -> bytes:
        """The document as JSON."""
        return msgspec.json.encode(self.document())

    def document(self) -> dict[str, Any]:
        """The document."""
        taken = [kind for route in self._routes for kind in _members(route.body)]
        given = [kind for route in self._routes for whole in (route.answer, route.events) for kind in _members(whole)]
        forms = {route.errors.schema for route in self._routes}
        kinds = list(dict.fromkeys([*taken, *given, *sorted(forms, key=str)]))
        references, schemas = msgspec.json.schema_components(kinds, ref_template=_REFERENCE + "{name}")
        schema_of = dict(zip(kinds, references, strict=True))
        _require_what_is_always_sent(schemas, [schema_of[kind] for kind in taken])
        for schema in schemas.values():
            if "description" in schema:
                schema["description"] = inspect.cleandoc(schema["description"])
        paths: dict[str, dict[str, Any]] = {}
        for route in self._routes:
            paths.setdefault(route.name, {})[route.method.lower()] = self._operation(route, route.name, schema_of)
        components: dict[str, Any] = {
            "schemas": schemas,
            "responses": dict(response for kind in forms for response in _error_responses(kind, schema_of[kind])),
            "headers": {
                "RequestId": {
                    "description": "The request's X-Request-Id, or a new id.",
                    "required": True,
                    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$"},
                },
                "RetryAfter": {"description": "In seconds.", "required": True, "schema": {"type": "integer"}},
            },
        }
        if self._keys:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return {
            "openapi": "3.1.0",
            "info": {"title": "fdserve", "description": fdserve.__doc__, "version": fdserve.__version__},
            "paths": paths,
            "components": components,
        }

    def _operation(self, route: Route, path: str, schema_of: dict[Any, Any]) -> dict[str, Any]:
        operation: dict[str, Any] = {
            "operationId": "_".join([route.method.lower(), *re.findall(r"\w+", path)]),
            "summary": _summary(route.handler.func if isinstance(route.handler, partial) else route.handler),
        }
        names = re.findall(r"\{(\w+)\}", path)
        if names:
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
                for name in names
            ]
        if route.body is not None:
            operation["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": _schema(route.body, schema_of)}},
            }
        responses = {"200": {"description": "OK", "headers": _REQUEST_ID, "content": _content(route, schema_of)}}
        for error in self._errors(route, bool(names)):
            name = _error_name(error, route.errors.schema)
            responses[str(error.status)] = {"$ref": f"#/components/responses/{name}"}
        operation["responses"] = dict(sorted(responses.items()))
        if self._keys and not route.public:
            operation["security"] = [{"key": []}]
        return operation

    def _errors(self, route: Route, has_parameters: bool) -> Iterator[type[ServerError]]:
        yield from _ANY_ERRORS
        if route.body is not None:
            yield from _BODY_ERRORS
        if route.checked:
            yield errors.InvalidRequest
        if has_parameters:
            yield errors.NotFound
        if route.counted:
            yield errors.Overloaded
        if route.events is not None:
            yield errors.RequestCancelled
        if self._keys and not route.public:
            yield errors.Unauthorized


def _members(kind: Any) -> tuple[Any, ...]:
    """The structs of a union, one by one; msgspec makes no schema of a union of several."""
    if kind is None:
        return ()
    return get_args(kind) if isinstance(kind, UnionType) else (kind,)


def _schema(kind: Any, schema_of: dict[Any, Any]) -> dict[str, Any]:
    members = [schema_of[member] for member in _members(kind)]
    return members[0] if len(members) == 1 else {"anyOf": members}


def _summary(described: object) -> str:
    """The first sentence of the docstring, without its full stop."""
    text = " ".join((inspect.getdoc(described) or "").split())
    return re.split(r"[.;:] |\.$", text, maxsplit=1)[0]


def _content(route: Route, schema_of: dict[Any, Any]) -> dict[str, Any]:
    if route.answer is None:
        return {"text/plain": {"schema": {"type": "string"}}}
    content: dict[str, Any] = {"application/json": {"schema": _schema(route.answer, schema_of)}}
    if route.events is not None:
        content["text/event-stream"] = {"schema": _event_schema(route, schema_of)}
    return content


def _event_schema(route: Route, schema_of: dict[Any, Any]) -> dict[str, Any]:
    """One event of a stream, as its fields: OpenAPI 3.1 has no other way to describe a stream than by its items."""
    payload = {"anyOf": [_schema(route.events, schema_of), schema_of[route.errors.schema]]}
    encoded = {"type": "string", "contentMediaType": "application/json", "contentSchema": payload}
    return {
        "description": "One event of the stream.",
        "type": "object",
        "required": ["data"],
        "properties": {"event": {"type": "string"}, "data": {"anyOf": [encoded, {"const": "[DONE]"}]}},
    }


def _error_name(error: type[ServerError], kind: type[msgspec.Struct]) -> str:
    return error.__name__ if kind is ErrorBody else f"{error.__name__}.{kind.__name__}"


def _error_responses(kind: type[msgspec.Struct], body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for error in (*_BODY_ERRORS, *_COUNTED_ERRORS, *_ANY_ERRORS, errors.Unauthorized):
        headers: dict[str, Any] = dict(_REQUEST_ID)
        if error in _RETRIED:
            headers["retry-after"] = {"$ref": "#/components/headers/RetryAfter"}
        yield (
            _error_name(error, kind),
            {
                "description": _summary(error),
                "headers": headers,
                "content": {"application/json": {"schema": body}},
            },
        )


def _require_what_is_always_sent(schemas: dict[str, dict[str, Any]], taken: list[dict[str, Any]]) -> None:
    """Mark the fields with defaults as required in all schemas that no request has.

    A default is for the reader of a struct; what is sent has every field, those excepted that may be UNSET, and
    these have no default in the schema.
    """
    for name in schemas.keys() - _reachable(taken, schemas):
        properties = schemas[name].get("properties", {})
        schemas[name]["required"] = [
            field
            for field, schema in properties.items()
            if "default" in schema or field in schemas[name].get("required", ())
        ]
        for schema in properties.values():
            schema.pop("default", None)


def _reachable(roots: Sequence[Any], schemas: dict[str, dict[str, Any]]) -> set[str]:
    """The names of the schemas that these lead to."""
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, str) and value.startswith(_REFERENCE):
            name = value.removeprefix(_REFERENCE)
            if name not in found:
                found.add(name)
                waiting.append(schemas[name])
    return found
