"""The mixture-of-experts MLP of ERNIE-4.5-MoE: routed experts, and shared ones that see every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fdserve import ops
from fdserve.models.layers import Mlp
from fdserve.models.parallel import Collective

if TYPE_CHECKING:
    from paddle import Tensor

    from fdserve.ops import PackedExperts


@dataclass(frozen=True)
class MoeMlp:
    """sum of weight * expert(x) over the chosen experts, plus shared(x), over this rank's intermediate columns.

    Every rank routes alike and holds a slice of every expert.
    """

    gate: Tensor  # [E, H] float32
    correction_bias: Tensor  # [E] float32; moves the choice of experts and not their weights
    gate_up: PackedExperts  # H -> [gate | up]
    down: PackedExperts
    shared: Mlp | None
    top_k: int
    norm_min: float
    all_reduce: Collective

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, H] -> [T, H]."""
        shared = None if self.shared is None else self.shared.partial(x)
        return self.all_reduce(
            ops.moe(
                x,
                self.gate,
                self.correction_bias,
                self.gate_up,
                self.down,
                top_k=self.top_k,
                norm_min=self.norm_min,
                shared=shared,
            )
        )
