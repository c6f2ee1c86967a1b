"""From NumPy to Paddle, many times a second."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
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

    tensor = _to_host_tensor(values)
    if not on_gpu():
        return tensor
    there = paddle._C_ops.empty(tensor.shape, tensor.dtype, own_place())
    if values.size:
        send(tensor, there)
    return there


def _to_host_tensor(values: npt.NDArray[Any]) -> Tensor:
    import paddle

    values = np.ascontiguousarray(values)
    tensor = paddle._C_ops.empty(values.shape, _dtypes()[values.dtype], paddle.CPUPlace())
    ctypes.memmove(tensor.data_ptr(), values.ctypes.data, values.nbytes)
    return tensor


class HeldTensor:
    """Values that change and are handed to operators again and again: changed in `array`, taken by calling.

    Nothing is made anew for that on a CPU.
    """

    def __init__(self, values: npt.NDArray[Any]) -> None:
        """With a copy of these values, int32, int64 or float32; some at least."""
        self._tensor = None if on_gpu() else to_tensor(values)
        self.array = values.copy() if self._tensor is None else _memory_of(self._tensor, values.dtype)

    def __call__(self) -> Tensor:
        """What `array` holds now, as a tensor; not to be kept, for on a CPU it is the same memory."""
        return to_tensor(self.array) if self._tensor is None else self._tensor


class Staging:
    """A tensor of the host, int32 [N], that is filled from arrays without a call to Paddle, however often."""

    def __init__(self) -> None:
        self._resize(1024)

    def fill(self, parts: Sequence[npt.NDArray[np.int32]]) -> Tensor:
        """The tensor, which begins with these arrays' elements, one after the other, until the next call.

        Raises TypeError for arrays of another dtype.
        """
        total = sum([part.size for part in parts])
        if total > len(self._array):
            self._resize(2 * total)
        np.concatenate(parts, axis=None, out=self._array[:total], casting="no")
        return self._tensor

    def _resize(self, size: int) -> None:
        self._tensor = _to_host_tensor(np.zeros(size, np.int32))
        self._array = _memory_of(self._tensor, np.dtype(np.int32))


def _memory_of(tensor: Tensor, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A host tensor's own memory, for as long as somebody keeps the tensor. Paddle's ways to share it leak (3.3.1)."""
    size = tensor.size * dtype.itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(tensor.data_ptr()), dtype).reshape(tensor.shape)


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
