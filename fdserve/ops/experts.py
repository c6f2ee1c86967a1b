"""The mixture-of-experts layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdserve.ops import gpu
from fdserve.ops.library import on_gpu, run
from fdserve.ops.weights import FORMATS, PackedExperts

if TYPE_CHECKING:
    from paddle import Tensor


def moe(
    x: Tensor,
    gate: Tensor,
    correction_bias: Tensor,
    up_gate: PackedExperts,
    down: PackedExperts,
    *,
    top_k: int,
    norm_min: float,
    shared: Tensor | None = None,
) -> Tensor:
    """Route each token to its experts and sum what they answer, weighted, plus `shared`.

    p = softmax(x @ gate.T) in float32; the experts with the top_k largest p + correction_bias (lowest id on
    ties) are taken; their weights are p / max(sum of the chosen p, norm_min), rounded to D. The answers are
    summed in ascending expert id in float32, `shared` last. The cost follows the experts touched.

    Args:
        x: [T, H] D.
        gate: [E, H] float32.
        correction_bias: [E] float32.
        up_gate: E matrices [2I, H], the gate's rows first.
        down: E matrices [H, I].
        shared: the shared experts' answer [T, H] D, or None.

    Returns:
        [T, H] D.
    """
    if on_gpu():
        bits, scales = gpu.BITS[down.format], (up_gate.scales, down.scales)
        weights = gate, correction_bias, up_gate.data, down.data, *scales, shared
        return run("moe", x, *weights, bits, down.in_features, top_k, norm_min)[0]
    format = FORMATS.index(down.format)
    return run(
        "moe", x, gate, correction_bias, up_gate.data, down.data, shared, format, down.in_features, top_k, norm_min
    )[0]
