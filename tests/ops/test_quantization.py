from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fdserve import ops
from fdserve.ops import reference
from tests.ops.arrays import Float, assert_close, assert_rows_stand_alone, ints, normal, source, tensor, values

WEIGHT_ONLY = ["wint8", "wint4"]
FORMATS = [*WEIGHT_ONLY, "w8a8"]
SHAPES = [
    (1, 1, 1), (1, 64, 64), (3, 7, 130), (5, 70, 700), (6, 65, 64), (7, 300, 63), (13, 1, 200), (23, 64, 450),
    (64, 100, 1031), (200, 513, 70),
]  # fmt: skip


def pack(weight: Float, dtype: str, quantization: str) -> Any:
    return ops.pack_weight(source(weight, dtype), dtype=dtype, in_out=False, quantization=quantization)


def stored(packed: Any) -> Float:
    """The values that a weight-only matrix stands for: an embedding gives them, rounded to its dtype."""
    return values(ops.embedding(ints(range(packed.out_features)), packed))


@pytest.mark.parametrize("quantization", WEIGHT_ONLY)
@pytest.mark.parametrize(("tokens", "out_features", "in_features"), SHAPES)
def test_the_product_is_of_the_stored_values(
    dtype: str, quantization: str, tokens: int, out_features: int, in_features: int
) -> None:
    rng = np.random.default_rng(tokens)
    packed = pack(normal(rng, out_features, in_features, dtype=dtype), dtype, quantization)
    x = normal(rng, tokens, in_features, dtype=dtype)
    out = values(ops.linear(tensor(x, dtype), packed, out_dtype="float32"))
    expected = reference.linear(x, stored(packed))
    # In bfloat16 the embedding rounds what the product does not.
    size = np.sqrt(np.square(x).sum(axis=1, keepdims=True)) * np.sqrt(np.square(stored(packed)).sum(axis=1))
    assert (np.abs(out - expected) <= (2.0**-8 if dtype == "bfloat16" else 1e-5) * size).all()
    assert (values(ops.linear(tensor(x, dtype), packed)) == reference.rounded(out, dtype)).all()


@pytest.mark.parametrize(("tokens", "out_features", "in_features"), SHAPES)
def test_bytes_times_bytes(dtype: str, tokens: int, out_features: int, in_features: int) -> None:
    rng = np.random.default_rng(tokens)
    weight = normal(rng, out_features, in_features, dtype=dtype)
    x = normal(rng, tokens, in_features, dtype=dtype)
    out = values(ops.linear(tensor(x, dtype), pack(weight, dtype, "w8a8"), out_dtype="float32"))
    assert_close(out, reference.w8a8_linear(x, weight), "float32")


