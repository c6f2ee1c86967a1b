from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdserve.text.tools import ToolCallDelta, ToolFormat
from fdserve.text.tools_parser import ToolCallParser

HERMES = ToolFormat("hermes")


@dataclass
class Seen:
    """What the events come to: the content, and every call's name and arguments."""

    content: str = ""
    calls: list[list[str]] = field(default_factory=list)
    complete: int = 0


def gather(events: list[str | ToolCallDelta]) -> Seen:
    """Checks the order of the deltas on the way."""
    seen = Seen()
    ids = set()
    for event in events:
        if isinstance(event, str):
            assert event
            seen.content += event
        elif event.id is not None:
            assert re.fullmatch("call_[0-9a-f]{24}", event.id)
            assert event.id not in ids
            ids.add(event.id)
            assert event.name
            assert (event.index, event.arguments) == (len(seen.calls), "")
            seen.calls.append([event.name, ""])
        else:
            assert event.name is None
            assert event.index == len(seen.calls) - 1
            assert event.arguments
            seen.calls[-1][1] += event.arguments
    return seen


def parse(pieces: list[str]) -> Seen:
    parser = ToolCallParser(HERMES)
    events = [event for piece in pieces for event in parser.push(piece)]
    seen = gather(events + parser.flush())
    seen.complete = parser.complete_calls
    return seen


def parse_anyhow(text: str) -> Seen:
    """The text in one piece, after it has been split everywhere with the same outcome."""
    whole = parse([text])
    assert parse(list(text)) == whole
    for cut in range(1, len(text)):
        assert parse([text[:cut], text[cut:]]) == whole
    return whole


def block(inside: str) -> str:
    return f"<tool_call>\n{inside}\n</tool_call>"


