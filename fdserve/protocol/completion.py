"""POST /v1/completions."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from fdserve.protocol.generation import (
    FinishReason,
    GenerationRequest,
    OptionalIds,
    OptionalUsage,
    TokenIds,
    TopLogprobs,
)


class CompletionRequest(GenerationRequest, kw_only=True):
    """`prompt` is a string, a list of strings, a list of token ids, or a list of such lists, and never a mixture."""

    prompt: str | list[str | int | TokenIds]
    logprobs: TopLogprobs | None = None
    # Known and not supported, but for the values that change nothing.
    suffix: str | None = None
    echo: bool | None = None
    best_of: int | None = None


class CompletionLogprobs(msgspec.Struct):
    """Parallel lists, an entry a token; `text_offset` is in characters of the choice's text.

    A token that is not UTF-8 by itself is written as `bytes:\\xNN…`.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
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
    arrival_time: float | UnsetType = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """A whole completion, or one event of a stream: they have the same shape."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: OptionalUsage = UNSET
