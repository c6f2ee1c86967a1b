"""From logits to tokens: the rows' sampling state as the inputs of `ops.sample`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle

from fdserve import ops
from fdserve.executor.wire import SamplingParams
from fdserve.worker.rows import Ints, Rows

NO_FORCED_ID = -1


@dataclass(frozen=True)
class Sampled:
    """R sampled tokens; the logprob arrays are None if no row asked for logprobs."""

    token_ids: Ints
    """[R]; -1 where the logits held no number"""
    logprobs: npt.NDArray[np.float32] | None = None
    """[R]"""
    top_ids: Ints | None = None
    """[R, K], K as many as the row that asked for most"""
    top_logprobs: npt.NDArray[np.float32] | None = None
    """[R, K]"""


def sample(rows: Rows, row_ids: Ints, logits: Any, vocab_size: int) -> Sampled:
    """Sample one token for each of `row_ids` from logits float32 [R, V], and append it to its row.

    Each row depends on its own logits, parameters and tokens alone.
    """
    num_generated = (rows.num_tokens - rows.num_prompt)[row_ids]
    int_params = np.empty((len(row_ids), 4), np.int64)
    int_params[:, :2] = rows.int_params[row_ids]
    int_params[:, 2] = num_generated
    int_params[:, 3] = NO_FORCED_ID
    bans: list[tuple[int, ...]] = [()] * len(row_ids)
    for index in np.flatnonzero(rows.is_special[row_ids]).tolist():
        row = int(row_ids[index])
        params = rows.params[row]
        assert params is not None
        if num_generated[index] < params.min_tokens:
            bans[index] = params.ending_ids
        output = rows.tokens[row, rows.num_prompt[row] : rows.num_tokens[row]]
        int_params[index, 3] = forced_id(params, output)
    bias_ids, bias_offsets = _ragged([np.array(ids, np.int32) for ids in bans])
    history, history_offsets = _ragged(
        [rows.tokens[row, : rows.num_tokens[row]] if rows.needs_history[row] else _EMPTY for row in row_ids]
    )
    num_top = int(rows.num_top[row_ids].max())
    token_ids, logprobs, top_ids, top_logprobs = ops.sample(
        logits,
        paddle.to_tensor(rows.float_params[row_ids]),
        paddle.to_tensor(int_params),
        paddle.to_tensor(history),
        paddle.to_tensor(history_offsets),
        paddle.to_tensor(rows.num_prompt[row_ids]),
        paddle.to_tensor(bias_ids),
        paddle.to_tensor(np.full(len(bias_ids), -np.inf, np.float32)),
        paddle.to_tensor(bias_offsets),
        vocab_size=vocab_size,
        num_top=max(num_top, 0),
    )
    tokens = token_ids.numpy()
    rows.append(row_ids, tokens)
    if num_top < 0:
        return Sampled(tokens)
    return Sampled(tokens, logprobs.numpy(), top_ids.numpy(), top_logprobs.numpy())


def forced_id(params: SamplingParams, output: Ints) -> int:
    """The id that a thinking budget dictates after the `output` so far, or -1.

    A function of the output alone, so that it holds across a preemption: once `thinking_budget` tokens are out and
    none of them ended the thinking, the ids of `think_end_ids` follow, one a step.
    """
    budget = params.thinking_budget
    if budget is None or not budget <= len(output) < budget + len(params.think_end_ids):
        return NO_FORCED_ID
    if params.think_end_id in output[:budget]:
        return NO_FORCED_ID
    return params.think_end_ids[len(output) - budget]


_EMPTY: Ints = np.zeros(0, np.int32)


def _ragged(parts: list[Ints]) -> tuple[Ints, Ints]:
    """The parts end to end, and the [len + 1] offsets between them."""
    offsets = np.zeros(len(parts) + 1, np.int32)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return np.concatenate([_EMPTY, *parts]), offsets
