"""Linear layers, embedding, norms and activation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdserve.ops import gpu
from fdserve.ops.library import on_gpu, run
from fdserve.ops.weights import PackedWeight

if TYPE_CHECKING:
    from paddle import Tensor


def linear(x: Tensor, w: PackedWeight, *, out_dtype: str | None = None) -> Tensor:
    """x [T, K] D times the matrix -> [T, N], D or `out_dtype` ("float32"). Accumulates in float32."""
    if on_gpu():
        return gpu.linear(x, w.data, w.scales, w.format, out_dtype == "float32")
    return run("linear", x, w.data, w.code, w.out_features, w.in_features, out_dtype == "float32")[0]


def embedding(ids: Tensor, w: PackedWeight) -> Tensor:
    """Rows `ids` (int32 [T], each in [0, V)) of a packed table [V, H] -> [T, H] D.

    The table is packed like a linear layer's matrix, so an output head tied to it needs no memory of its own.
    """
    if on_gpu():
        return gpu.embedding(ids, w.data, w.scales, w.format, w.dtype)
    return run("embedding", ids, w.data, w.code, w.out_features, w.in_features, w.dtype == "bfloat16")[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, H] D / sqrt(mean(x^2) + eps), rounded to D, times weight [H] D -> [T, H] D."""
    return run("rms_norm", x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(total), total) with total = residual + x rounded to D; all [T, H] D."""
    normed, total = run("add_rms_norm", x, residual, weight, eps)
    return normed, total


def swiglu(x: Tensor) -> Tensor:
    """x [T, 2I] D -> silu(x[:, :I]) * x[:, I:], [T, I] D, rounded once."""
    return run("swiglu", x)[0]
