"""The operators in plain NumPy: what the compiled kernels are tested against.

Arrays are float32 whatever the compute dtype; `dtype="bfloat16"` rounds at the places where the kernels store
bfloat16 (see `rounded`). Weights are plain [out_features, in_features] matrices. Written to be read, not to
be fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]
Int = npt.NDArray[np.integer[Any]]


def bf16_bits(x: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """The bfloat16 bit patterns nearest to `x` (ties to even), as uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    high = bits >> np.uint32(16)
    nearest = (bits + np.uint32(0x7FFF) + (high & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, high | np.uint32(0x40), nearest).astype(np.uint16)


def bf16_values(bits: npt.NDArray[np.uint16]) -> Float:
    """The float32 values of bfloat16 bit patterns."""
    wide: Float = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return wide


def rounded(x: npt.ArrayLike, dtype: str) -> Float:
    """`x` as float32, rounded through `dtype` ("bfloat16" or "float32")."""
    values = np.asarray(x, np.float32)
    return bf16_values(bf16_bits(values)) if dtype == "bfloat16" else values


def linear(x: Float, weight: Float, *, dtype: str = "float32", out_dtype: str | None = None) -> Float:
    """x [T, K] times weight [N, K] transposed -> [T, N]."""
    return rounded(x.astype(np.float64) @ weight.astype(np.float64).T, out_dtype or dtype)


def to_bytes(x: Float) -> tuple[Float, Float]:
    """x [N, K] as integers of at most 127 (as float32), and the scale of each row [N, 1]."""
    top = np.abs(x).max(axis=-1, keepdims=True)
    inverse = np.divide(127, top, out=np.zeros_like(top), where=top > 0)
    return np.rint(x * inverse).astype(np.float32), top / np.float32(127)


def w8a8_linear(x: Float, weight: Float) -> Float:
    """x [T, K] times weight [N, K] transposed, both rounded to bytes with a scale a row -> float32 [T, N]."""
    (left, left_scale), (right, right_scale) = to_bytes(x), to_bytes(weight)
    exact = left.astype(np.float64) @ right.astype(np.float64).T
    product: Float = (exact * left_scale * right_scale.T).astype(np.float32)
    return product


def weight_only(weight: Float, format: str) -> Float:
    """weight [N, K] as "wint8" or "wint4" stores it, a group of inputs after the other."""
    size, to_group = (512, _bytes_of_group) if format == "wint8" else (128, _nibbles_of_group)
    with np.errstate(all="ignore"):
        groups = [to_group(weight[:, start : start + size]) for start in range(0, weight.shape[1], size)]
    stored: Float = np.concatenate(groups, axis=1)
    return stored


def _bytes_of_group(x: Float) -> Float:
    return _integers(x, rounded(np.abs(x).max(axis=1, keepdims=True) * np.float32(1 / 127), "bfloat16"), -127, 127)


def _nibbles_of_group(x: Float) -> Float:
    """With the scale of the least squared error, of those that put the first largest weight at -6.75, -7 ... -10."""
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    best, least = np.zeros_like(x), np.full(len(x), np.inf)
    for steps in np.arange(6.75, 10.25, 0.25, np.float32):
        values = _integers(x, rounded(extreme / -steps, "bfloat16"), -8, 7)
        error = np.square(x - values).sum(axis=1)
        best = np.where((error < least)[:, None], values, best)
        least = np.minimum(error, least)
    return best


def _integers(x: Float, scale: Float, low: int, high: int) -> Float:
    inverse = np.where(scale == 0, np.float32(0), 1 / scale)
    values: Float = np.clip(np.nan_to_num(np.rint(x * inverse), nan=low), low, high) * scale
    return values


def embedding(ids: Int, weight: Float) -> Float:
    """Rows `ids` [T] of weight [V, H] -> [T, H]."""
    rows: Float = weight[ids]
    return rows


def rms_norm(x: Float, weight: Float, eps: float, *, dtype: str = "float32") -> Float:
    """x [T, H] scaled to unit root mean square, rounded, times weight [H], rounded."""
    wide = x.astype(np.float64)
    normed = rounded(wide / np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + eps), dtype)
    return rounded(normed * weight, dtype)


def add_rms_norm(
    x: Float, residual: Float, weight: Float, eps: float, *, dtype: str = "float32"
) -> tuple[Float, Float]:
    """(rms_norm(residual + x), residual + x), the sum rounded before it is normalised."""
    total = rounded(residual + x, dtype)
    return rms_norm(total, weight, eps, dtype=dtype), total


