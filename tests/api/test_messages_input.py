from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest

from fdserve.api.messages_input import chat_request
from fdserve.errors import InvalidRequest
from fdserve.protocol.chat import ChatRequest
from fdserve.protocol.messages import MessagesRequest

TOOL = {"name": "add", "description": "Adds", "input_schema": {"type": "object"}}
USE = {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "2"}


def converted(*messages: Any, **fields: Any) -> ChatRequest:
    given = list(messages) or [{"role": "user", "content": "Hi"}]
    return chat_request(msgspec.convert({"max_tokens": 10, "messages": given, **fields}, MessagesRequest))


def messages(*given: Any, **fields: Any) -> list[dict[str, Any]]:
    """The chat's messages, without what they leave out."""
    result = msgspec.to_builtins(converted(*given, **fields).messages)
    return [{name: value for name, value in message.items() if value is not None} for message in result]


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


@pytest.mark.parametrize("system", ["Be brief.", [text("Be "), {**text("brief."), "cache_control": {}}]])
def test_the_system_prompt_comes_first(system: Any) -> None:
    assert messages(system=system) == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_text_blocks_are_joined() -> None:
    got = messages(
        {"role": "user", "content": [text("a"), text("b")]},
        {"role": "assistant", "content": "c"},
        {"role": "system", "content": [text("d")]},
        {"role": "user", "content": []},
    )
    assert [(m["role"], m["content"]) for m in got] == [
        ("user", "ab"),
        ("assistant", "c"),
        ("system", "d"),
        ("user", ""),
    ]


def test_many_blocks_take_time_in_proportion() -> None:
    blocks = [text("12345678")] * 200_000
    began = time.monotonic()
    (message,) = messages({"role": "user", "content": blocks})
    assert len(message["content"]) == 1_600_000
    assert time.monotonic() - began < 5


def test_a_turn_with_thought_text_and_calls_is_one_message() -> None:
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "redacted_thinking", "data": "x"},
        text("I add."),
        USE,
        {**USE, "id": "t2"},
    ]
    function = {"name": "add", "arguments": {"a": 1}}
    assert messages({"role": "assistant", "content": blocks}, {"role": "user", "content": "?"})[0] == {
        "role": "assistant",
        "content": "I add.",
        "reasoning_content": "hm",
        "tool_calls": [{"id": id, "type": "function", "function": function} for id in ("t1", "t2")],
    }


def test_results_are_messages_of_their_own() -> None:
    blocks = [
        RESULT,
        {**RESULT, "tool_use_id": "t2", "content": [text("3"), text("4")], "is_error": True},
        text("Go on"),
    ]
    empty = {"type": "tool_result", "tool_use_id": "t3"}
    assert messages({"role": "user", "content": [*blocks, text("!"), empty]}) == [
        {"role": "tool", "tool_call_id": "t1", "content": "2"},
        {"role": "tool", "tool_call_id": "t2", "content": "34"},
        {"role": "user", "content": "Go on!"},
        {"role": "tool", "tool_call_id": "t3", "content": ""},
    ]


def test_options() -> None:
    chat = converted(temperature=0.5, top_p=0.25, top_k=3, stop_sequences=["x"], metadata={"user_id": "u"})
    assert (chat.max_completion_tokens, chat.temperature, chat.top_p, chat.top_k) == (10, 0.5, 0.25, 3)
    assert chat.stop == ["x"]
    assert chat.tools == []
    schema = {"type": "object"}
    chat = converted(output_config={"effort": "low", "format": {"type": "json_schema", "schema": schema}})
    assert chat.reasoning_effort == "low"
    assert msgspec.to_builtins(chat.response_format)["json_schema"]["schema"] == schema


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        ({"type": "auto"}, "auto", True),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "none"}, "none", True),
        ({"type": "tool", "name": "add"}, {"type": "function", "function": {"name": "add"}}, True),
    ],
)
def test_tools(choice: Any, expected: Any, parallel: bool) -> None:
    chat = converted(tools=[{**TOOL, "type": "custom", "cache_control": {"type": "ephemeral"}}], tool_choice=choice)
    function = {"name": "add", "description": "Adds", "parameters": {"type": "object"}}
    assert msgspec.to_builtins(chat.tools) == [{"type": "function", "function": function}]
    assert msgspec.to_builtins(chat.tool_choice) == expected
    assert chat.parallel_tool_calls is parallel


@pytest.mark.parametrize(
    ("thinking", "enabled", "budget"),
    [
        (None, False, None),
        ({"type": "disabled"}, False, None),
        ({"type": "adaptive"}, True, None),
        ({"type": "enabled", "budget_tokens": 9}, True, 9),
    ],
)
def test_thinking(thinking: Any, enabled: bool, budget: int | None) -> None:
    chat = converted(thinking=thinking)
    assert (chat.enable_thinking, chat.reasoning_max_tokens) == (enabled, budget)


def test_an_answer_that_was_begun_goes_on() -> None:
    assert not converted().continue_final_message
    assert converted({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}).continue_final_message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [USE]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "content": [RESULT]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "messages[0].content[0].tool_use_id",
        ),
        (
            {"messages": [{"role": "user", "content": [{**RESULT, "content": [text("a"), {"type": "image"}]}]}]},
            "messages[0].content[0].content[1]",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "y"}]}]},
            "messages[0].content[0].input",
        ),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "add"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 10}}, "thinking.budget_tokens"),
    ],
)
def test_what_cannot_be_served(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        converted(**fields)
    assert error.value.param == param
    assert len(error.value.message) > 10
