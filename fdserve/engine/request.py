"""A request as the engine knows it: token ids and numbers, no text."""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "cancelled", "error"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens, and when to stop. Travels to the ranks as it is.

    `seed` is always set (the API draws one where the client gave none): with the position of a token it alone
    decides the random number for that token.
    """

    max_tokens: int
    seed: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    eos_token_ids: tuple[int, ...] = ()
    """Ids that end the sequence and are banned while fewer than `min_tokens` were generated."""
    stop_token_ids: tuple[int, ...] = ()
    """Further ids that end the sequence, as the client asked."""
    logprobs: int | None = None
    """None: no logprobs. k >= 0: the sampled token's and the k likeliest tokens' at every position."""
    thinking_budget: int | None = None
    """After this many generated tokens without `think_end_ids[think_end_at]` the ids of `think_end_ids` are forced."""
    think_end_ids: tuple[int, ...] = ()
    think_end_at: int = 0

    @property
    def needs_history(self) -> bool:
        """Whether the sampler must see the tokens so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


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
    """What one or more steps gave a request.

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
    """`time.monotonic()` when the request first entered a step."""
