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

GREEDY_TEMPERATURE = 1e-5
"""Below this temperature a row is decided by argmax."""


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


def philox4x32(seed: int, position: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 with key = seed, counter = position (Salmon et al., "Parallel random numbers: as easy
    as 1, 2, 3", 2011).
    """
    mask = 0xFFFFFFFF
    counter = [position & mask, (position >> 32) & mask, 0, 0]
    key = [seed & mask, (seed >> 32) & mask]
    for _ in range(10):
        left, right = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        mixed = (right >> 32) ^ counter[1] ^ key[0], (left >> 32) ^ counter[3] ^ key[1]
        counter = [mixed[0], right & mask, mixed[1], left & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return counter[0], counter[1], counter[2], counter[3]


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that decides the token at `position`: 53 bits of the first two Philox words."""
    high, low, _, _ = philox4x32(seed, position)
    return float(((high << 32) | low) >> 11) * 2.0**-53


def processed_logits(
    logits: Float, params: Float, history: Int, prompt_len: int, bias_ids: Int, bias_values: Float
) -> Float:
    """One row [V] after bias, repetition, frequency and presence penalties, before the temperature."""
    out = np.array(logits, np.float32)
    _, _, _, repetition, presence, frequency = (np.float32(value) for value in params)
    for token, value in zip(bias_ids, bias_values, strict=True):
        if 0 <= token < out.size:
            out[token] += value
    history = history.astype(np.int64)
    history = np.where((history >= 0) & (history < out.size), history, -1)
    seen = np.unique(history[history >= 0])
    out[seen] = np.where(out[seen] < 0, out[seen] * repetition, out[seen] / repetition)
    output = history[prompt_len:]
    ids, counts = np.unique(output[output >= 0], return_counts=True)
    out[ids] -= counts.astype(np.float32) * frequency + presence
    return out


def candidates(logits: Float, params: Float, top_k: int) -> tuple[Int, npt.NDArray[np.float64]]:
    """The ids that may be drawn from one processed row [V], in drawing order, and their probabilities.

    min_p keeps what reaches min_p times the largest probability; top_k (when on) keeps the largest k and
    renormalises; top_p keeps the smallest leading set that reaches top_p, the candidates being ordered by (logit
    descending, id ascending). What is kept is drawn from in the order of ids.
    """
    temperature, top_p, min_p = (float(value) for value in params[:3])
    if temperature < GREEDY_TEMPERATURE:
        return np.array([np.argmax(logits)]), np.ones(1)
    scaled = (logits.astype(np.float64) - float(logits.max())) / temperature
    weights = np.exp(scaled)
    total = weights.sum()
    ids = np.nonzero(weights >= min_p)[0] if min_p > 0 else np.arange(logits.size)
    if top_k > 0 or top_p < 1:
        ids = ids[np.argsort(-logits[ids], kind="stable")]
    if top_k > 0:
        ids = ids[:top_k]
        total = weights[ids].sum()
    if top_p < 1:
        reached = np.cumsum(weights[ids]) >= top_p * total
        ids = ids[: int(np.argmax(reached)) + 1] if reached.any() else ids
    ids = np.sort(ids)
    return ids, weights[ids] / weights[ids].sum()


def sample(
    logits: Float,
    float_params: Float,
    int_params: Int,
    history: Int,
    history_offsets: Int,
    prompt_lens: Int,
    bias_ids: Int,
    bias_values: Float,
    bias_offsets: Int,
    *,
    vocab_size: int,
    num_top: int,
) -> tuple[Int, Float, Int, Float]:
    """Arguments and result as `fdserve.ops.sample`."""
    rows = logits.shape[0]
    tokens, logprobs = np.full(rows, -1, np.int32), np.full(rows, np.nan, np.float32)
    top_ids = np.full((rows, num_top), -1, np.int32)
    top_logprobs = np.full((rows, num_top), np.nan, np.float32)
    for row in range(rows):
        raw = logits[row, :vocab_size]
        if np.isnan(raw).any() or not np.isfinite(raw.max()):
            continue
        top_k, seed, position, forced = (int(value) for value in int_params[row])
        biases = slice(bias_offsets[row], bias_offsets[row + 1])
        past = history[history_offsets[row] : history_offsets[row + 1]]
        processed = processed_logits(
            raw, float_params[row], past, int(prompt_lens[row]), bias_ids[biases], bias_values[biases]
        )
        wide = raw.astype(np.float64)
        normalised = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
        order = np.argsort(-raw, kind="stable")[:num_top]
        top_ids[row, : order.size], top_logprobs[row, : order.size] = order, normalised[order]
        if forced >= 0:
            tokens[row] = forced
        elif np.isfinite(processed.max()):
            ids, probs = candidates(processed, float_params[row], top_k)
            drawn = np.searchsorted(np.cumsum(probs), uniform(seed, position), side="right")
            tokens[row] = ids[min(int(drawn), ids.size - 1)]
        if 0 <= tokens[row] < vocab_size:
            logprobs[row] = normalised[tokens[row]]
    return tokens, logprobs, top_ids, top_logprobs
