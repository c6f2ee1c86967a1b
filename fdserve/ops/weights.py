"""Weights in the layout the kernels stream: panels of 64 output features (see kernels/cpu/gemm.h)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fdserve.ops.library import library

if TYPE_CHECKING:
    from paddle import Tensor

PANEL = 64
_SOURCES = {"uint16": 0, "float32": 1}


@dataclass(frozen=True)
class PackedWeight:
    """A linear layer's matrix or an embedding table. `data` is opaque; `dtype` "bfloat16" or "float32"."""

    data: Tensor
    out_features: int
    in_features: int
    dtype: str


@dataclass(frozen=True)
class PackedExperts:
    """The matrices of `num_experts` experts, packed one after the other; otherwise as `PackedWeight`."""

    data: Tensor
    num_experts: int
    out_features: int
    in_features: int
    dtype: str


def pack_weight(weight: npt.NDArray[Any], *, dtype: str, in_out: bool) -> PackedWeight:
    """Pack a matrix for `linear` or `embedding`.

    Args:
        weight: [N, K], or [K, N] when `in_out`; float32, or uint16 holding bfloat16 bits. May be a view of a
        mapped
            file; it is read once and no copy of it in another dtype is made.
        dtype: what to compute in, "bfloat16" or "float32".
        in_out: whether the input features come first.

    Raises:
        ValueError: another shape or dtype.
    """
    out_features, in_features = _features(weight, in_out)
    data = _empty_panels(1, out_features, in_features, dtype)
    _pack_into(data, 0, weight, dtype, in_out)
    return PackedWeight(data[0], out_features, in_features, dtype)


def pack_experts(weights: Iterable[npt.NDArray[Any]], *, num_experts: int, dtype: str, in_out: bool) -> PackedExperts:
    """Pack `num_experts` equal-shaped matrices, one at a time; otherwise as `pack_weight`."""
    data: Any = None
    shape: tuple[int, ...] = ()
    count = 0
    for count, weight in enumerate(weights, 1):
        if data is None:
            shape = weight.shape
            data = _empty_panels(num_experts, *_features(weight, in_out), dtype)
        if weight.shape != shape or count > num_experts:
            raise ValueError(f"expected {num_experts} experts of {shape}, got number {count}: {weight.shape}")
        _pack_into(data, count - 1, weight, dtype, in_out)
    if count != num_experts or data is None:
        raise ValueError(f"expected {num_experts} experts, got {count}")
    out_features, in_features = shape[::-1] if in_out else shape
    return PackedExperts(data, num_experts, out_features, in_features, dtype)


def _features(weight: npt.NDArray[Any], in_out: bool) -> tuple[int, int]:
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"a weight must be a non-empty matrix, not of shape {weight.shape}")
    rows, columns = weight.shape
    return (columns, rows) if in_out else (rows, columns)


def _empty_panels(count: int, out_features: int, in_features: int, dtype: str) -> Any:
    import paddle

    panels = -(-out_features // PANEL)
    if dtype == "bfloat16":
        return paddle.empty([count, panels, -(-in_features // 2), PANEL, 2], dtype)
    if dtype == "float32":
        return paddle.empty([count, panels, in_features, PANEL], dtype)
    raise ValueError(f"cannot compute in {dtype}")


def _pack_into(data: Any, index: int, weight: npt.NDArray[Any], dtype: str, in_out: bool) -> None:
    import ctypes

    if weight.dtype.name not in _SOURCES or not weight.dtype.isnative:
        raise ValueError(f"a weight must be float32 or bfloat16 (as uint16), not {weight.dtype}")
    weight = np.ascontiguousarray(weight)
    out_features, in_features = _features(weight, in_out)
    panel_bytes = data.element_size() * int(np.prod(data.shape[1:]))
    library().c.fdserve_pack(
        ctypes.c_void_p(data.data_ptr() + index * panel_bytes),
        ctypes.c_void_p(weight.ctypes.data),
        ctypes.c_int64(out_features),
        ctypes.c_int64(in_features),
        ctypes.c_int(_SOURCES[weight.dtype.name]),
        ctypes.c_int(dtype == "bfloat16"),
        ctypes.c_int(in_out),
    )
