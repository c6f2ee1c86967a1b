"""Packing weights, which bounds how fast a checkpoint is loaded that the system has in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.floors import Case, Floors
from bench.kernel_linear import pack
from bench.machine import CACHE_BYTES, seconds

HIDDEN, WIDTH = 2560, 3072
"""What an expert of ERNIE-4.5-21B-A3B begins with."""


def pack_cases(floors: Floors, *, names: Sequence[str]) -> Iterator[Case]:
    """Matrices of bfloat16, [N, K] and [K, N], into every format; what counts is the bytes read."""
    bits = np.random.default_rng(0).integers(0x3C00, 0x3F80, (WIDTH, HIDDEN), np.uint16)
    for shape, matrix in [("[N, K]", bits), ("[K, N]", bits.T)]:
        matrices = [matrix.copy("C") for _ in range(max(1, CACHE_BYTES // matrix.nbytes))]
        for name in names:
            call = partial(_pack_all, matrices, name, matrix is not bits)
            took = seconds(call, budget=floors.budget) / len(matrices)
            rate = matrix.nbytes / took
            yield Case(f"pack {name}", shape, took, rate / 1e9, "GB/s", of_memory=rate / floors.bandwidth)


def _pack_all(matrices: Sequence[npt.NDArray[Any]], name: str, in_out: bool) -> None:
    for matrix in matrices:
        pack(matrix, name, in_out=in_out)
