"""Fields that say what the output looks like, by their effect on the demo model."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import openai
import pytest

from tests.e2e.asking import ask, refused, say

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
QUESTION = "What is the weather in Paris?"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("thinking", [False, True])
def test_json_schemas(client: openai.OpenAI, stream: bool, thinking: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    answer = ask(
        client,
        extra={"enable_thinking": thinking, "min_tokens": 60, "stop_token_ids": list(range(300, 400))},
        stop=["a", "e", '"', "}"],
        response_format=form,
        temperature=1,
        seed=2,
        n=2,
        stream=stream,
    )
    texts = ["", ""]
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            texts[choice.index] += (choice.delta if stream else choice.message).content or ""
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[a-c]{3,5}"}, "[a-c]{3,5}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'start: ("1" | "2") "+" ("1" | "2")'}, "[12][+][12]"),
        ({"guided_json": {"enum": [17, 18]}}, "17|18"),
        ({"guided_json": '{"type": "boolean"}'}, "true|false"),
        ({"structured_outputs": {"choice": ["one", "two"]}}, "one|two"),
        ({"response_format": {"type": "json_object"}, "max_tokens": 300}, r"\{.*\}"),
    ],
)
def test_forms(client: openai.OpenAI, fields: dict[str, Any], pattern: str) -> None:
    limit = fields.get("max_tokens", 100)
    for thinking in (False, True):
        choice = ask(client, extra={"enable_thinking": thinking, **fields}, max_tokens=limit).choices[0]
        assert bool(choice.message.reasoning_content) == thinking
        if choice.finish_reason != "length":
            assert re.fullmatch(pattern, choice.message.content, re.DOTALL), choice
        else:
            assert pattern.startswith(r"\{")  # the demo model may write an object without end
    assert refused(ask, client, extra={**fields, "guided_regex": "x", "guided_choice": ["y"]}).split(".")[0]


def test_a_thought_does_not_end_the_answer(client: openai.OpenAI) -> None:
    towards_the_end = {"2": 99, "4": 99}
    assert ask(client, extra={"logit_bias": towards_the_end}).choices[0].message.content == ""
    answer = ask(client, extra={"guided_choice": ["yes", "no"], "logit_bias": towards_the_end}).choices[0]
    assert answer.message.content in ("yes", "no")
    assert answer.message.reasoning_content


def test_structural_tags(client: openai.OpenAI) -> None:
    tag = {"structures": [{"begin": "<n>", "schema": {"type": "integer"}, "end": "</n>"}], "triggers": ["<n>"]}
    assert say(client, extra={"structural_tag": tag}) == say(client)
    one = {
        "type": "sequence",
        "elements": [{"type": "const_string", "value": "n="}, {"type": "json_schema", "json_schema": {"enum": [7]}}],
    }
    form = {"type": "structural_tag", "format": one}
    assert say(client, response_format=form) == "n=7"


def test_tools(client: openai.OpenAI) -> None:
    answer = ask(client, QUESTION, tools=[{"type": "function", "function": {"name": "get_weather"}}])
    (call,) = answer.choices[0].message.tool_calls
    assert (answer.choices[0].finish_reason, call.function.name) == ("tool_calls", "get_weather")
    assert "Paris" in json.loads(call.function.arguments).values()
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 21, "condition": "sunny"}'},
    ]
    final = ask(client, turns, tools=[WEATHER]).choices[0]
    assert final.finish_reason == "stop"
    assert "sunny" in final.message.content or "21" in final.message.content
    plain = ask(client, QUESTION, tools=[WEATHER], tool_choice="none").choices[0]
    assert plain.message.tool_calls is None


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_forced_calls_fit_their_schemas(client: openai.OpenAI, choice: Any) -> None:
    for question in ("Hello!", "What is 1 + 1?"):
        several: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1, "seed": 4}]
        for fields in several:
            answer = ask(
                client, question, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, **fields
            ).choices[0]
            (call,) = answer.message.tool_calls
            jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
            assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)


def test_streamed_calls(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "seed": 1}
    whole = ask(client, QUESTION, **fields).choices[0].message.tool_calls
    with client.chat.completions.stream(
        model="default", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=200, **fields
    ) as stream:
        streamed: Any = stream.get_final_completion().choices[0].message.tool_calls
    assert [call.function.arguments for call in streamed] == [call.function.arguments for call in whole]
    assert [call.function.name for call in streamed] == [call.function.name for call in whole]


def test_functions_are_the_older_form(client: openai.OpenAI) -> None:
    functions = [WEATHER["function"]]
    answer = ask(client, QUESTION, functions=functions, function_call={"name": "get_weather"}).choices[0]
    assert answer.finish_reason == "function_call"
    jsonschema.validate(json.loads(answer.message.function_call.arguments), PARAMETERS)
