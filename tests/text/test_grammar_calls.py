"""Tool calls, forced and free."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import jsonschema
import pytest

from fdserve.errors import InvalidRequest
from fdserve.text.grammar_spec import ToolCalls
from fdserve.text.tokenizer import Tokenizer, load_tokenizer
from tests.text.decoding import allowed_ids, at_random, decode, text_of, writing
from tests.text.grammar_model import CITY, Model

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
        begin, end = (out.ids.count(ernie.token_id(tag) or 0) for tag in ("<tool_call>", "</tool_call>"))
        assert begin == end == len(calls) >= 1
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
