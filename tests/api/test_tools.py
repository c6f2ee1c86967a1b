from __future__ import annotations

import json
import time
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from fdserve.api.tool_use import tool_use
from fdserve.config import Config
from fdserve.protocol.chat import ChatRequest
from fdserve.protocol.tools import AllowedSet, AllowedTools, FunctionDefinition, FunctionName, NamedTool, Tool
from tests.http.client import Client, serving
from tests.http.fake_engine import FakeEngine, follow, ids, say

pytestmark = pytest.mark.anyio

CONFIG = Config(tool_call_parser="hermes", enable_logprob=True)
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, "é"]}}\n</tool_call>'
ARGUMENTS = '{"a": 1, "b": [2, "é"]}'


async def answer(client: Client, **fields: Any) -> dict[str, Any]:
    response = await client.chat(**fields)
    assert response.status == 200, response.body
    ChatCompletion.model_validate(response.json(), strict=True)
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


async def test_a_call() -> None:
    async with serving(FakeEngine(say(CALL)), CONFIG) as client:
        choice = await answer(client, tools=[TOOL])
        (call,) = choice["message"]["tool_calls"]
        assert call["id"].startswith("call_")
        assert (call["type"], call["function"]) == ("function", {"name": "add", "arguments": ARGUMENTS})
        assert choice["message"]["content"] is None
        assert choice["finish_reason"] == "tool_calls"


async def test_text_and_calls() -> None:
    async with serving(FakeEngine(say("Let me see.\n" + CALL + "\n" + CALL)), CONFIG) as client:
        choice = await answer(client, tools=[TOOL])
        assert choice["message"]["content"] == "Let me see."
        assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == [ARGUMENTS] * 2
        assert len({call["id"] for call in choice["message"]["tool_calls"]}) == 2


async def test_calls_are_text_unless_tools_may_be_called() -> None:
    async with serving(FakeEngine(say(CALL)), CONFIG) as client:
        several: list[dict[str, Any]] = [{}, {"tools": []}, {"tools": [TOOL], "tool_choice": "none"}]
        for fields in several:
            choice = await answer(client, **fields)
            assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")
            assert "tool_calls" not in choice["message"]


async def test_what_is_no_call_is_text() -> None:
    text = '<tool_call>\n{"name": "add", oops}\n</tool_call>'
    async with serving(FakeEngine(say(text)), CONFIG) as client:
        choice = await answer(client, tools=[TOOL])
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")


async def test_a_call_that_is_cut_off_is_none() -> None:
    async with serving(FakeEngine(say(CALL)), CONFIG) as client:
        choice = await answer(client, tools=[TOOL], max_tokens=len(ids(CALL)) - 12)
        assert choice["finish_reason"] == "length"


async def test_a_stop_token_after_a_call() -> None:
    async with serving(FakeEngine(say(CALL + "#")), CONFIG) as client:
        choice = await answer(client, tools=[TOOL], stop_token_ids=[ord("#")])
        assert (choice["finish_reason"], choice["stop_reason"]) == ("tool_calls", ord("#"))


async def test_allowed_tools_are_the_only_ones() -> None:
    template = "{% for t in tools %}{{ t.function.name }} {% endfor %}."
    other = {"type": "function", "function": {"name": "sub"}}
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "sub"}}]}
    async with serving(FakeEngine(say("x")), CONFIG, template=template) as client:
        await answer(client, tools=[TOOL, other])
        await answer(client, tools=[TOOL, other], tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
        prompts = [bytes(request.prompt).decode() for request in client.engine.requests]
        assert prompts == ["add sub .", "sub ."]


async def test_the_template_gets_the_tools_as_they_came() -> None:
    function = {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "x": [1, None]},
        "strict": False,
    }
    tool = {"type": "function", "function": function}
    async with serving(FakeEngine(say("x")), CONFIG, template="{{ tools | tojson }}") as client:
        await answer(client, tools=[tool])
        assert json.loads(bytes(client.engine.requests[0].prompt)) == [tool]


@pytest.mark.parametrize("batch", [1, 3, 100])
async def test_a_stream_of_calls(batch: int) -> None:
    text = "So:\n" + CALL + CALL
    async with serving(FakeEngine(follow([*ids(text), 256], batch=batch, delay=0.0005)), CONFIG) as client:
        events = (await client.chat(tools=[TOOL], stream=True)).events
        calls: dict[int, dict[str, Any]] = {}
        content = ""
        for event in events:
            ChatCompletionChunk.model_validate(event, strict=True)
            delta = event["choices"][0]["delta"]
            content += delta["content"] or ""
            assert (delta["content"] is None) == ("tool_calls" in delta)
            for part in delta.get("tool_calls", []):
                call = calls.setdefault(part["index"], {"arguments": ""})
                if "id" in part:
                    assert "id" not in call
                    call.update(id=part["id"], type=part["type"], name=part["function"]["name"])
                call["arguments"] += part["function"]["arguments"]
        assert content == "So:"
        assert [calls[i]["arguments"] for i in sorted(calls)] == [ARGUMENTS] * 2
        assert [calls[i]["name"] for i in sorted(calls)] == ["add"] * 2
        assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_functions_are_the_older_form() -> None:
    functions = [{"name": "add", "parameters": {"type": "object"}}]
    async with serving(FakeEngine(say(CALL)), CONFIG, template="{{ (tools or []) | length }}") as client:
        choice = await answer(client, functions=functions, function_call="auto")
        assert choice["message"]["function_call"] == {"name": "add", "arguments": ARGUMENTS}
        assert choice["message"]["content"] is None
        assert "tool_calls" not in choice["message"]
        assert choice["finish_reason"] == "function_call"
        assert bytes(client.engine.requests[0].prompt) == b"1"
        choice = await answer(client, functions=functions, function_call="none")
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")
        events = (await client.chat(functions=functions, stream=True)).events
        parts = [e["choices"][0]["delta"].get("function_call") for e in events]
        parts = [part for part in parts if part]
        assert [part["name"] for part in parts if "name" in part] == ["add"]
        assert "".join(part["arguments"] for part in parts) == ARGUMENTS
        assert events[-1]["choices"][0]["finish_reason"] == "function_call"


