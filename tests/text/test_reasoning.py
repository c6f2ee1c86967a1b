from __future__ import annotations

from dataclasses import replace

import pytest

from fdserve.errors import StartupError
from fdserve.text.reasoning import ReasoningFormat, ReasoningSplitter, resolve_reasoning, starts_in_thinking
from fdserve.text.tokenizer import Tokenizer

from .conftest import TAGS
from .vocabulary import ListTokenizer

THINK, THINK_END, RESPONSE, RESPONSE_END = range(4)
LETTERS = [bytes([byte]) for byte in b"abcdefghijklmnopqrstuvwxyz .\n"] + [b"\n\n", b".\n", b"\xf0\x9f\x98", b"@"]
WORDS = ListTokenizer([tag.encode() for tag in TAGS] + LETTERS + [b"</s>"], special=[b"</s>"])
ERNIE_X1 = ReasoningFormat("ernie_x1", THINK, THINK_END, RESPONSE, RESPONSE_END)
THINK_ONLY = ReasoningFormat("think", THINK, THINK_END)


def split(text: str, format: ReasoningFormat = ERNIE_X1, thinking: bool = True) -> tuple[str, str]:
    splitter = ReasoningSplitter(WORDS, format, thinking)
    parts = [splitter.push(token) for token in WORDS.encode(text)] + [splitter.flush()]
    return "".join(reasoning for reasoning, _ in parts), "".join(content for _, content in parts)


class TestErnieX1:
    @pytest.mark.parametrize(
        ("text", "reasoning", "content"),
        [
            ("abc\n</think>\n\n<response>\ndef\n</response>\n", "abc", "def"),
            ("abc</think><response>def</response>", "abc", "def"),
            ("\nabc\n\n</think>\n<response>\n\ndef\n\n</response>", "abc\n", "\ndef\n"),
            ("abc.\n</think>\n\n<response>\ndef.\n</response>\n", "abc.", "def."),
            ("abc\n</think>\n\n<response>\ndef\n", "abc", "def\n"),  # cut off: the newline is text
            ("abc\n", "abc\n", ""),
            ("abc\n</think>\n\n<response>\n", "abc", ""),
            ("abc\n</think>\n\n", "abc", ""),
            ("abc\n</think>\ndef", "abc", "def"),  # no response tags
            ("abc</think>\n\n  def ", "abc", "  def "),
            ("abc</think>def\n</response>\n", "abc", "def"),
            ("abc</think>def\n<response>\nghi\n</response>", "abc", "defghi"),
            ("\n</think>\n<response>\n</response>", "", ""),
            ("abc\n</think>\n\n\n<tool_call>\nx\n</tool_call>\n", "abc", "<tool_call>\nx\n</tool_call>\n"),
            ("a</think><response>b</response>\n<tool_call>x</tool_call>", "a", "b<tool_call>x</tool_call>"),
            ("a</think><response>b<think>c</think>d</response>", "a", "b<think>c</think>d"),
            ("<think>\nabc</think>def", "abc", "def"),  # the model opens the thought once more
            ("ab<think>c</think>def", "ab<think>c", "def"),
            ("ab<response>c</think>def", "ab<response>c", "def"),  # only </think> ends a thought
            ("", "", ""),
        ],
    )
    def test_thinking(self, text: str, reasoning: str, content: str) -> None:
        assert split(text) == (reasoning, content)

    @pytest.mark.parametrize(
        ("text", "reasoning", "content"),
        [
            ("abc", "", "abc"),
            ("\n\nabc\n", "", "\n\nabc\n"),
            ("\n", "", "\n"),
            ("\n<response>\nabc\n</response>\n", "", "abc"),
            ("def\n</response>\n", "", "def"),  # an answer that the prompt began
            ("\n<think>abc</think>\ndef", "abc", "def"),
            ("a</think>b", "", "a</think>b"),
        ],
    )
    def test_not_thinking(self, text: str, reasoning: str, content: str) -> None:
        assert split(text, thinking=False) == (reasoning, content)


