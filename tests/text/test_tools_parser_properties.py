"""Calls of any layout, whole, cut off or broken, wherever the text is split."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdserve.text.tools_parser import ToolCallParser
from tests.text.parsed_calls import HERMES, Seen, parse, parse_anyhow

TRICKY = ["<tool_call>", "</tool_call>", "<", '"', "\\", "{", "}", "\n", "é", "😀", "a", " ", "</response>"]
TEXTS = st.lists(st.sampled_from(TRICKY), max_size=5).map("".join) | st.text(max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
LAYOUT = st.sampled_from(["", "\n", " ", "\n\n\n"])


@dataclass
class Written:
    text: str
    calls: list[list[str]]


@st.composite
def written_call(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A call as a model may write it, and what it says."""
    name = draw(st.text(min_size=1, max_size=6).filter(lambda text: text.isprintable()))
    ascii, indent = draw(st.booleans()), draw(st.sampled_from([None, 1]))
    arguments = json.dumps(draw(st.dictionaries(TEXTS, JSON, max_size=3)), ensure_ascii=ascii, indent=indent)
    value = json.dumps(arguments, ensure_ascii=ascii) if draw(st.booleans()) else arguments
    members = [
        ("name", json.dumps(name, ensure_ascii=ascii)),
        (draw(st.sampled_from(["arguments", "parameters"])), value),
    ]
    if draw(st.booleans()):
        members.insert(draw(st.integers(0, 2)), ("extra", json.dumps(draw(JSON))))
    if draw(st.booleans()):
        members.reverse()
    space = draw(LAYOUT)
    inside = f",{space}".join(f"{json.dumps(key)}{space}:{space}{value}" for key, value in members)
    return f"{{{space}{inside}{space}}}", [name, arguments]


@st.composite
def written_block(draw: st.DrawFn) -> Written:
    calls = draw(st.lists(written_call(), min_size=1, max_size=3))
    space = draw(LAYOUT)
    inside = calls[0][0]
    if len(calls) > 1 or draw(st.booleans()):
        inside = "[" + f"{space},{space}".join(text for text, _ in calls) + "]"
    return Written(f"<tool_call>{space}{inside}{space}</tool_call>", [said for _, said in calls])


@settings(max_examples=60)
@given(
    blocks=st.lists(written_block(), min_size=1, max_size=2),
    space=LAYOUT,
    text=st.sampled_from(["", "Well: é", "<"]),
    random=st.randoms(use_true_random=False),
)
def test_every_call_comes_out_as_written_wherever_it_is_split(
    blocks: list[Written], space: str, text: str, random: Random
) -> None:
    whole = text + "".join(f"{space}{block.text}{space}" for block in blocks) + text
    calls = [call for block in blocks for call in block.calls]
    assert parse_anyhow(whole, random.sample(range(1, len(whole)), 12)) == Seen(text + text, calls, len(calls))


@settings(max_examples=60)
@given(block=written_block(), random=st.randoms(use_true_random=False))
def test_a_call_that_is_cut_off_is_the_beginning_of_the_whole(block: Written, random: Random) -> None:
    for length in random.sample(range(len(block.text)), 16):
        seen = parse([block.text[:length]])
        assert seen.content == ("" if seen.calls else block.text[:length])
        assert seen.complete == 0
        for (name, arguments), (whole_name, whole) in zip(seen.calls, block.calls, strict=False):
            assert name == whole_name
            assert arguments == whole[: len(arguments)]


PARTS = [
    *TRICKY,
    '{"name": "f"',
    ', "arguments": {',
    ', "arguments": "{',
    "}}",
    '}"}',
    "[",
    "]",
    ",",
    ":",
    "1",
    "</tool_",
]


@settings(max_examples=400)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=14))
def test_anything_can_come(parts: list[str]) -> None:
    text = "".join(parts)
    seen = parse([text])
    assert parse(list(text)) == parse(parts) == seen
    assert seen.complete <= len(seen.calls)
    if not seen.calls:
        assert seen.content == text
    rest = iter(text)
    assert all(char in rest for char in seen.content)
    if seen.complete == len(seen.calls):
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in seen.calls)


@pytest.mark.parametrize("piece", ["<tool_call>", "\n", '{"', "a <", '<tool_call>{"name":"f","arguments":{"'])
@pytest.mark.parametrize("start", ["", '{"name":"', '{"arguments":{"', '{"arguments":"{', '{"name":"f","x":'])
def test_long_outputs_take_linear_time(start: str, piece: str) -> None:
    parser = ToolCallParser(HERMES)
    started = time.process_time()
    parser.push("<tool_call>" + start)
    for _ in range(20_000):
        parser.push(piece)
    parser.flush()
    assert time.process_time() - started < 3
