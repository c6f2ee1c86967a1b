"""What a model generates as the content blocks of /v1/messages, and as the events that tell of them."""

from __future__ import annotations

import json
from typing import Any, Literal, cast

import msgspec

from fdserve.api.choice import Piece
from fdserve.protocol.message_events import (
    BlockDelta,
    BlockStart,
    BlockStop,
    InputJsonDelta,
    MessageEvent,
    SignatureDelta,
    TextDelta,
    ThinkingDelta,
)
from fdserve.protocol.messages import TextBlock, ThinkingBlock, ToolUseBlock
from fdserve.text.tools import ToolCallDelta

Block = TextBlock | ThinkingBlock | ToolUseBlock


class BlockWriter:
    """Builds the content of one message from the pieces of its choice: one block after the other.

    `blocks` are whole after `finish`. `hide_thoughts` leaves thinking blocks empty.
    """

    def __init__(self, *, hide_thoughts: bool) -> None:
        self.blocks: list[Block] = []
        self._hide_thoughts = hide_thoughts
        self._open: Literal["thinking", "text"] | int | None = None  # an int is the number of a call
        self._texts: list[str] = []  # of the open block

    def push(self, piece: Piece) -> list[MessageEvent]:
        """Take a piece; return the events that it leads to."""
        events: list[MessageEvent] = []
        if piece.reasoning:
            if self._open != "thinking":
                events += self._begin("thinking", ThinkingBlock(thinking=""))
            if not self._hide_thoughts:
                self._texts.append(piece.reasoning)
                events.append(BlockDelta(index=self._index, delta=ThinkingDelta(piece.reasoning)))
        for part in piece.parts:
            events += self._text(part) if isinstance(part, str) else self._call(part)
        return events

    def _text(self, text: str) -> list[MessageEvent]:
        events: list[MessageEvent] = [] if self._open == "text" else self._begin("text", TextBlock(text=""))
        self._texts.append(text)
        return [*events, BlockDelta(index=self._index, delta=TextDelta(text))]

    def _call(self, call: ToolCallDelta) -> list[MessageEvent]:
        events: list[MessageEvent] = []
        if call.index != self._open:
            assert call.id is not None, "the first delta of a call names it"
            assert call.name is not None, "the first delta of a call names it"
            events += self._begin(call.index, ToolUseBlock(id=call.id, name=call.name, input={}))
        if call.arguments:
            self._texts.append(call.arguments)
            events.append(BlockDelta(index=self._index, delta=InputJsonDelta(call.arguments)))
        return events

    def finish(self) -> list[MessageEvent]:
        """End the block that is open."""
        if self._open is None:
            return []
        events: list[MessageEvent] = []
        block, text = self.blocks[-1], "".join(self._texts)
        if isinstance(block, ToolUseBlock):
            self.blocks[-1] = ToolUseBlock(id=block.id, name=block.name, input=_object(text))
        elif isinstance(block, TextBlock):
            self.blocks[-1] = TextBlock(text=text)
        else:
            self.blocks[-1] = ThinkingBlock(thinking=text)
            events.append(BlockDelta(index=self._index, delta=SignatureDelta("")))
        events.append(BlockStop(index=self._index))
        self._open, self._texts = None, []
        return events

    @property
    def _index(self) -> int:
        return len(self.blocks) - 1

    def _begin(self, kind: Literal["thinking", "text"] | int, block: Block) -> list[MessageEvent]:
        events = self.finish()
        self._open = kind
        self.blocks.append(block)
        return [*events, BlockStart(index=self._index, content_block=block)]


def _object(text: str) -> dict[str, Any]:
    """A call's arguments, as the model wrote them; empty where the length cut them off."""
    try:
        value = json.loads(text, parse_int=str)
    except (ValueError, RecursionError):
        return {}
    # Numbers and surrogates would not all survive to be made into Python's own and back.
    return cast(dict[str, Any], msgspec.Raw(text.encode())) if isinstance(value, dict) else {}
