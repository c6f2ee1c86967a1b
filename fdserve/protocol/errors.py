"""OpenAI's error body."""

from __future__ import annotations

import msgspec


class ErrorDetail(msgspec.Struct):
    """`param` is the path of the offending field, such as `messages[1].content`."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    error: ErrorDetail