class TestCalls:
    @pytest.mark.parametrize(
        ("inside", "calls"),
        [
            ('{"name": "f", "arguments": {"a": 1}}', [["f", '{"a": 1}']]),
            ('{"name":"f","arguments":{}}', [["f", "{}"]]),
            ('{"name": "f", "parameters": {"a": [1, {"b": "}"}]}}', [["f", '{"a": [1, {"b": "}"}]}']]),
            ('{"arguments": {"a": 1}, "name": "f"}', [["f", '{"a": 1}']]),
            ('{"name": "f", "arguments": "{\\"a\\": \\"\\\\n\\u00e9\\"}"}', [["f", '{"a": "\\né"}']]),
            ('{"arguments": " {\\"a\\": 1}\\n", "name": "f"}', [["f", ' {"a": 1}\n']]),
            ('{"name": "f"}', [["f", "{}"]]),
            ('{"id": "x", "type": "function", "name": "f", "n": 1.5, "arguments": {}, "z": [{}]}', [["f", "{}"]]),
            (
                '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"b": 2}}]',
                [["f", "{}"], ["g", '{"b": 2}']],
            ),
            ('[{"name": "f"}]', [["f", "{}"]]),
            ('{"name": "f\\u00e9 \\"x", "arguments": {}}', [['fé "x', "{}"]]),
            (
                '{"name": "f", "arguments": {"a": "</tool_call><tool_call>{"}}',
                [["f", '{"a": "</tool_call><tool_call>{"}']],
            ),
            ('{"name": "f", "arguments": {"a": "x\ny"}}', [["f", '{"a": "x\\ny"}']]),
            (
                '{"name": "\\ud800", "arguments": "{\\"a\\": \\"\\ud83d\\ude00\\udc00\\"}"}',
                [["\ufffd", '{"a": "😀\ufffd"}']],
            ),
            # A key that comes again is skipped.
            ('{"name": "f", "arguments": {"a": 1}, "name": "g", "parameters": 5}', [["f", '{"a": 1}']]),
        ],
    )
    def test_one_block(self, inside: str, calls: list[list[str]]) -> None:
        assert parse_anyhow(block(inside)) == Seen("", calls, len(calls))
        assert parse(["<tool_call>", inside, "</tool_call>"]) == Seen("", calls, len(calls))

    @pytest.mark.parametrize("wrong", ["}", "}}}", "}]", "}\n}", "", "\n", "]"])
    def test_brackets_after_complete_arguments_are_forgiven(self, wrong: str) -> None:
        seen = parse_anyhow(f'<tool_call>{{"name": "f", "arguments": {{"a": 1}}{wrong}</tool_call>b')
        assert seen == Seen("b", [["f", '{"a": 1}']], 1)
        seen = parse_anyhow(f'<tool_call>[{{"name": "f", "arguments": {{"a": 1}}{wrong}</tool_call>b')
        assert seen == Seen("b", [["f", '{"a": 1}']], 1)

    @pytest.mark.parametrize(
        ("before", "between", "after", "content"),
        [
            ("", "", "", ""),
            ("\n\n\n", "\n", "\n", ""),
            ("Let me see.\n\n", "\n", " \n", "Let me see."),
            (" a ", " b ", "\tc\n", " abc\n"),
            ("<tool", "<<", "</tool_call>", "<tool<<</tool_call>"),
            ("a < b\n", " <tool_calls>", "", "a < b<tool_calls>"),
        ],
    )
    def test_layout(self, before: str, between: str, after: str, content: str) -> None:
        call = block('{"name": "f", "arguments": {}}')
        assert parse_anyhow(before + call + between + call + after) == Seen(content, [["f", "{}"]] * 2, 2)

    def test_the_name_comes_when_the_arguments_begin(self) -> None:
        parser = ToolCallParser(HERMES)
        assert parser.push('Sure. <tool_call>{"name": "f", "arguments": ') == ["Sure."]
        name, brace = parser.push("{")
        assert isinstance(name, ToolCallDelta)
        assert (name.index, name.name, name.arguments) == (0, "f", "")
        assert brace == ToolCallDelta(0, None, None, "{")
        assert parser.push('"a": ') == [ToolCallDelta(0, None, None, '"a": ')]
        assert parser.push("1}") == [ToolCallDelta(0, None, None, "1}")]
        assert parser.push("}</tool_call") == []
        assert parser.complete_calls == 0
        assert parser.push(">") == []
        assert parser.complete_calls == 1

    def test_text_is_not_held_back(self) -> None:
        parser = ToolCallParser(HERMES)
        assert parser.push("a b") == ["a b"]
        assert parser.push(" \n") == []
        assert parser.push("c <") == [" \nc"]
        assert parser.push("d") == [" <", "d"]

    @pytest.mark.parametrize(
        ("text", "inside"),
        [
            ("a", False),
            ('"a', False),
            ('<tool_call>{"na', True),
            ('<tool_call>{"name"', False),
            ('<tool_call>{"name": "f', True),
            ('<tool_call>{"name": "f", "arguments": {', False),
            ('<tool_call>{"name": "f", "arguments": {"a": "\\', True),
            ('<tool_call>{"name": "f", "arguments": "', True),
            ('<tool_call>{"name": "f", "id": "', True),
            ('<tool_call>{"name": "f", "id": 1', False),
        ],
    )
    def test_in_string(self, text: str, inside: bool) -> None:
        parser = ToolCallParser(HERMES)
        parser.push(text)
        assert parser.in_string is inside


class TestNoCalls:
    @pytest.mark.parametrize(
        "text",
        [
            "",
            "\n a\n",
            "the <tool_call> tag \n",
            "<tool_call></tool_call>",
            block("not json"),
            block("{}") + "\n",
            block("[]"),
            block("[1]"),
            block('"f"'),
            block('{"name": ""}'),
            block('{"name": 1, "arguments": {}}'),
            block('{"arguments": {"a": 1}}'),
            block('{"name": "f", "arguments": [1]}'),
            block('{"name": "f", "arguments": null}'),
            block('{"name": "f", "arguments": "no"}'),
            block('{"name": "f", "arguments": "[]"}'),
            block('{"name": "f", "arguments": ""}'),
            block('{"arguments": {"a": }, "name": "f"}'),
            block('{"arguments": "{\\"a\\" 1}", "name": "f"}'),
            block('{"arguments": "{\\"a\\": 1} x", "name": "f"}'),
            block('{"arguments": "{", "name": "f"}'),
            block('{"name" "f"}'),
            block('{"name": "f",}'),
            block('{"name": "\\x"}'),
            block('{"na\\x": "f"}'),
            block("{'name': 'f'}"),
            '<tool_call>{"name": "f"</tool_call>',  # cut short before the arguments
            ' <tool_call>\n{"name": "f", "argum',
            '<tool_call>{"arguments": {"a": 1}',
            "a \n<tool_c",
            "a <tool_call>\n",
            "<tool_call><tool_call>\n<tool_call",
        ],
    )
    def test_are_content_verbatim(self, text: str) -> None:
        assert parse_anyhow(text) == Seen(text, [], 0)

    def test_a_call_after_one_that_is_none(self) -> None:
        call = block('{"name": "f", "arguments": {}}')
        for bad in ("<tool_call>", "<tool_call>\nx", "<tool_call> {", '<tool_call>{"name": ', "<<tool_call"):
            assert parse_anyhow(f"a {bad}\n{call}") == Seen(f"a {bad.rstrip()}", [["f", "{}"]], 1)


