"""Sampling in plain NumPy: what the compiled op is tested against. Written to be read, not to be fast."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fdserve.ops.sampling import (
    BROKEN,
    GREEDY_TEMPERATURE,
    NO_LOGPROBS,
    NOTHING_ALLOWED,
    TEMPERATURE_SCALED,
    TOP_P_NORMALIZED,
)

Float = npt.NDArray[np.float32]
Int = npt.NDArray[np.integer[Any]]


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


def allowed(mask: Int, vocab_size: int) -> npt.NDArray[np.bool_]:
    """Which of the ids below `vocab_size` a mask int32 [W] allows."""
    bits = np.unpackbits(np.ascontiguousarray(mask, np.int32).view(np.uint8), bitorder="little")
    return bits[:vocab_size].astype(np.bool_)


def log_probabilities(raw: Float, params: Float, mode: int) -> npt.NDArray[np.float64]:
    """Of one row [V], as a logprob mode of `fdserve.ops.sample` says."""
    temperature, top_p = float(params[0]), float(params[1])
    wide = raw.astype(np.float64) - float(raw.max())
    if mode & TEMPERATURE_SCALED and temperature >= GREEDY_TEMPERATURE:
        wide /= temperature
    result: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum())
    if mode & TOP_P_NORMALIZED and top_p < 1:
        order = np.argsort(-raw, kind="stable")
        reached = np.cumsum(np.exp(result[order])) >= top_p
        kept = order[: int(np.argmax(reached)) + 1] if reached.any() else order
        inside = result[kept] - np.log(np.exp(result[kept]).sum())
        result = np.full_like(result, -np.inf)
        result[kept] = inside
    return result


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
    masks: Int | None = None,
    mask_rows: Int | None = None,
    logprob_modes: Int | None = None,
) -> tuple[Int, Float, Int, Float]:
    """Arguments and result as `fdserve.ops.sample`."""
    rows = logits.shape[0]
    tokens, logprobs = np.full(rows, BROKEN, np.int32), np.full(rows, np.nan, np.float32)
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
        if masks is not None and mask_rows is not None and mask_rows[row] >= 0:
            processed[~allowed(masks[mask_rows[row]], vocab_size)] = -np.inf
        if forced >= 0:
            tokens[row] = forced
        elif np.isfinite(processed.max()):
            ids, probs = candidates(processed, float_params[row], top_k)
            drawn = np.searchsorted(np.cumsum(probs), uniform(seed, position), side="right")
            tokens[row] = ids[min(int(drawn), ids.size - 1)]
        elif processed.max() == -np.inf:
            tokens[row] = NOTHING_ALLOWED
        mode = 0 if logprob_modes is None else int(logprob_modes[row])
        if mode == NO_LOGPROBS:
            continue
        normalised = log_probabilities(raw, float_params[row], mode)
        order = np.argsort(-raw, kind="stable")[:num_top]
        top_ids[row, : order.size], top_logprobs[row, : order.size] = order, normalised[order]
        if 0 <= tokens[row] < vocab_size:
            logprobs[row] = normalised[tokens[row]]
    return tokens, logprobs, top_ids, top_logprobs