def swiglu(x: Float, *, dtype: str = "float32") -> Float:
    """x [T, 2I] -> silu(x[:, :I]) * x[:, I:]."""
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    return rounded(gate * np.exp(np.minimum(gate, 0)) / (1 + np.exp(-np.abs(gate))) * up, dtype)


def rope_table(positions: Int, head_dim: int, theta: float) -> Float:
    """[T, head_dim] with cosines in the first half of the columns and sines in the second."""
    inverse = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = np.asarray(positions, np.float64)[:, None] * inverse
    table: Float = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    return table


def apply_rope(x: Float, rope: Float) -> Float:
    """Rotate the adjacent pairs (x[2i], x[2i+1]) of x [T, heads, head_dim]."""
    cos, sin = np.split(rope[:, None, :], 2, axis=-1)
    even, odd = x[..., 0::2], x[..., 1::2]
    out = np.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = odd * cos + even * sin
    return out


def attention(
    qkv: Float,
    k_cache: Float,
    v_cache: Float,
    rope: Float,
    block_tables: Int,
    query_starts: Int,
    context_lens: Int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: str = "float32",
) -> Float:
    """Paged causal attention; the caches, [num_blocks, block_size, num_kv_heads, head_dim], change in place.

    Arguments and result as `fdserve.ops.attention`. All keys and values are written before any query is
    answered.
    """
    tokens = qkv.shape[0]
    heads = qkv.reshape(tokens, num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = np.split(heads, [num_heads, num_heads + num_kv_heads], axis=1)
    q = rounded(apply_rope(q, rope), dtype)
    k = rounded(apply_rope(k, rope), dtype)
    for row, start in enumerate(query_starts[:-1]):
        for token in range(start, query_starts[row + 1]):
            position = context_lens[row] + token - start
            block = block_tables[row][position // block_size]
            k_cache[block, position % block_size] = k[token]
            v_cache[block, position % block_size] = v[token]
    out = np.zeros((tokens, num_heads, head_dim), np.float32)
    group = num_heads // num_kv_heads
    for row, start in enumerate(query_starts[:-1]):
        end = query_starts[row + 1]
        length = context_lens[row] + end - start
        blocks = block_tables[row][: -(-length // block_size)]
        keys, values = (
            cache[blocks].reshape(-1, num_kv_heads, head_dim)[:length].repeat(group, axis=1).astype(float)
            for cache in (k_cache, v_cache)
        )
        for token in range(start, end):
            seen = context_lens[row] + token - start + 1
            scores = np.einsum("hd,lhd->hl", q[token].astype(np.float64), keys[:seen]) * head_dim**-0.5
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            out[token] = np.einsum("hl,lhd->hd", weights, values[:seen])
    return rounded(out.reshape(tokens, num_heads * head_dim), dtype)


def route(x: Float, gate: Float, correction_bias: Float, top_k: int, norm_min: float) -> tuple[Int, Float]:
    """ERNIE-4.5 routing: (expert ids [T, k] in ascending order, their float32 weights [T, k])."""
    scores = x.astype(np.float64) @ gate.astype(np.float64).T
    probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probs /= probs.sum(axis=-1, keepdims=True)
    chosen = np.sort(np.argsort(-(probs + correction_bias), axis=-1, kind="stable")[:, :top_k], axis=-1)
    weights = np.take_along_axis(probs, chosen, axis=-1)
    return chosen, (weights / np.maximum(weights.sum(axis=-1, keepdims=True), norm_min)).astype(np.float32)


def moe(
    x: Float,
    gate: Float,
    correction_bias: Float,
    up_gate: Sequence[Float],
    down: Sequence[Float],
    *,
    top_k: int,
    norm_min: float,
    shared: Float | None = None,
    dtype: str = "float32",
) -> Float:
    """Each token's experts, weighted and summed by ascending id, plus `shared`: as `fdserve.ops.moe`."""
    chosen, weights = route(x, gate, correction_bias, top_k, norm_min)
    weights = rounded(weights, dtype)
    out = np.zeros(x.shape, np.float32)
    for token in range(x.shape[0]):
        row = x[token : token + 1]
        for expert, weight in zip(chosen[token], weights[token], strict=True):
            hidden = swiglu(linear(row, up_gate[expert], dtype=dtype), dtype=dtype)
            out[token] += weight * linear(hidden, down[expert])[0]
    return rounded(out if shared is None else out + shared, dtype)
