"""Each kind of structured output, as a model would be made to write it."""

from __future__ import annotations

import json
import random
import re

import jsonschema
import pytest

from fdserve.errors import InvalidRequest
from fdserve.text import grammar
from fdserve.text.grammar_spec import Choice, JsonSchema, Lark, Regex
from fdserve.text.grammar_vocabulary import GrammarVocabulary
from fdserve.text.stream import TextStream, content_of
from fdserve.text.tokenizer import Tokenizer
from tests.text.decoding import allowed_ids, at_random, decode, text_of
from tests.text.grammar_model import PERSON, Model


@pytest.mark.anyio
async def test_json_follows_its_schema_with_every_kind_of_tokenizer(tokenizer: Tokenizer) -> None:
    model = Model(tokenizer)
    for seed in range(20):
        out = await model.random(JsonSchema(PERSON, True, "response_format"), seed=seed)
        assert out.ended == "finished"
        jsonschema.validate(json.loads(model.text(out)), PERSON)


@pytest.mark.anyio
async def test_choice_is_exact(model: Model) -> None:
    choices = ["yes", "yes!", "no", 'a "quoted" \\ / one', "line\nbreak", "北京", "<think>", "<|im_end|>", "😀"]
    for choice in choices:
        assert await model.accepts(Choice(choices, "guided_choice"), choice)
    for seed in range(30):
        assert model.text(await model.random(Choice(choices, "guided_choice"), seed=seed)) in choices
    assert not await model.accepts(Choice(choices, "guided_choice"), "ye")


@pytest.mark.anyio
async def test_regex_matches_the_whole_text(model: Model) -> None:
    patterns = [
        r"^[a-z]{3,6}\d{2}$",
        r"a/b|c\/d",
        r"(foo|bar)+baz?",
        r"(?i)yes",
        r"[一-龥]{1,3}",
        "a\nb",
        r"\w{1,9}@\w{1,9}\.(com|org)",
    ]
    for pattern in patterns:
        for seed in range(10):
            out = await model.random(Regex(pattern, "guided_regex"), seed=seed, hurry=5)
            assert out.ended != "length"
            assert re.fullmatch(pattern, model.text(out)), pattern
    assert await model.accepts(Regex(r"\d+ ?%", "guided_regex"), "42 %")
    assert not await model.accepts(Regex(r"\d+ ?%", "guided_regex"), "42 % ")


@pytest.mark.anyio
@pytest.mark.parametrize(
    "source",
    [
        'start: item ("," item)*\nitem: WORD "=" /[0-9]+/\nWORD: /[a-z]+/\n',
        'root ::= item ("," item)*\nitem ::= word "=" [0-9]+\nword ::= [a-z]+\n',
        '?start: item\n    | start "," item\n?item: /[a-z]+/ "=" NUMBER\nNUMBER: /[0-9]/+\n',
    ],
    ids=["lark", "gbnf", "lark with inlined rules"],
)
async def test_grammars_in_lark_and_in_gbnf(model: Model, source: str) -> None:
    spec = Lark(source, "guided_grammar")
    assert await model.accepts(spec, "a=1")
    assert await model.accepts(spec, "width=10,height=203")
    assert not await model.accepts(spec, "width=,")
    for seed in range(10):
        text = model.text(await model.random(spec, seed=seed, hurry=5))
        assert re.fullmatch(r"[a-z]+=[0-9]+(,[a-z]+=[0-9]+)*", text)


@pytest.mark.anyio
async def test_gbnf_escapes_and_json_inside_lark(model: Model) -> None:
    assert await model.accepts(Lark('root ::= "\\u4e2d\\u0041\\n" [^\\n]\n', "guided_grammar"), "中A\n/")
    spec = Lark('start: "v=" v\nv: %json {"type": "array", "items": {"type": "integer"}}\n', "guided_grammar")
    assert await model.accepts(spec, "v=[1, 2]")
    assert not await model.accepts(spec, "v=[1,  2]")


@pytest.mark.anyio
async def test_json_object_without_a_schema(model: Model) -> None:
    for seed in range(10):
        out = await model.random(JsonSchema(None, True, "response_format"), seed=seed)
        assert out.ended == "finished"
        assert isinstance(json.loads(model.text(out)), dict)