FUNCTION = TOOL["function"]
NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(
    ("fields", "param", "instead"),
    [
        ({"tools": [TOOL], "function_call": {"name": "add"}}, "function_call", "tool_choice"),
        ({"tools": [TOOL], "function_call": "none"}, "function_call", "tool_choice"),
        ({"tools": [TOOL], "function_call": "auto", "tool_choice": "required"}, "function_call", "tool_choice"),
        ({"functions": [FUNCTION], "tool_choice": NAMED}, "tool_choice", "function_call"),
        ({"functions": [FUNCTION], "tool_choice": "required"}, "tool_choice", "function_call"),
        ({"functions": [FUNCTION], "tool_choice": "none"}, "tool_choice", "function_call"),
    ],
)
async def test_a_choice_in_the_other_form_is_refused(fields: dict[str, Any], param: str, instead: str) -> None:
    async with serving(FakeEngine(say("x")), CONFIG) as client:
        response = await client.chat(**fields)
        assert (response.status, response.error["param"]) == (400, param), response.body
        assert response.error["message"].endswith(f"send {instead}.")
        assert not client.engine.requests


async def test_a_choice_in_the_other_form_may_say_what_holds_anyway() -> None:
    several: list[dict[str, Any]] = [
        {"tools": [TOOL], "function_call": "auto"},
        {"tools": [TOOL], "function_call": "none", "tool_choice": "none"},
        {"functions": [FUNCTION], "tool_choice": "auto"},
        {"functions": [FUNCTION], "tool_choice": "none", "function_call": "none"},
        {"function_call": "auto"},
        {"function_call": "none", "functions": []},
    ]
    async with serving(FakeEngine(say("x")), CONFIG) as client:
        for fields in several:
            await answer(client, **fields)


CONVERSATION = [
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {}}]},
    {"role": "tool", "tool_call_id": "c", "content": "3"},
]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"a": 1}', "object 1"),
        ({"a": 1}, "object 1"),
        ("", "object "),
        ("{broken", "text {broken"),
        ("[1]", "text [1]"),
    ],
)
async def test_past_calls(arguments: Any, shown: str) -> None:
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{% set a = c.function.arguments %}"
        "{{ c.id }} {{ c.function.name }} {{ 'text ' ~ a if a is string else 'object ' ~ a.a }}"
        "{% endfor %}{% if m.role == 'tool' %}, {{ m.tool_call_id }}={{ m.content }}{% endif %}{% endfor %}"
    )
    messages = json.loads(json.dumps(CONVERSATION))
    messages[1]["tool_calls"][0]["function"] = {"name": "add", "arguments": arguments}
    async with serving(FakeEngine(say("x")), CONFIG, template=template) as client:
        await answer(client, messages=messages)
        assert bytes(client.engine.requests[0].prompt).decode() == f"c add {shown}, c=3"


@pytest.mark.parametrize(
    ("function", "code"),
    [({"name": "add"}, "missing_required_parameter"), ({"name": "add", "arguments": None}, "invalid_value")],
)
async def test_past_calls_need_their_arguments(function: dict[str, Any], code: str) -> None:
    """Templates write them as JSON, and fail where there are none."""
    user = {"role": "user", "content": "1+2?"}
    call = {"id": "c", "type": "function", "function": function}
    async with serving(FakeEngine(say("x")), CONFIG, template="{{ messages[1].tool_calls[0] | tojson }}") as client:
        for field, value, path in (
            ("tool_calls", [call], "messages[1].tool_calls[0].function.arguments"),
            ("function_call", function, "messages[1].function_call.arguments"),
        ):
            response = await client.chat(messages=[user, {"role": "assistant", "content": None, field: value}])
            assert (response.status, response.error["param"], response.error["code"]) == (400, path, code)
            assert f"'{path}'" in response.error["message"]
        assert not client.engine.requests


async def test_past_function_calls() -> None:
    template = (
        "{% for m in messages %}{{ m.role }} {{ m.name }}"
        "{% for c in m.tool_calls or [] %} {{ c.function.name }}{% endfor %};{% endfor %}"
    )
    messages = [
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}},
        {"role": "function", "name": "add", "content": "3"},
    ]
    async with serving(FakeEngine(say("x")), CONFIG, template=template) as client:
        await answer(client, messages=messages)
        assert bytes(client.engine.requests[0].prompt).decode() == "assistant  add;tool add;"


async def test_many_allowed_tools_take_time_in_proportion() -> None:
    tools = [Tool(type="function", function=FunctionDefinition(name=f"f{i}")) for i in range(20_000)]
    allowed = AllowedSet(mode="auto", tools=[NamedTool(function=FunctionName(name=f"f{i}")) for i in range(20_000)])
    began = time.monotonic()
    use = tool_use(ChatRequest(tools=tools, tool_choice=AllowedTools(allowed_tools=allowed)))
    assert use is not None
    assert use.tools == tools
    assert time.monotonic() - began < 3
