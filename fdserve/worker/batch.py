"""A step's inputs, gathered from the rows without a Python loop over tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fdserve.executor.wire import Plan
from fdserve.worker.rows import Ints, Rows


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
    samples = ends == rows.num_tokens[row_ids]
    return Batch(
        token_ids=token_ids,
        positions=positions,
        query_starts=query_starts,
        context_lens=context_lens,
        block_tables=rows.blocks[row_ids, :width],
        sample_indices=query_starts[1:][samples] - 1,
        sample_rows=row_ids[samples],
    )
