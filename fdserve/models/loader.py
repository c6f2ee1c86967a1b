"""A rank's share of a checkpoint, read slice by slice from the mapped files into packed weights.

One tensor at a time is packed and its pages are given back, so that loading takes about the memory of the
packed model plus one tensor. Meanwhile the system reads the next ones into its cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fdserve import ops
from fdserve.models.checkpoint import Checkpoint, validate
from fdserve.models.config import ModelConfig, MoeConfig, check_world_size
from fdserve.models.ernie4_5 import Ernie4_5, Layer
from fdserve.models.ernie4_5_moe import MoeMlp
from fdserve.models.footprint import matrices
from fdserve.models.layers import Attention, Mlp, Vocabulary
from fdserve.models.layout import Part, expected_tensors
from fdserve.models.parallel import Collective, Ranks, identity

if TYPE_CHECKING:
    from paddle import Tensor

    from fdserve.ops import PackedExperts, PackedWeight, SharedMemory

Array = npt.NDArray[Any]
Place = tuple[str, slice, slice]
Progress = Callable[[int, int], None]
READ_AHEAD_BYTES = 256 << 20
"""What the system is asked to read before it is wanted, at most: some tenths of a second of a fast disk."""


def no_progress(done: int, total: int) -> None:
    """Tell nobody."""


def load_model(
    directory: Path,
    config: ModelConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    dtype: str,
    quantization: str | None = None,
    all_reduce: Collective = identity,
    shared: SharedMemory | None = None,
    progress: Progress = no_progress,
) -> Ernie4_5:
    """Load what `rank` of `world_size` holds of the checkpoint in `directory`.

    Args:
        dtype: what to compute in, "bfloat16", "float32" or on a GPU "float16", whatever dtype the weights are in.
        quantization: how to store the matrices, "wint8", "wint4" or "w8a8" (see `fdserve.ops.weights.FORMATS`), the
            routers' excepted; None loses nothing that `dtype` keeps, see `weight_format`. The vocabulary's are "wint8"
            under "w8a8".
        all_reduce: sums a tensor over the ranks.
        shared: what operators that sum by themselves do it through; None where they cannot.
        progress: called, as loading goes on, with the bytes of the checkpoint that are dealt with and all it has.

    Raises:
        StartupError: the checkpoint is broken, or cannot be split so.
    """
    check_world_size(config, world_size)
    with Checkpoint(directory) as checkpoint:
        validate(config, checkpoint)
        format = quantization or _exact_format(checkpoint, config, dtype)
        reader = _Reader(checkpoint, config, dtype, format, progress)
        return _Builder(config, reader, Ranks(rank, world_size, all_reduce, shared)).model()


def weight_format(directory: Path, config: ModelConfig, dtype: str, quantization: str | None) -> str:
    """The format, of `fdserve.ops.weights.FORMATS`, in which `load_model` stores the matrices of a checkpoint.

    Without quantization that is `dtype`, but on a CPU those of bfloat16 stay so where float32 is computed: exact, and
    half the memory. Raises StartupError for a broken checkpoint, whose headers are read without quantization.
    """
    if quantization is not None:
        return quantization
    with Checkpoint(directory) as checkpoint:
        return _exact_format(checkpoint, config, dtype)


def _exact_format(checkpoint: Checkpoint, config: ModelConfig, dtype: str) -> str:
    if dtype != "float32" or ops.on_gpu():
        return dtype
    infos = [checkpoint.tensors.get(matrix.name) for matrix in matrices(config, checkpoint.layout)]
    return "float32" if any(info is None or info.dtype == "F32" for info in infos) else "bfloat16"


class _Reader:
    """Turns tensors of the checkpoint into operands in the compute dtype."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        dtype: str,
        format: str,
        progress: Progress,
    ) -> None:
        self._checkpoint = checkpoint
        self.layout = checkpoint.layout
        self.dtype = dtype
        self._format = format
        self._progress = progress
        infos = checkpoint.tensors
        self._left = {
            tensor.name: infos[tensor.name].end - infos[tensor.name].begin
            for tensor in expected_tensors(config, checkpoint.layout)
        }
        self._total = sum(self._left.values())
        self._done = 0

    def vector(self, name: str) -> Tensor:
        """[N] D."""
        return self.floats(name).flatten().cast(self.dtype)

    def floats(self, name: str) -> Tensor:
        """A vector, or a small matrix turned [out, in], in float32."""
        import paddle

        values = ops.as_float32(self._checkpoint.read(name))
        if values.ndim == 2 and self.layout.in_out:
            values = values.T
        tensor = paddle.to_tensor(np.ascontiguousarray(values))
        self._finish([name])
        return tensor

    def matrix(self, parts: list[Part], inputs: range) -> PackedWeight:
        """The parts' output features, one part after the other, over the input features `inputs`."""
        return self._matrix(parts, inputs, self.layout.in_out, self._format)

    def vocabulary(self, part: Part, inputs: range, *, in_out: bool) -> PackedWeight:
        """As `matrix`. Activations are never rounded before logits: with few rows only the weights' bytes count."""
        return self._matrix([part], inputs, in_out, "wint8" if self._format == "w8a8" else self._format)

    def _matrix(self, parts: list[Part], inputs: range, in_out: bool, format: str) -> PackedWeight:
        slices = next(self._slices([parts], inputs, in_out))
        packed = ops.pack_weight(slices, dtype=self.dtype, in_out=in_out, quantization=format)
        self._finish([part.name for part in parts])
        return packed

    def experts(self, experts: list[list[Part]], inputs: range) -> PackedExperts:
        """What `matrix` gives, for every expert."""
        in_out = self.layout.in_out

        def weights() -> Iterator[list[Array]]:
            for parts, slices in zip(experts, self._slices(experts, inputs, in_out), strict=True):
                yield slices
                self._finish([part.name for part in parts])

        return ops.pack_experts(
            weights(),
            num_experts=len(experts),
            dtype=self.dtype,
            in_out=in_out,
            quantization=self._format,
        )

    def _slices(self, matrices: list[list[Part]], inputs: range, in_out: bool) -> Iterator[list[Array]]:
        """Each matrix as slices of its parts, while the system reads those of the next ones."""
        asked: deque[tuple[list[Place], int]] = deque()
        total = 0
        for parts in matrices:
            places = [_place(part, inputs, in_out) for part in parts]
            asked.append((places, sum(self._checkpoint.read_ahead(*place) for place in places)))
            total += asked[-1][1]
            while total > READ_AHEAD_BYTES:
                places, size = asked.popleft()
                total -= size
                yield [self._checkpoint.read(*place) for place in places]
        for places, _ in asked:
            yield [self._checkpoint.read(*place) for place in places]

    def _finish(self, names: list[str]) -> None:
        for name in names:
            self._checkpoint.release(name)
            self._done += self._left.pop(name, 0)
        self._progress(self._done, self._total)


