"""POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from fdserve.protocol.generation import (
    Count,
    FinishReason,
    GenerationRequest,
    OptionalIds,
    OptionalPromptLogprobs,
    OptionalUsage,
    TokenIds,
    TopLogprobs,
)


class CompletionRequest(GenerationRequest, kw_only=True):
    """`prompt` is a string, a list of strings, a list of token ids, or a list of such lists, and never a mixture.

    It is required unless there are `prompt_token_ids`.
    """

    prompt: str | list[str | int | TokenIds] | None = None
    max_tokens: Count | None = None
    logprobs: TopLogprobs | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    # Known and not supported.
    suffix: str | None = None


class CompletionLogprobs(msgspec.Struct):
    """Parallel lists, an entry a token; `text_offset` is in characters of the choice's text.

    A token that is not UTF-8 by itself is written as `bytes:\\xNN…`, and one that is no text as "". The first token
    of an echoed prompt has no probability: null.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """See `ChatChoice` and `ChatChunkChoice`."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    prompt_token_ids: OptionalIds = UNSET
    completion_token_ids: OptionalIds = UNSET
    prompt_logprobs: OptionalPromptLogprobs = UNSET
    arrival_time: float | UnsetType = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """A whole completion, or one event of a stream: they have the same shape."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: OptionalUsage = UNSET
    system_fingerprint: str
