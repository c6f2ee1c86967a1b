"""POST /v1/messages and /v1/messages/count_tokens, in the form of Anthropic's API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fdserve.protocol.chat import ConversationRequest
from fdserve.protocol.generation import Positive
from fdserve.protocol.tools import ToolName

StopSequence = Annotated[str, Meta(min_length=1)]
MessageStopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class ContentBlock(msgspec.Struct, kw_only=True):
    """One block of a message. `type` decides which fields count.

    text: `text`; thinking: `thinking`; redacted_thinking: none; tool_use: `id`, `name`, `input`; tool_result:
    `tool_use_id`, `content`, `is_error`.
    """

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[ResultBlock] | None = None
    is_error: bool | None = None


class ResultBlock(msgspec.Struct, kw_only=True):
    """One block of a tool's result or of a system prompt; only type "text" can be served."""

    type: str
    text: str | None = None


class InputMessage(msgspec.Struct, kw_only=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class MessageTool(msgspec.Struct, kw_only=True):
    """A tool that the client runs: type "custom", which is the default, with its `input_schema`."""

    name: ToolName
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class MessageToolChoice(msgspec.Struct, kw_only=True):
    """`name` belongs to type "tool"."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, kw_only=True):
    """`budget_tokens` belongs to type "enabled"; `display` "omitted" keeps the thoughts back."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Positive | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(msgspec.Struct, kw_only=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, kw_only=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountTokensRequest(ConversationRequest, kw_only=True):
    """Anthropic's fields, and those of a chat; see `fdserve.api.adapted` for which of these are refused."""

    messages: Annotated[list[InputMessage], Meta(min_length=1)]
    max_tokens: Positive | None = None
    system: str | list[ResultBlock] | None = None
    tools: list[MessageTool] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    stop_sequences: list[StopSequence] | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    max_tokens: Positive


class TokenCount(msgspec.Struct):
    input_tokens: int


class TextBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="text"):
    text: str
    citations: None = None


class ThinkingBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="thinking"):
    """`signature` is always empty: there is nothing to verify."""

    thinking: str
    signature: str = ""


class ToolUseBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


class MessageTokensDetails(msgspec.Struct):
    thinking_tokens: int


class MessageUsage(msgspec.Struct, kw_only=True):
    """`input_tokens` are those that the prefix cache did not hold, `cache_read_input_tokens` those that it did."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: MessageTokensDetails
    service_tier: Literal["standard"] = "standard"


class MessageDeltaUsage(msgspec.Struct, kw_only=True):
    """The totals at the end of a stream."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: MessageTokensDetails


class Message(msgspec.Struct, kw_only=True):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: MessageStopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageErrorDetail(msgspec.Struct):
    type: str
    message: str


class MessageErrorBody(msgspec.Struct, kw_only=True):
    type: Literal["error"] = "error"
    error: MessageErrorDetail
    request_id: str
