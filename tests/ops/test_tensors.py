from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fdserve import ops
from fdserve.ops.tensors import Staging


@pytest.fixture(params=[False, True], ids=["cpu", "gpu"], autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, and as on a GPU whose tensors lie on the CPU."""
    monkeypatch.setattr("fdserve.ops.tensors.on_gpu", lambda: request.param)


@pytest.mark.parametrize("dtype", ["int32", "int64", "float32"])
@pytest.mark.parametrize("shape", [(0,), (3,), (2, 5), (0, 4)])
def test_values_shape_and_dtype_are_those_of_the_array(dtype: str, shape: tuple[int, ...]) -> None:
    values = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    tensor = ops.to_tensor(values)
    assert tuple(tensor.shape) == shape
    assert str(tensor.dtype).endswith(dtype)
    np.testing.assert_array_equal(tensor.numpy(), values)


def test_the_values_are_copied_in_their_order() -> None:
    values = np.arange(12, dtype=np.int32).reshape(3, 4)
    tensor = ops.to_tensor(values[:, ::2])
    values[:] = 0
    assert tensor.numpy().tolist() == [[0, 2], [4, 6], [8, 10]]


def test_a_held_tensor_has_what_its_array_holds_now() -> None:
    values = np.arange(8, dtype=np.int64).reshape(2, 4)
    held = ops.HeldTensor(values)
    np.testing.assert_array_equal(held().numpy(), values)
    for number in (7, 9):
        held.array[:, 2] = number
        np.testing.assert_array_equal(held().numpy(), [[0, 1, number, 3], [4, 5, number, 7]])
    assert values[0, 2] == 2, "a copy"


def test_staging_puts_arrays_one_after_the_other() -> None:
    staging = Staging()
    table = np.arange(12, dtype=np.int32).reshape(3, 4)
    parts = [np.array([5], np.int32), table[:, 1:3], np.zeros(0, np.int32)]
    tensor = staging.fill(parts)
    assert tensor.numpy()[:7].tolist() == [5, 1, 2, 5, 6, 9, 10]
    address = tensor.data_ptr()
    staging.fill([np.array([8, 9], np.int32)])
    assert tensor.numpy()[:2].tolist() == [8, 9], "the same tensor, as long as it is large enough"
    large = staging.fill([np.arange(5000, dtype=np.int32)])
    assert large.data_ptr() != address
    assert large.numpy()[:5000].tolist() == list(range(5000))


def test_staging_takes_no_other_dtype() -> None:
    with pytest.raises(TypeError):
        Staging().fill([np.zeros(3, np.int64)])


@pytest.mark.parametrize("make", [ops.to_tensor, lambda values: ops.HeldTensor(values)()])
def test_no_call_leaves_memory_behind(make: Callable[[Any], Any]) -> None:
    values = np.arange(64, dtype=np.int32)

    def resident_pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    for _ in range(1000):
        make(values)
    before = resident_pages()
    for _ in range(20_000):
        make(values)
    assert resident_pages() - before < 256  # a megabyte; Paddle's own functions leave more
