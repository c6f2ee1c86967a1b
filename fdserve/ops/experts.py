"""The mixture-of-experts layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fdserve.ops import gpu
from fdserve.ops.library import on_gpu, run
from fdserve.ops.weights import FORMATS, PackedExperts

if TYPE_CHECKING:
    from paddle import Tensor


@dataclass(frozen=True)
class Experts:
    """The E experts of a layer and the router that chooses `top_k` of them for each token."""

    gate: Tensor  # [E, H] float32
    correction_bias: Tensor  # [E] float32; moves the choice of experts and not their weights
    up_gate: PackedExperts  # E matrices [2I, H], the gate's rows first
    down: PackedExperts  # E matrices [H, I]
    top_k: int
    norm_min: float


def moe(x: Tensor, experts: Experts, shared: Tensor | None = None) -> Tensor:
    """Route each token to its experts and sum what they answer, weighted, plus `shared`.

    p = softmax(x @ gate.T) in float32; the experts with the top_k largest p + correction_bias (lowest id on
    ties) are taken; their weights are p / max(sum of the chosen p, norm_min), rounded to D. The answers are
    summed in ascending expert id in float32, `shared` last. The cost follows the experts touched.

    Args:
        x: [T, H] D.
        shared: the shared experts' answer [T, H] D, or None.

    Returns:
        [T, H] D.
    """
    up_gate, down = experts.up_gate, experts.down
    weights = experts.gate, experts.correction_bias, up_gate.data, down.data
    if on_gpu():
        bits, scales = gpu.BITS[down.format], (up_gate.scales, down.scales)
        how = bits, down.in_features, experts.top_k, experts.norm_min
        return run("moe", x, *weights, *scales, shared, *how)[0]
    how = FORMATS.index(down.format), down.in_features, experts.top_k, experts.norm_min
    return run("moe", x, *weights, shared, *how)[0]