class TestThinkOnly:
    @pytest.mark.parametrize(
        ("text", "thinking", "reasoning", "content"),
        [
            ("abc\n</think>\n\ndef\n", True, "abc", "def\n"),
            ("<think>\nabc\n</think>\n\ndef", False, "abc", "def"),
            ("<think>\n\n</think>\n\ndef", False, "", "def"),
            ("def", False, "", "def"),
            (
                "a</think>\n<response>b</response>",
                True,
                "a",
                "<response>b</response>",
            ),  # no tags of this format
        ],
    )
    def test_split(self, text: str, thinking: bool, reasoning: str, content: str) -> None:
        assert split(text, THINK_ONLY, thinking) == (reasoning, content)

    def test_newlines_of_the_answer_do_not_wait(self) -> None:
        splitter = ReasoningSplitter(WORDS, THINK_ONLY, thinking=False)
        assert [splitter.push(token) for token in WORDS.encode("a\nb")] == [("", "a"), ("", "\n"), ("", "b")]


def test_reasoning_tokens_are_the_ids_between_the_tags() -> None:
    splitter = ReasoningSplitter(WORDS, ERNIE_X1, thinking=True)
    for token in WORDS.encode("\nabc\n</think>\n\n<response>\ndef\n</response>"):
        splitter.push(token)
    assert splitter.reasoning_tokens == 5


def test_what_forces_the_end_of_a_thought_counts_up_to_the_tag() -> None:
    splitter = ReasoningSplitter(WORDS, ERNIE_X1, thinking=True)
    forced = [WORDS.tokens.index(b"\n"), THINK_END, WORDS.tokens.index(b"\n\n")]
    parts = [splitter.push(token) for token in [*WORDS.encode("ab"), *forced, *WORDS.encode("cd")]]
    assert ["".join(side) for side in zip(*parts, strict=True)] == ["ab", "cd"]
    assert splitter.reasoning_tokens == 3


@pytest.mark.parametrize(
    ("format", "thinking", "text", "expected"),
    [
        (ERNIE_X1, True, "\nab\n</think>\n\n<response>\nc\n</response>", ("\nab", "c")),
        (ERNIE_X1, True, "<think>\n</think>c", ("<think>", "c")),
        (ERNIE_X1, False, "\n\nab\n</response>\n", ("", "\n\nab")),
        (ERNIE_X1, False, "<think>a</think>", ("", "<think>a</think>")),
        (THINK_ONLY, False, "\n<think>a</think>\n", ("", "\n<think>a</think>\n")),
    ],
)
def test_a_continued_text_has_no_layout_in_front(
    format: ReasoningFormat, thinking: bool, text: str, expected: tuple[str, str]
) -> None:
    splitter = ReasoningSplitter(WORDS, format, thinking, continued=True)
    parts = [splitter.push(token) for token in WORDS.encode(text)] + [splitter.flush()]
    assert ("".join(reasoning for reasoning, _ in parts), "".join(content for _, content in parts)) == expected


def test_tags_are_text_where_that_is_said() -> None:
    splitter = ReasoningSplitter(WORDS, ERNIE_X1, thinking=False)
    splitter.push(WORDS.tokens.index(b"a"))
    assert splitter.push(RESPONSE_END, literal=True) == ("", "</response>")
    assert splitter.push(RESPONSE_END) == ("", "")


def test_unfinished_character_stays_on_its_side_of_a_tag() -> None:
    half = WORDS.tokens.index(b"\xf0\x9f\x98")
    splitter = ReasoningSplitter(WORDS, ERNIE_X1, thinking=True)
    assert splitter.push(half) == ("", "")
    assert splitter.push(THINK_END) == ("\ufffd", "")
    assert splitter.push(half) == ("", "")
    assert splitter.flush() == ("", "\ufffd")


def test_special_tokens_show_when_asked_for() -> None:
    splitter = ReasoningSplitter(WORDS, ERNIE_X1, thinking=True, skip_special_tokens=False)
    parts = [splitter.push(token) for token in WORDS.encode("a</s></think>b</s>")]
    assert parts[-1] == ("", "</s>")
    assert "".join(reasoning for reasoning, _ in parts) == "a</s>"


