from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle
import pytest

from fdserve import ops
from fdserve.ops import reference
from tests.ops.arrays import assert_close, assert_rows_stand_alone, ints, normal, packed, source, tensor, values

SHAPES = [(1, 1, 1), (1, 64, 64), (3, 7, 130), (6, 65, 64), (7, 300, 63), (13, 1, 200), (64, 100, 1031), (200, 513, 70)]


@pytest.mark.parametrize(("tokens", "out_features", "in_features"), SHAPES)
def test_linear_is_the_product(dtype: str, tokens: int, out_features: int, in_features: int) -> None:
    rng = np.random.default_rng(tokens)
    weight = normal(rng, out_features, in_features, dtype=dtype)
    x = normal(rng, tokens, in_features, dtype=dtype)
    wide = ops.linear(tensor(x, dtype), packed(weight, dtype), out_dtype="float32")
    assert_close(values(wide), reference.linear(x, weight), "float32")
    narrow = ops.linear(tensor(x, dtype), packed(weight, dtype))
    assert narrow.dtype == tensor(x, dtype).dtype
    assert (values(narrow) == reference.rounded(values(wide), dtype)).all()


def test_linear_of_no_rows(dtype: str) -> None:
    weight = packed(normal(np.random.default_rng(0), 70, 30, dtype=dtype), dtype)
    assert ops.linear(tensor(np.zeros((0, 30), np.float32), dtype), weight).shape == [0, 70]


@pytest.mark.parametrize("depth", [700, 1024])  # many rows are copied into whole tiles where they fill them
def test_a_rows_bits_do_not_depend_on_the_batch_or_the_threads(dtype: str, depth: int) -> None:
    rng = np.random.default_rng(1)
    weight = packed(normal(rng, 200, depth, dtype=dtype), dtype)
    x = tensor(normal(rng, 401, depth, dtype=dtype), dtype)
    assert_rows_stand_alone(x, weight)


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
@pytest.mark.parametrize("in_out", [False, True])
def test_packing_takes_either_layout_and_dtype(dtype: str, stored: str, in_out: bool) -> None:
    rng = np.random.default_rng(2)
    weight = normal(rng, 130, 75, dtype=stored)
    x = normal(rng, 5, 75, dtype=dtype)
    matrix = source(weight.T.copy() if in_out else weight, stored)
    if stored == "float32":
        matrix = np.asfortranarray(matrix)  # a view that is not contiguous
    weight_packed = ops.pack_weight(matrix, dtype=dtype, in_out=in_out)
    assert (weight_packed.out_features, weight_packed.in_features, weight_packed.dtype) == (130, 75, dtype)
    out = ops.linear(tensor(x, dtype), weight_packed, out_dtype="float32")
    assert_close(values(out), reference.linear(x, reference.rounded(weight, dtype)), "float32")


@pytest.mark.parametrize("depth", [1, 75, 700])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 30])
def test_floats_times_bfloat16_are_those_times_the_floats_that_it_is(isa: str, rows: int, depth: int) -> None:
    rng = np.random.default_rng(4)
    weight = normal(rng, 130, depth, dtype="bfloat16")
    x = tensor(normal(rng, rows, depth, dtype="float32"), "float32")
    kept = ops.pack_weight(source(weight, "bfloat16"), dtype="float32", in_out=False, quantization="bfloat16")
    wide = packed(weight, "float32")
    assert (kept.format, wide.format) == ("bfloat16", "float32")
    assert (values(ops.linear(x, kept)) == values(ops.linear(x, wide))).all()
    ids = ints(rng.integers(0, 130, 41))
    assert (values(ops.embedding(ids, kept)) == values(ops.embedding(ids, wide))).all()


