"""Linear layers: every shape of the model, from one row to a prefill's, beside oneDNN's product of the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle

from bench.floors import Case, Floors
from bench.machine import CACHE_BYTES, fastest
from bench.onednn import Unavailable
from fdserve import ops
from fdserve.ops.weights import PackedWeight

SHAPES = {"qkv": (1024, 2560), "o": (2048, 1024), "up_gate": (1024, 6144), "down": (3072, 1024), "head": (1024, 103424)}
"""(K, N) of ERNIE-4.5-0.3B"""
ROWS = (1, 2, 4, 16, 64, 256, 1024)


BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
BESIDE = {"float32": "float32", "bfloat16": "bfloat16", "wint8": "bfloat16", "wint4": "bfloat16", "w8a8": "int8"}
"""For each of our formats what oneDNN multiplies beside it: for those of weights alone, the product that they are to
be no slower than at many rows. Its int8 product is without the rounding of activations, which ours includes."""


def pack(source: npt.NDArray[np.uint16], name: str, *, in_out: bool = False) -> PackedWeight:
    """A weight [N, K] ([K, N] when `in_out`) of bfloat16 bits in a format."""
    dtype = name if name == "float32" else ops.compute_dtype()
    return ops.pack_weight(source, dtype=dtype, in_out=in_out, quantization=name)


def linear_cases(
    floors: Floors, *, names: Sequence[str], shapes: Sequence[str] = tuple(SHAPES), rows: Sequence[int] = ROWS
) -> Iterator[Case]:
    """A case for each format, shape and number of rows."""
    for name in names:
        for shape in shapes:
            yield from _shape_cases(floors, name, shape, rows)


def _shape_cases(floors: Floors, name: str, shape: str, rows: Sequence[int]) -> Iterator[Case]:
    k, n = SHAPES[shape]
    source = np.random.default_rng(0).integers(0x3C00, 0x3F80, (n, k), np.uint16)
    weights = [pack(source, name)]
    size = int(np.prod(weights[0].data.shape)) * weights[0].data.element_size()
    weights += [pack(source, name) for _ in range(CACHE_BYTES // size - 1)]
    their_copies = max(1, CACHE_BYTES // (k * n * BYTES[BESIDE[name]]))
    for count in rows:
        x = paddle.ones([count, k], weights[0].dtype)
        calls: dict[str, Callable[[], Any]] = {"ours": partial(_multiply, x, weights)}
        with ExitStack() as stack:
            if floors.onednn is not None:
                try:
                    theirs = stack.enter_context(floors.onednn.linear(count, k, n, BESIDE[name], their_copies))
                    calls["onednn"] = partial(_call_all, theirs)
                except Unavailable:
                    pass
            times = fastest(calls, budget=floors.budget)
        took = times["ours"] / len(weights)
        yield Case(
            kernel=f"linear {name}",
            case=f"{shape} {k} -> {n}, {count} rows",
            seconds=took,
            rate=2 * count * k * n / took / 1e9,
            unit="GFLOP/s",
            # What the activations add matters from some rows on, where memory is not the floor.
            of_memory=size / took / floors.bandwidth,
            of_onednn=times["onednn"] / their_copies / took if "onednn" in times else None,
        )


def _multiply(x: Any, weights: Sequence[Any]) -> None:
    for weight in weights:
        ops.linear(x, weight)


def _call_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()
