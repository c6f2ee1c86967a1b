from __future__ import annotations

import itertools
import json
import time
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdserve.text.detokenizer import decode
from fdserve.text.reasoning import ReasoningFormat, resolve_reasoning
from fdserve.text.stop import StopTable
from fdserve.text.stream import TextDelta, TextStream, content_of
from fdserve.text.tokenizer import Tokenizer
from fdserve.text.tools import ToolCallDelta, ToolFormat

from .conftest import TAGS
from .vocabulary import ListTokenizer

EMOJI = "😀".encode()
TOKENS = [tag.encode() for tag in TAGS] + [
    b"a",
    b"b",
    b" ",
    b"\n",
    b"ab",
    b"\n\n",
    EMOJI[:2],
    EMOJI[2:],
    b"</s>",
    b'{"name":"b","arguments":',
    b'{"a":"',
    b'"}',
    b"}",
    b"</tool",
    b"_call>",
]
TOY = ListTokenizer(TOKENS, special=[b"</s>"])
EOS = TOKENS.index(b"</s>")
ERNIE_X1 = ReasoningFormat("ernie_x1", 0, 1, 2, 3)
HERMES = ToolFormat("hermes")
FORMATS = [None, ERNIE_X1, ReasoningFormat("think", 0, 1)]


class Seen(NamedTuple):
    reasoning: str
    content: str
    stop: str | None
    used: int
    reasoning_tokens: int
    calls: tuple[tuple[str, str], ...] = ()
    complete: int = 0


def run(stream: TextStream, pushes: list[list[int]]) -> Seen:
    deltas = [stream.push(push) for push in pushes] + [stream.finish()]
    stops = [delta.stop_matched for delta in deltas if delta.stop_matched is not None]
    assert len(stops) <= 1
    return Seen(
        "".join(delta.reasoning for delta in deltas),
        content_of([part for delta in deltas for part in delta.parts]),
        stops[0] if stops else None,
        sum(delta.tokens_used for delta in deltas),
        stream.reasoning_tokens,
        calls_of(deltas),
        stream.complete_calls,
    )


def calls_of(deltas: list[TextDelta]) -> tuple[tuple[str, str], ...]:
    calls: list[tuple[str, str]] = []
    for delta in deltas:
        for call in delta.parts:
            if isinstance(call, str):
                continue
            if call.id is not None:
                assert call.index == len(calls)
                calls.append((call.name or "", call.arguments))
            else:
                assert call.index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + call.arguments)
    return tuple(calls)


@settings(max_examples=400)
@given(
    ids=st.lists(st.integers(-1, len(TOKENS)), max_size=25),
    cuts=st.lists(st.integers(0, 25), max_size=6),
    format=st.sampled_from(FORMATS),
    thinking=st.booleans(),
    stop=st.lists(st.sampled_from(["a", "ab", "ba", "\n", "😀", "b\n\na", "aab", "\ufffd"]), max_size=3),
    skip=st.booleans(),
    include=st.booleans(),
    tools=st.booleans(),
)
def test_the_split_over_pushes_makes_no_difference(
    ids: list[int],
    cuts: list[int],
    format: ReasoningFormat | None,
    thinking: bool,
    stop: list[str],
    skip: bool,
    include: bool,
    tools: bool,
) -> None:
    def stream() -> TextStream:
        return TextStream(
            TOY,
            format=format,
            thinking=thinking,
            stop=StopTable(stop),
            skip_special_tokens=skip,
            include_stop_str_in_output=include,
            hidden={EOS},
            tools=HERMES if tools else None,
        )

    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    pushes = [ids[start:end] for start, end in itertools.pairwise(edges)]
    seen = run(stream(), pushes)
    assert seen == run(stream(), [ids])
    assert seen == run(stream(), [[token] for token in ids])
    assert "</s>" not in seen.content + seen.reasoning
    if seen.stop is not None:
        assert seen.content.endswith(seen.stop) or not include
    elif format is None and not seen.calls:
        assert seen.content == decode(TOY, [token for token in ids if token != EOS])
        assert seen.used == len(ids)


def test_stop_string_over_several_tokens_counts_the_tokens_up_to_it() -> None:
    stream = TextStream(TOY, stop=StopTable(["ba"]))
    assert stream.push(TOY.encode("a")) == TextDelta("", ["a"], None, 1)
    assert stream.push(TOY.encode("b")) == TextDelta("", [], None, 1)
    ids = TOY.encode("a\nb")
    assert stream.push(ids) == TextDelta("", [], "ba", 1)
    assert stream.push(ids) == TextDelta("", [], None, 0)
    assert stream.finish() == TextDelta("", [], None, 0)


def test_stop_string_included() -> None:
    stream = TextStream(TOY, stop=StopTable(["b\n"]), include_stop_str_in_output=True)
    assert stream.push(TOY.encode("ab\na")) == TextDelta("", ["ab\n"], "b\n", 2)


