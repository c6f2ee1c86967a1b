"""The mixture-of-experts layer in every weight format: its cost must follow the experts that the tokens touch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import paddle

from bench.floors import Case, Floors
from bench.machine import seconds
from fdserve import ops
from fdserve.models.footprint import WEIGHT_BYTES

HIDDEN, INNER, EXPERTS, TOP_K = 2560, 1536, 64, 6
"""A layer of ERNIE-4.5-21B-A3B."""


def routes(rows: int, experts: int, top_k: int) -> list[list[int]]:
    """The experts of each row: neighbours in the circle, so that few rows touch few experts and many touch all."""
    return [[(row * top_k + place) % experts for place in range(top_k)] for row in range(rows)]


def moe_cases(
    floors: Floors, *, names: Sequence[str], rows: Sequence[int], hidden: int = HIDDEN, inner: int = INNER
) -> Iterator[Case]:
    """Of each format few rows by the bytes of the experts they touch, many by operations a second."""
    for name in names:
        yield from _format_cases(floors, name, rows, hidden, inner)


def _format_cases(floors: Floors, name: str, rows: Sequence[int], hidden: int, inner: int) -> Iterator[Case]:
    bits = np.random.default_rng(0).integers(0x3C00, 0x3C80, (2 * inner, hidden), np.uint16)
    up_gate, down = _pack(bits, name), _pack(bits[:inner].T, name)
    dtype, width = up_gate.dtype, WEIGHT_BYTES[name]
    for count in rows:
        chosen = routes(count, EXPERTS, TOP_K)
        # Row i has a 1 in column i, where the gates of its experts are high.
        x = np.zeros((count, hidden), np.float32)
        x[np.arange(count), np.arange(count)] = 1
        gate = np.zeros((EXPERTS, hidden), np.float32)
        for row, experts in enumerate(chosen):
            gate[experts, row] = 8
        tokens, gates, bias = paddle.to_tensor(x).astype(dtype), paddle.to_tensor(gate), paddle.zeros([EXPERTS])
        call = partial(ops.moe, tokens, ops.Experts(gates, bias, up_gate, down, TOP_K, 1e-12))
        took = seconds(call, budget=floors.budget)
        touched = len({expert for experts in chosen for expert in experts})
        moved = touched * 3 * hidden * inner * width / took
        flops = 2 * count * TOP_K * 3 * hidden * inner / took
        yield Case(
            f"moe {name}",
            f"{count} rows, {touched} of {EXPERTS} experts",
            took,
            flops / 1e9,
            "GFLOP/s",
            of_memory=moved / floors.bandwidth,
            of_onednn=flops / floors.peak if floors.peak and dtype == ops.compute_dtype() else None,
        )


def _pack(weight: npt.NDArray[np.uint16], name: str) -> ops.PackedExperts:
    """EXPERTS times the same matrix [N, K] of bfloat16 bits in a format."""
    dtype = name if name == "float32" else ops.compute_dtype()
    same = itertools.repeat(weight, EXPERTS)
    return ops.pack_experts(same, num_experts=EXPERTS, dtype=dtype, in_out=False, quantization=name)
