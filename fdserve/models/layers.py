"""The parts every ERNIE-4.5 model is built from, on the shapes one tensor-parallel rank holds.

T tokens, H hidden size, "D" the compute dtype. Activations are [T, H] D and the same on every rank; what a
rank computes alone is summed by `all_reduce` behind each block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from fdserve import ops
from fdserve.models.parallel import Collective, Ranks

if TYPE_CHECKING:
    from paddle import Tensor

    from fdserve.ops import PackedWeight


Ints = npt.NDArray[np.int32]


class ForwardBatch(NamedTuple):
    """What one step computes: T new tokens of S sequences, and the R of them whose logits are wanted."""

    token_ids: Ints  # [T], in [0, vocab_size)
    rope: npt.NDArray[np.float32]  # [T, head_dim]: see `Rope.table`
    query_starts: Ints  # [S + 1], the tokens of sequence s are query_starts[s] to query_starts[s + 1]
    context_lens: Ints  # [S], tokens of each sequence that are in the cache already
    block_tables: Ints  # [S, B]
    sample_rows: Ints  # [R], indices into the T tokens; may be empty

    def tensors(self) -> BatchTensors:
        """The same on the device."""
        query_lens = np.diff(self.query_starts)
        longest = int((self.context_lens + query_lens).max())
        tensors = dict(zip(self._fields, map(ops.to_tensor, self), strict=True))
        return BatchTensors(**tensors, max_query_len=int(query_lens.max()), longest=longest)


class BatchTensors(NamedTuple):
    """A `ForwardBatch` where the operators can take it one by one."""

    token_ids: Tensor
    rope: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    sample_rows: Tensor
    max_query_len: int  # the most tokens that the step computes of a sequence
    longest: int  # the most tokens of a sequence, the step's included


@dataclass(frozen=True)
class KvCaches:
    """(keys, values) of each layer in blocks of `block_size` tokens, from `fdserve.ops.new_kv_cache`."""

    layers: list[tuple[Tensor, Tensor]]
    block_size: int


class Rope:
    """Cosines and sines of interleaved rotary embeddings, float32 all through as Hugging Face computes them."""

    def __init__(self, head_dim: int, theta: float, compression_ratio: float) -> None:
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        self._frequencies = np.float32(1.0) / np.float32(theta) ** exponents
        self._compression = np.float32(compression_ratio)

    def table(self, positions: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """[T, head_dim] float32: cosines in the first half of the columns, sines in the second."""
        scaled = positions.astype(np.float32)
        if self._compression != 1:
            scaled /= self._compression
        angles = scaled[:, None] * self._frequencies
        half = angles.shape[1]
        table = np.empty((angles.shape[0], 2 * half), np.float32)
        np.cos(angles, out=table[:, :half])
        np.sin(angles, out=table[:, half:])
        return table


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention over this rank's heads."""

    qkv: PackedWeight  # H -> [all Q | all K | all V]
    o: PackedWeight
    num_heads: int
    num_kv_heads: int
    head_dim: int
    all_reduce: Collective

    def __call__(self, x: Tensor, batch: BatchTensors, caches: KvCaches, layer: int) -> Tensor:
        """x [T, H] -> [T, H]; stores the tokens' keys and values in the layer's cache."""
        keys, values = caches.layers[layer]
        heads = ops.attention(
            ops.linear(x, self.qkv),
            keys,
            values,
            batch.rope,
            batch.block_tables,
            batch.query_starts,
            batch.context_lens,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            block_size=caches.block_size,
            max_query_len=batch.max_query_len,
            longest=batch.longest,
        )
        return self.all_reduce(ops.linear(heads, self.o))


@dataclass(frozen=True)
class Mlp:
    """down(silu(gate(x)) * up(x)) over this rank's intermediate columns."""

    gate_up: PackedWeight  # H -> [gate | up]
    down: PackedWeight
    all_reduce: Collective

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, H] -> [T, H]."""
        return self.all_reduce(self.partial(x))

    def partial(self, x: Tensor) -> Tensor:
        """This rank's part of the sum."""
        return ops.linear(ops.swiglu(ops.linear(x, self.gate_up)), self.down)


@dataclass(frozen=True)
class Vocabulary:
    """The embedding and the output head over this rank's rows [start, start + head.out_features)."""

    table: PackedWeight  # [this rank's part of V, H]
    head: PackedWeight  # the same object when tied
    start: int
    ranks: Ranks

    def embed(self, ids: Tensor) -> Tensor:
        """ids int32 [T] -> [T, H]."""
        if self.ranks.world_size == 1:
            return ops.embedding(ids, self.table)
        local = ids - self.start
        mine = (local >= 0).logical_and(local < self.table.out_features)
        # Rows that other ranks hold are looked up as row 0 and then zeroed: the sum takes theirs.
        rows = ops.embedding(local * mine.cast("int32"), self.table)
        return self.ranks.all_reduce(rows * mine.cast(rows.dtype).unsqueeze(1))

    def logits(self, x: Tensor) -> Tensor:
        """x [R, H] -> float32 [R, this rank's part of V]."""
        return ops.linear(x, self.head, out_dtype="float32")
