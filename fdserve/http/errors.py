"""Errors as OpenAI's clients read them: the body, the headers, and msgspec's complaints in those terms."""

from __future__ import annotations

import re
from typing import Any

from fdserve.errors import InvalidRequest, MethodNotAllowed, Overloaded, ServerError, Unauthorized, Unavailable
from fdserve.http.allowed_values import allowed_values
from fdserve.protocol.errors import ErrorBody, ErrorDetail

MAX_TEXT = 220
"""Characters of a complaint: some quote the whole value."""

_PATH = re.compile(r"(?P<key>`key` in )?`\$\.?(?P<path>.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<field>[^`]*)`")


def error_body(error: ServerError) -> ErrorBody:
    """The body that tells a client of the error."""
    return ErrorBody(ErrorDetail(message=error.message, type=error.type, param=error.param, code=error.code))


def error_headers(error: ServerError) -> list[tuple[bytes, bytes]]:
    """The headers that the error's status asks for."""
    if isinstance(error, Unauthorized):
        return [(b"www-authenticate", b"Bearer")]
    if isinstance(error, MethodNotAllowed):
        return [(b"allow", error.allow.encode("ascii"))]
    if isinstance(error, Overloaded):
        return [(b"retry-after", str(error.retry_after).encode("ascii"))]
    if isinstance(error, Unavailable):
        return [(b"retry-after", b"5")]
    return []


def invalid_field(message: str, kind: Any) -> InvalidRequest:
    """From the message of a msgspec.ValidationError about a body of type `kind`.

    `param` is the JSON path that it names, without the root.
    """
    # Before it may stand a value of the client's, which reads as it likes.
    text, found, place = message.rpartition(" - at ")
    match = _PATH.fullmatch(place) if found else None
    path = match["path"] if match else ""
    text = text if match else message
    if len(text) > MAX_TEXT:
        text = f"{text[:MAX_TEXT]}…{text[-1]}"  # the last one closes the value's quotes
    if missing := _MISSING.match(text):
        param = f"{path}.{missing['field']}" if path else missing["field"]
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    field = f"a key of '{path}'" if match and match["key"] else f"'{path}'"
    where = f"Invalid value for {field}: " if path else "Invalid request: "
    hint = ""
    if text.startswith("Invalid") and (allowed := allowed_values(kind, path)):
        hint = f" Supported values are: {', '.join(map(repr, allowed))}."
    return InvalidRequest(f"{where}{text[:1].lower()}{text[1:]}.{hint}", param=path or None)
