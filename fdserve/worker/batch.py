"""A step's inputs, gathered from the rows without a Python loop over tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fdserve.executor.wire import Plan
from fdserve.worker.rows import Ints, Rows

EMPTY: Ints = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Batch:
    """T tokens of S sequences, R of which sample; all arrays int32."""

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
    """[R] into `token_ids`: the last tokens of the sequences whose tokens are all computed with this step"""
    sample_rows: Ints
    """[R], their rows"""
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
    offsets = np.arange(query_starts[-1], dtype=np.int32) - np.repeat(query_starts[:-1], counts)
    positions = np.repeat(context_lens, counts) + offsets
    token_ids = rows.tokens[np.repeat(row_ids, counts), positions]
    ends = context_lens + counts
    rows.num_computed[row_ids] = ends
    width = -(-int(ends.max()) // rows.block_size)
    samples = (ends == rows.num_tokens[row_ids]) & rows.samples[row_ids]
    prompt_indices, prompt_targets, prompt_num_top = _prompt_tokens(rows, row_ids, query_starts, context_lens)
    return Batch(
        token_ids=token_ids,
        positions=positions,
        query_starts=query_starts,
        context_lens=context_lens,
        block_tables=rows.blocks[row_ids, :width],
        sample_indices=query_starts[1:][samples] - 1,
        sample_rows=row_ids[samples],
        prompt_indices=prompt_indices,
        prompt_targets=prompt_targets,
        prompt_num_top=prompt_num_top,
    )


def _prompt_tokens(rows: Rows, row_ids: Ints, query_starts: Ints, context_lens: Ints) -> tuple[Ints, Ints, int]:
    """`prompt_indices`, `prompt_targets` and `prompt_num_top` of a batch."""
    indices, targets = [EMPTY], [EMPTY]
    num_top = int(rows.prompt_top[row_ids].max())
    for sequence in np.flatnonzero(rows.prompt_top[row_ids] >= 0).tolist():
        row, first = row_ids[sequence], int(query_starts[sequence])
        start = int(context_lens[sequence])
        stop = min(start + int(query_starts[sequence + 1]) - first, int(rows.num_prompt[row]) - 1)
        indices.append(np.arange(first, first + max(0, stop - start), dtype=np.int32))
        targets.append(rows.tokens[row, start + 1 : stop + 1])
    return np.concatenate(indices), np.concatenate(targets), max(num_top, 0)
