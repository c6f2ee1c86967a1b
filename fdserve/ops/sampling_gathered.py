"""Sampling by ranks on GPUs of their own, each from its part of the vocabulary.

The steps are those of kernels/cuda/sample_ranks.cu. What ranks gather between them is a few numbers a row: three times,
or once where all rows are greedy. Rows that these do not settle are sampled from whole logits, by every rank alike.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from fdserve.ops.collectives import vocabulary_starts
from fdserve.ops.gathering import Gathering
from fdserve.ops.library import run
from fdserve.ops.tensors import to_tensor

if TYPE_CHECKING:
    from paddle import Tensor

UNSETTLED = -3
"""In place of the token of a row that is to be sampled from whole logits."""

SUM_BLOCK = 1024
MAX_RANKS = 16  # as in launchers.h
Ints = npt.NDArray[np.int32]


class SampledRows(NamedTuple):
    """The tensors that `fdserve.ops.sample` takes, in the order of the ops' inputs."""

    logits: Tensor
    float_params: Tensor
    int_params: Tensor
    history: Tensor
    history_offsets: Tensor
    prompt_lens: Tensor
    bias_ids: Tensor
    bias_values: Tensor
    bias_offsets: Tensor
    masks: Tensor | None
    mask_rows: Tensor | None
    logprob_modes: Tensor | None

    def take(self, logits: Tensor, which: Ints) -> SampledRows:
        """The rows of these numbers, which `logits` are of already."""
        index = _index(which)
        history, history_offsets = _ragged(self.history_offsets, which, self.history)
        bias_ids, bias_values, bias_offsets = _ragged(self.bias_offsets, which, self.bias_ids, self.bias_values)
        return SampledRows(
            logits,
            self.float_params[index],
            self.int_params[index],
            history,
            history_offsets,
            self.prompt_lens[index],
            bias_ids,
            bias_values,
            bias_offsets,
            self.masks,
            None if self.mask_rows is None else self.mask_rows[index],
            None if self.logprob_modes is None else self.logprob_modes[index],
        )


def sample_gathered(
    rows: SampledRows, vocab_size: int, num_top: int, ranks: Gathering, *, all_greedy: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fdserve.ops.sample` of logits that are this rank's columns; the results are those of the whole logits."""
    starts = vocabulary_starts(vocab_size, ranks.world_size)
    if ranks.world_size > MAX_RANKS or any(start % SUM_BLOCK or start == stop for start, stop in pairwise(starts)):
        # The vocabulary is too small to be shared out in blocks of the sampler's sums, or the ranks are too many.
        whole = rows._replace(logits=ranks.join_columns(rows.logits, starts))
        tokens, logprobs, top_ids, top_logprobs = run("sample", *whole, vocab_size, num_top)
        return tokens, logprobs, top_ids, top_logprobs
    shares = vocab_size, num_top, ranks.rank, starts
    offered, workspace = run("sample_offer", *rows, *shares)
    known: list[Tensor | None] = [workspace, ranks.gather(offered)]
    if all_greedy:
        known += [None, None]
    else:
        known.append(ranks.gather(run("sample_weigh", *rows, *known, *shares)[0]))
        known.append(ranks.gather(run("sample_settle", *rows, *known, *shares)[0]))
    results = run("sample_finish", *rows, *known, *shares)
    # Waits for the device, as whoever reads the tokens does; all ranks see the same.
    unsettled = np.flatnonzero(results[0].numpy() == UNSETTLED).astype(np.int32)
    if len(unsettled):
        _settle(results, unsettled, rows, vocab_size, num_top, ranks)
    tokens, logprobs, top_ids, top_logprobs = results
    return tokens, logprobs, top_ids, top_logprobs


def _settle(
    results: list[Tensor], which: Ints, rows: SampledRows, vocab_size: int, num_top: int, ranks: Gathering
) -> None:
    """Put what the whole logits of some rows give into the results."""
    index = _index(which)
    whole = ranks.join_columns(rows.logits[index], vocabulary_starts(vocab_size, ranks.world_size))
    settled = run("sample", *rows.take(whole, which), vocab_size, num_top)
    for result, part in zip(results, settled, strict=True):
        if result.size:
            result[index] = part


def _index(which: Ints) -> Tensor:
    """Of these rows, in the one dtype that Paddle's kernels for indexing on a GPU take."""
    return to_tensor(which.astype(np.int64))


def _ragged(offsets: Tensor, which: Ints, *values: Tensor) -> list[Tensor]:
    """These rows' values, of each of `values`, end to end; and their offsets."""
    bounds = offsets.numpy()
    places = np.concatenate([np.arange(bounds[row], bounds[row + 1]) for row in which])
    lengths = bounds[which + 1] - bounds[which]
    taken = [to_tensor(each.numpy()[places]) for each in values]
    return [*taken, to_tensor(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))]
