from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fdserve import ops


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


def test_no_call_leaves_memory_behind() -> None:
    values = np.arange(64, dtype=np.int32)

    def resident_pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    for _ in range(1000):
        ops.to_tensor(values)
    before = resident_pages()
    for _ in range(20_000):
        ops.to_tensor(values)
    assert resident_pages() - before < 256  # a megabyte; Paddle's own function leaves twice that
