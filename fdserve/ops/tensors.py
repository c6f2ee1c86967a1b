"""From NumPy to Paddle, many times a second."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fdserve.ops.library import on_gpu

if TYPE_CHECKING:
    from paddle import Tensor


def to_tensor(values: npt.NDArray[Any]) -> Tensor:
    """A tensor with a copy of these values, of the same shape (a dimension or more) and dtype: int32, int64 or
    float32.

    On a CPU Paddle's own function takes three times as long, and each call leaks some hundred bytes (Paddle 3.3.1).
    """
    import paddle

    if on_gpu():
        return paddle.to_tensor(values)
    place, dtypes = _cpu()
    values = np.ascontiguousarray(values)
    tensor = paddle._C_ops.empty(values.shape, dtypes[values.dtype], place)
    ctypes.memmove(tensor.data_ptr(), values.ctypes.data, values.nbytes)
    return tensor


@cache
def _cpu() -> tuple[Any, dict[Any, Any]]:
    import paddle

    names = ("int32", "int64", "float32")
    return paddle.CPUPlace(), {np.dtype(name): getattr(paddle, name) for name in names}