@pytest.mark.parametrize("quantization", [None, "wint8", "wint4", "w8a8"])
@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_views_and_parts_pack_like_the_whole(dtype: str, stored: str, in_out: bool, quantization: str | None) -> None:
    """Whether the parts fill whole panels or not, and be they of two dtypes."""
    weight = normal(np.random.default_rng(3), 230, 190, dtype="bfloat16")

    def packed_bytes(weights: npt.NDArray[Any] | list[npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
        packed = ops.pack_weight(weights, dtype=dtype, in_out=in_out, quantization=quantization)
        panels: npt.NDArray[np.uint8] = packed.data.numpy().view(np.uint8)
        return panels

    def matrix(rows: npt.NDArray[np.float32], kind: str = stored) -> npt.NDArray[Any]:
        return source(rows.T.copy() if in_out else rows, kind)

    whole = packed_bytes(matrix(weight))
    framed = np.pad(matrix(weight), 3, constant_values=1)
    assert (packed_bytes(framed[3:-3, 3:-3]) == whole).all()
    for ends in ([64], [128, 192], [50, 64]):
        parts = np.split(weight, ends)
        assert (packed_bytes([matrix(part) for part in parts]) == whole).all()
        kinds = ["float32", "bfloat16"] * len(parts)
        assert (packed_bytes([matrix(*each) for each in zip(parts, kinds, strict=False)]) == whole).all()


def test_packing_rounds_like_the_reference() -> None:
    odd = np.array([[1.00390625, 1.01171875, 1e-40, np.inf, -np.inf, 3.4e38, 65536.5, -1.00390626]], np.float32)
    data = ops.pack_weight(odd, dtype="bfloat16", in_out=False).data.numpy()
    assert (data[0, :, 0, :].reshape(-1) == reference.bf16_bits(odd[0])).all()


def test_packing_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="float16"):
        ops.pack_weight(np.zeros((2, 2), np.float16), dtype="float32", in_out=False)
    with pytest.raises(ValueError, match="int8"):
        ops.pack_weight(np.zeros((2, 2), np.float32), dtype="int8", in_out=False)
    with pytest.raises(ValueError, match="matrix"):
        ops.pack_weight(np.zeros((2, 0), np.float32), dtype="float32", in_out=False)
    with pytest.raises(ValueError, match="matrix"):
        ops.pack_weight([np.zeros((2, 2), np.float32), np.zeros((2, 3), np.float32)], dtype="float32", in_out=False)


@pytest.mark.parametrize(("vocab", "hidden"), [(300, 64), (65, 33), (1, 1)])
def test_embedding_gathers_rows(dtype: str, vocab: int, hidden: int) -> None:
    rng = np.random.default_rng(3)
    table = normal(rng, vocab, hidden, dtype=dtype)
    ids = rng.integers(0, vocab, 41)
    assert (values(ops.embedding(ints(ids), packed(table, dtype))) == reference.embedding(ids, table)).all()
    assert ops.embedding(ints([]), packed(table, dtype)).shape == [0, hidden]


def test_wrong_arguments_are_refused(dtype: str) -> None:
    weight = packed(np.ones((4, 6), np.float32), dtype)
    with pytest.raises(ValueError, match="in_features"):
        ops.linear(tensor(np.ones((1, 5), np.float32), dtype), weight)
    with pytest.raises(ValueError, match="not of this size"):
        ops.linear(tensor(np.ones((1, 6), np.float32), dtype), replace(weight, out_features=65))
    with pytest.raises(ValueError, match="not of this size"):
        ops.linear(tensor(np.ones((1, 6), np.float32), dtype), replace(weight, data=weight.data[:0]))
    with pytest.raises(ValueError, match="out of range"):
        ops.embedding(ints([4]), weight)
    with pytest.raises(ValueError, match=r"same dtype|expected a bfloat16 or float32 tensor"):
        ops.linear(paddle.ones([1, 6], "float16"), weight)


def test_bfloat16_needs_its_instructions() -> None:
    ops.library.force_isa("baseline")
    try:
        assert ops.compute_dtype() == "float32"
        with pytest.raises(ValueError, match="AVX512-BF16"):
            ops.swiglu(paddle.zeros([1, 2], "bfloat16"))
    finally:
        ops.library.force_isa(None)
