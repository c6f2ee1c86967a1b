from __future__ import annotations

import json
import time
from typing import Any

import jsonschema
import pytest

from fdserve.api.structured import output_form
from fdserve.config import Config
from fdserve.engine.request import Constraint
from fdserve.errors import InvalidRequest
from fdserve.protocol.completion import CompletionRequest
from fdserve.protocol.structured import JsonSchemaFormat, ResponseFormat, StructuredOutputs
from fdserve.text.grammar_rules import MAX_SOURCE
from fdserve.text.grammar_spec import Choice, JsonSchema, Lark, Regex, Spec, StructuralTag
from tests.http.client import serving
from tests.http.fake_engine import EOS, FakeEngine, ids, say

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TAG: dict[str, Any] = {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f>"]}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}
CONFIG = Config(tool_call_parser="hermes")


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({}, None),
        ({"response_format": ResponseFormat(type="text")}, None),
        ({"structured_outputs": StructuredOutputs(json_object=False)}, None),
        ({"response_format": ResponseFormat(type="json_object")}, JsonSchema(None, False, "response_format")),
        (
            {"response_format": ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(schema=SCHEMA))},
            JsonSchema(SCHEMA, False, "response_format.json_schema.schema"),
        ),
        (
            {
                "response_format": ResponseFormat(
                    type="json_schema", json_schema=JsonSchemaFormat(name="x", schema=SCHEMA, strict=True)
                )
            },
            JsonSchema(SCHEMA, True, "response_format.json_schema.schema"),
        ),
        ({"response_format": ResponseFormat(type="structural_tag", **TAG)}, StructuralTag(TAG, "response_format")),
        ({"guided_json": SCHEMA}, JsonSchema(SCHEMA, False, "guided_json")),
        ({"guided_json": json.dumps(SCHEMA)}, JsonSchema(SCHEMA, False, "guided_json")),
        ({"guided_regex": "a+"}, Regex("a+", "guided_regex")),
        ({"guided_choice": ["a", 1, 0.5, True]}, Choice(["a", "1", "0.5", "true"], "guided_choice")),
        ({"guided_grammar": 'start: "a"'}, Lark('start: "a"', "guided_grammar")),
        ({"structural_tag": json.dumps(TAG)}, StructuralTag(TAG, "structural_tag")),
        (
            {"structured_outputs": StructuredOutputs(json_object=True)},
            JsonSchema(None, False, "structured_outputs.json_object"),
        ),
        ({"structured_outputs": StructuredOutputs(regex="a")}, Regex("a", "structured_outputs.regex")),
        ({"structured_outputs": StructuredOutputs(json="{}")}, JsonSchema({}, False, "structured_outputs.json")),
    ],
)
def test_forms(fields: dict[str, Any], form: Spec | None) -> None:
    assert output_form(CompletionRequest(**fields)) == form


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex"),
        ({"guided_json": SCHEMA, "response_format": ResponseFormat(type="json_object")}, "guided_json"),
        ({"structured_outputs": StructuredOutputs(regex="a", choice=["a"])}, "structured_outputs.choice"),
        ({"structured_outputs": StructuredOutputs(regex="a", json_object=False)}, "structured_outputs.json_object"),
        ({"structured_outputs": StructuredOutputs(regex="a"), "guided_regex": "a"}, "structured_outputs.regex"),
        ({"structured_outputs": StructuredOutputs()}, "structured_outputs"),
        ({"response_format": ResponseFormat(type="json_schema")}, "response_format.json_schema"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[1]"}, "guided_json"),
        ({"structural_tag": "{"}, "structural_tag"),
        ({"guided_json": '{"a": ' + "[" * MAX_SOURCE}, "guided_json"),
    ],
)
def test_what_is_no_form(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        output_form(CompletionRequest(**fields))
    assert error.value.param == param


EMPTY: list[tuple[dict[str, Any], str]] = [
    ({"guided_json": ""}, "guided_json"),
    ({"guided_regex": ""}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_grammar": ""}, "guided_grammar"),
    ({"structural_tag": ""}, "structural_tag"),
    ({"structured_outputs": {"json": ""}}, "structured_outputs.json"),
    ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"grammar": ""}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"structural_tag": ""}}, "structured_outputs.structural_tag"),
    ({"chat_template_kwargs": {"guided_choice": []}}, "guided_choice"),
]
NOTHING_KNOWN: list[dict[str, Any]] = [{}, {"foo": 1}, {"json_schema": SCHEMA}, {"regex": None, "choice": None}]


