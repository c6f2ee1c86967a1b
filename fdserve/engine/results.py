"""A step's result as the scheduler reads it: the ranks' bytes behind plain numbers."""

from __future__ import annotations

from array import array

from fdserve.engine.request import TokenLogprobs
from fdserve.executor.wire import StepResult


class Sampled:
    """The tokens that a step sampled, in the plan's order; logprobs become objects only when asked for."""

    __slots__ = ("_prompt", "_sampled", "counts", "seconds", "token_ids")

    def __init__(self, result: StepResult) -> None:
        self.token_ids = array("i", result.token_ids)
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
        return TokenLogprobs(
            self._logprobs[index],
            tuple(self._top_ids[start : start + num_top]),
            tuple(self._top_logprobs[start : start + num_top]),
        )