def test_held_back_text_comes_at_the_end() -> None:
    stream = TextStream(TOY, stop=StopTable(["ab\n\na"]))
    assert stream.push([TOKENS.index(b"ab"), TOKENS.index(EMOJI[:2])]).parts == []
    assert stream.finish() == TextDelta("", ["ab\ufffd"], None, 0)


def test_stop_strings_are_looked_for_in_the_content_only() -> None:
    stream = TextStream(TOY, format=ERNIE_X1, thinking=True, stop=StopTable(["b"]))
    ids = TOY.encode("ab</think>\n<response>\nab\n</response>")
    assert stream.push(ids) == TextDelta("ab", ["a"], "b", 6)
    assert stream.reasoning_tokens == 1


def test_a_stop_string_can_be_completed_by_the_last_newline() -> None:
    stream = TextStream(TOY, format=ERNIE_X1, thinking=True, stop=StopTable(["a\n"]))
    assert stream.push(TOY.encode("</think><response>a\n")).parts == []
    assert stream.finish() == TextDelta("", [], "a\n", 0)


def test_hidden_ids_never_show_and_are_no_reasoning() -> None:
    stream = TextStream(TOY, format=ERNIE_X1, thinking=True, skip_special_tokens=False, hidden=[EOS])
    assert stream.push([*TOY.encode("a"), EOS]) == TextDelta("a", [], None, 2)
    assert stream.reasoning_tokens == 1
    assert TextStream(TOY, skip_special_tokens=False).push([EOS]).parts == ["</s>"]


def test_thinking_model_end_to_end(ernie: Tokenizer) -> None:
    format = ReasoningFormat("ernie_x1", *[ernie.token_id(tag) or -1 for tag in TAGS[:4]])
    output = "The 世界 is big.\n</think>\n\n<response>\nhello 😀 world\n</response>\n</s>"
    stream = TextStream(ernie, format=format, thinking=True)
    assert run(stream, [[token] for token in ernie.encode(output)])[:3] == (
        "The 世界 is big.",
        "hello 😀 world",
        None,
    )


@pytest.mark.parametrize("format", FORMATS, ids=["none", "ernie_x1", "think"])
def test_long_outputs_take_linear_time(format: ReasoningFormat | None) -> None:
    stream = TextStream(TOY, format=format, thinking=True, stop=StopTable(["aaab", "b" * 50]))
    ids = TOY.encode("a\na b")
    started = time.process_time()
    for _ in range(20_000):
        stream.push(ids)
    stream.finish()
    assert time.process_time() - started < 5


def test_no_stop_string_ends_the_text_before_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one stop two stop three")
    stops_at = [len(ids[: at + 1]) for at in range(len(ids)) if decode(tokenizer, ids[: at + 1]).endswith("stop")]
    assert len(stops_at) == 2
    for minimum, expected in ((0, stops_at[0]), (stops_at[0], stops_at[0]), (stops_at[0] + 1, stops_at[1])):
        for step in (1, len(ids)):
            stream = TextStream(tokenizer, stop=StopTable(["stop"]), min_tokens=minimum)
            deltas = [stream.push(ids[at : at + step]) for at in range(0, len(ids), step)]
            assert sum(delta.tokens_used for delta in deltas) == expected


CALL = b'{"name":"b","arguments":', b'{"a":"', EMOJI[:2], EMOJI[2:], b"\n", b'"}', b"}"
CALL_IDS = [TOKENS.index(token) for token in CALL]


def in_tags(ids: list[int]) -> list[int]:
    return [*TOY.encode("<tool_call>\n"), *ids, *TOY.encode("\n</tool_call>")]


@given(
    before=st.lists(st.sampled_from(["a", "b", "ab", " ", "\n"]), max_size=4).map("".join),
    after=st.lists(st.sampled_from(["a", "b", " ", "\n"]), max_size=3).map("".join),
    inside=st.lists(st.sampled_from([*TAGS[2:], "a", "\n\n", "}", "😀", "</tool"]), max_size=4).map("".join),
    format=st.sampled_from(FORMATS),
    cuts=st.lists(st.integers(0, 40), max_size=6),
)
def test_calls_of_an_answer(
    before: str, after: str, inside: str, format: ReasoningFormat | None, cuts: list[int]
) -> None:
    # What is inside the string of a call is never a tag.
    call = in_tags([*CALL_IDS[:2], *TOY.encode(inside), *CALL_IDS[2:]])
    thought = [*TOY.encode("a\n"), *call, TAGS.index("</think>")] if format else []
    ids = [*thought, *TOY.encode(before), *call, *TOY.encode("\n"), *call, *TOY.encode(after)]
    edges = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    pushes = [ids[start:end] for start, end in itertools.pairwise(edges)]
    seen = run(TextStream(TOY, format=format, thinking=True, tools=HERMES), pushes)
    arguments = '{"a":"' + inside.replace("\n", "\\n") + '😀\\n"}'
    assert seen.calls == (("b", arguments),) * 2
    assert seen.complete == 2
    content = (before.lstrip("\n") if format else before).rstrip() + after.lstrip()
    assert seen.content == content
    assert seen.reasoning_tokens == (len(thought) - 1 if thought else 0)


