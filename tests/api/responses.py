"""Requests to /v1/responses, and what their answers are read as."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from openai.types.responses import Response as OpenAIResponse
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from fdserve.config import Config
from tests.http.client import Client, Response

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
THINKS = "ab</think>\n\n<response>\nHello</response>"
CALLS = 'x</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
ADD = {"type": "function", "name": "add", "parameters": {"type": "object"}}


def config(**fields: Any) -> Config:
    return Config(enable_logprob=True, reasoning_parser="ernie_x1", tool_call_parser="ernie_x1", **fields)


async def respond(client: Client, text: Any = "Hi", **fields: Any) -> Response:
    return await client.post("/v1/responses", {"input": text, **fields})


def whole(response: Response) -> dict[str, Any]:
    """The response's body, which openai's client takes without converting anything."""
    assert response.status == 200, response.body
    content: dict[str, Any] = response.json()
    OpenAIResponse.model_validate(content, strict=True)
    return content


def events(response: Response) -> list[dict[str, Any]]:
    """The events, each as openai's client takes it, without an end mark, numbered in order."""
    assert response.status == 200, response.body
    result = response.named_events
    for event in result:
        EVENT.validate_python(event, strict=True)
    assert [event["sequence_number"] for event in result] == list(range(len(result)))
    return result


def short(given: Iterable[dict[str, Any]]) -> list[str]:
    """The types of events without what they have in common."""
    return [event["type"].removeprefix("response.") for event in given]


def without_ids(output: Any) -> Any:
    return [{name: value for name, value in item.items() if name != "id"} for item in output]
