"""ERNIE-4.5: pre-norm decoder blocks, each an attention and a dense or mixture-of-experts MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fdserve import ops
from fdserve.models.config import ModelConfig
from fdserve.models.ernie4_5_moe import MoeMlp
from fdserve.models.layers import Attention, BatchTensors, ForwardBatch, KvCaches, Mlp, Rope, Vocabulary

if TYPE_CHECKING:
    from paddle import Tensor


@dataclass(frozen=True)
class Layer:
    """One decoder block: x + attention(norm(x)), then x + mlp(norm(x))."""

    input_norm: Tensor  # [H] D
    attention: Attention
    post_attention_norm: Tensor  # [H] D
    mlp: Mlp | MoeMlp


class Ernie4_5:
    """One rank's share of a model; `forward` is the same call on every rank."""

    def __init__(
        self, config: ModelConfig, dtype: str, vocabulary: Vocabulary, layers: list[Layer], norm: Tensor
    ) -> None:
        self.config = config
        self.dtype = dtype
        self._vocabulary = vocabulary
        self._layers = layers
        self._rope = Rope(config.head_dim, config.rope_theta, config.compression_ratio)
        # Each block's MLP is added in by the norm that follows it: the next block's first, or the final one.
        self._next_norms = [layer.input_norm for layer in layers[1:]] + [norm]
        self._num_kv_heads = layers[0].attention.num_kv_heads
        self._decoder = self._whole_decoder(norm)

    def _whole_decoder(self, norm: Tensor) -> ops.Decoder | None:
        """All of it as one operator, where that can sum over the ranks by itself."""
        vocabulary = self._vocabulary
        ranks = vocabulary.ranks
        if ops.on_gpu() or (ranks.world_size > 1 and ranks.shared is None):
            return None
        return ops.Decoder(
            [_block(layer) for layer in self._layers],
            norm,
            table=vocabulary.table,
            head=vocabulary.head,
            first_id=vocabulary.start,
            vocab_size=self.config.vocab_size,
            num_heads=self._layers[0].attention.num_heads,
            num_kv_heads=self._num_kv_heads,
            head_dim=self.config.head_dim,
            eps=self.config.rms_norm_eps,
            shared=ranks.shared,
        )

    def rope_table(self, positions: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """`ForwardBatch.rope` of tokens that stand at these positions [T] of their sequences: [T, head_dim]."""
        return self._rope.table(positions)

    def new_caches(self, num_blocks: int, block_size: int, dtype: str | None = None) -> KvCaches:
        """Zeroed key/value caches of `num_blocks` blocks of `block_size` tokens, of `dtype` (None: D) or "int8"."""
        heads, head_dim = self._num_kv_heads, self.config.head_dim
        layers = [ops.new_kv_cache(num_blocks, heads, block_size, head_dim, dtype or self.dtype) for _ in self._layers]
        return KvCaches(layers, block_size)

    def kv_bytes_per_block(self, block_size: int, dtype: str | None = None) -> int:
        """Bytes that one block of such caches takes on this rank, in all layers together."""
        token = ops.kv_bytes_per_token(self._num_kv_heads, self.config.head_dim, dtype or self.dtype)
        return token * block_size * len(self._layers)

    def forward(self, batch: ForwardBatch, caches: KvCaches) -> Tensor:
        """Compute the batch's tokens and store their keys and values in `caches`, in place.

        Returns:
            The logits of `batch.sample_rows`, float32 [R, this rank's part of vocab_size].
        """
        if self._decoder is not None:
            return self._decoder(*batch, caches.layers, caches.block_size, logits=True)
        return self.forward_tensors(batch.tensors(), caches)

    def hidden(self, batch: ForwardBatch, caches: KvCaches) -> Tensor:
        """`forward` up to the head: the last hidden states of `batch.sample_rows`, [R, H] D."""
        if self._decoder is not None:
            return self._decoder(*batch, caches.layers, caches.block_size, logits=False)
        return self._hidden(batch.tensors(), caches)

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of R > 0 rows that `hidden` gave, float32 [R, this rank's part of vocab_size]."""
        return self._vocabulary.logits(hidden)

    def forward_tensors(self, batch: BatchTensors, caches: KvCaches) -> Tensor:
        """`forward`, operator by operator: the way of GPUs, which can record it."""
        import paddle

        hidden = self._hidden(batch, caches)
        if batch.sample_rows.shape[0] == 0:
            return paddle.empty([0, self._vocabulary.head.out_features], "float32")
        return self.logits(hidden)

    def _hidden(self, batch: BatchTensors, caches: KvCaches) -> Tensor:
        import paddle

        eps = self.config.rms_norm_eps
        residual = self._vocabulary.embed(batch.token_ids)
        x = ops.rms_norm(residual, self._layers[0].input_norm, eps)
        for number, (layer, next_norm) in enumerate(zip(self._layers, self._next_norms, strict=True)):
            x = layer.attention(x, batch, caches, number)
            if number == len(self._layers) - 1:
                # No token looks at another after the last attention: only the rows asked for go on.
                if batch.sample_rows.shape[0] == 0:
                    return paddle.empty([0, self.config.hidden_size], self.dtype)
                x = paddle.gather(x, batch.sample_rows)
                residual = paddle.gather(residual, batch.sample_rows)
            x, residual = ops.add_rms_norm(x, residual, layer.post_attention_norm, eps)
            x, residual = ops.add_rms_norm(layer.mlp(x), residual, next_norm, eps)
        return x


def _block(layer: Layer) -> ops.Block:
    attention, mlp = layer.attention, layer.mlp
    dense, experts = (mlp.shared, mlp.experts) if isinstance(mlp, MoeMlp) else (mlp, None)
    return ops.Block(
        layer.input_norm,
        attention.qkv,
        attention.o,
        layer.post_attention_norm,
        None if dense is None else dense.gate_up,
        None if dense is None else dense.down,
        experts,
    )
