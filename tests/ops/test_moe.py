from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fdserve import ops
from fdserve.ops import reference
from tests.ops.arrays import Float, assert_close, normal, source, tensor, values


class Layer:
    """A small mixture-of-experts layer, packed and plain."""

    def __init__(
        self, dtype: str, hidden: int, inner: int, experts: int, top_k: int, quantization: str | None = None
    ) -> None:
        rng = np.random.default_rng(hidden)
        self.dtype, self.top_k = dtype, top_k
        self.gate = normal(rng, experts, hidden, scale=hidden**-0.5)
        self.bias = normal(rng, experts, scale=0.05)
        self.up_gate = [normal(rng, 2 * inner, hidden, dtype=dtype, scale=hidden**-0.5) for _ in range(experts)]
        self.down = [normal(rng, hidden, inner, dtype=dtype, scale=inner**-0.5) for _ in range(experts)]
        self.packed = [
            ops.pack_experts(
                (source(weight, dtype) for weight in weights),
                num_experts=experts,
                dtype=dtype,
                in_out=False,
                quantization=quantization,
            )
            for weights in (self.up_gate, self.down)
        ]

    def run(self, x: Float, shared: Float | None = None) -> Any:
        extra = None if shared is None else tensor(shared, self.dtype)
        gate, bias = tensor(self.gate, "float32"), tensor(self.bias, "float32")
        up_gate, down = self.packed
        experts = ops.Experts(gate, bias, up_gate, down, self.top_k, norm_min=1e-12)
        return values(ops.moe(tensor(x, self.dtype), experts, extra))

    def expect(self, x: Float, shared: Float | None = None) -> Float:
        return reference.moe(
            x, self.gate, self.bias, self.up_gate, self.down,
            top_k=self.top_k, norm_min=1e-12, shared=shared, dtype=self.dtype,
        )  # fmt: skip


@pytest.mark.parametrize(("hidden", "inner", "experts", "top_k"), [(64, 96, 8, 3), (33, 21, 5, 5), (128, 64, 64, 6)])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_moe(dtype: str, hidden: int, inner: int, experts: int, top_k: int, tokens: int) -> None:
    layer = Layer(dtype, hidden, inner, experts, top_k)
    rng = np.random.default_rng(tokens)
    x, shared = (normal(rng, tokens, hidden, dtype=dtype) for _ in range(2))
    assert_close(layer.run(x), layer.expect(x), dtype)
    assert_close(layer.run(x, shared), layer.expect(x, shared), dtype)


# Of 1100 tokens a chunk has up to 1024, more than a group; widths of whole panels are activated in the cache.
@pytest.mark.parametrize("inner", [96, 128])
@pytest.mark.parametrize("quantization", [None, "wint8", "wint4", "w8a8"])
def test_a_tokens_bits_do_not_depend_on_the_batch_or_the_threads(
    dtype: str, quantization: str | None, inner: int
) -> None:
    layer = Layer(dtype, 64, inner, 8, 3, quantization)
    layer.bias[:2] += 1  # which most tokens go to
    x = normal(np.random.default_rng(3), 1100, 64, dtype=dtype)
    together = layer.run(x)
    for first, last in [(0, 1), (5, 12), (1000, 1100)]:
        assert (layer.run(x[first:last]) == together[first:last]).all()
    ops.set_num_threads(1)
    assert (layer.run(x) == together).all()


def test_a_broken_token_disturbs_no_other(dtype: str) -> None:
    layer = Layer(dtype, 64, 96, 8, 3)
    x = normal(np.random.default_rng(4), 6, 64, dtype=dtype)
    expected = layer.run(x)
    x[2] = np.nan
    actual = layer.run(x)
    assert np.isnan(actual[2]).all()
    assert (np.delete(actual, 2, 0) == np.delete(expected, 2, 0)).all()


def test_fewer_experts_left_than_are_asked_for(dtype: str) -> None:
    layer = Layer(dtype, 64, 96, 8, 3)
    layer.bias[:7] = -np.inf
    x = normal(np.random.default_rng(5), 6, 64, dtype=dtype)
    assert_close(layer.run(x), layer.expect(x), dtype)


def test_the_bias_chooses_but_does_not_weigh() -> None:
    scores = np.array([[2.0, 1.0, 0.0, -1.0]], np.float32)
    chosen, weights = reference.route(np.eye(4, dtype=np.float32)[:1] * 1, scores.T @ np.eye(1, 4, dtype=np.float32),
                                      np.array([0, 0, 0, 1], np.float32), 2, 1e-12)  # fmt: skip
    probs = np.exp(scores[0]) / np.exp(scores[0]).sum()
    assert chosen.tolist() == [[0, 3]]
    assert np.allclose(weights, probs[[0, 3]] / probs[[0, 3]].sum())


def test_experts_must_be_whole(dtype: str) -> None:
    layer = Layer(dtype, 64, 64, 2, 1)
    up_gate, down = layer.packed
    layer.packed = [replace(up_gate, data=up_gate.data[:1].reshape([2, -1])), down]
    with pytest.raises(ValueError, match="not of this size"):
        layer.run(normal(np.random.default_rng(6), 3, 64, dtype=dtype))


def test_experts_must_be_as_many_as_promised() -> None:
    matrices = [np.zeros((4, 4), np.float32)] * 2
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"expected {count} experts"):
            ops.pack_experts(iter(matrices), num_experts=count, dtype="float32", in_out=False)
    with pytest.raises(ValueError, match="expected 2 experts of"):
        ops.pack_experts([matrices[0], np.zeros((4, 5), np.float32)], num_experts=2, dtype="float32", in_out=False)
