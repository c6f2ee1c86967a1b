"""A step's result as the scheduler reads it: the ranks' bytes behind plain numbers, and what they add to a sequence."""

from __future__ import annotations

from array import array
from math import isnan

from fdserve.engine.request import TokenDelta, TokenLogprobs
from fdserve.engine.sequence import Sequence
from fdserve.errors import InternalError, InvalidRequest
from fdserve.executor.wire import StepResult
from fdserve.ops.sampling import BROKEN, NOTHING_ALLOWED


class Sampled:
    """The tokens that a step sampled, in the plan's order; logprobs become objects only when asked for."""

    __slots__ = ("_prompt", "_sampled", "counts", "seconds", "token_ids")

    def __init__(self, result: StepResult) -> None:
        self.token_ids = array("i", result.token_ids).tolist()
        """Negative where there is no token: see `StepResult.token_ids`."""
        self.counts = array("i", result.counts)
        """Tokens of each row that sampled; empty where that is one each."""
        self.seconds = result.seconds
        self._sampled = _Logprobs(result.num_top, result.logprobs, result.top_ids, result.top_logprobs)
        self._prompt = _Logprobs(
            result.prompt_num_top, result.prompt_logprobs, result.prompt_top_ids, result.prompt_top_logprobs
        )

    def logprobs_at(self, index: int, num_top: int) -> TokenLogprobs:
        """The sampled token's logprob and the `num_top` likeliest tokens, of entry `index`."""
        return self._sampled.at(index, num_top)

    def prompt_logprobs(self, start: int, count: int, num_top: int) -> list[TokenLogprobs]:
        """Those of `count` prompt tokens, from the step's prompt token number `start` on."""
        return [self._prompt.at(index, num_top) for index in range(start, start + count)]


class _Logprobs:
    """The bytes of some tokens' logprobs as arrays."""

    __slots__ = ("_logprobs", "_num_top", "_top_ids", "_top_logprobs")

    def __init__(self, num_top: int, logprobs: bytes, top_ids: bytes, top_logprobs: bytes) -> None:
        self._num_top = num_top
        self._logprobs = array("f", logprobs)
        self._top_ids = array("i", top_ids)
        self._top_logprobs = array("f", top_logprobs)

    def at(self, index: int, num_top: int) -> TokenLogprobs:
        start = index * self._num_top
        # Not as tuples, whose numbers take three times the memory while the client is waited for.
        return TokenLogprobs(
            self._logprobs[index],
            self._top_ids[start : start + num_top],
            self._top_logprobs[start : start + num_top],
        )


def take_tokens(sequence: Sequence, sampled: Sampled, first: int, count: int) -> TokenDelta:
    """Append a step's tokens to a sequence, `count` from entry `first` on, or as many as it takes to end it.

    Where `count` is 0 the sequence has nothing to generate, and is at its end. The delta says whether and why the
    sequence ends; ending it is left to the caller.
    """
    token_ids = sampled.token_ids[first : first + count]
    delta = TokenDelta(token_ids, cached_tokens=sequence.cached_tokens)
    if count == 0:
        delta.finish_reason = "length"
    taken = 0
    for token in token_ids:
        if token < 0:
            delta.finish_reason = "error"
            delta.error = _no_token_error(token)
            break
        taken += 1
        reason = sequence.ends_with(token)
        if reason is not None:
            delta.finish_reason = reason
            delta.stop_token_id = token if reason == "stop" else None
            break
    if taken < count:
        del token_ids[taken:]
    if sequence.prompt_logprobs is not None and (token_ids or count == 0):
        delta.prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, None
    num_top = sequence.request.params.logprobs
    if num_top is not None:
        delta.logprobs = [sampled.logprobs_at(index, num_top) for index in range(first, first + taken)] or None
    return delta


def take_prompt_logprobs(sequence: Sequence, sampled: Sampled, start: int, count: int) -> bool:
    """Keep the logprobs of `count` tokens of a sequence's prompt, the step's from number `start` on.

    False where the model's output for one of them was not a number.
    """
    num_top = sequence.request.params.prompt_logprobs
    if sequence.prompt_logprobs is None or num_top is None or sequence.finish_reason is not None:
        return True
    values = sampled.prompt_logprobs(start, count, num_top)
    sequence.prompt_logprobs += values
    return not any(isnan(value.logprob) for value in values)


def broken() -> TokenDelta:
    """The end of a sequence for which the model's output was not a number."""
    return TokenDelta([], finish_reason="error", error=_no_token_error(BROKEN))


def _no_token_error(code: int) -> InternalError | InvalidRequest:
    """What a code in place of a token means for the request."""
    if code == NOTHING_ALLOWED:
        return InvalidRequest(
            "No token can follow: the form of the output, bad_words, logit_bias and the lists of token ids leave none.",
            code="no_token_allowed",
        )
    return InternalError("The model's output for this request was not a number.")
