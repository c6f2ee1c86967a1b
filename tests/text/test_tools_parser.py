from __future__ import annotations

import pytest

from fdserve.text.tools import ToolCallDelta
from fdserve.text.tools_parser import ToolCallParser
from tests.text.parsed_calls import HERMES, Seen, parse, parse_anyhow


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