@pytest.mark.anyio
async def test_json_may_be_laid_out_but_never_with_endless_space(model: Model) -> None:
    value = {"name": "Ann", "age": 3}
    spec = JsonSchema(PERSON, True, "response_format")
    for layout in (
        json.dumps(value),
        json.dumps(value, separators=(",", ":")),
        json.dumps(value, indent=2),
        json.dumps(value, indent=8),
    ):
        assert await model.accepts(spec, layout)
    for space in ("  ", "\n\n", "\t", "\n" + " " * 41, " \n"):
        assert not await model.accepts(spec, json.dumps(value).replace(" ", space, 1))
    assert not await model.accepts(spec, " " + json.dumps(value))
    # A model that likes nothing better than white space still gets to the end.
    constraint = (await model.compiler.compile(JsonSchema({"const": {"a": [1]}}, True, "x"))).constraint(None)
    blank = {i for i in range(model.tokenizer.vocab_size) if model.tokenizer.token_bytes(i).isspace()}
    out = decode(constraint, model.vocab_size, model.eos, lambda ids: next((i for i in ids if i in blank), ids[0]), 600)
    assert out.ended == "finished"


@pytest.mark.anyio
async def test_strict_names_what_it_cannot_enforce_and_lenient_ignores_it(model: Model) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    with pytest.raises(InvalidRequest, match="uniqueItems") as caught:
        await model.compiler.compile(JsonSchema(schema, True, "response_format.json_schema.schema"))
    assert caught.value.param == "response_format.json_schema.schema"
    assert await model.accepts(JsonSchema(schema, False, "response_format"), "[1, 1]")


@pytest.mark.anyio
async def test_strings_hold_tags_and_no_half_characters(model: Model) -> None:
    spec = JsonSchema({"type": "string"}, True, "x")
    out = await model.wishing(spec, '"</think> 😀 <tool_call>"')
    assert model.text(out) == '"</think> 😀 <tool_call>"'
    tags = {model.tokenizer.token_id(tag) for tag in ("<think>", "</think>", "<response>", "<tool_call>")}
    assert tags.isdisjoint(out.ids)
    assert not await model.accepts(spec, r'"\ud83d"')
    assert await model.accepts(JsonSchema({"const": "a\u0001b"}, True, "x"), r'"a\u0001b"')


@pytest.mark.anyio
async def test_characters_may_be_split_over_byte_tokens(model: Model) -> None:
    constraint = (await model.compiler.compile(Choice(["é😀龘"], "guided_choice"))).constraint(None)
    pieces = {model.tokenizer.token_bytes(i): i for i in reversed(range(model.tokenizer.vocab_size))}
    for byte in "é😀龘".encode():
        mask = constraint.mask()
        assert mask is not None
        assert pieces[bytes([byte])] in allowed_ids(mask)
        assert not constraint.finished
        constraint.advance(pieces[bytes([byte])])
    assert constraint.finished
    assert allowed_ids(constraint.mask() or b"") == model.eos


@pytest.mark.anyio
async def test_eos_is_allowed_just_where_the_text_may_end(model: Model) -> None:
    constraint = (await model.compiler.compile(Regex("ab*|abbc", "guided_regex"))).constraint(None)
    a, b, c = (model.tokenizer.encode(char)[-1] for char in "abc")
    for token_id, may_end in ((a, True), (b, True), (b, True), (c, True)):
        constraint.advance(token_id)
        assert (set(model.eos) <= set(allowed_ids(constraint.mask() or b""))) is may_end
    assert constraint.finished
    fresh = (await model.compiler.compile(Regex("ab*|abbc", "guided_regex"))).constraint(None)
    assert set(model.eos).isdisjoint(allowed_ids(fresh.mask() or b""))
    with pytest.raises(InvalidRequest, match="guided_regex"):
        fresh.advance(c)


@pytest.mark.anyio
async def test_an_eos_that_ends_nothing_still_completes_the_text(model: Model) -> None:
    constraint = (await model.compiler.compile(Regex("a+", "guided_regex"))).constraint(None)
    constraint.advance(model.tokenizer.encode("a")[-1])
    assert not constraint.finished
    constraint.advance(model.eos[0])
    assert constraint.finished
    assert allowed_ids(constraint.mask() or b"") == model.eos


@pytest.mark.anyio
async def test_constraints_of_one_grammar_are_apart(model: Model) -> None:
    compiled = await model.compiler.compile(Choice(["ab", "cd"], "guided_choice"))
    first, second = compiled.constraint(None), compiled.constraint(None)
    before = second.mask()
    first.advance(model.tokenizer.encode("a")[-1])
    assert second.mask() == before
    assert first.mask() != before


def stream(model: Model, thinking: bool, ids: list[int]) -> tuple[str, str]:
    """(reasoning, content) as a client gets them."""
    stream = TextStream(model.tokenizer, format=model.format, thinking=thinking, hidden=model.eos)
    delta, rest = stream.push(ids), stream.finish()
    return delta.reasoning + rest.reasoning, content_of([*delta.parts, *rest.parts])


