"""Requests to /v1/messages, and what their answers are read as."""

from __future__ import annotations

from typing import Any

from anthropic.types import Message, RawMessageStreamEvent
from anthropic.types.shared import ErrorResponse
from pydantic import TypeAdapter

from fdserve.config import Config
from tests.http.client import Client, Response

PATH = "/v1/messages"
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
THINKS = "ab</think>\n\n<response>\nHello</response>"
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": %d}}\n</tool_call>\n'
ADD = {"name": "add", "input_schema": {"type": "object"}}


def config(**fields: Any) -> Config:
    return Config(reasoning_parser="ernie_x1", tool_call_parser="ernie_x1", **fields)


async def send(client: Client, text: Any = "Hi", **fields: Any) -> Response:
    options = {name: fields.pop(name) for name in ("headers", "leave_after", "http_version") if name in fields}
    body = {"max_tokens": 200, "messages": [{"role": "user", "content": text}], **fields}
    return await client.post(PATH, body, **options)


def whole(response: Response) -> dict[str, Any]:
    """The response's body, which Anthropic's client takes without converting anything."""
    assert response.status == 200, response.body
    content: dict[str, Any] = response.json()
    Message.model_validate(content, strict=True)
    return content


def events(response: Response) -> list[dict[str, Any]]:
    """The events, each as Anthropic's client takes it; pings and the last error are not checked by it."""
    assert response.status == 200, response.body
    result = response.named_events
    for event in result:
        if event["type"] not in ("ping", "error"):
            EVENT.validate_python(event, strict=True)
    return result


def error(response: Response) -> dict[str, Any]:
    """The error in the body, which is in Anthropic's form."""
    body = response.json()
    assert body["request_id"] == response.headers["x-request-id"] == response.headers["request-id"]
    if body["error"]["type"] != "request_too_large":  # documented, and not among the client's types
        ErrorResponse.model_validate(body, strict=True)
    assert list(body["error"]) == ["type", "message"]
    detail: dict[str, Any] = body["error"]
    return detail
