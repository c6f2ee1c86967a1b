"""Structural tags, in both of their forms."""

from __future__ import annotations

import pytest

from fdserve.errors import InvalidRequest
from fdserve.text.grammar_spec import StructuralTag
from tests.text.grammar_model import CITY, Model

STRUCTURES = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<fn=a>", "schema": CITY, "end": "</fn>"},
        {"begin": "<fn=b>", "schema": {"type": "integer"}, "end": "</fn>"},
    ],
    "triggers": ["<fn="],
}


@pytest.mark.anyio
async def test_structural_tags_of_the_older_form(model: Model) -> None:
    spec = StructuralTag(STRUCTURES, "response_format")
    for text in (
        "plain",
        'so: <fn=a>{"city": "Rome"}</fn> and <fn=b>12</fn>.',
        "a < b",
        "<fn=b>1</fn><fn=b>2</fn>",
        "",
    ):
        assert await model.accepts(spec, text), text
    for text in ("<fn=c>", "<fn=b>x</fn>", '<fn=a>{"city": "Oslo"}</fn>', "<fn=b>1"):
        assert not await model.accepts(spec, text), text


def tag(begin: str, content: object, end: object = "</x>") -> dict[str, object]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


TEXT = {"type": "any_text"}
INTEGER = {"type": "json_schema", "json_schema": {"type": "integer"}}


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("format", "good", "bad"),
    [
        ({"type": "const_string", "value": "hi <tool_call>"}, ["hi <tool_call>"], ["hi"]),
        (INTEGER, ["12"], ["x", "1.5"]),
        ({"type": "regex", "pattern": "a+"}, ["aa"], ["", "b"]),
        ({"type": "grammar", "grammar": 'root ::= "x" [0-9]'}, ["x1"], ["x"]),
        ({"type": "any_text"}, ["anything\nat all", ""], []),
        (tag("<x>", INTEGER), ["<x>3</x>"], ["<x></x>", "3"]),
        (tag("<x>", TEXT), ["<x>a <b></x>"], ["<x>a", "<x>a</x>b"]),
        (tag("<tool_call>", TEXT, ["</tool_call>", "!"]), ["<tool_call>a!", "<tool_call>b</tool_call>"], []),
        ({"type": "sequence", "elements": [tag("<x>", INTEGER), TEXT]}, ["<x>3</x>", "<x>3</x> ok"], ["ok"]),
        ({"type": "or", "elements": [INTEGER, {"type": "const_string", "value": "none"}]}, ["7", "none"], ["no"]),
        ({"type": "star", "content": tag("<x>", INTEGER)}, ["", "<x>1</x><x>2</x>"], ["<x>"]),
        (
            {"type": "triggered_tags", "triggers": ["<x", "<tool_call>"],
             "at_least_one": True, "stop_after_first": True,
             "tags": [tag("<x>", INTEGER), tag("<tool_call>", INTEGER, "</tool_call>")]},
            ["see <x>1</x>", "<tool_call>5</tool_call>"],
            ["text", "<x>1</x> more", "<xy>", "<tool_call>x"],
        ),
        (
            {"type": "tags_with_separator", "separator": ", ", "at_least_one": True, "tags": [tag("<x>", INTEGER)]},
            ["<x>1</x>", "<x>1</x>, <x>2</x>"],
            ["", "<x>1</x><x>2</x>"],
        ),
    ],
)  # fmt: skip
async def test_structural_tags_of_the_newer_form(model: Model, format: object, good: list[str], bad: list[str]) -> None:
    spec = StructuralTag({"type": "structural_tag", "format": format}, "structural_tag")
    for text in good:
        assert await model.accepts(spec, text), text
    for text in bad:
        assert not await model.accepts(spec, text), text


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"format": {"type": "qwen_xml_parameter"}}, "'qwen_xml_parameter' is not supported"),
        ({"format": {"type": "sequence", "elements": [TEXT, INTEGER]}}, r"elements\[0\]: any_text can only"),
        ({"format": {"type": "tag", "begin": "<x>", "content": INTEGER}}, "format.end must be"),
        ({"format": 3}, "format must be an object"),
        ({}, "structural tag.structures must be"),
        ({"structures": [{"begin": "<x>", "schema": {}, "end": ""}], "triggers": ["<y"]}, "no trigger begins"),
        ({"structures": [{"begin": "<x>", "schema": 3, "end": ""}], "triggers": ["<x"]}, "must be a JSON schema"),
        ({"structures": [{"begin": 1}], "triggers": ["<x"]}, r"structures\[0\].begin must be a string"),
    ],
)  # fmt: skip
async def test_structural_tags_that_cannot_be_are_refused(model: Model, value: dict[str, object], told: str) -> None:
    with pytest.raises(InvalidRequest, match=told) as caught:
        await model.compiler.compile(StructuralTag(value, "structural_tag"))
    assert caught.value.param == "structural_tag"
