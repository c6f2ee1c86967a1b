"""All blocks of a model in one call: see kernels/cpu/decoder.cc."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from fdserve.ops.collectives import ALONE, SharedMemory, or_gone
from fdserve.ops.experts import Experts
from fdserve.ops.library import run
from fdserve.ops.weights import PackedWeight

if TYPE_CHECKING:
    from paddle import Tensor


class Block(NamedTuple):
    """The weights of one decoder block; the matrices of all blocks are of one format, and all experts routed alike.

    Where there are `experts`, gate_up and down are those of the experts that see every token, or None without such.
    """

    input_norm: Tensor  # [H] D
    qkv: PackedWeight  # H -> [all Q | all K | all V]
    o: PackedWeight
    post_norm: Tensor  # [H] D
    gate_up: PackedWeight | None  # H -> [gate | up]
    down: PackedWeight | None
    experts: Experts | None = None


class Decoder:
    """x + attention(norm(x)), then x + mlp(norm(x)), for each block; then the final norm.

    The same bits as the operators one by one. What is fixed is put together once, because a step is short. Ranks that
    have a part of each matrix (`num_heads` and `num_kv_heads` are this rank's) add up through what they share.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        norm: Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        shared: SharedMemory | None = None,
    ) -> None:
        self._norm = norm
        self._input_norms = [block.input_norm for block in blocks]
        self._qkv = [block.qkv.data for block in blocks]
        self._o = [block.o.data for block in blocks]
        self._post_norms = [block.post_norm for block in blocks]
        self._mlps = [tensor for block in blocks for tensor in _mlp(block)]
        self._inner = [0 if block.down is None else block.down.in_features for block in blocks]
        experts = [block.experts for block in blocks]
        self._experts_inner = [0 if each is None else each.down.in_features for each in experts]
        self._routing = next(((each.top_k, each.norm_min) for each in experts if each), (0, 0.0))
        self._format = blocks[0].qkv.code
        self._heads = (num_heads, num_kv_heads, head_dim)
        self._eps = eps
        self._shared = shared  # kept, as the operator is only told where it is
        self._ranks = shared.attributes if shared else ALONE
        self._run = partial(or_gone, run) if shared else run

    def __call__(
        self,
        x: Tensor,
        rope: Tensor,
        block_tables: Tensor,
        query_starts: Tensor,
        context_lens: Tensor,
        sample_rows: Tensor,
        caches: Sequence[tuple[Tensor, Tensor]],
        block_size: int,
    ) -> Tensor:
        """What `sample_rows` (int32 [R], R <= T) of x [T, H] D become: [R, H] D.

        `caches` has the (keys, values) of each block, changed in place; all else is as for `fdserve.ops.attention`.
        Raises RankError where a peer is gone.
        """
        results = self._run(
            "decoder",
            x, rope, block_tables, query_starts, context_lens, sample_rows, self._norm, self._input_norms, self._qkv,
            self._o, [keys for keys, _ in caches], [values for _, values in caches], self._post_norms, self._mlps,
            self._format, *self._heads, block_size, self._inner, self._experts_inner, *self._routing, self._eps,
            *self._ranks,
        )  # fmt: skip
        result: Tensor = results[0]
        return result


def _mlp(block: Block) -> list[Tensor]:
    """The tensors of a block's MLP in the operator's order, whichever it has."""
    tensors = []
    if block.experts is not None:
        experts = block.experts
        tensors += [experts.gate, experts.correction_bias, experts.up_gate.data, experts.down.data]
    if block.gate_up is not None and block.down is not None:
        tensors += [block.gate_up.data, block.down.data]
    return tensors
