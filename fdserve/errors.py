"""Every error that fdserve can tell somebody about: a small closed set, each with its HTTP status.

`ServerError` subclasses reach a client as OpenAI's error body. `StartupError` reaches the operator: it stops
the start with one sentence.
"""

from __future__ import annotations


class StartupError(Exception):
    """The server cannot start: the message is one sentence that says what is wrong and what to do."""


class RankError(Exception):
    """A rank process died, hung or reported a failure; the message says which rank and why."""


class ServerError(Exception):
    """An error with an HTTP status and OpenAI's `type`, `code` and `param`."""

    status = 500
    type = "internal_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequest(ServerError):
    """The request is malformed, or asks for something out of range."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class Unauthorized(ServerError):
    """The API key is missing or wrong."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class NotFound(ServerError):
    """No such path, model or request."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class MethodNotAllowed(ServerError):
    """The path exists, under the methods in `allow`."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class RequestTimeout(ServerError):
    """The request's body did not come in time."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class RequestCancelled(ServerError):
    """The client cancelled the request by its id while it was being answered."""

    status = 409
    type = "invalid_request_error"
    code = "request_cancelled"


class PayloadTooLarge(ServerError):
    """The request body is over the limit of its size, or of its number of values."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class UnsupportedMediaType(ServerError):
    """The request's body is not JSON by its own account."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class HeadersTooLarge(ServerError):
    """The request's line and headers are over the size limit."""

    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class Overloaded(ServerError):
    """The queue is full: try again after `retry_after` seconds."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(ServerError):
    """The engine cannot take or finish requests now: loading, draining, or a rank was lost."""

    status = 503
    type = "server_error"
    code = "unavailable"


class SlowReader(ServerError):
    """The client read so slowly that its request was ended."""

    status = 503
    type = "server_error"
    code = "slow_reader"


class InternalError(ServerError):
    """A defect of the server; the message never holds a traceback."""

    status = 500
    type = "internal_error"
    code = "internal_error"