@pytest.mark.anyio
async def test_a_form_that_says_nothing_is_refused() -> None:
    async with serving(FakeEngine(say("x"))) as client:
        cases = EMPTY + [({"structured_outputs": given}, "structured_outputs") for given in NOTHING_KNOWN]
        for fields, param in cases:
            responses = [await client.chat(**fields)]
            if "chat_template_kwargs" not in fields:
                responses.append(await client.complete(**fields))
            for response in responses:
                assert (response.status, response.error["param"]) == (400, param), (fields, response.body)
                assert response.error["code"] == "invalid_value"
        wanted = "structured_outputs needs one of json, regex, choice, grammar, json_object and structural_tag."
        assert response.error["message"] == wanted
        assert not client.engine.requests
        given = {"regex": "x", "json": None, "disable_any_whitespace": True}
        assert (await client.chat(structured_outputs=given)).status == 200


@pytest.mark.anyio
async def test_the_description_knows_that_forms_are_not_empty() -> None:
    async with serving() as client:
        components = (await client.get("/openapi.json")).json()["components"]
    schema = {"$ref": "#/components/schemas/ChatRequest", "components": components}
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid({"guided_choice": ["a"], "guided_json": {}, "structured_outputs": {"regex": "a"}})
    for fields, _ in EMPTY[:-1]:
        assert not validator.is_valid(fields), fields


def test_json_in_a_string_is_bounded_before_it_becomes_objects() -> None:
    text = '{"enum": [' + "[]," * 5_000_000 + "[]]}"
    began = time.process_time()
    with pytest.raises(InvalidRequest, match="guided_json is longer than 524288 characters"):
        output_form(CompletionRequest(guided_json=text))
    assert time.process_time() - began < 0.1


def allows(constraint: Constraint | None, text: str) -> bool:
    """Whether the text may come, and the end after it."""
    assert constraint is not None
    for token in [*ids(text), EOS]:
        mask = constraint.mask()
        if mask is not None and not mask[token // 8] >> token % 8 & 1:
            return False
        if token != EOS:
            constraint.advance(token)
    return True


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
BAD_CALL = '<tool_call>\n{"name": "add", "arguments": {"b": 1}}\n</tool_call>'
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
NAMED = {"type": "function", "function": {"name": "add"}}
STRICT = {"type": "function", "function": {**TOOL["function"], "strict": True}}


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"guided_regex": "a+"}, ["a", "aaa"], ["", "b"]),
        ({"response_format": FORM}, ['{"a": 1}'], ["{}", '{"a": "x"}', CALL]),
        ({"tools": [TOOL], "tool_choice": "required"}, [CALL, CALL + "\n" + CALL], [BAD_CALL, "text", ""]),
        ({"tools": [TOOL], "tool_choice": NAMED}, [CALL], [BAD_CALL, "text"]),
        ({"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}, [CALL], [CALL + "\n" + CALL]),
        ({"tools": [TOOL], "parallel_tool_calls": False}, [CALL, "text"], [CALL + "\n" + CALL]),
        ({"tools": [STRICT]}, [CALL, "text"], [BAD_CALL]),
        ({"tools": [TOOL], "response_format": FORM}, [CALL, '{"a": 1}'], [BAD_CALL, "text", '{"b": 1}']),
        ({"tools": [TOOL], "tool_choice": "required", "response_format": FORM}, [CALL], ['{"a": 1}']),
        ({"functions": [TOOL["function"]], "function_call": {"name": "add"}}, [CALL], [BAD_CALL, CALL + "\n" + CALL]),
    ],
)
async def test_what_may_come(fields: dict[str, Any], good: list[str], bad: list[str]) -> None:
    async with serving(FakeEngine(say("x")), CONFIG, template="{{ messages[0].content }}") as client:
        for text in good + bad:
            assert (await client.chat(**fields)).status == 200
            assert allows(client.engine.requests[-1].constraint, text) == (text in good), text


