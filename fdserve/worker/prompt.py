"""Log-probabilities of a prompt's own tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor

from fdserve import ops
from fdserve.executor.wire import PROMPT_SLICE
from fdserve.worker.rows import Ints


@dataclass(frozen=True)
class PromptLogprobs:
    """Of P prompt tokens."""

    logprobs: npt.NDArray[np.float32]
    """[P]"""
    top_ids: Ints
    """[P, K], K as many as the row that asked for most"""
    top_logprobs: npt.NDArray[np.float32]
    """[P, K]"""


def prompt_logprobs(
    hidden: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    targets: Ints,
    num_top: int,
    vocab_size: int,
    sample_op: Callable[..., Any] = ops.sample,
) -> PromptLogprobs:
    """The log-probability of each of `targets` [P] after the token whose hidden state is in the same row of `hidden`.

    A slice at a time, so that there are never more than `PROMPT_SLICE` rows of logits; a row's numbers depend on its
    own hidden state alone.
    """
    parts = []
    for start in range(0, len(targets), PROMPT_SLICE):
        logits = logits_of(hidden[start : start + PROMPT_SLICE])
        parts.append(_report(logits, targets[start : start + PROMPT_SLICE], num_top, vocab_size, sample_op))
    logprobs, top_ids, top_logprobs = (np.concatenate(each) for each in zip(*parts, strict=True))
    return PromptLogprobs(logprobs, top_ids, top_logprobs)


def _report(
    logits: Tensor, targets: Ints, num_top: int, vocab_size: int, sample_op: Callable[..., Any]
) -> tuple[npt.NDArray[np.float32], Ints, npt.NDArray[np.float32]]:
    """The sampler with the prompt's tokens forced on it."""
    count = len(targets)
    none, offsets = paddle.zeros([0], "int32"), paddle.zeros([count + 1], "int32")
    ints = np.zeros((count, 4), np.int64)
    ints[:, 3] = targets
    floats = np.tile(np.array([0, 1, 0, 1, 0, 0], np.float32), (count, 1))
    _, logprobs, top_ids, top_logprobs = sample_op(
        logits,
        ops.to_tensor(floats),
        ops.to_tensor(ints),
        none,
        offsets,
        offsets[:count],
        none,
        paddle.zeros([0], "float32"),
        offsets,
        vocab_size=vocab_size,
        num_top=num_top,
    )
    return logprobs.numpy(), top_ids.numpy(), top_logprobs.numpy()
