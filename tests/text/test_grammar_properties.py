"""Whatever the schema and whatever the choices among what is allowed: the output parses and validates."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import jsonschema
from hypothesis import given, settings
from hypothesis import strategies as st

from fdserve.demo import CHECKPOINT
from fdserve.text.grammar import Grammar, compiled
from fdserve.text.grammar_source import write_grammar
from fdserve.text.grammar_spec import JsonSchema, Spec, ToolCalls
from fdserve.text.grammar_vocabulary import GrammarVocabulary
from fdserve.text.reasoning import ReasoningFormat, resolve_reasoning
from fdserve.text.stream import TextStream, calls_of, content_of
from fdserve.text.tokenizer import load_tokenizer
from fdserve.text.tools import resolve_tools
from tests.text.decoding import allowed_ids, at_random, decode, text_of

TOKENIZER = load_tokenizer(CHECKPOINT)
EOS = (2, 4)
VOCAB_SIZE = TOKENIZER.vocab_size + 11
VOCABULARY = GrammarVocabulary(TOKENIZER, EOS, VOCAB_SIZE)
NAMES = ("a", "name", "x y", "日本", 'q"uote', "back\\slash", "🙂", "$ref")


def reasoning() -> ReasoningFormat:
    format = resolve_reasoning("ernie_x1", TOKENIZER, "")
    assert format is not None
    return format


def grammar(spec: Spec) -> Grammar:
    return Grammar(compiled(write_grammar(spec, VOCABULARY), VOCABULARY), VOCABULARY, reasoning(), spec)


def object_of(properties: dict[str, Any], required: int, more: object) -> dict[str, Any]:
    names = [name for bit, name in enumerate(properties) if required >> bit & 1]
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": more}


def bounded(kind: str, low: int, span: int, exclusive: bool) -> dict[str, Any]:
    keys = ("exclusiveMinimum", "exclusiveMaximum") if exclusive else ("minimum", "maximum")
    return {"type": kind, keys[0]: low, keys[1]: low + span + 2}


small = st.integers(0, 9)
patterns = ["^[a-z]{2,5}$", "^\\d{3}-\\w{2}$", "^(foo|bar)?x$", '^[^"\\\\]{1,4}$']
constants = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**6), 10**6), st.text(max_size=8), st.just([1, {"a": None}])
)
leaves = st.one_of(
    st.just({"type": "string", "maxLength": 20}),
    st.builds(lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more}, small, small),
    st.sampled_from(patterns).map(lambda pattern: {"type": "string", "pattern": pattern}),
    st.sampled_from(["date", "uuid", "ipv4"]).map(lambda name: {"type": "string", "format": name}),
    st.builds(bounded, st.sampled_from(["integer", "number"]), st.integers(-999, 999), small, st.booleans()),
    st.sampled_from([3, 10, 7]).map(lambda multiple: {"type": "integer", "multipleOf": multiple}),
    st.sampled_from(["integer", "number", "boolean", "null"]).map(lambda kind: {"type": kind}),
    st.just({"type": ["null", "integer"]}),
    st.lists(constants, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    constants.map(lambda value: {"const": value}),
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=1, max_size=3)
    properties = st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    return st.one_of(
        st.builds(object_of, properties, st.integers(0, 15), st.one_of(st.just(False), st.just(False), inner)),
        st.builds(
            lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
            inner, st.integers(0, 2), st.integers(0, 2),
        ),
        several.map(lambda items: {"type": "array", "prefixItems": items, "items": False}),
        several.map(lambda options: {"anyOf": options}),
        inner.map(lambda schema: {"allOf": [schema]}),
    )  # fmt: skip


schemas = st.recursive(leaves, containers, max_leaves=8)
objects = st.builds(
    object_of, st.dictionaries(st.sampled_from(NAMES), schemas, max_size=4), st.integers(0, 15), st.just(False)
)
TREE = {
    "$defs": {"node": object_of({"value": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}}, 1, False)},
    "$ref": "#/$defs/node",
}


def generate(spec: Spec, seed: int, thinking: bool | None) -> tuple[str, str, str]:
    """(reasoning, content, how it ended)"""
    constraint = grammar(spec).constraint(thinking)
    thought: list[int] = []
    if thinking:
        thought = [*TOKENIZER.encode("hm {"), reasoning().think_end]
    for token_id in thought:
        assert token_id in allowed_ids(constraint.mask() or b"")
        constraint.advance(token_id)
    choose = at_random(random.Random(seed), TOKENIZER, EOS, hurry=random.Random(seed).choice((0, 10, 60)))
    out = decode(constraint, VOCAB_SIZE, EOS, choose, max_tokens=1500)
    if thinking is None:
        return "", text_of(TOKENIZER, out.ids).decode(), out.ended
    stream = TextStream(TOKENIZER, format=reasoning(), thinking=thinking, hidden=EOS)
    delta, rest = stream.push(thought + out.ids), stream.finish()
    return delta.reasoning + rest.reasoning, content_of([*delta.parts, *rest.parts]), out.ended


def check(schema: Mapping[str, Any] | bool, text: str) -> None:
    value = json.loads(text)
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(value)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(schema=schemas, seed=st.integers(0, 1000), thinking=st.sampled_from([None, False, True]))
def test_random_outputs_validate(schema: dict[str, Any], seed: int, thinking: bool | None) -> None:
    reasoned, content, ended = generate(JsonSchema(schema, True, "response_format"), seed, thinking)
    assert reasoned == ("hm {" if thinking else "")
    assert ended in ("finished", "eos")
    check(schema, content)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
def test_recursive_schemas_validate(seed: int) -> None:
    _, content, ended = generate(JsonSchema(TREE, True, "response_format"), seed, None)
    assert ended == "finished"
    check(TREE, content)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(schema=objects, seed=st.integers(0, 1000))
def test_random_calls_validate(schema: dict[str, Any], seed: int) -> None:
    spec = ToolCalls({"f": schema}, "f", True, "ernie_x1", "tools", frozenset({"f"}))
    _, text, ended = generate(spec, seed, None)
    assert ended == "finished"
    call = json.loads(text.strip().removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert call["name"] == "f"
    check(schema, json.dumps(call["arguments"]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(schema=objects, seed=st.integers(0, 1000), thinking=st.booleans(), form=st.sampled_from(["ernie_x1", "think"]))
def test_what_is_generated_as_calls_is_read_as_calls(
    schema: dict[str, Any], seed: int, thinking: bool, form: str
) -> None:
    format = resolve_reasoning(form, TOKENIZER, "")
    tools = resolve_tools("ernie_x1", TOKENIZER, "")
    assert format is not None
    spec = ToolCalls({"f": schema, 'a "b"': None}, "required", True, "ernie_x1", "tools", frozenset({"f"}))
    matcher = compiled(write_grammar(spec, VOCABULARY), VOCABULARY)
    constraint = Grammar(matcher, VOCABULARY, format, spec).constraint(thinking)
    thought = [*TOKENIZER.encode("hm"), format.think_end] if thinking else []
    for token_id in thought:
        constraint.advance(token_id)
    choose = at_random(random.Random(seed), TOKENIZER, EOS, hurry=20)
    out = decode(constraint, VOCAB_SIZE, EOS, lambda ids: choose([i for i in ids if i != format.think_start]), 3000)
    assert out.ended == "eos"
    stream = TextStream(TOKENIZER, format=format, thinking=thinking, hidden=EOS, tools=tools)
    deltas = [stream.push([token_id]) for token_id in thought + out.ids] + [stream.finish()]
    parts = [part for delta in deltas for part in delta.parts]
    assert content_of(parts).strip() == ""
    pieces = calls_of(parts)
    names = [piece.name for piece in pieces if piece.name is not None]
    assert stream.complete_calls == len(names) >= 1
    for index, name in enumerate(names):
        arguments = "".join(piece.arguments for piece in pieces if piece.index == index)
        check(schema if name == "f" else {"type": "object"}, arguments)
