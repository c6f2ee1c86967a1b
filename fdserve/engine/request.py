"""A request as the engine knows it, and what it gets back: token ids and numbers, no text."""

from __future__ import annotations

from typing import Literal

import msgspec

from fdserve.executor.wire import SamplingParams

__all__ = ["FinishReason", "Request", "SamplingParams", "TokenDelta", "TokenLogprobs"]

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Request(msgspec.Struct, kw_only=True):
    """One sequence to generate. A client's request with n choices is n of these."""

    id: str
    prompt: list[int]
    params: SamplingParams
    priority: int = 0
    """Lower runs first; equal priorities run in order of arrival."""
    cache_salt: str = ""
    """Prefix blocks are shared only between requests with the same salt."""


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Raw log-probabilities at one position."""

    logprob: float
    """Of the sampled token."""
    top_ids: tuple[int, ...]
    """The likeliest ids, most likely first, exactly as many as asked."""
    top_logprobs: tuple[float, ...]


class TokenDelta(msgspec.Struct):
    """What a step gave a request.

    `finish_reason` is set on the last delta, and only there. `stop_token_id` tells which eos or stop id ended it: that
    id is the last of `token_ids` and counts as generated. `error` carries the reason of an "error" finish.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: Exception | None = None
    cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache when the request first ran."""
    started: float = 0.0
    """`time.monotonic()` when the request's first step was planned."""
