from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest

from fdserve.api.responses_input import as_own_fields, chat_request, input_items
from fdserve.errors import InvalidRequest
from fdserve.protocol.chat import ChatRequest
from fdserve.protocol.responses import InputItem, ResponsesRequest

CALL = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "2"}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
TOOL = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": True, "description": "Adds"}


def converted(history: list[Any] | None = None, **fields: Any) -> ChatRequest:
    request = msgspec.convert({"input": "Hi", **fields}, ResponsesRequest)
    return chat_request(request, msgspec.convert(history or [], list[InputItem]), input_items(request))


def messages(*items: Any, **fields: Any) -> list[dict[str, Any]]:
    """The messages that items lead to, without what they leave out."""
    result = msgspec.to_builtins(converted(input=list(items), **fields).messages)
    return [{name: value for name, value in message.items() if value is not None} for message in result]


def test_text_is_a_users_message_after_the_instructions() -> None:
    chat = converted(instructions="Be brief.")
    assert [(m.role, m.content) for m in chat.messages or ()] == [("system", "Be brief."), ("user", "Hi")]


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"role": "user", "content": "x"}, {"role": "user", "content": "x"}),
        ({"type": "message", "role": "developer", "content": "x"}, {"role": "developer", "content": "x"}),
        (
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            {"role": "user", "content": "ab"},
        ),
        (
            {
                "type": "message",
                "id": "msg_1",
                "status": "completed",
                "role": "assistant",
                "content": [
                    {"type": "output_text", "text": "a", "annotations": [], "logprobs": []},
                    {"type": "refusal", "refusal": "no"},
                ],
            },
            {"role": "assistant", "content": "ano"},
        ),
        ({**OUTPUT, "output": [{"type": "input_text", "text": "2"}]}, {"role": "tool", "content": "2"}),
    ],
)
def test_items(item: Any, expected: dict[str, Any]) -> None:
    (message,) = messages(item)
    message.pop("tool_call_id", None)
    assert message == expected


def test_one_turn_of_the_assistant_is_one_message() -> None:
    text = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I add."}]}
    function = {"name": "add", "arguments": '{"a": 1}'}
    calls = [{"id": id, "type": "function", "function": function} for id in ("c1", "c2")]
    got = messages({"role": "user", "content": "x"}, THOUGHT, text, CALL, {**CALL, "call_id": "c2"}, OUTPUT, text)
    assert got == [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "I add.", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
        {"role": "assistant", "content": "I add."},
    ]
    assert [m["role"] for m in messages(CALL, THOUGHT, CALL)] == ["assistant", "assistant"]


def test_a_summary_stands_for_the_thought() -> None:
    item = {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "short"}], "content": []}
    assert messages(item)[0]["reasoning_content"] == "short"


def test_items_of_before_come_between_instructions_and_input() -> None:
    chat = converted(history=[{"role": "user", "content": "one"}, CALL], instructions="sys", input="two")
    assert [m.role for m in chat.messages or ()] == ["system", "user", "assistant", "user"]


def test_options() -> None:
    chat = converted(
        max_output_tokens=7,
        temperature=0.5,
        top_p=0.25,
        top_logprobs=3,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        reasoning={"effort": "low"},
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
        metadata={"a": "b"},
    )
    assert (chat.max_completion_tokens, chat.temperature, chat.top_p) == (7, 0.5, 0.25)
    assert (chat.logprobs, chat.top_logprobs) == (True, 3)
    assert msgspec.to_builtins(chat.tools) == [
        {"type": "function", "function": {name: value for name, value in TOOL.items() if name != "type"}}
    ]
    assert (chat.tool_choice, chat.parallel_tool_calls, chat.reasoning_effort) == ("required", False, "low")
    assert chat.response_format is not None
    assert chat.response_format.type == "json_schema"
    schema = chat.response_format.json_schema
    assert schema is not None
    assert (schema.name, schema.schema, schema.strict) == ("n", {"type": "object"}, True)


def test_logprobs_by_include() -> None:
    assert converted(include=["message.output_text.logprobs", "reasoning.encrypted_content"]).logprobs is True
    assert not converted(include=["reasoning.encrypted_content"]).logprobs


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "function", "name": "add"}, {"type": "function", "function": {"name": "add"}}),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]},
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "add"}}]},
            },
        ),
    ],
)
def test_tool_choice(choice: Any, expected: Any) -> None:
    assert msgspec.to_builtins(converted(tools=[TOOL], tool_choice=choice).tool_choice) == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": "x"}, {"type": "web_search_call", "id": "x"}]}, "input[1].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "call_id": "c"}]}, "input[0].name"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
        ({"input": [{**CALL, "arguments": None}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{**OUTPUT, "output": [{"type": "input_image"}]}]}, "input[0].output[0]"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
    ],
)
def test_what_cannot_be_served(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        converted(**fields)
    assert error.value.param == param
    assert len(error.value.message) > 10


@pytest.mark.parametrize(
    ("chat", "own"),
    [
        ("messages", "input"),
        ("messages[3].content", "input"),
        ("text.format.schema", "text.format.schema"),
        ("max_completion_tokens", "max_output_tokens"),
        ("tools[1].function.parameters", "tools[1].parameters"),
        ("temperature", "temperature"),
        (None, None),
    ],
)
def test_errors_name_the_requests_own_fields(chat: str | None, own: str | None) -> None:
    with pytest.raises(InvalidRequest) as error, as_own_fields():
        raise InvalidRequest("no", param=chat)
    assert error.value.param == own


def test_many_calls_take_time_in_proportion() -> None:
    began = time.monotonic()
    (message,) = messages(*[CALL] * 100_000)
    assert len(message["tool_calls"]) == 100_000
    assert time.monotonic() - began < 5
