"""The operators that a GPU has otherwise than the CPU: Paddle's own for plain products and lookups.

Weights are [out_features, in_features], row-major, on the GPU: D, or integers of 8 or 4 bits (two in a byte, the lower
half first, 8 for zero) with a float32 scale for every `GROUP` inputs of an output.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fdserve.ops.library import run

if TYPE_CHECKING:
    from paddle import Tensor

GROUP = 64
BITS = {"bfloat16": 16, "float16": 16, "wint8": 8, "wint4": 4}
Array = npt.NDArray[Any]


def pack(weight: Array, format: str, in_out: bool) -> tuple[Tensor, Tensor | None]:
    """A matrix [N, K] ([K, N] when `in_out`) of float32, or bfloat16 as uint16, as (data, scales).

    It is sent as it is, and all else done there: for a gigabyte NumPy takes ten seconds to turn it or to quantize it.
    Raises ValueError for a format that the GPU has no kernel for, or inputs that groups do not divide.
    """
    if format not in BITS:
        raise ValueError(f"a GPU computes with {', '.join(BITS)}, not with {format}")
    matrix = _sent(weight.T if in_out else weight)
    if BITS[format] == 16:
        # Paddle copies what has the dtype already.
        return matrix if format == "bfloat16" and weight.dtype == np.uint16 else matrix.cast(format), None
    if matrix.shape[1] % GROUP:
        raise ValueError(f"{format} needs inputs in groups of {GROUP}, not {matrix.shape[1]}")
    return _quantize(matrix.cast("float32"), BITS[format])


def pack_all(weights: Iterable[Array], count: int, format: str, in_out: bool) -> tuple[Tensor, Tensor | None]:
    """What `pack` gives for each of `count` matrices of one shape, one after the other: [count, ...] of each."""
    import paddle

    wholes: list[Tensor] = []
    for number, weight in enumerate(weights):
        parts = [part for part in pack(weight, format, in_out) if part is not None]
        wholes = wholes or [paddle.empty([count, *part.shape], part.dtype) for part in parts]
        for whole, part in zip(wholes, parts, strict=True):
            whole[number].copy_(part, False)
    return wholes[0], wholes[1] if len(wholes) > 1 else None


def _quantize(matrix: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """[N, K] float32 as integers of `bits` bits and their scales [N, K / GROUP], to the nearest."""
    import paddle

    rows, columns = matrix.shape
    groups = matrix.reshape([rows, columns // GROUP, GROUP])
    high = (1 << bits - 1) - 1
    largest = groups.abs().max(axis=2)
    # Whether the largest of values with a NaN is one, Paddle leaves to its kernels; here it has to show.
    scales = paddle.where(groups.isnan().any(axis=2), paddle.full_like(largest, math.nan), largest / high)
    divisors = paddle.where(scales == 0, paddle.ones_like(scales), scales).unsqueeze(-1)
    integers = (groups / divisors).round().clip(-high, high).reshape([rows, columns])
    if bits == 4:
        halves = integers + 8
        return (halves[:, ::2] + halves[:, 1::2] * 16).cast("uint8"), scales
    return integers.cast("int8"), scales


def linear(x: Tensor, data: Tensor, scales: Tensor | None, format: str, to_float: bool) -> Tensor:
    """x [T, K] D -> [T, N], D or float32."""
    import paddle

    if scales is None:
        out = paddle.matmul(x, data, transpose_y=True)
        return out.cast("float32") if to_float else out
    return run("quant_linear", x, data, scales, BITS[format], to_float)[0]


def embedding(ids: Tensor, data: Tensor, scales: Tensor | None, format: str, dtype: str) -> Tensor:
    """ids int32 [T] -> [T, H] of `dtype`."""
    import paddle

    rows = paddle.gather(data, ids)
    if scales is None:
        return rows
    if format == "wint4":
        rows = paddle.stack([rows.bitwise_and(_like(rows, 15)), rows.floor_divide(_like(rows, 16))], axis=-1)
        rows = rows.flatten(1).cast("float32") - 8
    wide = rows.cast("float32").reshape([rows.shape[0], -1, GROUP]) * paddle.gather(scales, ids).unsqueeze(-1)
    return wide.flatten(1).cast(dtype)


def new_kv_cache(shape: list[int], dtype: str) -> tuple[Tensor, Tensor]:
    """Zeroed (keys, values) of one layer."""
    import paddle

    return paddle.zeros(shape, dtype), paddle.zeros(shape, dtype)


def _like(x: Tensor, value: int) -> Tensor:
    import paddle

    return paddle.full([1], value, x.dtype)


def _sent(matrix: Array) -> Tensor:
    """The matrix row by row, as float32 or bfloat16."""
    import paddle

    # Bits of bfloat16, which NumPy has no type for.
    stored = matrix.view(np.int16) if matrix.dtype == np.uint16 else matrix
    if stored.strides[0] < stored.strides[1]:
        tensor = paddle.to_tensor(np.ascontiguousarray(stored.T)).T.contiguous()
    else:
        tensor = paddle.to_tensor(np.ascontiguousarray(stored))
    return tensor.view("bfloat16") if matrix.dtype == np.uint16 else tensor