@pytest.mark.parametrize("quantization", WEIGHT_ONLY)
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (65, 64), (130, 75), (80, 700), (16, 1537)])
def test_what_is_stored_is_the_references(dtype: str, quantization: str, out_features: int, in_features: int) -> None:
    """Each row has a size of its own, some so small that a scale has no finite inverse."""
    rng = np.random.default_rng(out_features)
    sizes = rng.choice([*range(-150, -120), *range(-40, 40)], (out_features, 1))
    weight = np.ldexp(normal(rng, out_features, in_features), sizes)
    weight[rng.random(weight.shape) < 0.1] = 0
    weight[::16, : in_features // 2] = 0
    weight = reference.rounded(weight, dtype)
    expected = reference.rounded(reference.weight_only(weight, quantization), dtype)
    np.testing.assert_array_equal(stored(pack(weight, dtype, quantization)), expected)


@pytest.mark.parametrize(("quantization", "bound"), [("wint8", 0.008), ("wint4", 0.1)])
def test_the_error_of_normal_weights(dtype: str, quantization: str, bound: float) -> None:
    weight = normal(np.random.default_rng(0), 128, 512, dtype=dtype, scale=0.02)
    error = stored(pack(weight, dtype, quantization)) - weight
    assert np.sqrt(np.square(error).mean() / np.square(weight).mean()) < bound


@pytest.mark.parametrize("depth", [700, 1024])  # many rows are copied into whole tiles where they fill them
@pytest.mark.parametrize("quantization", FORMATS)
def test_a_rows_bits_do_not_depend_on_the_batch_or_the_threads(dtype: str, quantization: str, depth: int) -> None:
    rng = np.random.default_rng(1)
    weight = pack(normal(rng, 200, depth, dtype=dtype), dtype, quantization)
    rows = normal(rng, 401, depth, dtype=dtype)
    rows[::7, ::200] = 100  # some activations far above the others, of some rows
    assert_rows_stand_alone(tensor(rows, dtype), weight)


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("in_out", [False, True])
def test_packing_takes_either_layout_and_dtype(dtype: str, quantization: str, in_out: bool) -> None:
    rng = np.random.default_rng(2)
    weight = normal(rng, 130, 75, dtype="bfloat16")
    x = tensor(normal(rng, 5, 75, dtype=dtype), dtype)
    expected = values(ops.linear(x, pack(weight, "float32", quantization) if dtype == "float32" else
                                 pack(weight, dtype, quantization), out_dtype="float32"))  # fmt: skip
    for kind in ("bfloat16", "float32"):
        matrix = source(weight.T.copy() if in_out else weight, kind)
        packed = ops.pack_weight(matrix, dtype=dtype, in_out=in_out, quantization=quantization)
        assert (packed.out_features, packed.in_features, packed.format) == (130, 75, quantization)
        assert (values(ops.linear(x, packed, out_dtype="float32")) == expected).all()


@pytest.mark.parametrize("quantization", FORMATS)
def test_zeros_and_single_weights_are_exact(dtype: str, quantization: str) -> None:
    weight = np.zeros((3, 128), np.float32)
    weight[1, 5], weight[2, 70] = -4.0, 0.5
    x = np.zeros((2, 128), np.float32)
    x[0, 5], x[1, 70] = 1.0, -2.0
    out = values(ops.linear(tensor(x, dtype), pack(weight, dtype, quantization), out_dtype="float32"))
    assert np.abs(out - x @ weight.T).max() < 0.02
    assert (out[:, 0] == 0).all()


@pytest.mark.parametrize("tokens", [1, 8, 20, 40])
def test_activations_near_the_largest_of_their_group_are_exact(dtype: str, tokens: int) -> None:
    """Where bfloat16 is multiplied as integers of 15 bits: every bit counts down to 2^-6 of the largest."""
    rng = np.random.default_rng(tokens)
    x = (
        rng.integers(128, 256, (tokens, 512))
        * 2.0 ** rng.integers(-6, 1, (tokens, 512))
        * rng.choice([-1, 1], (tokens, 512))
    )
    x[:, ::32] = 255
    check_exact(dtype, "wint8", x, rng)


@pytest.mark.parametrize("tokens", [1, 8, 20, 40])
def test_activations_that_are_bytes_are_exact(dtype: str, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    x = rng.integers(-127, 128, (tokens, 512)).astype(float)
    x[:, ::32] = 127
    x[:, 128:256] = x[:, :128] * 2.0**-20  # every group has a scale of its own
    check_exact(dtype, "wint4", x, rng)


def check_exact(dtype: str, quantization: str, x: npt.NDArray[np.float64], rng: np.random.Generator) -> None:
    largest = {"wint8": 127, "wint4": 7}[quantization]
    weight = rng.integers(-largest, largest + 1, (64, 512)).astype(np.float32)
    weight[:, ::32] = 127 if quantization == "wint8" else -8  # what the scale follows from: it is 1
    packed = pack(weight, dtype, quantization)
    assert (stored(packed) == weight).all()
    out = values(ops.linear(tensor(x.astype(np.float32), dtype), packed, out_dtype="float32"))
    exact = x @ weight.astype(float).T
    # Each of the few groups' sums, and their sum, is rounded to float32 at most.
    assert np.abs(out - exact).max() <= 2.0**-23 * np.abs(x).sum(axis=1).max() * 128


@pytest.mark.parametrize("tokens", [1, 20, 40])
@pytest.mark.parametrize(("quantization", "bits"), [("wint8", 14), ("wint4", 11)])
def test_a_large_activation_costs_the_others_little(dtype: str, quantization: str, bits: int, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    packed = pack(normal(rng, 64, 512, dtype=dtype), dtype, quantization)
    # As the product sees it: embeddings are rounded in bfloat16, so single inputs tell.
    identity = np.zeros((512, 512), np.float32)
    np.fill_diagonal(identity, 1)
    weight = values(ops.linear(tensor(identity, dtype), packed, out_dtype="float32")).T.astype(float)
    x = normal(rng, tokens, 512, dtype=dtype)
    x[:, 7] = 1000
    out = values(ops.linear(tensor(x, dtype), packed, out_dtype="float32"))
    group = {"wint8": 512, "wint4": 128}[quantization]
    bound = 2.0**-bits * 1000 * np.abs(weight[:, :group]).sum(axis=1) + 1e-4 * np.abs(x).sum(axis=1, keepdims=True)
    assert (np.abs(out - x @ weight.T) <= bound).all()


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("power", [-90, -20, 20, 90])
def test_powers_of_two_scale_exactly(dtype: str, quantization: str, power: int) -> None:
    rng = np.random.default_rng(5)
    weight = pack(normal(rng, 70, 300, dtype=dtype), dtype, quantization)
    x = normal(rng, 3, 300, dtype=dtype)
    out = values(ops.linear(tensor(x, dtype), weight, out_dtype="float32"))
    scaled = values(ops.linear(tensor(x * np.float32(2.0**power), dtype), weight, out_dtype="float32"))
    assert (scaled == out * np.float32(2.0**power)).all()


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_broken_activation_shows(dtype: str, quantization: str, broken: float) -> None:
    weight = pack(normal(np.random.default_rng(3), 70, 96, dtype=dtype), dtype, quantization)
    x = normal(np.random.default_rng(4), 3, 96, dtype=dtype)
    expected = values(ops.linear(tensor(x, dtype), weight))
    x[1, 40] = broken
    actual = values(ops.linear(tensor(x, dtype), weight))
    assert not np.isfinite(actual[1]).any()
    assert (actual[::2] == expected[::2]).all()


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_broken_weight_shows(dtype: str, quantization: str, broken: float) -> None:
    rng = np.random.default_rng(6)
    weight = normal(rng, 70, 300, dtype=dtype)
    x = tensor(normal(rng, 3, 300, dtype=dtype), dtype)
    expected = values(ops.linear(x, pack(weight, dtype, quantization)))
    weight[5, 200] = broken
    actual = values(ops.linear(x, pack(weight, dtype, quantization)))
    assert not np.isfinite(actual[:, 5]).any()
    assert (np.delete(actual, 5, axis=1) == np.delete(expected, 5, axis=1)).all()


def test_memory_per_weight() -> None:
    weight = np.zeros((640, 1024), np.float32)
    sizes = {name: pack(weight, "float32", name).data.size / weight.size for name in FORMATS}
    assert sizes == {"wint8": 1 + 2 / 512, "wint4": 0.5 + 2 / 128, "w8a8": 1 + 8 / 1024}


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("tokens", [1, 9])
def test_experts(dtype: str, quantization: str, tokens: int) -> None:
    """A mixture of experts is the same whether its experts are multiplied together or one by one."""
    rng = np.random.default_rng(tokens)
    hidden, inner, experts, top_k = 64, 96, 4, 2
    gate = normal(rng, experts, hidden, scale=hidden**-0.5)
    shapes = [(2 * inner, hidden), (hidden, inner)]
    up_gate, down = ([normal(rng, *shape, dtype=dtype, scale=0.1) for _ in range(experts)] for shape in shapes)
    packed_up_gate, packed_down = (
        ops.pack_experts(
            (source(weight, dtype) for weight in weights),
            num_experts=experts, dtype=dtype, in_out=False, quantization=quantization,
        )
        for weights in (up_gate, down)
    )  # fmt: skip
    x = normal(rng, tokens, hidden, dtype=dtype)
    zeros = tensor(np.zeros(experts, np.float32), "float32")
    layer = ops.Experts(tensor(gate, "float32"), zeros, packed_up_gate, packed_down, top_k, norm_min=1e-12)
    out = ops.moe(tensor(x, dtype), layer)
    chosen, weights = reference.route(x, gate, np.zeros(experts, np.float32), top_k, 1e-12)
    weights = reference.rounded(weights, dtype)
    expected = np.zeros_like(x)
    for token in range(tokens):
        row = tensor(x[token : token + 1], dtype)
        for expert, weight in zip(chosen[token], weights[token], strict=True):
            both = ops.linear(row, pack(up_gate[expert], dtype, quantization))
            answer = ops.linear(ops.swiglu(both), pack(down[expert], dtype, quantization), out_dtype="float32")
            expected[token] += weight * values(answer)[0]
    assert_close(values(out), reference.rounded(expected, dtype), dtype)


def test_wrong_arguments_are_refused() -> None:
    weight = np.ones((4, 6), np.float32)
    with pytest.raises(ValueError, match="wint2"):
        pack(weight, "float32", "wint2")
    with pytest.raises(ValueError, match="w8a8"):
        ops.embedding(ints([0]), pack(weight, "float32", "w8a8"))
