"""The events of a stream of POST /v1/responses; docs/protocol.md has their order."""

from __future__ import annotations

import msgspec

from fdserve.protocol.chat import TokenLogprob
from fdserve.protocol.responses import OutputItem, OutputText, ReasoningText, Response, SummaryText


class ResponseEvent(msgspec.Struct, kw_only=True, tag_field="type"):
    """What all events have; `sequence_number` counts those of one stream from 0."""

    sequence_number: int = 0


class ResponseCreated(ResponseEvent, kw_only=True, tag="response.created"):
    response: Response


class ResponseInProgress(ResponseEvent, kw_only=True, tag="response.in_progress"):
    response: Response


class ResponseCompleted(ResponseEvent, kw_only=True, tag="response.completed"):
    response: Response


class ResponseIncomplete(ResponseEvent, kw_only=True, tag="response.incomplete"):
    response: Response


class ResponseFailed(ResponseEvent, kw_only=True, tag="response.failed"):
    response: Response


class ItemAdded(ResponseEvent, kw_only=True, tag="response.output_item.added"):
    """`output_index` is the item's place in the response's output, here and in all events."""

    output_index: int
    item: OutputItem


class ItemDone(ResponseEvent, kw_only=True, tag="response.output_item.done"):
    output_index: int
    item: OutputItem


class PartAdded(ResponseEvent, kw_only=True, tag="response.content_part.added"):
    item_id: str
    output_index: int
    content_index: int = 0
    part: OutputText | ReasoningText


class PartDone(ResponseEvent, kw_only=True, tag="response.content_part.done"):
    item_id: str
    output_index: int
    content_index: int = 0
    part: OutputText | ReasoningText


class TextDelta(ResponseEvent, kw_only=True, tag="response.output_text.delta"):
    item_id: str
    output_index: int
    content_index: int = 0
    delta: str
    logprobs: list[TokenLogprob]


class TextDone(ResponseEvent, kw_only=True, tag="response.output_text.done"):
    item_id: str
    output_index: int
    content_index: int = 0
    text: str
    logprobs: list[TokenLogprob]


class ReasoningDelta(ResponseEvent, kw_only=True, tag="response.reasoning_text.delta"):
    item_id: str
    output_index: int
    content_index: int = 0
    delta: str


class ReasoningDone(ResponseEvent, kw_only=True, tag="response.reasoning_text.done"):
    item_id: str
    output_index: int
    content_index: int = 0
    text: str


class SummaryPartAdded(ResponseEvent, kw_only=True, tag="response.reasoning_summary_part.added"):
    item_id: str
    output_index: int
    summary_index: int = 0
    part: SummaryText


class SummaryPartDone(ResponseEvent, kw_only=True, tag="response.reasoning_summary_part.done"):
    item_id: str
    output_index: int
    summary_index: int = 0
    part: SummaryText


class SummaryDelta(ResponseEvent, kw_only=True, tag="response.reasoning_summary_text.delta"):
    item_id: str
    output_index: int
    summary_index: int = 0
    delta: str


class SummaryDone(ResponseEvent, kw_only=True, tag="response.reasoning_summary_text.done"):
    item_id: str
    output_index: int
    summary_index: int = 0
    text: str


class ArgumentsDelta(ResponseEvent, kw_only=True, tag="response.function_call_arguments.delta"):
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(ResponseEvent, kw_only=True, tag="response.function_call_arguments.done"):
    item_id: str
    output_index: int
    name: str
    arguments: str


ResponseStreamEvent = (
    ResponseCreated
    | ResponseInProgress
    | ItemAdded
    | PartAdded
    | TextDelta
    | TextDone
    | ReasoningDelta
    | ReasoningDone
    | SummaryPartAdded
    | SummaryDelta
    | SummaryDone
    | SummaryPartDone
    | ArgumentsDelta
    | ArgumentsDone
    | PartDone
    | ItemDone
    | ResponseCompleted
    | ResponseIncomplete
    | ResponseFailed
)