class _Builder:
    """Puts the model together out of this rank's shares."""

    def __init__(self, config: ModelConfig, reader: _Reader, ranks: Ranks) -> None:
        self._config = config
        self._reader = reader
        self._layout = reader.layout
        self._ranks = ranks
        self._hidden = range(config.hidden_size)

    def model(self) -> Ernie4_5:
        vocabulary = self._vocabulary()
        layers = [self._layer(layer) for layer in range(self._config.num_layers)]
        norm = self._reader.vector(self._layout.final_norm)
        return Ernie4_5(self._config, self._reader.dtype, vocabulary, layers, norm)

    def _vocabulary(self) -> Vocabulary:
        rows = self._ranks.vocabulary(self._config.vocab_size)
        # The embedding has the vocabulary first in both layouts.
        embedding = Part(self._layout.embedding, rows.start, rows.stop)
        table = self._reader.vocabulary(embedding, self._hidden, in_out=False)
        head = table
        if not self._config.tie_word_embeddings:
            lm_head = Part("lm_head.weight", rows.start, rows.stop)
            head = self._reader.vocabulary(lm_head, self._hidden, in_out=self._layout.in_out)
        return Vocabulary(table, head, rows.start, self._ranks)

    def _layer(self, layer: int) -> Layer:
        prefix = self._layout.layer(layer)
        return Layer(
            self._reader.vector(f"{prefix}input_layernorm.weight"),
            self._attention(layer),
            self._reader.vector(f"{prefix}post_attention_layernorm.weight"),
            self._mlp(layer),
        )

    def _attention(self, layer: int) -> Attention:
        config, ranks = self._config, self._ranks
        heads, kv_heads = ranks.share(config.num_heads), ranks.kv_heads(config.num_kv_heads)
        o_inputs = range(heads.start * config.head_dim, heads.stop * config.head_dim)
        return Attention(
            self._reader.matrix(self._layout.qkv(config, layer, heads, kv_heads), self._hidden),
            self._down(f"{self._layout.layer(layer)}self_attn.o_proj.weight", o_inputs),
            len(heads),
            len(kv_heads),
            config.head_dim,
            ranks.all_reduce,
        )

    def _mlp(self, layer: int) -> Mlp | MoeMlp:
        name = f"{self._layout.layer(layer)}mlp."
        if self._config.moe is None or not self._config.layer_is_moe(layer):
            return self._dense(name, self._config.intermediate_size)
        return self._moe(name, self._config.moe)

    def _dense(self, name: str, width: int) -> Mlp:
        columns = self._ranks.share(width)
        gate_up = self._reader.matrix(self._layout.gate_up(name, width, columns), self._hidden)
        down = self._down(f"{name}down_proj.weight", columns)
        return Mlp(gate_up, down, self._ranks.all_reduce)

    def _moe(self, name: str, moe: MoeConfig) -> MoeMlp:
        import paddle

        reader, layout = self._reader, self._layout
        width = moe.intermediate_size
        columns = self._ranks.share(width)
        names = [f"{name}experts.{expert}." for expert in range(moe.num_experts)]
        if moe.has_correction_bias:
            bias = reader.floats(f"{name}moe_statics.e_score_correction_bias").flatten()
        else:
            bias = paddle.zeros([moe.num_experts], "float32")
        experts = ops.Experts(
            reader.floats(f"{name}gate.weight"),
            bias,
            reader.experts([layout.gate_up(expert, width, columns) for expert in names], self._hidden),
            reader.experts([[self._whole(f"{expert}down_proj.weight")] for expert in names], columns),
            moe.top_k,
            moe.norm_min,
        )
        shared = None
        if moe.num_shared_experts:
            shared = self._dense(f"{name}shared_experts.", width * moe.num_shared_experts)
        return MoeMlp(experts, shared, self._ranks.all_reduce)

    def _down(self, name: str, inputs: range) -> PackedWeight:
        """A matrix back to the hidden size, of which this rank has some inputs."""
        return self._reader.matrix([self._whole(name)], inputs)

    def _whole(self, name: str) -> Part:
        return Part(name, 0, self._config.hidden_size)


def _place(part: Part, inputs: range, in_out: bool) -> Place:
    """The tensor, rows and columns where these inputs of a part are."""
    outputs, columns = slice(part.start, part.stop), slice(inputs.start, inputs.stop)
    return (part.name, columns, outputs) if in_out else (part.name, outputs, columns)
