"""From logits to tokens: the rows' sampling state as the inputs of `ops.sample`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle

from fdserve import ops
from fdserve.worker.limits import NO_FORCED_ID, Floats, read_mask
from fdserve.worker.rows import Ints, Rows


@dataclass(frozen=True)
class Sampled:
    """R sampled tokens; the logprob arrays are None if no row asked for logprobs."""

    token_ids: Ints
    """[R]; `ops.sampling.BROKEN` or `NOTHING_ALLOWED` where there is none"""
    logprobs: npt.NDArray[np.float32] | None = None
    """[R]"""
    top_ids: Ints | None = None
    """[R, K], K as many as the row that asked for most"""
    top_logprobs: npt.NDArray[np.float32] | None = None
    """[R, K]"""


def sample(
    rows: Rows, row_ids: Ints, logits: Any, vocab_size: int, masks: Mapping[int, bytes] | None = None
) -> Sampled:
    """Sample one token for each of `row_ids` from logits float32 [R, V], and append it to its row.

    `masks` are the constraints' masks by row, where there are any. Each row depends on its own logits, parameters,
    mask and tokens alone.
    """
    int_params = np.empty((len(row_ids), 4), np.int64)
    int_params[:, :2] = rows.int_params[row_ids]
    int_params[:, 2] = (rows.num_tokens - rows.num_prompt)[row_ids]
    int_params[:, 3] = NO_FORCED_ID
    limits = _limits(rows, row_ids, masks or {}, vocab_size, int_params)
    history = (
        [rows.tokens[row, : rows.num_tokens[row]] if rows.needs_history[row] else _EMPTY for row in row_ids]
        if rows.needs_history[row_ids].any()
        else None
    )
    past, past_offsets = _ragged(history, len(row_ids))
    num_top = int(rows.num_top[row_ids].max())
    token_ids, logprobs, top_ids, top_logprobs = ops.sample(
        logits,
        paddle.to_tensor(rows.float_params[row_ids]),
        paddle.to_tensor(int_params),
        paddle.to_tensor(past),
        paddle.to_tensor(past_offsets),
        paddle.to_tensor(rows.num_prompt[row_ids]),
        paddle.to_tensor(limits.bias_ids),
        paddle.to_tensor(limits.bias_values),
        paddle.to_tensor(limits.bias_offsets),
        vocab_size=vocab_size,
        num_top=max(num_top, 0),
        masks=None if limits.masks is None else paddle.to_tensor(limits.masks),
        mask_rows=None if limits.masks is None else paddle.to_tensor(limits.mask_rows),
        logprob_modes=paddle.to_tensor(rows.logprob_modes[row_ids]),
    )
    tokens = token_ids.numpy()
    rows.append(row_ids, tokens)
    if num_top < 0:
        return Sampled(tokens)
    return Sampled(tokens, logprobs.numpy(), top_ids.numpy(), top_logprobs.numpy())


@dataclass(frozen=True)
class _Limits:
    """The limits of R rows as `ops.sample` takes them."""

    bias_ids: Ints
    bias_values: Floats
    bias_offsets: Ints
    masks: Ints | None
    mask_rows: Ints


def _limits(
    rows: Rows, row_ids: Ints, masks: Mapping[int, bytes], vocab_size: int, int_params: npt.NDArray[np.int64]
) -> _Limits:
    """What the rows' limits say now; forced ids are put into `int_params`."""
    bias_ids, bias_values = [_EMPTY] * len(row_ids), [_NO_VALUES]
    words: list[Ints] = []
    mask_rows = np.full(len(row_ids), -1, np.int32)
    limited = rows.is_limited[row_ids]
    if masks:
        limited |= np.isin(row_ids, list(masks))
    if not limited.any():
        return _Limits(_EMPTY, _NO_VALUES, np.zeros(len(row_ids) + 1, np.int32), None, mask_rows)
    for index in np.flatnonzero(limited).tolist():
        row = int(row_ids[index])
        mask = read_mask(masks[row], vocab_size) if row in masks else None
        limits = rows.limits[row]
        if limits is not None:
            output = rows.tokens[row, rows.num_prompt[row] : rows.num_tokens[row]]
            mask = limits.mask(mask)
            bias_ids[index], values = limits.biases(output, mask)
            bias_values.append(values)
            int_params[index, 3] = limits.forced_id(output)
        if mask is not None:
            mask_rows[index] = len(words)
            words.append(mask)
    ids, offsets = _ragged(bias_ids, len(row_ids))
    return _Limits(ids, np.concatenate(bias_values), offsets, np.stack(words) if words else None, mask_rows)


_EMPTY: Ints = np.zeros(0, np.int32)
_NO_VALUES: Floats = np.zeros(0, np.float32)


def _ragged(parts: list[Ints] | None, count: int) -> tuple[Ints, Ints]:
    """The `count` parts end to end, and the [count + 1] offsets between them; None for nothing but empty parts."""
    offsets = np.zeros(count + 1, np.int32)
    if parts is None:
        return _EMPTY, offsets
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return np.concatenate([_EMPTY, *parts]), offsets
