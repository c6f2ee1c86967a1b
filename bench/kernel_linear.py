"""Linear layers: every shape of the model, from one row to a prefill's, beside oneDNN's product of the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import paddle

from bench.floors import Case, Floors
from bench.machine import CACHE_BYTES, fastest
from bench.onednn import Unavailable
from fdserve import ops

SHAPES = {"qkv": (1024, 2560), "o": (2048, 1024), "up_gate": (1024, 6144), "down": (3072, 1024), "head": (1024, 103424)}
"""(K, N) of ERNIE-4.5-0.3B"""
ROWS = (1, 2, 4, 16, 64, 256, 1024)


@dataclass(frozen=True)
class Format:
    """A way to hold weights. `pack` makes a weight of bfloat16 bits [N, K]; `bits` are those read for each of them."""

    pack: Callable[[Any], Any]
    bits: float
    x_dtype: str
    onednn: str
    """What oneDNN is asked for beside it."""


def formats() -> dict[str, Format]:
    """Those that this processor computes in."""
    found = {
        "float32": Format(lambda weight: ops.pack_weight(weight, dtype="float32", in_out=False), 32, *2 * ["float32"])
    }
    if ops.compute_dtype() == "bfloat16":
        bf16 = Format(lambda weight: ops.pack_weight(weight, dtype="bfloat16", in_out=False), 16, *2 * ["bfloat16"])
        found = {"bfloat16": bf16} | found
    return found


def linear_cases(
    floors: Floors, *, names: Sequence[str], shapes: Sequence[str] = tuple(SHAPES), rows: Sequence[int] = ROWS
) -> Iterator[Case]:
    """A case for each format, shape and number of rows."""
    for name in names:
        for shape in shapes:
            yield from _shape_cases(floors, name, shape, rows)


def _shape_cases(floors: Floors, name: str, shape: str, rows: Sequence[int]) -> Iterator[Case]:
    format = formats()[name]
    k, n = SHAPES[shape]
    size = k * n * format.bits / 8
    copies = max(1, int(CACHE_BYTES // size))
    source = np.random.default_rng(0).integers(0x3C00, 0x3F80, (n, k), np.uint16)
    weights = [format.pack(source) for _ in range(copies)]
    for count in rows:
        x = paddle.ones([count, k], format.x_dtype)
        calls: dict[str, Callable[[], Any]] = {"ours": partial(_multiply, x, weights)}
        with ExitStack() as stack:
            if floors.onednn is not None:
                try:
                    theirs = stack.enter_context(floors.onednn.linear(count, k, n, format.onednn, copies))
                    calls["onednn"] = partial(_call_all, theirs)
                except Unavailable:
                    pass
            times = fastest(calls, budget=floors.budget)
        took = times["ours"] / copies
        yield Case(
            kernel=f"linear {name}",
            case=f"{shape} {k} -> {n}, {count} rows",
            seconds=took,
            rate=2 * count * k * n / took / 1e9,
            unit="GFLOP/s",
            # What the activations add matters from some rows on, where memory is not the floor.
            of_memory=size / took / floors.bandwidth,
            of_onednn=times["onednn"] / times["ours"] if "onednn" in times else None,
        )


def _multiply(x: Any, weights: Sequence[Any]) -> None:
    for weight in weights:
        ops.linear(x, weight)


def _call_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()
