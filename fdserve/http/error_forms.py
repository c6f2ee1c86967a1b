"""How endpoints tell of errors: OpenAI's form, and Anthropic's for the endpoints that follow its API."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from fdserve.errors import ServerError
from fdserve.http.errors import error_body
from fdserve.http.response import DONE, event, named_event
from fdserve.protocol.errors import ErrorBody
from fdserve.protocol.messages import MessageErrorBody, MessageErrorDetail

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


@dataclass(frozen=True)
class ErrorForm:
    """`body` and `ending` take an error and the request's id.

    `schema` is the type of the body. `body` gives the JSON body of an answer, `ending` the last bytes of a stream that
    has begun. `id_headers` name the headers that clients look for the request's id in, besides x-request-id.
    """

    schema: type[msgspec.Struct]
    body: Callable[[ServerError, str], msgspec.Struct]
    ending: Callable[[ServerError, str], bytes]
    id_headers: tuple[bytes, ...] = ()


def _anthropic_body(error: ServerError, request_id: str) -> MessageErrorBody:
    message = error.message
    if error.param is not None and error.param not in message:
        message = f"{error.param}: {message}"
    detail = MessageErrorDetail(type=_ANTHROPIC_TYPES.get(error.status, "api_error"), message=message)
    return MessageErrorBody(error=detail, request_id=request_id)


OPENAI = ErrorForm(
    schema=ErrorBody,
    body=lambda error, request_id: error_body(error),
    ending=lambda error, request_id: event(error_body(error)) + DONE,
)
ANTHROPIC = ErrorForm(
    schema=MessageErrorBody,
    body=_anthropic_body,
    ending=lambda error, request_id: named_event("error", _anthropic_body(error, request_id)),
    id_headers=(b"request-id",),
)
