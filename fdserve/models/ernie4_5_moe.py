"""The mixture-of-experts MLP of ERNIE-4.5-MoE: routed experts, and shared ones that see every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fdserve import ops
from fdserve.models.layers import Mlp
from fdserve.models.parallel import Collective

if TYPE_CHECKING:
    from paddle import Tensor


@dataclass(frozen=True)
class MoeMlp:
    """sum of weight * expert(x) over the chosen experts, plus shared(x), over this rank's intermediate columns.

    Every rank routes alike and holds a slice of every expert.
    """

    experts: ops.Experts
    shared: Mlp | None
    all_reduce: Collective

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, H] -> [T, H]."""
        shared = None if self.shared is None else self.shared.partial(x)
        return self.all_reduce(ops.moe(x, self.experts, shared))
