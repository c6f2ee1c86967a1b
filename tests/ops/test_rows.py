from __future__ import annotations

import numpy as np
import pytest

from fdserve import ops
from fdserve.ops import reference
from tests.ops.arrays import assert_close, normal, tensor, values


@pytest.mark.parametrize(("tokens", "size"), [(1, 64), (5, 1024), (3, 7), (2, 1), (300, 250), (0, 64)])
def test_norms(dtype: str, tokens: int, size: int) -> None:
    rng = np.random.default_rng(size)
    x, residual = normal(rng, tokens, size, dtype=dtype, scale=3), normal(rng, tokens, size, dtype=dtype)
    weight = normal(rng, size, dtype=dtype)
    args = tensor(x, dtype), tensor(residual, dtype), tensor(weight, dtype)
    assert_close(values(ops.rms_norm(args[0], args[2], 1e-5)), reference.rms_norm(x, weight, 1e-5, dtype=dtype), dtype)
    normed, total = ops.add_rms_norm(*args, 1e-5)
    expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-5, dtype=dtype)
    assert (values(total) == expected_total).all()
    assert_close(values(normed), expected, dtype)
    # The fused op is the two ops.
    assert (values(normed) == values(ops.rms_norm(total, args[2], 1e-5))).all()
    assert (values(args[0]) == x).all()
    assert (values(args[1]) == residual).all()


@pytest.mark.parametrize(("tokens", "size"), [(1, 64), (5, 3072), (3, 7), (2, 1), (300, 250), (0, 64)])
def test_swiglu(dtype: str, tokens: int, size: int) -> None:
    x = normal(np.random.default_rng(size), tokens, 2 * size, dtype=dtype, scale=5)
    if tokens > 1:
        x[0, 0], x[1, 0] = reference.rounded(-200, dtype), reference.rounded(200, dtype)
    assert_close(values(ops.swiglu(tensor(x, dtype))), reference.swiglu(x, dtype=dtype), dtype)


def test_a_rows_bits_do_not_depend_on_the_batch(dtype: str) -> None:
    rng = np.random.default_rng(4)
    x, residual = (tensor(normal(rng, 200, 514, dtype=dtype), dtype) for _ in range(2))
    weight = tensor(normal(rng, 514, dtype=dtype), dtype)
    normed, total = (values(each) for each in ops.add_rms_norm(x, residual, weight, 1e-6))
    activated = values(ops.swiglu(x))
    for first, last in [(0, 1), (3, 10), (150, 200)]:
        alone = ops.add_rms_norm(x[first:last], residual[first:last], weight, 1e-6)
        assert (values(alone[0]) == normed[first:last]).all()
        assert (values(alone[1]) == total[first:last]).all()
        assert (values(ops.swiglu(x[first:last])) == activated[first:last]).all()


def test_a_broken_row_disturbs_no_other(dtype: str) -> None:
    x = normal(np.random.default_rng(5), 3, 128, dtype=dtype)
    weight = tensor(np.ones(128, np.float32), dtype)
    expected = values(ops.rms_norm(tensor(x, dtype), weight, 1e-5))
    x[1, 5] = np.nan
    actual = values(ops.rms_norm(tensor(x, dtype), weight, 1e-5))
    assert np.isnan(actual[1]).all()
    assert (actual[[0, 2]] == expected[[0, 2]]).all()
