"""How weights are put on a GPU, with tensors on the CPU: nothing here needs the kernels."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import paddle
import pytest

from fdserve.ops import gpu

Array = np.ndarray[Any, Any]
FORMATS = list(gpu.BITS)
SOURCES = ["float32", "uint16"]


def weight(source: str, rows: int = 192, columns: int = 128) -> Array:
    """[N, K] of float32, or of bfloat16's bits."""
    values = np.random.default_rng(1).normal(size=(rows, columns)).astype(np.float32)
    return values if source == "float32" else (values.view(np.uint32) >> 16).astype(np.uint16)


def bytes_of(*packed: paddle.Tensor | None) -> list[tuple[list[int], bytes]]:
    """Shapes and contents."""
    tensors = [tensor for tensor in packed if tensor is not None]
    assert all(tensor.is_contiguous() for tensor in tensors)
    return [
        (list(tensor.shape), (tensor.view("int16") if tensor.element_size() == 2 else tensor).numpy().tobytes())
        for tensor in tensors
    ]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("format", FORMATS)
def test_both_layouts_give_the_same_rows(format: str, source: str) -> None:
    rows = weight(source)
    turned = np.ascontiguousarray(rows.T)
    expected = bytes_of(*gpu.pack(rows, format, in_out=False))
    assert bytes_of(*gpu.pack(turned, format, in_out=True)) == expected
    part = bytes_of(*gpu.pack(rows[64:128], format, in_out=False))
    assert bytes_of(*gpu.pack(turned[:, 64:128], format, in_out=True)) == part


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("format", FORMATS)
def test_the_host_turns_nothing(format: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Array] = []
    to_tensor = paddle.to_tensor

    def noted(values: Array) -> paddle.Tensor:
        sent.append(values)
        return to_tensor(values)

    monkeypatch.setattr(paddle, "to_tensor", noted)
    gpu.pack(np.ascontiguousarray(weight(source).T), format, in_out=True)
    (array,) = sent
    assert array.shape == (128, 192)
    assert array.itemsize == np.dtype(source).itemsize


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    values = np.array([[1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-20]], np.float32)
    data, _ = gpu.pack(values, "bfloat16", in_out=False)
    assert data.cast("float32").tolist() == [[1, 1, 1 + 2**-6, -1 - 2**-7]]


def test_bfloat16_stays_as_it_is() -> None:
    bits = np.array([[0x3F81, 0x8000, 0x7FC1, 0xFF80]], np.uint16)  # a NaN and an infinity among them
    assert gpu.pack(bits, "bfloat16", in_out=False)[0].view("int16").numpy().view(np.uint16).tolist() == bits.tolist()


@pytest.mark.parametrize(("format", "high"), [("wint8", 127), ("wint4", 7)])
def test_integers_are_the_nearest_and_their_scale_that_of_the_largest(format: str, high: int) -> None:
    values = weight("float32")
    values[3, 64:] = 0
    data, scales = gpu.pack(values, format, in_out=False)
    assert scales is not None
    packed = data.numpy()
    if format == "wint4":
        packed = np.stack([packed & 15, packed >> 4], axis=2).reshape(values.shape).astype(np.int8) - 8
    wide = np.repeat(scales.numpy(), gpu.GROUP, axis=1)
    assert np.allclose(wide[:, :: gpu.GROUP] * high, np.abs(values.reshape(192, 2, gpu.GROUP)).max(2))
    assert np.abs(packed).max() == high
    assert (np.abs(packed * wide - values) <= wide * 0.5001).all()
    assert (packed[3, 64:] == 0).all()


@pytest.mark.parametrize("format", ["wint8", "wint4"])
def test_a_nan_stays_one(format: str) -> None:
    values = weight("float32")
    values[3, 70] = np.nan
    _, scales = gpu.pack(values, format, in_out=False)
    assert scales is not None
    assert np.argwhere(np.isnan(scales.numpy())).tolist() == [[3, 1]]


@pytest.mark.parametrize("format", FORMATS)
def test_matrices_are_put_one_after_the_other(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [weight("float32") * scale for scale in (1, 2, 3)]
    each = [gpu.pack(matrix, format, in_out=False) for matrix in weights]
    order: list[str] = []
    pack = gpu.pack

    def noted(*arguments: Any) -> Any:
        order.append("packed")
        return pack(*arguments)

    monkeypatch.setattr(gpu, "pack", noted)

    def read() -> Any:
        for matrix in weights:
            order.append("read")
            yield matrix

    packed = gpu.pack_all(read(), 3, format, False)
    for whole, parts in zip(packed, zip(*each, strict=True), strict=True):
        assert (whole is None) == (parts[0] is None)
        if whole is not None:
            assert bytes_of(whole) == bytes_of(paddle.stack(list(parts)))
    assert all(one != other for one, other in pairwise(order)), "one matrix at a time"
