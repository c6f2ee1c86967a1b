"""A step's result as the scheduler reads it: the ranks' bytes behind plain numbers."""

from __future__ import annotations

from array import array

from fdserve.engine.request import TokenLogprobs
from fdserve.executor.wire import StepResult


class Sampled:
    """The tokens that a step sampled, in the plan's order; logprobs become objects only when asked for."""

    __slots__ = ("_logprobs", "_num_top", "_top_ids", "_top_logprobs", "token_ids")

    def __init__(self, result: StepResult) -> None:
        self.token_ids = array("i", result.token_ids)
        """-1 where there is no token: the row's logits held no number."""
        self._num_top = result.num_top
        self._logprobs = array("f", result.logprobs)
        self._top_ids = array("i", result.top_ids)
        self._top_logprobs = array("f", result.top_logprobs)

    def logprobs_at(self, index: int, num_top: int) -> TokenLogprobs:
        """The sampled token's logprob and the `num_top` likeliest tokens, of entry `index`."""
        start = index * self._num_top
        return TokenLogprobs(
            self._logprobs[index],
            tuple(self._top_ids[start : start + num_top]),
            tuple(self._top_logprobs[start : start + num_top]),
        )
