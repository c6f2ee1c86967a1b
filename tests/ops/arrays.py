"""Between NumPy (float32 values) and paddle tensors of a compute dtype, and what must hold of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import paddle

from fdserve import ops
from fdserve.ops import PackedWeight, pack_weight
from fdserve.ops.reference import bf16_bits, bf16_values, rounded

Float = npt.NDArray[np.float32]


def normal(rng: np.random.Generator, *shape: int, dtype: str = "float32", scale: float = 1.0) -> Float:
    """Normal numbers that `dtype` holds exactly."""
    return rounded(rng.standard_normal(shape) * scale, dtype)


def tensor(values: Float, dtype: str) -> Any:
    """A paddle tensor of `dtype` with these values."""
    if values.size == 0:
        return paddle.zeros(list(values.shape), dtype)
    return paddle.to_tensor(values).astype(dtype)


def ints(values: Any, dtype: str = "int32") -> Any:
    """An integer tensor; empty lists allowed."""
    array = np.asarray(values, dtype)
    return paddle.to_tensor(array) if array.size else paddle.zeros(list(array.shape), dtype)


def values(x: Any) -> Float:
    """The float32 values of a tensor of either compute dtype."""
    array = x.numpy()
    return bf16_values(array) if array.dtype == np.uint16 else array


def source(weight: Float, dtype: str) -> npt.NDArray[Any]:
    """A weight as a checkpoint of `dtype` holds it: bfloat16 as uint16 bits."""
    return bf16_bits(weight) if dtype == "bfloat16" else weight


def packed(weight: Float, dtype: str) -> PackedWeight:
    """A [N, K] weight packed for `dtype`."""
    return pack_weight(source(weight, dtype), dtype=dtype, in_out=False)


def assert_close(actual: Float, expected: Float, dtype: str) -> None:
    """Equal up to rounding: float32 chains of additions, and one unit in the last place of bfloat16."""
    assert actual.shape == expected.shape
    scale = np.abs(expected).max(initial=1e-30)
    bound = np.abs(expected) * (2.0**-7 if dtype == "bfloat16" else 1e-5) + scale * 1e-5
    worst = np.abs(actual.astype(np.float64) - expected) - bound
    assert (worst <= 0).all(), f"off by {worst.max():g} beyond the bound"


def assert_rows_stand_alone(x: Any, weight: PackedWeight) -> None:
    """The bits of a row of a product depend neither on the rows beside it, of 401, nor on the number of threads."""
    together = values(ops.linear(x, weight, out_dtype="float32"))
    for first, last in [(0, 1), (1, 3), (4, 9), (10, 16), (16, 29), (16, 34), (50, 150), (190, 400), (400, 401)]:
        assert (values(ops.linear(x[first:last], weight, out_dtype="float32")) == together[first:last]).all()
    for threads in (1, 3):
        ops.set_num_threads(threads)
        assert (values(ops.linear(x, weight, out_dtype="float32")) == together).all()
