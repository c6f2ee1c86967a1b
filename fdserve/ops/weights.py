"""Weights in the layout the kernels stream: panels of 64 output features (see kernels/cpu/gemm.h); on a GPU rows."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Iterator, Sequence
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

Floats are multiplied by a "bfloat16" weight as by the floats that it is. "wint8" and "wint4" keep integers with a
scale for every 512 or 128 inputs of an output (64 on a GPU) and multiply activations as they are, or as integers of 15
or 8 bits where bfloat16 is computed on a CPU (kernels/cpu/digits.h); "w8a8" keeps bytes with a scale for every output
and rounds each row of activations to bytes.
"""
Array = npt.NDArray[Any]
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


def pack_weight(
    weight: Array | Sequence[Array], *, dtype: str, in_out: bool, quantization: str | None = None
) -> PackedWeight:
    """Pack a matrix for `linear` or `embedding`.

    Args:
        weight: [N, K], or [K, N] when `in_out`; float32, or uint16 holding bfloat16 bits. Or several such, whose output
            features follow each other. May be views of a mapped file: they are read once, and copied only where
            several do not fill whole panels.
        dtype: what to compute in, D.
        in_out: whether the input features come first.
        quantization: "wint8", "wint4" or (not for an embedding) "w8a8", see FORMATS, or on a CPU "bfloat16", which
            loses nothing of bfloat16 bits; `dtype` or None stores that.

    Raises:
        ValueError: another shape, dtype or quantization.
    """
    parts = _parts(weight)
    out_features, in_features = _features(parts, in_out)
    format = _format(dtype, quantization)
    if on_gpu():
        rows, scales = gpu.pack(_joined(parts, in_out), format, in_out)
        return PackedWeight(rows, out_features, in_features, dtype, format, scales)
    data = _empty_panels(1, out_features, in_features, format)
    _pack_into(data, 0, parts, format, in_out)
    return PackedWeight(data[0], out_features, in_features, dtype, format)


def pack_experts(
    weights: Iterable[Array | Sequence[Array]],
    *,
    num_experts: int,
    dtype: str,
    in_out: bool,
    quantization: str | None = None,
) -> PackedExperts:
    """Pack `num_experts` equal-shaped matrices, one at a time; otherwise as `pack_weight`."""
    format = _format(dtype, quantization)
    equal = _equal(weights, num_experts, in_out)
    first = next(equal)
    equal = chain([first], equal)
    out_features, in_features = _features(first, in_out)
    if on_gpu():
        data, scales = gpu.pack_all((_joined(parts, in_out) for parts in equal), num_experts, format, in_out)
        return PackedExperts(data, num_experts, out_features, in_features, dtype, format, scales)
    data = _empty_panels(num_experts, out_features, in_features, format)
    for index, parts in enumerate(equal):
        _pack_into(data, index, parts, format, in_out)
    return PackedExperts(data, num_experts, out_features, in_features, dtype, format)


def as_float32(values: Array) -> npt.NDArray[np.float32]:
    """float32 as it is; bfloat16 bits (uint16) widened."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values


def _equal(weights: Iterable[Array | Sequence[Array]], num_experts: int, in_out: bool) -> Iterator[Sequence[Array]]:
    """The experts' matrices, which must be so many and of one shape."""
    count, shape = 0, None
    for count, weight in enumerate(weights, 1):
        parts = _parts(weight)
        features = _features(parts, in_out)
        shape = shape or features
        if features != shape or count > num_experts:
            raise ValueError(f"expected {num_experts} experts of {shape}, got number {count}: {features}")
        yield parts
    if count != num_experts or shape is None:
        raise ValueError(f"expected {num_experts} experts, got {count}")


def _parts(weight: Array | Sequence[Array]) -> Sequence[Array]:
    return [weight] if isinstance(weight, np.ndarray) else weight


def _format(dtype: str, quantization: str | None) -> str:
    if dtype not in ("bfloat16", "float16" if on_gpu() else "float32"):
        raise ValueError(f"cannot compute in {dtype}")
    if quantization not in (None, dtype, *FORMATS[2 if on_gpu() else 1 :]):
        raise ValueError(f"cannot store weights as {quantization}")
    return quantization or dtype


def _features(parts: Sequence[Array], in_out: bool) -> tuple[int, int]:
    """(out_features, in_features) of all of them."""
    shapes = [part.shape[::-1] if in_out else part.shape for part in parts]
    if any(part.ndim != 2 or 0 in part.shape for part in parts) or len({inputs for _, inputs in shapes}) != 1:
        raise ValueError(f"a weight must be a non-empty matrix, not of shape {[part.shape for part in parts]}")
    return sum(outputs for outputs, _ in shapes), shapes[0][1]


def _joined(parts: Sequence[Array], in_out: bool) -> Array:
    if len(parts) == 1:
        return parts[0]
    if len({part.dtype for part in parts}) > 1:
        parts = [as_float32(part) for part in parts]
    return np.concatenate(parts, axis=1 if in_out else 0)


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


def _pack_into(data: Tensor, index: int, parts: Sequence[Array], format: str, in_out: bool) -> None:
    for part in parts:
        if part.dtype.name not in _SOURCES or not part.dtype.isnative:
            raise ValueError(f"a weight must be float32 or bfloat16 (as uint16), not {part.dtype}")
    if any(_features([part], in_out)[0] % PANEL for part in parts[:-1]):
        parts = [_joined(parts, in_out)]
    panel_bytes = data.element_size() * int(np.prod(data.shape[2:]))
    at = data.data_ptr() + index * data.shape[1] * panel_bytes
    for part in parts:
        part = part if part.strides[1] == part.itemsize and part.strides[0] > 0 else np.ascontiguousarray(part)
        out_features, in_features = _features([part], in_out)
        library().c.fdserve_pack(
            ctypes.c_void_p(at),
            ctypes.c_void_p(part.ctypes.data),
            ctypes.c_int64(out_features),
            ctypes.c_int64(in_features),
            ctypes.c_int64(part.strides[0] // part.itemsize),
            ctypes.c_int(_SOURCES[part.dtype.name]),
            ctypes.c_int(FORMATS.index(format)),
            ctypes.c_int(in_out),
        )
        at += out_features // PANEL * panel_bytes
