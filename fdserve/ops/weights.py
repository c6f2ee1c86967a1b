"""Weights in the layout the kernels stream: panels of 64 output features (see kernels/cpu/gemm.h); on a GPU rows."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fdserve.ops import gpu
from fdserve.ops.library import library, on_gpu
from fdserve.ops.memory import Arena

if TYPE_CHECKING:
    from paddle import Tensor

PANEL = 64
FORMATS = ("float32", "bfloat16", "wint8", "wint4", "w8a8")
"""How a weight is stored, in the order of the kernels' own numbers; a GPU has "float16", too.

"wint8" and "wint4" keep integers with a scale for every 512 or 128 inputs of an output (64 on a GPU) and multiply
activations as they are, or as integers of 15 or 8 bits where bfloat16 is computed on a CPU (kernels/cpu/digits.h);
"w8a8" keeps bytes with a scale for every output and rounds each row of activations to bytes.
"""
_SOURCES = {"uint16": 0, "float32": 1}
_arena = Arena()


@dataclass(frozen=True)
class PackedWeight:
    """A linear layer's matrix or an embedding table. `data` is opaque; `format` one of FORMATS.

    `dtype` is what it is computed with, D.
    """

    data: Tensor
    out_features: int
    in_features: int
    dtype: str
    format: str
    scales: Tensor | None = None
    """Of integers on a GPU; on a CPU they are in `data`."""

    @property
    def code(self) -> int:
        """The kernels' number of the format."""
        return FORMATS.index(self.format)


@dataclass(frozen=True)
class PackedExperts:
    """The matrices of `num_experts` experts, packed one after the other; otherwise as `PackedWeight`."""

    data: Tensor
    num_experts: int
    out_features: int
    in_features: int
    dtype: str
    format: str
    scales: Tensor | None = None


def pack_weight(weight: npt.NDArray[Any], *, dtype: str, in_out: bool, quantization: str | None = None) -> PackedWeight:
    """Pack a matrix for `linear` or `embedding`.

    Args:
        weight: [N, K], or [K, N] when `in_out`; float32, or uint16 holding bfloat16 bits. May be a view of a mapped
            file; it is read once and no copy of it in another dtype is made.
        dtype: what to compute in, D.
        in_out: whether the input features come first.
        quantization: "wint8", "wint4" or (not for an embedding) "w8a8", see FORMATS; None stores `dtype`.

    Raises:
        ValueError: another shape, dtype or quantization.
    """
    out_features, in_features = _features(weight, in_out)
    format = _format(dtype, quantization)
    if on_gpu():
        rows, scales = gpu.pack(weight, format, in_out)
        return PackedWeight(rows, out_features, in_features, dtype, format, scales)
    data = _empty_panels(1, out_features, in_features, format)
    _pack_into(data, 0, weight, format, in_out)
    return PackedWeight(data[0], out_features, in_features, dtype, format)


def pack_experts(
    weights: Iterable[npt.NDArray[Any]],
    *,
    num_experts: int,
    dtype: str,
    in_out: bool,
    quantization: str | None = None,
) -> PackedExperts:
    """Pack `num_experts` equal-shaped matrices, one at a time; otherwise as `pack_weight`."""
    format = _format(dtype, quantization)
    equal = _equal(weights, num_experts)
    first = next(equal)
    equal = chain([first], equal)
    out_features, in_features = _features(first, in_out)
    if on_gpu():
        data, scales = gpu.pack_all(equal, num_experts, format, in_out)
        return PackedExperts(data, num_experts, out_features, in_features, dtype, format, scales)
    data = _empty_panels(num_experts, out_features, in_features, format)
    for index, weight in enumerate(equal):
        _pack_into(data, index, weight, format, in_out)
    return PackedExperts(data, num_experts, out_features, in_features, dtype, format)


def _equal(weights: Iterable[npt.NDArray[Any]], num_experts: int) -> Iterator[npt.NDArray[Any]]:
    """The experts' matrices, which must be so many and of one shape."""
    count, shape = 0, None
    for count, weight in enumerate(weights, 1):
        shape = shape or weight.shape
        if weight.shape != shape or count > num_experts:
            raise ValueError(f"expected {num_experts} experts of {shape}, got number {count}: {weight.shape}")
        yield weight
    if count != num_experts or shape is None:
        raise ValueError(f"expected {num_experts} experts, got {count}")


def _format(dtype: str, quantization: str | None) -> str:
    if dtype not in ("bfloat16", "float16" if on_gpu() else "float32"):
        raise ValueError(f"cannot compute in {dtype}")
    if quantization is not None and quantization not in FORMATS[2:]:
        raise ValueError(f"cannot store weights as {quantization}")
    return quantization or dtype


def _features(weight: npt.NDArray[Any], in_out: bool) -> tuple[int, int]:
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"a weight must be a non-empty matrix, not of shape {weight.shape}")
    rows, columns = weight.shape
    return (columns, rows) if in_out else (rows, columns)


def _empty_panels(count: int, out_features: int, in_features: int, format: str) -> Tensor:
    import paddle

    panels = -(-out_features // PANEL)
    if format == "bfloat16":
        shape, dtype = [count, panels, -(-in_features // 2), PANEL, 2], format
    elif format == "float32":
        shape, dtype = [count, panels, in_features, PANEL], format
    else:
        panel_bytes = library().c.fdserve_panel_bytes(FORMATS.index(format), ctypes.c_int64(in_features))
        shape, dtype = [count, panels, panel_bytes], "uint8"
    # A view of int16 as bfloat16, because NumPy has no such dtype.
    storage: np.dtype[Any] = np.dtype("int16" if dtype == "bfloat16" else dtype)
    memory = _arena.take(math.prod(shape) * storage.itemsize)
    return paddle.from_dlpack(np.frombuffer(memory, storage).reshape(shape)).view(dtype)


def _pack_into(data: Tensor, index: int, weight: npt.NDArray[Any], format: str, in_out: bool) -> None:
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
        ctypes.c_int(FORMATS.index(format)),
        ctypes.c_int(in_out),
    )
