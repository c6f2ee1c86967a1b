"""Each kind of structured output, as a model would be made to write it."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import jsonschema
import pytest

from fdserve.errors import InvalidRequest
from fdserve.text import grammar
from fdserve.text.grammar import (
    Choice,
    GrammarCompiler,
    JsonSchema,
    Lark,
    Regex,
    Spec,
    StructuralTag,
    ToolCalls,
)
from fdserve.text.reasoning import ReasoningFormat
from fdserve.text.stream import TextStream
from fdserve.text.tokenizer import Tokenizer, load_tokenizer
from tests.text.decoding import Decoded, allowed_ids, at_random, decode, text_of, writing

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
EXTRA_IDS = 37  # that the model has beyond its tokenizer


def formats(tokenizer: Tokenizer) -> dict[str, ReasoningFormat | None]:
    ids = [tokenizer.token_id(tag) for tag in ("<think>", "</think>", "<response>", "</response>")]
    start, end, response_start, response_end = ids
    assert start is not None
    assert end is not None
    return {
        "none": None,
        "think": ReasoningFormat("think", start, end),
        "ernie_x1": ReasoningFormat("ernie_x1", start, end, response_start, response_end),
    }


class Model:
    """What stands for a model: a tokenizer, its eos ids and a reasoning format."""

    def __init__(self, tokenizer: Tokenizer, reasoning: str = "none", **options: float) -> None:
        self.tokenizer = tokenizer
        self.format = formats(tokenizer)[reasoning] if reasoning != "none" else None
        eos = tokenizer.eos_token_id
        end = tokenizer.token_id("<|im_end|>")
        self.eos = sorted({i for i in (eos, end) if i is not None})
        self.vocab_size = tokenizer.vocab_size + EXTRA_IDS
        self.compiler = GrammarCompiler(tokenizer, self.eos, self.format, self.vocab_size, **options)

    async def random(self, spec: Spec, thinking: bool | None = None, seed: int = 0, hurry: int = 40) -> Decoded:
        constraint = (await self.compiler.compile(spec)).constraint(thinking)
        return decode(
            constraint, self.vocab_size, self.eos, at_random(random.Random(seed), self.tokenizer, self.eos, hurry)
        )

    async def wishing(self, spec: Spec, text: str, thinking: bool | None = None) -> Decoded:
        constraint = (await self.compiler.compile(spec)).constraint(thinking)
        return decode(constraint, self.vocab_size, self.eos, writing(self.tokenizer, text.encode(), self.eos))

    async def accepts(self, spec: Spec, text: str) -> bool:
        """Whether the output may be this text: every token allowed, the end too."""
        out = await self.wishing(spec, text)
        return text_of(self.tokenizer, out.ids) == text.encode() and out.ended != "length"

    def text(self, out: Decoded) -> str:
        return text_of(self.tokenizer, out.ids).decode()


@pytest.fixture
def model(ernie: Tokenizer) -> Model:
    return Model(ernie)


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


def stream(model: Model, thinking: bool, ids: list[int]) -> tuple[str, str]:
    """(reasoning, content) as a client gets them."""
    stream = TextStream(model.tokenizer, format=model.format, thinking=thinking, hidden=model.eos)
    delta, rest = stream.push(ids), stream.finish()
    return delta.reasoning + rest.reasoning, delta.content + rest.content


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
    spec = Regex(r"\n?[ab]{1,5}\n?", "guided_regex")
    for seed in range(20):
        out = await model.random(spec, thinking=False, seed=seed, hurry=4)
        if reasoning == "think" and model.format.think_start in out.ids:
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


TOOLS = {"get_weather": CITY, 'say "hi"': None, "add": {"properties": {"a": {"type": "integer"}}}}


def calls_of(text: str) -> list[dict[str, object]]:
    found = re.findall(r"<tool_call>\n(.*?)\n</tool_call>", text, re.DOTALL)
    return [json.loads(call) for call in found]


def tool_calls(mode: str, parallel: bool = True, strict: frozenset[str] = frozenset()) -> ToolCalls:
    return ToolCalls(TOOLS, mode, parallel, "ernie_x1", "tools", strict)


@pytest.mark.anyio
@pytest.mark.parametrize("thinking", [None, False, True])
async def test_required_calls_are_whole_and_follow_their_schemas(ernie: Tokenizer, thinking: bool | None) -> None:
    model = Model(ernie, "ernie_x1")
    for seed in range(20):
        constraint = (await model.compiler.compile(tool_calls("required"))).constraint(thinking)
        if thinking:
            assert model.format is not None
            constraint.advance(model.format.think_end)
        out = decode(constraint, model.vocab_size, model.eos, at_random(random.Random(seed), ernie, model.eos), 900)
        assert out.ended == "eos"
        text = text_of(ernie, out.ids).decode()
        calls = calls_of(text)
        assert out.ids.count(ernie.token_id("<tool_call>")) == len(calls) >= 1
        assert out.ids.count(ernie.token_id("</tool_call>")) == len(calls)
        assert not re.sub(r"<tool_call>\n.*?\n</tool_call>", "", text, flags=re.DOTALL).strip("\n")
        for call in calls:
            assert list(call) == ["name", "arguments"]
            jsonschema.validate(call["arguments"], TOOLS[str(call["name"])] or {"type": "object"})
            assert isinstance(call["arguments"], dict)


@pytest.mark.anyio
async def test_several_calls_and_a_line_break_at_the_end(ernie: Tokenizer) -> None:
    model = Model(ernie, "ernie_x1")
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    for text in (f"{call}\n", f"{call}\n{call}", f"{call}\n\n{call}\n"):
        constraint = (await model.compiler.compile(tool_calls("required"))).constraint(False)
        choose = writing(ernie, text.encode(), model.eos)
        out = decode(constraint, model.vocab_size, model.eos, choose, 200)
        assert (out.ended, text_of(ernie, out.ids).decode()) == ("eos", text)


@pytest.mark.anyio
async def test_one_call_where_one_is_asked_for(model: Model) -> None:
    for seed in range(10):
        for spec in (tool_calls("add"), tool_calls("required", parallel=False)):
            out = await model.random(spec, seed=seed)
            assert out.ended == "finished"
            (call,) = calls_of(model.text(out))
            assert call["name"] == "add" or spec.mode != "add"


@pytest.mark.anyio
async def test_calls_come_as_the_template_writes_them(ernie: Tokenizer) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    for reasoning in ("ernie_x1", "think"):
        model = Model(ernie, reasoning)
        assert model.format is not None
        for text in (f"\n\n\n{call}", call, f"\n\n{call}\n\n{call}", f"\n{call}\n{call}"):
            constraint = (await model.compiler.compile(tool_calls("required"))).constraint(True)
            constraint.advance(model.format.think_end)
            out = decode(constraint, model.vocab_size, model.eos, writing(ernie, text.encode(), model.eos))
            assert text_of(ernie, out.ids).decode() == text


@pytest.mark.anyio
async def test_free_calls_are_held_to_their_schemas(ernie: Tokenizer) -> None:
    model = Model(ernie, "ernie_x1")
    spec = tool_calls("auto", strict=frozenset({"get_weather"}))
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    for text in ("just text", "", call, f"\n\n<response>\nI look.\n</response>\n\n{call}\n\n{call}\nso"):
        assert await model.accepts(spec, text), text
    assert not await model.accepts(spec, call.replace("Rome", "Oslo"))
    assert not await model.accepts(spec, "<tool_call>hi")
    # Nor can a call be spelled out in letters, past the schema.
    spelled = [ernie.encode(char)[-1] for char in "<tool_call"]
    constraint = (await model.compiler.compile(spec)).constraint(False)
    for token_id in spelled:
        assert token_id in allowed_ids(constraint.mask() or b"")
        constraint.advance(token_id)
    assert ernie.encode(">")[-1] not in allowed_ids(constraint.mask() or b"")
    one = tool_calls("auto", parallel=False, strict=frozenset({"get_weather"}))
    assert await model.accepts(one, f"now: {call} done")
    assert not await model.accepts(one, f"{call}\n{call}")


@pytest.mark.anyio
async def test_calls_without_tokens_of_their_own_are_spelled(byte_level_dir: Path) -> None:
    model = Model(load_tokenizer(byte_level_dir))
    assert model.tokenizer.token_id("<tool_call>") is None
    for mode in ("required", "auto"):
        spec = tool_calls(mode, strict=frozenset({"add"}))
        assert await model.accepts(spec, '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>')
        assert not await model.accepts(spec, '<tool_call>\n{"name": "sub", "arguments": {"a": 1}}\n</tool_call>')
    assert await model.accepts(tool_calls("auto"), "text < more")


@pytest.mark.anyio
async def test_tools_that_cannot_be_are_refused_by_name(model: Model) -> None:
    with pytest.raises(InvalidRequest, match="no tool 'sub'"):
        await model.compiler.compile(tool_calls("sub"))
    bad = ToolCalls({"add": {"not": {}}, "ok": None}, "auto", True, "ernie_x1", "tools", frozenset({"add"}))
    with pytest.raises(InvalidRequest, match=r"tool 'add'.*not") as caught:
        await model.compiler.compile(bad)
    assert caught.value.param == "tools"


@pytest.mark.anyio
async def test_identical_grammars_are_compiled_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = []
    real = grammar.compiled
    monkeypatch.setattr(
        grammar, "compiled", lambda source, vocabulary: sources.append(source) or real(source, vocabulary)
    )
    for _ in range(3):
        await model.compiler.compile(Choice(["a", "b"], "guided_choice"))
        await model.compiler.compile(Choice(["b", "a", "b"], "another_field"))
    assert len(sources) == 1
    for number in range(grammar.CACHED_GRAMMARS):
        await model.compiler.compile(Choice([str(number)], "guided_choice"))
    await model.compiler.compile(Choice(["a", "b"], "guided_choice"))
    assert len(sources) == grammar.CACHED_GRAMMARS + 2
