"""The events of a stream of POST /v1/messages; docs/protocol.md has their order."""

from __future__ import annotations

import msgspec

from fdserve.protocol.messages import (
    Message,
    MessageDeltaUsage,
    MessageStopReason,
    TextBlock,
    ThinkingBlock,
    ToolUseBlock,
)


class MessageEvent(msgspec.Struct, kw_only=True, tag_field="type"):
    """What all events are."""


class MessageStart(MessageEvent, kw_only=True, tag="message_start"):
    message: Message


class Ping(MessageEvent, kw_only=True, tag="ping"):
    """Says nothing; every stream has one."""


class BlockStart(MessageEvent, kw_only=True, tag="content_block_start"):
    """`index` is the block's place in the message's content, here and in all events."""

    index: int
    content_block: TextBlock | ThinkingBlock | ToolUseBlock


class TextDelta(msgspec.Struct, tag_field="type", tag="text_delta"):
    text: str


class ThinkingDelta(msgspec.Struct, tag_field="type", tag="thinking_delta"):
    thinking: str


class SignatureDelta(msgspec.Struct, tag_field="type", tag="signature_delta"):
    signature: str


class InputJsonDelta(msgspec.Struct, tag_field="type", tag="input_json_delta"):
    partial_json: str


class BlockDelta(MessageEvent, kw_only=True, tag="content_block_delta"):
    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class BlockStop(MessageEvent, kw_only=True, tag="content_block_stop"):
    index: int


class StopDelta(msgspec.Struct, kw_only=True):
    stop_reason: MessageStopReason
    stop_sequence: str | None


class MessageDelta(MessageEvent, kw_only=True, tag="message_delta"):
    delta: StopDelta
    usage: MessageDeltaUsage


class MessageStop(MessageEvent, kw_only=True, tag="message_stop"):
    """The last event."""


MessageStreamEvent = MessageStart | Ping | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop
