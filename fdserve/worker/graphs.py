"""Decode steps recorded once for each batch size and replayed.

On a GPU, launching a step's kernels one by one would cost more than running them. Steps of several ranks are not
recorded: nothing is known to forbid it (see docs/gpu.md), but it was never tried, and a graph that deadlocks is worse
than a slow step.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor

from fdserve import ops
from fdserve.models.ernie4_5 import Ernie4_5
from fdserve.models.layers import BatchTensors, KvCaches
from fdserve.worker.batch import Batch

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Sequences in a recorded step; a step with fewer is filled up."""

Record = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
"""Runs a step's work once: its result, and what computes it again, from what its inputs then hold, into that result."""


def record_cuda_graph(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """`Record` by a CUDA graph."""
    from paddle.device.cuda.graphs import CUDAGraph

    work()  # what is set up at the first call must not be recorded
    paddle.device.synchronize()
    # Without a place it would be the first of those that the launcher chose, whatever `set_device` says.
    graph = CUDAGraph(ops.own_place())
    graph.capture_begin()
    try:
        result = work()
    except BaseException:
        with suppress(Exception):  # it says no more than that something was wrong before
            graph.capture_end()  # or nothing could run on this stream any more
        raise
    graph.capture_end()
    return result, graph.replay


class _Inputs:
    """What a recorded step computes from: tensors that stay where they are, filled by one copy from the host.

    Rows that fill a step up have a token at position 0, and write its key and value to `spare_block`.
    """

    def __init__(self, size: int, max_model_len: int, block_size: int, head_dim: int, spare_block: int) -> None:
        width = -(-max_model_len // block_size)
        shapes = [(size,), (size,), (size, width), (size, head_dim)]
        self._host = np.zeros(sum(map(_room, shapes)), np.int32)
        self._sent = paddle.from_dlpack(self._host)
        self._token_ids, self._context_lens, self._block_tables, rope = _parts(self._host, shapes)
        self._rope = rope.view(np.float32)
        self._spare_block = spare_block
        self._block_tables[:, 0] = spare_block
        self._held = ops.to_tensor(self._host)
        token_ids, context_lens, block_tables, rope = _parts(self._held, shapes)
        self.held = BatchTensors(
            token_ids=token_ids,
            rope=rope.view("float32"),
            query_starts=ops.to_tensor(np.arange(size + 1, dtype=np.int32)),
            context_lens=context_lens,
            block_tables=block_tables,
            sample_rows=ops.to_tensor(np.arange(size, dtype=np.int32)),
            max_query_len=1,
            longest=max_model_len,
        )

    def fill(self, batch: Batch, rope: npt.NDArray[np.float32]) -> None:
        """Hold this step's, whose table of rotations is `rope`."""
        count, width = batch.block_tables.shape
        self._token_ids[:count], self._rope[:count] = batch.token_ids, rope
        self._context_lens[:count], self._context_lens[count:] = batch.context_lens, 0
        self._block_tables[:count, :width], self._block_tables[count:, 0] = batch.block_tables, self._spare_block
        ops.send(self._sent, self._held)


class DecodeGraphs:
    """The recorded steps of a model for up to `max_num_seqs` sequences, or the largest of SIZES; made on creation.

    `spare_block` is a block of the caches that belongs to no sequence: what fills a step up writes there.
    """

    def __init__(
        self,
        model: Ernie4_5,
        caches: KvCaches,
        *,
        max_num_seqs: int,
        max_model_len: int,
        spare_block: int,
        record: Record,
    ) -> None:
        self._model = model
        self._steps: dict[int, tuple[_Inputs, Tensor, Callable[[], None]]] = {}
        for size in SIZES[: bisect_left(SIZES, max_num_seqs) + 1]:
            inputs = _Inputs(size, max_model_len, caches.block_size, model.config.head_dim, spare_block)
            self._steps[size] = inputs, *record(partial(model.forward_tensors, inputs.held, caches))

    def logits(self, batch: Batch) -> Tensor | None:
        """The logits float32 [R, V] of a step that computes one token of each sequence and samples after each; None
        for any other step, or a larger one than any recorded. Valid until the next call.
        """
        count = len(batch.context_lens)
        size = next((size for size in self._steps if size >= count), None)
        plain = len(batch.token_ids) == len(batch.sample_rows) == count and not len(batch.prompt_indices)
        if size is None or not plain:
            return None
        inputs, result, replay = self._steps[size]
        inputs.fill(batch, self._model.rope_table(batch.positions))
        replay()
        return result[:count]


def _room(shape: tuple[int, ...]) -> int:
    """Of a part, in elements of 4 bytes: kernels want each to begin at a multiple of 16 bytes."""
    return -(-math.prod(shape) // 4) * 4


def _parts(whole: Any, shapes: list[tuple[int, ...]]) -> list[Any]:
    """Views of an array's or a tensor's parts."""
    starts = accumulate(map(_room, shapes), initial=0)
    return [
        whole[start : start + math.prod(shape)].reshape(shape) for start, shape in zip(starts, shapes, strict=False)
    ]