def test_calls_of_a_thought_are_thoughts() -> None:
    text = '<tool_call>{"name":"b","arguments":{"a":"a"}}</tool_call>'
    stream = TextStream(TOY, format=ERNIE_X1, thinking=True, tools=HERMES)
    assert run(stream, [TOY.encode(text + "</think>")])[:2] == (text, "")
    assert stream.complete_calls == 0


def test_calls_are_text_without_a_format() -> None:
    text = '<tool_call>{"name":"b","arguments":{"a":"a"}}</tool_call>'
    assert run(TextStream(TOY), [TOY.encode(text)])[:2] == ("", text)


def test_stop_strings_are_not_looked_for_in_calls() -> None:
    ids = [*TOY.encode("a"), *in_tags(CALL_IDS), *TOY.encode("b")]
    for stop in ('"', "}", "\n", "name", "ab", "call"):
        seen = run(TextStream(TOY, tools=HERMES, stop=StopTable([stop])), [[token] for token in ids])
        assert (seen.content, seen.stop, seen.complete) == ("ab", None, 1)
    # What could have become one comes out before the call does.
    stream = TextStream(TOY, tools=HERMES, stop=StopTable(["ab"]))
    deltas = [stream.push([token]) for token in ids]
    begun = next(at for at, delta in enumerate(deltas) if calls_of([delta]))
    assert deltas[begun].parts[0] == "a"
    # What is no call is content like any other.
    bad = TOY.encode("<tool_call>\nab")
    seen = run(TextStream(TOY, tools=HERMES, stop=StopTable(["l>\na"])), [bad])
    assert (seen.content, seen.stop, seen.used) == ("<tool_cal", "l>\na", len(bad))


def test_nothing_comes_after_a_stop_string() -> None:
    ids = [*TOY.encode("a"), *in_tags(CALL_IDS)]
    stream = TextStream(TOY, tools=HERMES, stop=StopTable(["a"]))
    assert run(stream, [ids]) == Seen("", "", "a", 1, 0)


def test_what_one_push_tells_of_a_call_comes_as_one() -> None:
    (call,) = TextStream(TOY, tools=HERMES).push(in_tags(CALL_IDS)).parts
    assert isinstance(call, ToolCallDelta)
    assert (call.index, call.name, call.arguments) == (0, "b", '{"a":"😀\\n"}')


def test_texts_and_calls_keep_their_order() -> None:
    ids = [*TOY.encode("a"), *in_tags(CALL_IDS), *TOY.encode("b"), *in_tags(CALL_IDS), *TOY.encode("ab")]
    parts = TextStream(TOY, tools=HERMES).push(ids).parts
    assert [part if isinstance(part, str) else part.index for part in parts] == ["a", 0, "b", 1, "ab"]


def test_calls_of_a_thinking_model_end_to_end(ernie: Tokenizer) -> None:
    format = resolve_reasoning("ernie-x1", ernie, "")
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "世界", "tag": "</response>"}}\n</tool_call>\n'
    for answer, content in (("\n", ""), ("<response>\nhello\n</response>\n", "hello"), ("hello", "hello")):
        output = f"The 世界 is big.\n</think>\n\n{answer}\n{call}{call}</s>"
        stream = TextStream(ernie, format=format, thinking=True, tools=ToolFormat("ernie_x1"))
        seen = run(stream, [[token] for token in ernie.encode(output)])
        assert (seen.reasoning, seen.content, seen.complete) == ("The 世界 is big.", content, 2)
        assert seen.calls == (("get_weather", '{"city": "世界", "tag": "</response>"}'),) * 2


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    arguments=st.dictionaries(st.text(max_size=5), st.text(max_size=8) | st.integers(), max_size=3),
    ascii=st.booleans(),
    quoted=st.booleans(),
)
def test_calls_come_out_of_any_tokenizer(
    tokenizer: Tokenizer, arguments: dict[str, str | int], ascii: bool, quoted: bool
) -> None:
    written = json.dumps({"<tool_call>世界": arguments}, ensure_ascii=ascii)
    inside = json.dumps(written, ensure_ascii=ascii) if quoted else written
    text = f'the 世界 \n<tool_call>\n{{"name": "天气", "arguments": {inside}}}\n</tool_call>\n'
    for step in (1, 2, len(text)):
        ids = tokenizer.encode(text)
        pushes = [ids[at : at + step] for at in range(0, len(ids), step)]
        seen = run(TextStream(tokenizer, tools=HERMES, skip_special_tokens=False), pushes)
        assert (seen.content, seen.calls, seen.complete) == ("the 世界", (("天气", written),), 1)
