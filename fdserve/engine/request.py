"""A request as the engine knows it, and what it gets back: token ids and numbers, no text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from fdserve.executor.wire import SamplingParams

__all__ = ["Constraint", "FinishReason", "Group", "Request", "SamplingParams", "TokenDelta", "TokenLogprobs"]

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Constraint(Protocol):
    """What may come next in one output, by its ids so far: a grammar's state, say.

    Used by one thread at a time, never the event loop's. The methods raise InvalidRequest when the constraint cannot
    go on (it is too costly, or a token broke it); that ends the request and nothing else.
    """

    @property
    def finished(self) -> bool:
        """Whether the output is complete and nothing may follow but the end."""

    def advance(self, token_id: int) -> None:
        """Take the next token of the output, an eos or stop id excepted."""

    def mask(self) -> bytes | None:
        """The ids allowed next as little-endian bits (bit i % 8 of byte i // 8), `vocab_size` of them rounded up to
        whole uint32 words, eos ids included where the output may end; None where anything may come."""


class Group:
    """The choices of one client's request: they share a bound on what waits, and fail together with a constraint."""

    def __init__(self) -> None:
        self.pending = 0
        """Tokens that wait for the client, as `engine.output` weighs them."""


class Request(msgspec.Struct, kw_only=True):
    """One sequence to generate. A client's request with n choices is n of these."""

    id: str
    prompt: list[int]
    params: SamplingParams
    priority: int = 0
    """Lower runs first; equal priorities run in order of arrival."""
    cache_salt: str = ""
    """Prefix blocks are shared only between requests with the same salt."""
    constraint: Constraint | None = None
    """Of this request alone; it has seen no token yet."""
    group: Group = msgspec.field(default_factory=Group)
    """The choices of a client's request have the same one."""


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities at one position."""

    logprob: float
    """Of the sampled token."""
    top_ids: Sequence[int]
    """The likeliest ids, most likely first, exactly as many as asked."""
    top_logprobs: Sequence[float]


class TokenDelta(msgspec.Struct):
    """What a step gave a request.

    `finish_reason` is set on the last delta, and only there. `stop_token_id` tells which eos or stop id ended it: that
    id is the last of `token_ids` and counts as generated. `error` carries the reason of an "error" finish.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Once, with or before the first token, where asked: of each token of the prompt but the first."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: Exception | None = None
    cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache when the request first ran."""
    started: float = 0.0
    """`time.monotonic()` when the request's first step was planned."""