class TestBrokenCalls:
    """The call stays as far as it was JSON, the rest is content, and it is not complete."""

    @pytest.mark.parametrize(
        ("text", "arguments", "content"),
        [
            ('{"name": "f", "arguments": {"a": }}</tool_call> b', '{"a": ', "}}</tool_call> b"),
            ('{"name": "f", "arguments": {a', "{", "a"),
            ('{"name": "f", "arguments": {}, "x"}</tool_call>', "{}", ', "x"}</tool_call>'),
            ('{"name": "f", "arguments": {}} x', "{}", " x"),
            ('{"name": "f", "arguments": {}} </tool_x', "{}", " </tool_x"),
            ('{"name": "f", "arguments": "{\\"a\\": x}"}', '{"a": ', 'x}"}'),
            ('{"name": "f", "arguments": "{\\"a\\" \\"b"}', '{"a" ', '\\"b"}'),
            ('{"name": "f", "arguments": "{\\"a\\"\\u12x', '{"a"', "\\u12x"),
            ('{"name": "f", "arguments": "{"}', "{", '"}'),
            ('{"name": "f", "arguments": "{} x"}', "{} ", 'x"}'),
            ('{"name": "f"}, "x"', "{}", ', "x"'),
            ('[{"name": "f", "arguments": {}}, {"name": 1}]', "{}", ', {"name": 1}]'),
        ],
    )
    def test_later(self, text: str, arguments: str, content: str) -> None:
        assert parse_anyhow("a\n<tool_call>" + text) == Seen("a" + content, [["f", arguments]], 0)

    @pytest.mark.parametrize(
        ("text", "arguments"),
        [
            ('{"name": "f", "arguments": {"a": [1, "b', '{"a": [1, "b'),
            ('{"name": "f", "arguments": {', "{"),
            ('{"name": "f", "arguments": {}', "{}"),
            ('{"name": "f", "arguments": {}}\n</tool_call', "{}"),
            ('{"name": "f", "arguments": "{\\"a', '{"a'),
            ('{"name": "f", "arguments": "{\\"a\\', '{"a'),
        ],
    )
    def test_cut_off_by_the_end(self, text: str, arguments: str) -> None:
        assert parse_anyhow("a\n<tool_call>" + text) == Seen("a", [["f", arguments]], 0)

    def test_the_next_call_is_found(self) -> None:
        text = '<tool_call>{"name": "f", "arguments": {}}<tool_call>{"name": "g", "arguments": {}}</tool_call>'
        assert parse_anyhow(text) == Seen("", [["f", "{}"], ["g", "{}"]], 1)


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


@settings(max_examples=30, deadline=None)
@given(
    blocks=st.lists(written_block(), min_size=1, max_size=2), space=LAYOUT, text=st.sampled_from(["", "Well: é", "<"])
)
def test_every_call_comes_out_as_written_wherever_it_is_split(blocks: list[Written], space: str, text: str) -> None:
    whole = text + "".join(f"{space}{block.text}{space}" for block in blocks) + text
    calls = [call for block in blocks for call in block.calls]
    assert parse_anyhow(whole) == Seen(text + text, calls, len(calls))


@settings(max_examples=50, deadline=None)
@given(block=written_block())
def test_a_call_that_is_cut_off_is_the_beginning_of_the_whole(block: Written) -> None:
    for length in range(len(block.text)):
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
