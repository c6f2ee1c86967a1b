"""From logits to tokens: the rows' sampling state as the inputs of `ops.sample`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor

from fdserve import ops
from fdserve.ops.sampling import GREEDY_TEMPERATURE
from fdserve.worker.limits import NO_FORCED_ID, leaves_one, read_mask
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
    counts: Ints | None = None
    """Of each row that sampled; None for one each"""

    def select(self, kept: npt.NDArray[np.bool_], counts: Ints) -> Sampled:
        """Those that are `kept` [R], `counts` of each row."""
        if self.logprobs is None or self.top_ids is None or self.top_logprobs is None:
            return Sampled(self.token_ids[kept], counts=counts)
        logprobs, top_ids, top_logprobs = self.logprobs[kept], self.top_ids[kept], self.top_logprobs[kept]
        return Sampled(self.token_ids[kept], logprobs, top_ids, top_logprobs, counts)


@dataclass(frozen=True)
class _Fixed:
    """What `ops.sample` takes of R rows that stays the same while they run, put together once."""

    rows: bytes
    """Which rows these are."""
    num_begun: int
    """`Rows.num_begun` when it was put together."""
    floats: Tensor
    num_prompt: Tensor
    logprob_modes: Tensor
    int_params: ops.HeldTensor
    """[R, 4] int64, of which the positions and the forced ids are written anew in each step"""
    prompts: Ints
    """[R], `num_prompt` as an array"""
    limited: npt.NDArray[np.bool_] | None
    """[R], the rows that have limits; None if there is none"""
    penalized: npt.NDArray[np.bool_] | None
    """[R], the rows that need their tokens so far; None if there is none"""
    num_top: int
    """-1 if no row asks for logprobs"""
    all_greedy: bool
    """Nothing is drawn, and no row asks for logprobs."""


class Sampler:
    """Samples the tokens of `rows`.

    `sample_op` is `ops.sample`, or what does its work together with other ranks, the logits then being this rank's
    part.
    """

    def __init__(self, rows: Rows, vocab_size: int, sample_op: Callable[..., Any] = ops.sample) -> None:
        self._rows = rows
        self._vocab_size = vocab_size
        self._sample_op = sample_op
        self._fixed: _Fixed | None = None

    def sample(
        self, row_ids: Ints, lens: Ints, logits: Tensor, masks: Mapping[int, bytes] = MappingProxyType({})
    ) -> Sampled:
        """Sample the token that follows the first `lens` [R] tokens of each of `row_ids` [R].

        From logits float32 [R, V]; `masks` are the constraints' masks by row, where there are any. Each sample depends
        on its own logits and its row's parameters, mask and tokens alone.
        """
        fixed, rows = self._fixed_of(row_ids), self._rows
        np.subtract(lens, fixed.prompts, out=fixed.int_params.array[:, 2])
        limits = _limits(rows, row_ids, lens, masks, self._vocab_size, fixed)
        past, past_offsets = _history(rows, row_ids, lens, fixed.penalized)
        token_ids, logprobs, top_ids, top_logprobs = self._sample_op(
            logits,
            fixed.floats,
            fixed.int_params(),
            past,
            past_offsets,
            fixed.num_prompt,
            limits.bias_ids,
            limits.bias_values,
            limits.bias_offsets,
            vocab_size=self._vocab_size,
            num_top=max(fixed.num_top, 0),
            masks=limits.masks,
            mask_rows=limits.mask_rows,
            logprob_modes=fixed.logprob_modes,
            all_greedy=fixed.all_greedy,
        )
        tokens = token_ids.numpy()
        if fixed.num_top < 0:
            return Sampled(tokens)
        return Sampled(tokens, logprobs.numpy(), top_ids.numpy(), top_logprobs.numpy())

    def _fixed_of(self, row_ids: Ints) -> _Fixed:
        """As for the last step, if the rows are the same: most steps sample the rows of the one before."""
        fixed, rows = self._fixed, self._rows
        key = row_ids.tobytes()
        if fixed is None or fixed.num_begun != rows.num_begun or fixed.rows != key:
            int_params = np.full((len(row_ids), 4), NO_FORCED_ID, np.int64)
            int_params[:, :2] = rows.int_params[row_ids]
            num_top = int(rows.num_top[row_ids].max())
            greedy = rows.float_params[row_ids, 0] < GREEDY_TEMPERATURE
            fixed = self._fixed = _Fixed(
                rows=key,
                num_begun=rows.num_begun,
                floats=ops.to_tensor(rows.float_params[row_ids]),
                num_prompt=ops.to_tensor(rows.num_prompt[row_ids]),
                logprob_modes=ops.to_tensor(rows.logprob_modes[row_ids]),
                int_params=ops.HeldTensor(int_params),
                prompts=rows.num_prompt[row_ids],
                limited=_any(rows.is_limited[row_ids]),
                penalized=_any(rows.needs_history[row_ids]),
                num_top=num_top,
                all_greedy=num_top < 0 and bool(greedy.all()),
            )
        return fixed


def _any(flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_] | None:
    return flags if flags.any() else None


@dataclass(frozen=True)
class _Limits:
    """The limits of R rows as `ops.sample` takes them."""

    bias_ids: Tensor
    bias_values: Tensor
    bias_offsets: Tensor
    masks: Tensor | None = None
    mask_rows: Tensor | None = None


def _limits(
    rows: Rows,
    row_ids: Ints,
    lens: Ints,
    masks: Mapping[int, bytes],
    vocab_size: int,
    fixed: _Fixed,
) -> _Limits:
    """What the rows' limits say now, and the masks; forced ids are put into `fixed.int_params`."""
    limited = fixed.limited
    if masks:
        masked = np.isin(row_ids, list(masks))
        limited = masked if limited is None else limited | masked
    if limited is None:
        return _Limits(*_nothing(len(row_ids)))
    bias_ids, bias_values = [_EMPTY] * len(row_ids), [np.zeros(0, np.float32)]
    words: list[Ints] = []
    mask_rows = np.full(len(row_ids), -1, np.int32)
    for index in np.flatnonzero(limited).tolist():
        row = int(row_ids[index])
        mask = read_mask(masks[row], vocab_size) if row in masks else None
        limits = rows.limits[row]
        if limits is not None:
            output = rows.tokens[row, rows.num_prompt[row] : lens[index]]
            fixed.int_params.array[index, 3] = limits.forced_id(output)
            # What a constraint forces are mostly the tags and line breaks of the model's layout, which no client sees.
            if mask is None or not leaves_one(mask):
                mask = limits.mask(mask)
                bias_ids[index], values = limits.biases(output, mask)
                bias_values.append(values)
                mask = limits.without_banned(mask)
        if mask is not None:
            mask_rows[index] = len(words)
            words.append(mask)
    ids, offsets = _ragged(bias_ids)
    values = ops.to_tensor(np.concatenate(bias_values))
    if not words:
        return _Limits(ids, values, offsets)
    return _Limits(ids, values, offsets, ops.to_tensor(np.stack(words)), ops.to_tensor(mask_rows))


def _history(rows: Rows, row_ids: Ints, lens: Ints, penalized: npt.NDArray[np.bool_] | None) -> tuple[Tensor, Tensor]:
    """The tokens so far of the rows with penalties, and where each row's begin."""
    if penalized is None:
        ids, _, offsets = _nothing(len(row_ids))
        return ids, offsets
    return _ragged(
        [
            rows.tokens[row, :length] if wanted else _EMPTY
            for row, length, wanted in zip(row_ids, lens, penalized, strict=True)
        ]
    )


def _ragged(parts: list[Ints]) -> tuple[Tensor, Tensor]:
    """The parts end to end, and the [len + 1] offsets between them, as tensors."""
    offsets = np.zeros(len(parts) + 1, np.int32)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return ops.to_tensor(np.concatenate([_EMPTY, *parts])), ops.to_tensor(offsets)


@cache
def _nothing(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """No ids, no values, and the offsets of `count` rows that have none; made once, for a tensor costs microseconds."""
    return paddle.zeros([0], "int32"), paddle.zeros([0], "float32"), paddle.zeros([count + 1], "int32")


_EMPTY: Ints = np.zeros(0, np.int32)
