"""Decode steps recorded once for each batch size and replayed.

On a GPU, launching a step's kernels one by one would cost more than running them. Steps of several ranks are not
recorded: NCCL allows it, but nothing says that Paddle's process groups do, and a graph that deadlocks is worse than a
slow step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import paddle
from paddle import Tensor

from fdserve.models.ernie4_5 import Ernie4_5
from fdserve.models.layers import ForwardBatch, KvCaches
from fdserve.worker.batch import Batch
from fdserve.worker.rows import Ints

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
    graph = CUDAGraph(paddle.CUDAPlace(int(paddle.get_device().partition(":")[2])))
    graph.capture_begin()
    try:
        result = work()
    finally:
        graph.capture_end()  # or nothing could run on this stream any more
    return result, graph.replay


class DecodeGraphs:
    """The recorded steps of a model, made as they are first needed.

    `spare_block` is a block of the caches that belongs to no sequence: what fills a step up writes there.
    """

    def __init__(
        self, model: Ernie4_5, caches: KvCaches, *, max_model_len: int, spare_block: int, record: Record
    ) -> None:
        self._model = model
        self._caches = caches
        self._max_model_len = max_model_len
        self._width = -(-max_model_len // caches.block_size)
        self._spare_block = spare_block
        self._record = record
        self._steps: dict[int, tuple[ForwardBatch, Tensor, Callable[[], None]]] = {}

    def logits(self, batch: Batch) -> Tensor | None:
        """The logits float32 [R, V] of a step that computes one token of each sequence and samples after each; None
        for any other step, or a larger one than the largest of SIZES. Valid until the next call.
        """
        count = len(batch.context_lens)
        size = next((size for size in SIZES if size >= count), None)
        plain = len(batch.token_ids) == len(batch.sample_rows) == count and not len(batch.prompt_indices)
        if size is None or not plain:
            return None
        inputs = self._inputs(batch, size)
        if size not in self._steps:
            self._steps[size] = self._new_step(inputs)
        held, result, replay = self._steps[size]
        for name in ("token_ids", "rope", "context_lens", "block_tables"):
            paddle.assign(getattr(inputs, name), getattr(held, name))
        replay()
        return result[:count]

    def _new_step(self, inputs: ForwardBatch) -> tuple[ForwardBatch, Tensor, Callable[[], None]]:
        tensors = {name: value.clone() for name, value in vars(inputs).items() if isinstance(value, paddle.Tensor)}
        held = replace(inputs, **tensors)
        return held, *self._record(lambda: self._model.forward(held, self._caches))

    def _inputs(self, batch: Batch, size: int) -> ForwardBatch:
        """The step's inputs, filled up to `size` sequences."""
        count, width = batch.block_tables.shape
        tables = np.full((size, self._width), self._spare_block, np.int32)
        tables[:count, :width] = batch.block_tables
        positions = _filled(batch.positions, size)
        return ForwardBatch(
            token_ids=paddle.to_tensor(_filled(batch.token_ids, size)),
            rope=paddle.to_tensor(self._model.rope_table(positions)),
            query_starts=paddle.arange(size + 1, dtype="int32"),
            context_lens=paddle.to_tensor(positions),
            block_tables=paddle.to_tensor(tables),
            sample_rows=paddle.arange(size, dtype="int32"),
            max_query_len=1,
            longest=self._max_model_len,
        )


def _filled(values: Ints, size: int) -> Ints:
    whole = np.zeros(size, np.int32)
    whole[: len(values)] = values
    return whole
