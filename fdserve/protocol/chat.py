"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from fdserve.protocol.generation import (
    FinishReason,
    GenerationRequest,
    OptionalIds,
    OptionalPromptLogprobs,
    OptionalUsage,
    Positive,
    TopLogprobs,
    Usage,
)
from fdserve.protocol.tools import (
    CalledFunction,
    FunctionCall,
    FunctionCallDelta,
    FunctionDefinition,
    FunctionName,
    PastToolCall,
    Tool,
    ToolCall,
    ToolCallPart,
    ToolChoice,
)

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
ChatFinishReason = FinishReason | Literal["function_call"]


class ContentPart(msgspec.Struct, kw_only=True):
    """One element of a content list; only the types "text" and "refusal" can be served."""

    type: str
    text: str | None = None
    refusal: str | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[PastToolCall] | None = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None


class ConversationRequest(GenerationRequest, kw_only=True):
    """The fields of a chat beside those that /v1/responses and /v1/messages have in a form of their own."""

    max_completion_tokens: Positive | None = None
    response_max_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    parallel_tool_calls: bool | None = None
    enable_thinking: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    reasoning_max_tokens: Positive | None = None
    disable_chat_template: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    # OpenAI's older form of tools.
    functions: Annotated[list[FunctionDefinition], Meta(max_length=128)] | None = None
    function_call: Literal["none", "auto"] | FunctionName | None = None
    # Known and not supported.
    modalities: list[str] | None = None
    audio: Any = None


class ChatRequest(ConversationRequest, kw_only=True):
    """`messages` are required unless there are `prompt_token_ids`."""

    messages: list[ChatMessage] | None = None
    max_tokens: Positive | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    # OpenAI's, and without effect here.
    store: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    prediction: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    moderation: Any = None


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    """One generated token: its text, natural-log probability and exact bytes."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(msgspec.Struct, kw_only=True):
    """`content` is null where there is nothing but calls."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET
    function_call: FunctionCall | UnsetType = UNSET
    prompt_token_ids: OptionalIds = UNSET
    completion_token_ids: OptionalIds = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    """`stop_reason` is the stop string or the stop token id that ended the choice, null for an eos or the length."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: str | int | None


class ChatCompletion(msgspec.Struct, kw_only=True):
    """`created` is in seconds since the epoch."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: str | UnsetType = UNSET
    system_fingerprint: str
    prompt_logprobs: OptionalPromptLogprobs = UNSET


class Delta(msgspec.Struct, kw_only=True):
    """`content` is null beside parts of calls, and text in every other chunk."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallPart] | UnsetType = UNSET
    function_call: FunctionCallDelta | UnsetType = UNSET
    prompt_token_ids: OptionalIds = UNSET
    completion_token_ids: OptionalIds = UNSET


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """`arrival_time` is the seconds since inference of the request began."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    arrival_time: float | UnsetType = UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: OptionalUsage = UNSET
    service_tier: str | UnsetType = UNSET
    system_fingerprint: str
    prompt_logprobs: OptionalPromptLogprobs = UNSET
