"""A whole model in one call: see kernels/cpu/decoder.cc."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from fdserve.ops.collectives import ALONE, SharedMemory, or_gone
from fdserve.ops.experts import Experts
from fdserve.ops.library import run
from fdserve.ops.tensors import Staging
from fdserve.ops.weights import PackedWeight

if TYPE_CHECKING:
    from paddle import Tensor

Ints = npt.NDArray[np.int32]
Caches = Sequence[tuple["Tensor", "Tensor"]]


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
    """The embedding, x + attention(norm(x)) and x + mlp(norm(x)) for each block, the final norm and the head.

    The same bits as the operators one by one. Addresses and sizes of the weights are put together once, for the caches
    of the first call, and again when a call brings other caches, because a step is short. Ranks that have a part of
    each matrix (`num_heads` and `num_kv_heads` are this rank's, `table` and `head` have the ids from `first_id` on) add
    up through what they share.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        norm: Tensor,
        *,
        table: PackedWeight,
        head: PackedWeight,
        first_id: int,
        vocab_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        shared: SharedMemory | None = None,
    ) -> None:
        self._vocabulary = (table, head)
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
        self._ids = (table.out_features, first_id, vocab_size)
        self._format = blocks[0].qkv.code
        self._heads = (num_heads, num_kv_heads, head_dim)
        self._eps = eps
        self._shared = shared  # kept, as the operator is only told where it is
        self._ranks = shared.attributes if shared else ALONE
        self._run = partial(or_gone, run) if shared else run
        self._inputs = Staging()
        self._caches: Caches = ()
        self._note: Tensor | None = None

    def __call__(
        self,
        token_ids: Ints,
        rope: npt.NDArray[np.float32],
        query_starts: Ints,
        context_lens: Ints,
        block_tables: Ints,
        sample_rows: Ints,
        caches: Caches,
        block_size: int,
        *,
        logits: bool,
    ) -> Tensor:
        """What `sample_rows` [R <= T] of the tokens `token_ids` [T] become: their logits, float32 [R, this rank's ids],
        or without `logits` [R, H] D.

        `caches` has the (keys, values) of each block, whose tensors are changed in place: another list is looked at
        anew, the same one, with the same `block_size`, is not. All else is as for `fdserve.ops.attention`, as arrays.
        Raises RankError where a peer is gone.
        """
        if self._note is None or caches is not self._caches:
            self._note, self._caches = self._take_note(caches, block_size), caches
        # In the operator's order.
        inputs = self._inputs.fill(
            (rope.view(np.int32), token_ids, query_starts, context_lens, sample_rows, block_tables)
        )
        sizes = len(token_ids), len(context_lens), block_tables.shape[1], len(sample_rows)
        result: Tensor = self._run("decoder", self._note, inputs, *sizes, logits, *self._ranks)[0]
        return result

    def _take_note(self, caches: Caches, block_size: int) -> Tensor:
        """Where everything is. It is no copy: `self` keeps the weights and caches."""
        table, head = self._vocabulary
        keys, values = zip(*caches, strict=True)
        every = [self._input_norms, self._qkv, self._o, list(keys), list(values), self._post_norms, self._mlps]
        alone = [table.data, head.data, self._norm]
        if not all(tensor.is_contiguous() for tensors in [alone, *every] for tensor in tensors):
            raise ValueError("decoder: the weights and caches must be contiguous")  # or Paddle would pass on copies
        result: Tensor = run(
            "decoder_note",
            *alone, *every, table.code, head.code, *self._ids, self._format, *self._heads,
            block_size, self._inner, self._experts_inner, *self._routing, self._eps,
        )[0]  # fmt: skip
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