@pytest.mark.anyio
async def test_every_choice_has_a_constraint_of_its_own() -> None:
    async with serving(FakeEngine(say("x"))) as client:
        assert (await client.complete(["a", "b"], n=2, guided_choice=["x", "y"])).status == 200
        constraints = [request.constraint for request in client.engine.requests]
        assert len({id(constraint) for constraint in constraints}) == 4
        assert len({id(request.group) for request in client.engine.requests}) == 1
        await client.chat()
        assert client.engine.requests[-1].constraint is None
        await client.chat(tools=[TOOL])
        assert client.engine.requests[-1].constraint is None


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_json": {"type": "nothing"}}, "guided_json"),
        ({"guided_grammar": "start: missing"}, "guided_grammar"),
        ({"response_format": {**FORM, "json_schema": {"schema": {"type": 5}}}}, "response_format.json_schema.schema"),
        ({"structural_tag": {"structures": 5}}, "structural_tag"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"enum": 5}}}]}, "tools"),
    ],
)
async def test_forms_that_do_not_compile(fields: dict[str, Any], param: str) -> None:
    async with serving(FakeEngine(say("x")), CONFIG) as client:
        forced = {"tool_choice": "required"} if "tools" in fields else {}
        response = await client.chat(**fields, **forced)
        assert (response.status, response.error["param"]) == (400, param), response.body
        assert response.error["code"] == "invalid_value"
        assert len(response.error["message"]) > 30


@pytest.mark.anyio
async def test_calls_or_a_form_after_a_thought() -> None:
    config = Config(reasoning_parser="ernie_x1", tool_call_parser="ernie_x1")
    thought = "\nhm\n</think>\n\n"
    good = [thought + '<response>\n{"a": 1}', thought + "\n" + CALL]
    bad = [thought + '{"a": 1}', thought + "<response>\nfree", thought + "\n" + BAD_CALL]
    async with serving(FakeEngine(say("x")), config, template="<think>") as client:
        for text in good + bad:
            assert (await client.chat(tools=[TOOL], response_format=FORM)).status == 200
            assert allows(client.engine.requests[-1].constraint, text) == (text in good), text


@pytest.mark.anyio
async def test_nothing_cuts_json() -> None:
    async with serving(FakeEngine(say('{"a": 1}')), CONFIG) as client:
        stops: dict[str, Any] = {"stop": ['"', "a"], "stop_token_ids": [ord("1")]}
        forms: list[dict[str, Any]] = [{"response_format": FORM}, {"guided_json": SCHEMA}]
        for fields in forms:
            for response in (await client.chat(**stops, **fields), await client.complete(**stops, **fields)):
                (choice,) = response.json()["choices"]
                assert choice.get("text", choice.get("message", {}).get("content")) == '{"a": 1}'
                assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
        await client.chat(**stops, tools=[TOOL], tool_choice="required")
        assert client.engine.requests[-1].params.stop_token_ids == ()
        forms = [{}, {"guided_regex": ".*"}]
        for fields in forms:
            (choice,) = (await client.chat(**stops, **fields)).json()["choices"]
            assert (choice["message"]["content"], choice["stop_reason"]) == ("{", '"')
        response = await client.chat(guided_json=SCHEMA, stop="x" * 20_000)
        assert (response.status, response.error["param"]) == (400, "stop")
