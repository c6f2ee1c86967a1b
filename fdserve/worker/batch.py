"""A step's inputs, gathered from the rows without a Python loop over tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fdserve.executor.wire import Plan
from fdserve.worker.rows import Ints, Rows

EMPTY: Ints = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Batch:
    """T tokens of S sequences; R samples, one of each sequence that samples and one more after each of its drafts.

    All arrays are int32.
    """

    token_ids: Ints
    """[T]"""
    positions: Ints
    """[T], the token's place in its sequence"""
    query_starts: Ints
    """[S + 1], where each sequence's tokens begin in `token_ids`"""
    context_lens: Ints
    """[S], tokens of the sequence that are in the cache already"""
    block_tables: Ints
    """[S, B], B for the longest sequence of the step"""
    sample_indices: Ints
    """[R] into `token_ids`: the last tokens of the sequences whose tokens are all computed with this step, and their
    drafts"""
    sample_rows: Ints
    """[R], their rows"""
    sample_lens: Ints
    """[R], how many tokens of the row come before the sample"""
    sample_counts: Ints | None
    """Samples of each sequence that samples; None without drafts: one each"""
    prompt_indices: Ints
    """[P] into `token_ids`: the tokens before those whose logprob a prompt asks for"""
    prompt_targets: Ints
    """[P], the tokens after them"""
    prompt_num_top: int
    """How many of the likeliest tokens to report with each"""


def assemble(rows: Rows, plan: Plan) -> Batch:
    """The inputs of a plan whose changes the rows have taken, and the rows moved on by it."""
    row_ids = np.array(plan.rows, np.int32)
    counts = np.array(plan.num_tokens, np.int32)
    context_lens = rows.num_computed[row_ids]
    query_starts = np.zeros(len(row_ids) + 1, np.int32)
    np.cumsum(counts, out=query_starts[1:])
    if query_starts[-1] == len(row_ids):  # decodes alone: one token each
        token_ids, positions = rows.tokens[row_ids, context_lens], context_lens
    else:
        positions = np.repeat(context_lens, counts) + _count_up(counts)
        token_ids = rows.tokens[np.repeat(row_ids, counts), positions]
    ends = context_lens + counts
    rows.num_computed[row_ids] = ends
    width = -(-int(ends.max()) // rows.block_size)
    known = rows.num_tokens[row_ids]
    if plan.drafts:
        drafts = rows.num_drafts[row_ids]
        samples = (ends == known + drafts) & rows.samples[row_ids]
        sample_counts = 1 + drafts[samples]
        nth = _count_up(sample_counts)
        sample_rows = np.repeat(row_ids[samples], sample_counts)
        sample_lens = np.repeat(known[samples], sample_counts) + nth
        sample_indices = np.repeat((query_starts[1:] - 1 - drafts)[samples], sample_counts) + nth
    else:
        samples = (ends == known) & rows.samples[row_ids]
        sample_rows, sample_lens, sample_indices = row_ids[samples], known[samples], query_starts[1:][samples] - 1
        sample_counts = None
    prompt_indices, prompt_targets, prompt_num_top = _prompt_tokens(rows, row_ids, query_starts, context_lens)
    return Batch(
        token_ids=token_ids,
        positions=positions,
        query_starts=query_starts,
        context_lens=context_lens,
        block_tables=rows.blocks[row_ids, :width],
        sample_indices=sample_indices,
        sample_rows=sample_rows,
        sample_lens=sample_lens,
        sample_counts=sample_counts,
        prompt_indices=prompt_indices,
        prompt_targets=prompt_targets,
        prompt_num_top=prompt_num_top,
    )


def accept(rows: Rows, batch: Batch, counts: Ints, tokens: Ints) -> tuple[npt.NDArray[np.bool_], Ints]:
    """Append to rows with drafts what was sampled, up to the first sample that is not the draft's token.

    Returns which of the samples `tokens` [R] were appended, and how many to each row; `counts` is `sample_counts`.
    """
    starts = np.cumsum(counts) - counts
    row_ids = batch.sample_rows[starts]
    # Behind a row's last draft stands whatever was there before; that sample is the row's last in any case.
    wrong = (tokens != rows.tokens[batch.sample_rows, batch.sample_lens]).astype(np.int32)
    wrong_before = np.cumsum(wrong) - wrong
    kept: npt.NDArray[np.bool_] = wrong_before == np.repeat(wrong_before[starts], counts)
    rows.tokens[batch.sample_rows[kept], batch.sample_lens[kept]] = np.maximum(tokens[kept], 0)
    kept_counts = np.add.reduceat(kept, starts, dtype=np.int32)
    rows.num_tokens[row_ids] += kept_counts
    rows.num_computed[row_ids] = rows.num_tokens[row_ids] - 1
    rows.num_drafts[row_ids] = 0
    return kept, kept_counts


def _count_up(counts: Ints) -> Ints:
    """0, 1, … up to each count, one after the other."""
    ends = np.cumsum(counts, dtype=np.int32)
    return np.arange(ends[-1], dtype=np.int32) - np.repeat(ends - counts, counts)


def _prompt_tokens(rows: Rows, row_ids: Ints, query_starts: Ints, context_lens: Ints) -> tuple[Ints, Ints, int]:
    """`prompt_indices`, `prompt_targets` and `prompt_num_top` of a batch."""
    wanted = rows.prompt_top[row_ids]
    num_top = int(wanted.max())
    if num_top < 0:
        return EMPTY, EMPTY, 0
    indices, targets = [EMPTY], [EMPTY]
    for sequence in np.flatnonzero(wanted >= 0).tolist():
        row, first = row_ids[sequence], int(query_starts[sequence])
        start = int(context_lens[sequence])
        stop = min(start + int(query_starts[sequence + 1]) - first, int(rows.num_prompt[row]) - 1)
        indices.append(np.arange(first, first + max(0, stop - start), dtype=np.int32))
        targets.append(rows.tokens[row, start + 1 : stop + 1])
    return np.concatenate(indices), np.concatenate(targets), num_top