@pytest.mark.anyio
@pytest.mark.parametrize("reasoning", ["think", "ernie_x1"])
async def test_the_grammar_begins_after_the_thought(ernie: Tokenizer, reasoning: str) -> None:
    model = Model(ernie, reasoning)
    assert model.format is not None
    spec = JsonSchema(PERSON, True, "response_format")
    constraint = (await model.compiler.compile(spec)).constraint(True)
    thought = [*ernie.encode("\nthe quick </ brown{"), model.format.think_end]
    for token_id in thought:
        allowed = set(allowed_ids(constraint.mask() or b""))
        assert token_id in allowed
        assert allowed.isdisjoint(model.eos)
        assert not constraint.finished
        constraint.advance(token_id)
    out = decode(constraint, model.vocab_size, model.eos, at_random(random.Random(1), ernie, model.eos))
    assert out.ended == "finished"
    reasoned, content = stream(model, True, thought + out.ids)
    assert reasoned == "the quick </ brown{"
    jsonschema.validate(json.loads(content), PERSON)
    if reasoning == "ernie_x1":
        assert text_of(ernie, out.ids).startswith(b"\n\n<response>\n{")
        assert model.format.response_start in out.ids


@pytest.mark.anyio
async def test_a_thought_ended_by_force_leads_into_the_same_layout(ernie: Tokenizer) -> None:
    model = Model(ernie, "ernie_x1")
    assert model.format is not None
    newline = ernie.encode("\n")
    constraint = (await model.compiler.compile(Choice(["yes", "no"], "guided_choice"))).constraint(True)
    forced = [*newline, model.format.think_end, *newline, *newline]  # the two newlines as tokens of their own
    for token_id in forced:
        constraint.advance(token_id)
    assert allowed_ids(constraint.mask() or b"") == [model.format.response_start]
    out = decode(constraint, model.vocab_size, model.eos, at_random(random.Random(1), ernie, model.eos))
    assert stream(model, True, forced + out.ids)[1] in ("yes", "no")


@pytest.mark.anyio
@pytest.mark.parametrize("reasoning", ["none", "think", "ernie_x1"])
async def test_without_a_thought_the_content_is_the_grammars_text(ernie: Tokenizer, reasoning: str) -> None:
    model = Model(ernie, reasoning)
    opener = model.format.think_start if model.format is not None else None
    spec = Regex(r"\n?[ab]{1,5}\n?", "guided_regex")
    for seed in range(20):
        out = await model.random(spec, thinking=False, seed=seed, hurry=4)
        if reasoning == "think" and opener in out.ids:
            continue  # chance opened a thought of its own
        assert out.ended != "length"
        content = stream(model, False, out.ids)[1]
        assert re.fullmatch(spec.pattern, content)


@pytest.mark.anyio
async def test_what_a_model_writes_around_its_answer_is_allowed(ernie: Tokenizer) -> None:
    spec = Choice(["yes", "no"], "guided_choice")
    x1 = Model(ernie, "ernie_x1")
    out = await x1.wishing(spec, "<response>\nyes", thinking=False)
    assert text_of(ernie, out.ids) == b"<response>\nyes"
    think = Model(ernie, "think")
    out = await think.wishing(spec, "<think>\nhm\n</think>\n\nno", thinking=False)
    assert text_of(ernie, out.ids) == b"<think>\nhm\n</think>\n\nno"
    assert stream(think, False, out.ids) == ("hm", "no")
    for model in (x1, think):
        out = await model.wishing(spec, "<think>yes", thinking=None)
        assert text_of(ernie, out.ids) in (b"yes", b"no")


@pytest.mark.anyio
async def test_identical_grammars_are_compiled_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[str] = []
    real = grammar.compiled

    def noted(source: str, vocabulary: GrammarVocabulary) -> object:
        sources.append(source)
        return real(source, vocabulary)

    monkeypatch.setattr(grammar, "compiled", noted)
    for _ in range(3):
        await model.compiler.compile(Choice(["a", "b"], "guided_choice"))
        await model.compiler.compile(Choice(["b", "a", "b"], "another_field"))
    assert len(sources) == 1
    for number in range(grammar.CACHED_GRAMMARS):
        await model.compiler.compile(Choice([str(number)], "guided_choice"))
    await model.compiler.compile(Choice(["a", "b"], "guided_choice"))
    assert len(sources) == grammar.CACHED_GRAMMARS + 2
