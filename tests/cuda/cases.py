"""Every check at sizes that a GPU takes easily, the emulated tests' odd ones among them, in groups by kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from tests.cuda import attention, checks, sampling, sampling_ranks
from tests.cuda.harness import DTYPES, Device

Case = tuple[str, Callable[[Device], Any]]

SHAPES = (
    attention.Shape((1, 3, 0, 20, 1), (5, 70, 9, 0, 1100)),
    attention.Shape((1,), (0,)),
    attention.Shape((1, 9), (2100, 1020), heads=16, kv_heads=2, head_dim=128, block_size=64),
    attention.Shape((70,), (30,), heads=8, kv_heads=1, head_dim=128, block_size=32),
    attention.Shape((5, 17, 2), (1023, 63, 64), heads=2, kv_heads=2),
    attention.Shape((1, 27, 2, 0, 7), (40, 1010, 3, 7, 30), heads=5, kv_heads=1),
    attention.Shape((1,) * 64, tuple(range(1, 3200, 50)), heads=16, kv_heads=2, head_dim=128, block_size=64),
    attention.Shape((300, 1, 33), (1000, 20000, 5000), heads=8, kv_heads=1, head_dim=128, block_size=64),
)


def groups() -> dict[str, list[Case]]:
    """The cases of every kernel."""
    return {
        "rows": [
            *(
                case
                for tokens, hidden in ((3, 1024), (2, 8), (1, 2568), (5, 2560), (2, 17000), (0, 64), (1024, 8192))
                for residual in (False, True)
                for case in _typed("rms_norm", checks.rms_norm, tokens, hidden, residual=residual)
            ),
            *_each("swiglu", checks.swiglu, (3, 1024), (5, 8), (2, 2504), (0, 64), (4096, 3072)),
            *_each("sum_ranks", checks.sum_ranks, (2, 8), (3, 2504), (8, 512 * 2048), (2, 0)),
        ],
        # But for that of many sequences, whose caches take long to make.
        "rope": [
            case
            for shape in SHAPES
            if len(shape.lengths) < 64
            for case in _typed("rope_and_store", attention.rope_and_store, shape)
        ],
        "attention": [case for shape in SHAPES for case in _typed("attention", attention.attend, shape)],
        "experts": _each(
            "moe",
            checks.moe,
            *((5, 128, 64, 8, 2), (1, 72, 40, 4, 4), (40, 64, 72, 3, 2), (3, 64, 64, 64, 6), (1500, 128, 64, 64, 6)),
            (1030, 6144, 8, 4, 1),  # tokens to route that fill 48 KiB
            *((33, 1280, 768, 24, 6), (70, 1280, 768, 8, 2, 8), (70, 1280, 768, 8, 2, 4)),
        ),
        "quantized": [
            case
            for bits in (8, 4)
            for tokens, depth, columns in ((1, 192, 130), (16, 64, 128), (17, 128, 40), (200, 2560, 3584))
            for case in _typed(
                f"wint{bits} linear", checks.quant_linear, bits, tokens, depth, columns, to_float=tokens == 16
            )
        ],
        "sampler": [
            (f"sample {sizes}", partial(_untyped, sampling.sample, sizes))
            for sizes in (
                *((16, 1003, 1003, 5), (16, 9000, 8900, 20), (8, 40, 33, 0), (4, 64, 3, 64), (64, 103424, 103424, 20)),
            )
        ],
        "sampler of ranks": [
            *(
                (f"sample on ranks {sizes}", partial(_untyped, sampling_ranks.sample_ranks, sizes))
                for sizes in ((2, 24, 2051, 5), (4, 24, 5000, 20), (8, 24, 8192, 0), (8, 32, 103424, 20))
            ),
            *((f"draws on {ranks} ranks", partial(_untyped, sampling_ranks.draws, (ranks, 200))) for ranks in (2, 8)),
        ],
    }


def _typed(name: str, check: Callable[..., None], *sizes: Any, **options: Any) -> list[Case]:
    """A check in both 16-bit types."""
    told = ", ".join(map(str, (*sizes, *options.values())))
    if len(told) > 110:
        told = told[:107] + "..."
    return [(f"{name} ({told}) {dtype}", partial(_run, check, dtype, sizes, options)) for dtype in DTYPES]


def _each(name: str, check: Callable[..., None], *sizes: tuple[int, ...]) -> list[Case]:
    return [case for each in sizes for case in _typed(name, check, *each)]


def _run(check: Callable[..., None], dtype: str, sizes: Any, options: dict[str, Any], device: Device) -> None:
    check(device, np.random.default_rng(11), dtype, *sizes, **options)


def _untyped(check: Callable[..., None], sizes: tuple[int, ...], device: Device) -> None:
    check(device, np.random.default_rng(11), *sizes)
