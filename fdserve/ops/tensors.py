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

    On a CPU Paddle's own function takes three times as long, and each call leaks some hundred bytes (Paddle 3.3.1). On
    a GPU it waits for all that is queued; this does not.
    """
    import paddle

    values = np.ascontiguousarray(values)
    dtype = _dtypes()[values.dtype]
    tensor = paddle._C_ops.empty(values.shape, dtype, paddle.CPUPlace())
    ctypes.memmove(tensor.data_ptr(), values.ctypes.data, values.nbytes)
    if not on_gpu():
        return tensor
    there = paddle._C_ops.empty(values.shape, dtype, own_place())
    if values.size:
        send(tensor, there)
    return there


def send(values: Tensor, to: Tensor) -> None:
    """Copy a tensor of the host into one of the same shape and dtype, which stays where it is; on a GPU behind what is
    queued there, without waiting for it. `values` may be changed at once.
    """
    # Not blocking: CUDA has taken a copy of pageable memory by the time its call returns.
    to.copy_(values, False)


@cache
def own_place() -> Any:
    """Where Paddle computes in this process: the GPU that `set_device` chose, or the CPU."""
    import paddle

    # The kernels of a GPU may be emulated, and tensors then lie on the CPU.
    device, _, number = paddle.get_device().partition(":")
    return paddle.CUDAPlace(int(number)) if device == "gpu" else paddle.CPUPlace()


@cache
def _dtypes() -> dict[Any, Any]:
    import paddle

    return {np.dtype(name): getattr(paddle, name) for name in ("int32", "int64", "float32")}