class TestStartsInThinking:
    @pytest.mark.parametrize(
        ("prompt", "expected"),
        [
            ("user <think>\n", True),
            ("<think></think>", False),
            ("<response>a</response>user <think>", True),
            ("<think>a</think><response>", False),
        ],
    )
    @pytest.mark.parametrize("name", ["ernie_x1", "ernie_45_vl"])
    def test_the_last_tag_decides(self, prompt: str, expected: bool, name: str) -> None:
        format = ReasoningFormat(name, THINK, THINK_END, RESPONSE, RESPONSE_END)
        assert starts_in_thinking(format, WORDS.encode(prompt)) is expected

    @pytest.mark.parametrize(
        ("prompt", "continued", "expected"),
        [
            ("user <think>@assistant ", False, {"ernie_x1": True, "think": False}),  # the user writes about the tag
            ("a</think>@user b@assistant ", False, {"ernie_x1": True, "think": False}),
            ("@user a@assistant <think>\nab", True, {"ernie_x1": True, "think": True}),
            ("@user <think>@assistant ab", True, {"ernie_x1": False, "think": False}),
            ("@assistant <think>\na</think>b", True, {"ernie_x1": False, "think": False}),
            ("@assistant <response>b", True, {"ernie_x1": False, "think": False}),
        ],
    )
    def test_only_the_last_turn_counts(self, prompt: str, continued: bool, expected: dict[str, bool]) -> None:
        ids = WORDS.encode(prompt)
        for format in (ERNIE_X1, THINK_ONLY):
            in_turns = replace(format, turn_start=WORDS.tokens.index(b"@"))
            assert starts_in_thinking(in_turns, ids, continued) is expected[format.name]

    def test_without_a_tag_only_ernie_x1_thinks(self) -> None:
        assert starts_in_thinking(ERNIE_X1, WORDS.encode("hello")) is True
        assert starts_in_thinking(THINK_ONLY, WORDS.encode("hello")) is False
        assert starts_in_thinking(THINK_ONLY, WORDS.encode("a<response>")) is False


class TestResolve:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("ernie_x1", "ernie_x1"),
            ("ernie-x1", "ernie_x1"),
            ("Ernie-X1", "ernie_x1"),
            ("ernie45", "ernie_x1"),
            ("ernie-45-vl", "ernie_45_vl"),
            ("ernie_45_vl_thinking", "ernie_45_vl"),
            ("deepseek_r1", "think"),
            ("qwen3", "think"),
            ("think", "think"),
        ],
    )
    def test_names(self, ernie: Tokenizer, name: str, kind: str) -> None:
        format = resolve_reasoning(name, ernie, "")
        assert format is not None
        assert format.name == kind
        assert (format.think_start, format.think_end) == (
            ernie.token_id("<think>"),
            ernie.token_id("</think>"),
        )
        assert (format.response_end == ernie.token_id("</response>")) is (kind == "ernie_x1")
        assert format.turn_start == ernie.token_id("<|im_start|>")

    def test_detection(self, ernie: Tokenizer) -> None:
        def detect(template: str, tokenizer: Tokenizer = ernie) -> str | None:
            format = resolve_reasoning(None, tokenizer, template)
            return format.name if format else None

        assert detect("...<think>...<response>") == "ernie_x1"
        assert detect("...<think>...") == "think"
        assert detect("...<response>") is None
        assert detect("...<think>...<response>", ListTokenizer([b"<think>", b"</think>"])) == "think"
        assert detect("...<think>...", ListTokenizer([b"<think>"])) is None

    def test_off(self, ernie: Tokenizer) -> None:
        assert resolve_reasoning("none", ernie, "<think>") is None

    def test_missing_tags(self) -> None:
        tokenizer = ListTokenizer([b"<think>", b"</think>", b"</response>"])
        assert resolve_reasoning("qwen3", tokenizer, "") == ReasoningFormat("think", 0, 1)
        with pytest.raises(StartupError, match="'ernie-x1' needs <response> as single tokens"):
            resolve_reasoning("ernie-x1", tokenizer, "")

    def test_unknown_name(self, ernie: Tokenizer) -> None:
        with pytest.raises(StartupError, match=r"unknown reasoning parser 'gpt': choose one of ernie_x1, .*none"):
            resolve_reasoning("gpt", ernie, "")
