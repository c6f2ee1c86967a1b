"""`python -m tests.cuda.run`: the CUDA kernels' checks and timings, on a machine with a GPU, nvcc and torch.

It needs no Paddle. It ends with status 1 if a check fails, and prints the timings as a Markdown table.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tests.cuda import checks, sampling, sampling_ranks
from tests.cuda.harness import DTYPES, Device

Check = Callable[[Device, np.random.Generator, str], None]


def cases() -> Iterator[tuple[str, Check]]:
    """Every check at sizes that a GPU takes easily, the emulated tests' odd ones among them."""
    for tokens, hidden in ((3, 1024), (2, 8), (1, 2568), (2, 17000), (0, 64), (4096, 8192)):
        for residual in (False, True):
            yield (
                f"rms_norm [{tokens}, {hidden}] residual {residual}",
                lambda d, r, t, n=tokens, h=hidden, a=residual: checks.rms_norm(d, r, t, n, h, residual=a),  # type: ignore[misc]
            )
    for tokens, inner in ((3, 1024), (5, 8), (2, 2504), (0, 64), (4096, 3072)):
        yield f"swiglu [{tokens}, {inner}]", lambda d, r, t, n=tokens, i=inner: checks.swiglu(d, r, t, n, i)  # type: ignore[misc]
    for ranks, size in ((2, 8), (3, 2504), (8, 512 * 8192), (2, 0)):
        yield f"sum_ranks {ranks, size}", lambda d, r, t, n=ranks, s=size: checks.sum_ranks(d, r, t, n, s)  # type: ignore[misc]
    for shape in (
        checks.Shape((1, 3, 0, 20, 1), (5, 70, 9, 0, 1100)),
        checks.Shape((1,), (0,)),
        checks.Shape((1, 9), (2100, 1020), heads=16, kv_heads=2, head_dim=128, block_size=64),
        checks.Shape((70,), (30,), heads=8, kv_heads=1, head_dim=128, block_size=32),
        checks.Shape((5, 17, 2), (1023, 63, 64), heads=2, kv_heads=2),
        checks.Shape((1,) * 64, tuple(range(1, 6400, 100)), heads=16, kv_heads=2, head_dim=128, block_size=64),
        checks.Shape((300, 1, 33), (1000, 20000, 5000), heads=8, kv_heads=1, head_dim=128, block_size=64),
    ):
        yield f"attention {shape}", lambda d, r, t, s=shape: checks.attention(d, r, t, s)  # type: ignore[misc]
        yield f"rope_and_store {shape}", lambda d, r, t, s=shape: checks.rope_and_store(d, r, t, s)  # type: ignore[misc]
    for sizes in (
        (5, 128, 64, 8, 2),
        (1, 72, 40, 4, 4),
        (40, 64, 72, 3, 2),
        (3, 64, 64, 64, 6),
        (33, 2560, 1536, 64, 6),
    ):
        yield f"moe {sizes}", lambda d, r, t, s=sizes: checks.moe(d, r, t, *s)  # type: ignore[misc]
    for bits in (8, 4):
        yield f"moe of wint{bits}", lambda d, r, t, b=bits: checks.moe(d, r, t, 70, 2560, 1536, 8, 2, b)  # type: ignore[misc]
    for rows in ((16, 1003, 1003, 5), (16, 9000, 8900, 20), (8, 40, 33, 0), (4, 64, 3, 64), (256, 103424, 103424, 20)):
        yield f"sample {rows}", lambda d, r, t, a=rows: sampling.sample(d, r, *a)  # type: ignore[misc]
    for shares in ((2, 24, 2051, 5), (4, 24, 5000, 20), (8, 24, 8192, 0), (8, 64, 103424, 20)):
        yield f"sample on ranks {shares}", lambda d, r, t, a=shares: sampling_ranks.sample_ranks(d, r, *a)  # type: ignore[misc]
    for ranks in (2, 8):
        yield f"draws on {ranks} ranks", lambda d, r, t, n=ranks: sampling_ranks.draws(d, r, n, 200)  # type: ignore[misc]
    for bits in (8, 4):
        for tokens, depth, columns in ((1, 192, 130), (16, 64, 128), (17, 128, 40), (200, 2560, 3584)):
            yield (
                f"wint{bits} linear {tokens, depth, columns}",
                lambda d, r, t, b=bits, n=tokens, k=depth, c=columns: checks.quant_linear(  # type: ignore[misc]
                    d, r, t, b, n, k, c, to_float=n == 16
                ),
            )


def check_all(device: Device) -> int:
    """Run every check; how many failed."""
    failures = 0
    for name, check in cases():
        for dtype in DTYPES:
            try:
                check(device, np.random.default_rng(11), dtype)
            except Exception:
                failures += 1
                print(f"FAILED {name} {dtype}")
                traceback.print_exc(limit=3)
    return failures


def main() -> int:
    """The exit status."""
    import torch

    from tests.cuda import timings
    from tests.cuda.gpu import Gpu, build_for_gpu, copy_bandwidth, matmul_rate

    with tempfile.TemporaryDirectory() as directory:
        gpu = Gpu(build_for_gpu(Path(directory)))
        version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[
            -2
        ]
        print(f"{torch.cuda.get_device_name()}, {version}, torch {torch.__version__}")
        failures = check_all(gpu)
        print(f"{failures} checks failed" if failures else "all checks passed", flush=True)
        copy, matmul = copy_bandwidth(), matmul_rate()
        print(f"\ncopy: {copy / 1e9:.0f} GB/s read and written; bfloat16 matmul: {matmul / 1e12:.0f} TFLOP/s\n")
        print(timings.HEADER)
        for part in (
            timings.rows(gpu, copy),
            timings.attention(gpu, copy, matmul),
            timings.sampler(gpu, copy),
            timings.sampler_of_ranks(gpu, copy),
            timings.quantized(gpu, copy, matmul),
            timings.experts(gpu, copy, matmul),
        ):
            for figure in part:
                print(figure.row(), flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
