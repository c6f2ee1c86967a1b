"""Whatever a model writes, and however it is cut into pieces, the events of a stream lead to the whole answer."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from anthropic.types import RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from fdserve.api.choice import Piece, join
from fdserve.api.messages_output import BlockWriter
from fdserve.api.responses_output import OutputWriter
from fdserve.protocol.chat import TokenLogprob
from fdserve.text.tools import ToolCallDelta

RESPONSE_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
MESSAGE_EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
objects = st.dictionaries(st.sampled_from("abc"), st.integers(), max_size=3)


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, list[str | dict[str, int]], list[Piece]]:
    """A thought, texts and calls in any order, and the pieces that they come in: one delta each, or several joined."""
    thought = draw(texts | st.just(""))
    answer: list[str | dict[str, int]] = []
    for each in draw(st.lists(texts | objects, max_size=5)):
        if not (isinstance(each, str) and answer and isinstance(answer[-1], str)):
            answer.append(each)
    deltas: list[Piece] = [Piece(reasoning=part) for part in _cut(draw, thought)]
    calls = 0
    for each in answer:
        if isinstance(each, str):
            deltas += [Piece(parts=[part]) for part in _cut(draw, each)]
            continue
        deltas.append(Piece(parts=[ToolCallDelta(calls, f"call_{calls}", "add", "")]))
        deltas += [Piece(parts=[ToolCallDelta(calls, None, None, part)]) for part in _cut(draw, json.dumps(each))]
        calls += 1
    pieces: list[Piece] = []
    for delta in deltas:
        if pieces and bool(draw(st.booleans())):
            pieces[-1] = join([pieces[-1], delta])
        else:
            pieces.append(delta)
    return thought, answer, pieces


def _cut(draw: st.DrawFn, text: str) -> list[str]:
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=4)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [part for part in parts if part]


def builtins(value: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value))


def test_logprobs_become_json_once() -> None:
    """The last events tell all of them four times."""
    source: Any = Logprobs()
    writer = OutputWriter(summarize=False, logprobs=source)
    for text in ("a", "b", "c"):
        writer.push(Piece(parts=[text]))
    events: list[Any] = [*writer.finish(complete=True)]
    source.entry.logprob = 0.0  # too late
    told = [{"token": "x", "logprob": -1.0, "bytes": [120], "top_logprobs": []}] * 2
    assert [events[0].logprobs, events[1].part.logprobs, events[2].item.content[0].logprobs] == [
        msgspec.Raw(msgspec.json.encode(told))
    ] * 3


class Logprobs:
    """The face of `TextLogprobs`: texts of a token each, of which "b" has none."""

    def __init__(self) -> None:
        self.entry = TokenLogprob("x", -1.0, [120], [])

    def push(self, entries: object) -> None:
        """They are known."""

    def take(self, text: str) -> list[TokenLogprob]:
        return [] if text == "b" else [self.entry]


@settings(max_examples=60, deadline=None)
@given(answers(), st.booleans())
def test_events_of_a_response_lead_to_its_items(
    answer: tuple[str, list[str | dict[str, int]], list[Piece]], summarize: bool
) -> None:
    thought, texts_and_calls, pieces = answer
    writer = OutputWriter(summarize=summarize, logprobs=None)
    events = [event for piece in pieces for event in writer.push(piece)] + writer.finish(complete=True)
    told = [builtins(event) for event in events]
    for event in told:
        RESPONSE_EVENT.validate_python(event, strict=True)
    items = builtins(writer.items)
    assert all(item["status"] == "completed" for item in items)
    assert [event["output_index"] for event in told] == sorted(event["output_index"] for event in told)
    for index, item in enumerate(items):
        own = [event for event in told if event["output_index"] == index]
        assert own[0]["type"] == "response.output_item.added"
        assert own[0]["item"]["id"] == item["id"]
        assert (own[-1]["type"], own[-1]["item"]) == ("response.output_item.done", item)
        parts = item.get("content") or item.get("summary") or [{"text": item.get("arguments")}]
        assert "".join(event["delta"] for event in own if "delta" in event) == parts[0]["text"]
        ends = [event for event in own if event["type"].endswith((".done", ".added")) and "item" not in event]
        assert len(ends) == (1 if item["type"] == "function_call" else 3)
    got = [item for item in items if item["type"] != "reasoning"]
    assert texts_and_calls == [
        item["content"][0]["text"] if item["type"] == "message" else json.loads(item["arguments"]) for item in got
    ]
    field = "summary" if summarize else "content"
    assert [item[field][0]["text"] for item in items if item["type"] == "reasoning"] == [thought] * bool(thought)


@settings(max_examples=60, deadline=None)
@given(answers())
def test_events_of_a_message_lead_to_its_blocks(
    answer: tuple[str, list[str | dict[str, int]], list[Piece]],
) -> None:
    thought, texts_and_calls, pieces = answer
    writer = BlockWriter(hide_thoughts=False)
    events = [event for piece in pieces for event in writer.push(piece)] + writer.finish()
    told = [builtins(event) for event in events]
    for event in told:
        MESSAGE_EVENT.validate_python(event, strict=True)
    blocks = builtins(writer.blocks)
    assert [event["index"] for event in told] == sorted(event["index"] for event in told)
    for index, block in enumerate(blocks):
        first, *deltas, last = (event for event in told if event["index"] == index)
        assert (first["type"], last["type"]) == ("content_block_start", "content_block_stop")
        assert {event["type"] for event in deltas} <= {"content_block_delta"}
        kind = first["content_block"]["type"]
        field = {"thinking": "thinking", "text": "text", "tool_use": "partial_json"}[kind]
        joined = "".join(event["delta"].get(field, "") for event in deltas)
        whole = {"input": json.loads(joined)} if kind == "tool_use" else {field: joined}
        assert block == {**first["content_block"], **whole}
    assert [block["thinking"] for block in blocks if block["type"] == "thinking"] == [thought] * bool(thought)
    got = [block for block in blocks if block["type"] != "thinking"]
    assert texts_and_calls == [block["text"] if block["type"] == "text" else block["input"] for block in got]
