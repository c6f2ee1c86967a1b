"""Which tensors of a checkpoint make which weight, in both layouts ERNIE-4.5 is published in.

"torch" (the -PT repositories): matrices [out, in]; query, key and value apart, gate and up apart.
"paddle" (the -Paddle ones): matrices [in, out]; qkv_proj has the columns [all Q | all K | all V] and
up_gate_proj, despite its name, [gate | up].
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from fdserve.errors import StartupError
from fdserve.models.config import ModelConfig

FUSED = re.compile(r"\.(qkv_proj|up_gate_proj)\.")
APART = re.compile(r"\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.")
QUANTISED = re.compile(r"\.(quant_weight|weight_scale|weight_scale_inv|activation_scale|qweight|qzeros|scales|g_idx)$")
# Multi-token prediction, buffers and training statistics: nothing that the text model's answer depends on.
IGNORED = re.compile(r"(^|[._])mtp(_|\.|$)|\.rotary_emb\.|\.expert_usage$")
LAYER = re.compile(r"^(ernie|model)\.layers\.")


class Part(NamedTuple):
    """Output features [start, stop) of the tensor `name`."""

    name: str
    start: int
    stop: int


class Expected(NamedTuple):
    """A tensor that a checkpoint of this configuration must hold, and its shape.

    A vector may also have a leading 1 on disk: the experts' correction bias does.
    """

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a checkpoint's tensors; "in_out" matrices have their input features first."""

    prefix: str
    in_out: bool

    @property
    def embedding(self) -> str:
        return f"{self.prefix}embed_tokens.weight"

    @property
    def final_norm(self) -> str:
        return f"{self.prefix}norm.weight"

    def layer(self, layer: int) -> str:
        return f"{self.prefix}layers.{layer}."

    def matrix(self, out_features: int, in_features: int) -> tuple[int, int]:
        """The shape a matrix has on disk."""
        return (in_features, out_features) if self.in_out else (out_features, in_features)

    def qkv(self, config: ModelConfig, layer: int, heads: range, kv_heads: range) -> list[Part]:
        """What makes the fused [Q | K | V] of these heads."""
        attention = f"{self.layer(layer)}self_attn."
        widths = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        names = ("q_proj", "k_proj", "v_proj")
        return self._fused(
            [f"{attention}{name}.weight" for name in names],
            f"{attention}qkv_proj.weight",
            [width * config.head_dim for width in widths],
            [range(part.start * config.head_dim, part.stop * config.head_dim) for part in (heads, kv_heads, kv_heads)],
        )

    def gate_up(self, mlp: str, width: int, columns: range) -> list[Part]:
        """What makes the fused [gate | up] of these intermediate columns; `mlp` is the MLP's name, dotted."""
        names = [f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"]
        return self._fused(names, f"{mlp}up_gate_proj.weight", [width, width], [columns, columns])

    def _fused(self, apart: list[str], fused: str, widths: list[int], wanted: list[range]) -> list[Part]:
        if not self.in_out:
            return [Part(name, part.start, part.stop) for name, part in zip(apart, wanted, strict=True)]
        parts: list[Part] = []
        offset = 0
        for width, part in zip(widths, wanted, strict=True):
            start, stop = offset + part.start, offset + part.stop
            # Neighbours become one part, so that a whole tensor is read in one piece and not put together.
            if parts and parts[-1].stop == start:
                start = parts.pop().start
            parts.append(Part(fused, start, stop))
            offset += width
        return parts


def detect_layout(names: Collection[str], origin: str) -> Layout:
    """The layout of a checkpoint with these tensors, told by their names alone.

    Raises StartupError, which speaks of the checkpoint as `origin`, for quantised weights and for names that
    are no ERNIE-4.5 text model's.
    """
    for name in names:
        if QUANTISED.search(name):
            raise StartupError(f"{origin} is quantised (it has the tensor {name}), which is not supported.")
    prefix = next((p for p in ("ernie.", "model.") if f"{p}embed_tokens.weight" in names), None)
    fused = any(FUSED.search(name) for name in names)
    apart = any(APART.search(name) for name in names if not IGNORED.search(name))
    if prefix is None or not (fused or apart):
        raise StartupError(
            f"{origin} holds no ERNIE-4.5 text model: "
            "it needs ernie.* (Paddle layout) or model.* (torch layout) tensors."
        )
    if fused and apart:
        raise StartupError(
            f"{origin} mixes two layouts: it has both fused (qkv_proj, up_gate_proj) and separate projections."
        )
    return Layout(prefix, in_out=fused)


def expected_tensors(config: ModelConfig, layout: Layout) -> Iterator[Expected]:
    """Every tensor that loading the model will read, in the order it will read them."""
    hidden = config.hidden_size
    yield Expected(layout.embedding, (config.vocab_size, hidden))
    heads, kv_heads = range(config.num_heads), range(config.num_kv_heads)
    for layer in range(config.num_layers):
        prefix = layout.layer(layer)
        yield Expected(f"{prefix}input_layernorm.weight", (hidden,))
        yield from _whole(layout, layout.qkv(config, layer, heads, kv_heads), hidden)
        attention_width = config.num_heads * config.head_dim
        yield Expected(f"{prefix}self_attn.o_proj.weight", layout.matrix(hidden, attention_width))
        yield Expected(f"{prefix}post_attention_layernorm.weight", (hidden,))
        if config.layer_is_moe(layer):
            yield from _moe(config, layout, f"{prefix}mlp.")
        else:
            yield from _mlp(layout, f"{prefix}mlp.", config.intermediate_size, hidden)
    yield Expected(layout.final_norm, (hidden,))
    if not config.tie_word_embeddings:
        yield Expected("lm_head.weight", layout.matrix(config.vocab_size, hidden))


def _whole(layout: Layout, parts: list[Part], in_features: int) -> Iterator[Expected]:
    # All outputs are asked for, so each part is a whole tensor.
    for part in parts:
        yield Expected(part.name, layout.matrix(part.stop - part.start, in_features))


def _mlp(layout: Layout, mlp: str, width: int, hidden: int) -> Iterator[Expected]:
    yield from _whole(layout, layout.gate_up(mlp, width, range(width)), hidden)
    yield Expected(f"{mlp}down_proj.weight", layout.matrix(hidden, width))


def _moe(config: ModelConfig, layout: Layout, mlp: str) -> Iterator[Expected]:
    moe = config.moe
    assert moe is not None
    yield Expected(f"{mlp}gate.weight", layout.matrix(moe.num_experts, config.hidden_size))
    if moe.has_correction_bias:
        yield Expected(f"{mlp}moe_statics.e_score_correction_bias", (moe.num_experts,))
    for expert in range(moe.num_experts):
        yield from _mlp(layout, f"{mlp}experts.{expert}.", moe.intermediate_size, config.hidden_size)
    if moe.num_shared_experts:
        width = moe.intermediate_size * moe.num_shared_experts
        yield from _mlp(layout, f"{mlp}shared_experts.", width, config.hidden_size)
