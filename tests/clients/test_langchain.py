"""LangChain's ChatOpenAI: answers, streams, tools, structured output."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from tests.http.processes import ServerProcess

WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
}
QUESTION = "What is the weather in Paris?"


@pytest.fixture(scope="module")
def model(server: ServerProcess) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1",
        api_key=SecretStr("null"),
        model="default",
        temperature=0,
        max_retries=0,
        stream_usage=True,
    )


def whole(stream: Any) -> AIMessageChunk:
    """The chunks of a stream added up as LangChain adds them."""
    chunks = list(stream)
    total: AIMessageChunk = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    return total


def test_a_stream_adds_up_to_the_answer(model: ChatOpenAI) -> None:
    answer = model.invoke("What is 12 + 30?")
    streamed = whole(model.stream("What is 12 + 30?"))
    assert "42" in str(answer.content)
    assert streamed.content == answer.content
    assert answer.usage_metadata is not None
    assert streamed.usage_metadata == answer.usage_metadata
    assert answer.response_metadata["finish_reason"] == "stop"


def test_tools_are_called_and_their_results_used(model: ChatOpenAI) -> None:
    with_tools = model.bind_tools([WEATHER])
    call = with_tools.invoke(QUESTION)
    assert isinstance(call, AIMessage)
    assert [(each["name"], each["args"]) for each in call.tool_calls] == [("get_weather", {"location": "Paris"})]
    assert call.response_metadata["finish_reason"] == "tool_calls"
    streamed = whole(with_tools.stream(QUESTION))
    assert [(each["name"], each["args"]) for each in streamed.tool_calls] == [("get_weather", {"location": "Paris"})]
    result = ToolMessage('{"sky": "sunny"}', tool_call_id=str(call.tool_calls[0]["id"]))
    answer = with_tools.invoke([HumanMessage(QUESTION), call, result])
    assert "sunny" in str(answer.content)


def test_a_call_can_be_required(model: ChatOpenAI) -> None:
    call = model.bind_tools([WEATHER], tool_choice="get_weather").invoke("Hello!")
    assert isinstance(call, AIMessage)
    assert [each["name"] for each in call.tool_calls] == ["get_weather"]
    assert isinstance(call.tool_calls[0]["args"]["location"], str)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(model: ChatOpenAI, method: str) -> None:
    schema = {
        "title": "City",
        "description": "A city.",
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "large": {"type": "boolean"}},
        "required": ["name", "large"],
        "additionalProperties": False,
    }
    city: Any = model.with_structured_output(schema, method=method, strict=True).invoke("Name a city.")  # type: ignore[arg-type]
    assert set(city) == {"name", "large"}
    assert isinstance(city["large"], bool)
