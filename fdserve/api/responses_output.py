"""What a model generates as the items of /v1/responses, and as the events that tell of them while they grow."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Protocol, cast

import msgspec

from fdserve.api.choice import Piece
from fdserve.api.text_logprobs import TextLogprobs
from fdserve.http.response import encode
from fdserve.protocol.chat import TokenLogprob
from fdserve.protocol.response_events import (
    ArgumentsDelta,
    ArgumentsDone,
    ItemAdded,
    ItemDone,
    PartAdded,
    PartDone,
    ReasoningDelta,
    ReasoningDone,
    ResponseEvent,
    SummaryDelta,
    SummaryDone,
    SummaryPartAdded,
    SummaryPartDone,
    TextDelta,
    TextDone,
)
from fdserve.protocol.responses import (
    FunctionCall,
    ItemStatus,
    OutputItem,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    SummaryText,
)
from fdserve.text.tools import ToolCallDelta


class OutputWriter:
    """Builds the output of one response from the pieces of its choice. `items` are those that have begun."""

    def __init__(self, *, summarize: bool, logprobs: TextLogprobs | None) -> None:
        """`summarize` puts the thoughts where clients look for a summary of them; `logprobs` finds those of texts."""
        self.items: list[OutputItem] = []
        self._summarize = summarize
        self._logprobs = logprobs
        self._open: _Part | None = None
        self._open_call: int | None = None

    def push(self, piece: Piece) -> list[ResponseEvent]:
        """Take a piece; return the events that it leads to."""
        events: list[ResponseEvent] = []
        if self._logprobs is not None:
            self._logprobs.push(piece.logprobs)
        if piece.reasoning:
            if not isinstance(self._open, _ThoughtPart):
                part = _SummaryPart if self._summarize else _ThoughtPart
                events += self._begin(part(_new_id("rs"), len(self.items)))
            events += self._add(piece.reasoning)
        for each in piece.parts:
            events += self._text(each) if isinstance(each, str) else self._call(each)
        return events

    def _text(self, text: str) -> list[ResponseEvent]:
        events: list[ResponseEvent] = []
        if not isinstance(self._open, _TextPart):
            events += self._begin(_TextPart(_new_id("msg"), len(self.items), self._logprobs))
        return events + self._add(text)

    def _call(self, call: ToolCallDelta) -> list[ResponseEvent]:
        events: list[ResponseEvent] = []
        if call.index != self._open_call or not isinstance(self._open, _CallPart):
            assert call.id is not None, "the first delta of a call names it"
            assert call.name is not None, "the first delta of a call names it"
            events += self._begin(_CallPart(_new_id("fc"), len(self.items), call.id, call.name))
            self._open_call = call.index
        return events + self._add(call.arguments) if call.arguments else events

    def finish(self, *, complete: bool) -> list[ResponseEvent]:
        """End the item that is open; where the response is not `complete`, it was cut short in it."""
        if self._open is None:
            return []
        part, self._open = self._open, None
        events = part.end("completed" if complete else "incomplete")
        self.items[part.index] = part.item
        return events

    def _begin(self, part: _Part) -> list[ResponseEvent]:
        events = self.finish(complete=True)
        self._open = part
        self.items.append(part.item)
        return [*events, *part.begin()]

    def _add(self, text: str) -> list[ResponseEvent]:
        assert self._open is not None
        return [self._open.add(text)]


class _Part(Protocol):
    """An item that grows. `item` is what it is now; `index` is its place in the output."""

    index: int
    item: OutputItem

    def begin(self) -> list[ResponseEvent]: ...
    def add(self, text: str) -> ResponseEvent: ...
    def end(self, status: ItemStatus) -> list[ResponseEvent]: ...


class _TextPart:
    def __init__(self, id: str, index: int, logprobs: TextLogprobs | None) -> None:
        self.index = index
        self.item: OutputItem = OutputMessage(id=id, status="in_progress", content=[])
        self._id = id
        self._texts: list[str] = []
        self._source = logprobs
        self._logprobs: list[bytes] = []  # as JSON: four events tell all of them

    def begin(self) -> list[ResponseEvent]:
        part = OutputText(text="")
        return [
            ItemAdded(output_index=self.index, item=self.item),
            PartAdded(item_id=self._id, output_index=self.index, part=part),
        ]

    def add(self, text: str) -> ResponseEvent:
        self._texts.append(text)
        logprobs = self._source.take(text) if self._source else []
        if logprobs:
            self._logprobs.append(b",".join(map(encode, logprobs)))
        told = _list_of(self._logprobs[-1:] if logprobs else ())
        return TextDelta(item_id=self._id, output_index=self.index, delta=text, logprobs=told)

    def end(self, status: ItemStatus) -> list[ResponseEvent]:
        part = OutputText(text="".join(self._texts), logprobs=_list_of(self._logprobs))
        self.item = OutputMessage(id=self._id, status=status, content=[part])
        return [
            TextDone(item_id=self._id, output_index=self.index, text=part.text, logprobs=part.logprobs),
            PartDone(item_id=self._id, output_index=self.index, part=part),
            ItemDone(output_index=self.index, item=self.item),
        ]


class _ThoughtPart:
    def __init__(self, id: str, index: int) -> None:
        self.index = index
        self.item: OutputItem = ReasoningItem(id=id, status="in_progress", summary=[], content=[])
        self._id = id
        self._texts: list[str] = []

    def begin(self) -> list[ResponseEvent]:
        part = ReasoningText(text="")
        return [
            ItemAdded(output_index=self.index, item=self.item),
            PartAdded(item_id=self._id, output_index=self.index, part=part),
        ]

    def add(self, text: str) -> ResponseEvent:
        self._texts.append(text)
        return ReasoningDelta(item_id=self._id, output_index=self.index, delta=text)

    def end(self, status: ItemStatus) -> list[ResponseEvent]:
        part = ReasoningText(text="".join(self._texts))
        self.item = ReasoningItem(id=self._id, status=status, summary=[], content=[part])
        return [
            ReasoningDone(item_id=self._id, output_index=self.index, text=part.text),
            PartDone(item_id=self._id, output_index=self.index, part=part),
            ItemDone(output_index=self.index, item=self.item),
        ]


class _SummaryPart(_ThoughtPart):
    """Thoughts where clients look for a summary of them."""

    def begin(self) -> list[ResponseEvent]:
        part = SummaryText(text="")
        return [
            ItemAdded(output_index=self.index, item=self.item),
            SummaryPartAdded(item_id=self._id, output_index=self.index, part=part),
        ]

    def add(self, text: str) -> ResponseEvent:
        self._texts.append(text)
        return SummaryDelta(item_id=self._id, output_index=self.index, delta=text)

    def end(self, status: ItemStatus) -> list[ResponseEvent]:
        part = SummaryText(text="".join(self._texts))
        self.item = ReasoningItem(id=self._id, status=status, summary=[part], content=[])
        return [
            SummaryDone(item_id=self._id, output_index=self.index, text=part.text),
            SummaryPartDone(item_id=self._id, output_index=self.index, part=part),
            ItemDone(output_index=self.index, item=self.item),
        ]


class _CallPart:
    def __init__(self, id: str, index: int, call_id: str, name: str) -> None:
        self.index = index
        self.item: OutputItem = FunctionCall(id=id, status="in_progress", call_id=call_id, name=name, arguments="")
        self._id = id
        self._call_id = call_id
        self._name = name
        self._texts: list[str] = []

    def begin(self) -> list[ResponseEvent]:
        return [ItemAdded(output_index=self.index, item=self.item)]

    def add(self, text: str) -> ResponseEvent:
        self._texts.append(text)
        return ArgumentsDelta(item_id=self._id, output_index=self.index, delta=text)

    def end(self, status: ItemStatus) -> list[ResponseEvent]:
        arguments = "".join(self._texts)
        self.item = FunctionCall(
            id=self._id, status=status, call_id=self._call_id, name=self._name, arguments=arguments
        )
        return [
            ArgumentsDone(item_id=self._id, output_index=self.index, name=self._name, arguments=arguments),
            ItemDone(output_index=self.index, item=self.item),
        ]


def _list_of(entries: Sequence[bytes]) -> list[TokenLogprob]:
    """The list of what is JSON already; it goes into an answer as it is."""
    return cast(list[TokenLogprob], msgspec.Raw(b"[" + b",".join(entries) + b"]"))


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
