"""What works row by row: the sampler, and the element-wise operators, against the bytes they read and write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import paddle

from bench.floors import Case, Floors
from bench.machine import CACHE_BYTES, seconds
from fdserve import ops

VOCAB, HIDDEN, INTERMEDIATE = 103424, 1024, 3072
SAMPLERS: dict[str, tuple[list[float], int, int]] = {
    "greedy": ([0, 1, 0, 1, 0, 0], 0, 0),
    "greedy, 5 logprobs": ([0, 1, 0, 1, 0, 0], 0, 5),
    "greedy, 20 logprobs": ([0, 1, 0, 1, 0, 0], 0, 20),
    "temperature": ([0.8, 1, 0, 1, 0, 0], 0, 0),
    "top_p 0.8": ([0.8, 0.8, 0, 1, 0, 0], 0, 0),
    "top_k 50, top_p 0.8": ([0.8, 0.8, 0, 1, 0, 0], 50, 0),
    "min_p 0.05": ([0.8, 1, 0.05, 1, 0, 0], 0, 0),
    "penalties, 1000 tokens": ([0.8, 1, 0, 1.1, 0.5, 0.5], 0, 0),
}
"""(temperature, top_p, min_p, repetition, presence and frequency penalty), top_k, logprobs"""
SPREADS = {"flat": 2.0, "peaked": 4.0}
"""The standard deviation of the logits: with the second a few ids hold nearly all of the probability."""
HISTORY = 1000
ROWS = (1, 16, 64, 512)


def sampler_cases(floors: Floors, *, rows: int = 8, samplers: Sequence[str] = tuple(SAMPLERS)) -> Iterator[Case]:
    """Times are of one row."""
    for spread, deviation in SPREADS.items():
        copies = max(1, CACHE_BYTES // (4 * VOCAB * rows))
        logits = [paddle.randn([rows, VOCAB]) * deviation for _ in range(copies)]
        for name in samplers:
            call = _sampler(logits, rows, *SAMPLERS[name])
            took = seconds(call, budget=floors.budget) / (rows * copies)
            rate = 4 * VOCAB / took
            yield Case("sample", f"{name}, {spread}", took, 1e6 * took, "us/row", of_memory=rate / floors.bandwidth)


def _sampler(logits: list[Any], rows: int, floats: list[float], top_k: int, num_top: int) -> Callable[[], Any]:
    empty = paddle.zeros([0], "int32")
    zeros = paddle.zeros([rows + 1], "int32")
    history, offsets = empty, zeros
    if floats[3] != 1:
        ids = np.random.default_rng(0).integers(0, VOCAB, rows * HISTORY)
        history = paddle.to_tensor(ids.astype(np.int32))
        offsets = paddle.to_tensor((np.arange(rows + 1) * HISTORY).astype(np.int32))
    args = (
        paddle.to_tensor(np.array([floats] * rows, np.float32)),
        paddle.to_tensor(np.array([[top_k, 1, row, -1] for row in range(rows)])),
        history, offsets, zeros[:rows], empty, paddle.zeros([0], "float32"), zeros,
    )  # fmt: skip
    return lambda: [ops.sample(each, *args, vocab_size=VOCAB, num_top=num_top) for each in logits]


def element_cases(floors: Floors, *, dtype: str, rows: Sequence[int] = ROWS) -> Iterator[Case]:
    """The share of memory's speed is of bytes read and written; small ones stay in the caches and cost a call."""
    width = 2 if dtype == "bfloat16" else 4
    weight = paddle.ones([HIDDEN], dtype)
    table = ops.pack_weight(np.full((VOCAB, HIDDEN), 0x3F80, np.uint16), dtype=dtype, in_out=False)
    for count in rows:
        x, wide = paddle.ones([count, HIDDEN], dtype), paddle.ones([count, 2 * INTERMEDIATE], dtype)
        ids = paddle.to_tensor(np.random.default_rng(0).integers(0, VOCAB, count).astype(np.int32))
        calls: dict[str, tuple[Callable[[], Any], int]] = {
            "rms_norm": (partial(ops.rms_norm, x, weight, 1e-5), 2 * HIDDEN),
            "add_rms_norm": (partial(ops.add_rms_norm, x, x, weight, 1e-5), 4 * HIDDEN),
            "swiglu": (partial(ops.swiglu, wide), 3 * INTERMEDIATE),
            "embedding": (partial(ops.embedding, ids, table), 2 * HIDDEN),
        }
        for name, (call, numbers) in calls.items():
            took = seconds(call, budget=floors.budget / 4)
            rate = count * numbers * width / took
            case = f"{count} rows"
            yield Case(f"{name} {dtype}", case, took, rate / 1e9, "GB/s", of_memory=rate / floors.bandwidth)
