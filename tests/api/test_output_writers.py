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

from fdserve.api.choice import Piece
from fdserve.api.messages_output import BlockWriter
from fdserve.api.responses_output import OutputWriter
from fdserve.config import Config
from fdserve.text.tools import ToolCallDelta
from tests.http.fake_engine import FakeEngine, make_server

SERVER = make_server(FakeEngine(), Config())
RESPONSE_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
MESSAGE_EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
objects = st.dictionaries(st.sampled_from("abc"), st.integers(), max_size=3)


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, str, list[dict[str, int]], list[Piece]]:
    """A thought, a text, calls, and the pieces that they come in: one delta each, or several joined."""
    thought, text = draw(texts | st.just("")), draw(texts | st.just(""))
    calls = draw(st.lists(objects, max_size=3))
    deltas: list[Piece] = [Piece(reasoning=part) for part in _cut(draw, thought)]
    deltas += [Piece(content=part) for part in _cut(draw, text)]
    for index, call in enumerate(calls):
        deltas.append(Piece(tool_calls=[ToolCallDelta(index, f"call_{index}", "add", "")]))
        for part in _cut(draw, json.dumps(call)):
            deltas.append(Piece(tool_calls=[ToolCallDelta(index, None, None, part)]))
    pieces: list[Piece] = []
    for delta in deltas:
        if pieces and draw(st.booleans()):
            pieces[-1].reasoning += delta.reasoning
            pieces[-1].content += delta.content
            pieces[-1].tool_calls += delta.tool_calls
        else:
            pieces.append(delta)
    return thought, text, calls, pieces


def _cut(draw: st.DrawFn, text: str) -> list[str]:
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=4)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [part for part in parts if part]


def builtins(value: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value))


@settings(max_examples=60, deadline=None)
@given(answers(), st.booleans())
def test_events_of_a_response_lead_to_its_items(
    answer: tuple[str, str, list[dict[str, int]], list[Piece]], summarize: bool
) -> None:
    thought, text, calls, pieces = answer
    writer = OutputWriter(SERVER, [], summarize=summarize, logprobs=False)
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
    assert [item["content"][0]["text"] for item in items if item["type"] == "message"] == [text] * bool(text)
    assert [json.loads(item["arguments"]) for item in items if item["type"] == "function_call"] == calls
    field = "summary" if summarize else "content"
    assert [item[field][0]["text"] for item in items if item["type"] == "reasoning"] == [thought] * bool(thought)


@settings(max_examples=60, deadline=None)
@given(answers())
def test_events_of_a_message_lead_to_its_blocks(answer: tuple[str, str, list[dict[str, int]], list[Piece]]) -> None:
    thought, text, calls, pieces = answer
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
    assert [block["text"] for block in blocks if block["type"] == "text"] == [text] * bool(text)
    assert [block["input"] for block in blocks if block["type"] == "tool_use"] == calls
