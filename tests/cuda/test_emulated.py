"""The CUDA kernels' results, from the same sources, on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.cuda import attention, checks, sampling, sampling_ranks
from tests.cuda.harness import DTYPES, Emulated, link_emulated
from tests.cuda.traffic import CASES, Count, measure_case


@pytest.fixture(scope="module")
def device(objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    library = link_emulated(objects, tmp_path_factory.mktemp("library") / "emulated.so")
    return Emulated(ctypes.CDLL(str(library)))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@every_dtype
@pytest.mark.parametrize(("tokens", "hidden"), [(3, 1024), (2, 8), (1, 2568), (2, 17000), (0, 64)])
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(
    device: Emulated, rng: np.random.Generator, dtype: str, tokens: int, hidden: int, residual: bool
) -> None:
    checks.rms_norm(device, rng, dtype, tokens, hidden, residual=residual)


@every_dtype
@pytest.mark.parametrize(("tokens", "inner"), [(3, 1024), (5, 8), (2, 2504), (0, 64)])
def test_swiglu(device: Emulated, rng: np.random.Generator, dtype: str, tokens: int, inner: int) -> None:
    checks.swiglu(device, rng, dtype, tokens, inner)


@every_dtype
@pytest.mark.parametrize(("ranks", "size"), [(2, 8), (3, 2504), (8, 256), (2, 0)])
def test_sum_ranks(device: Emulated, rng: np.random.Generator, dtype: str, ranks: int, size: int) -> None:
    checks.sum_ranks(device, rng, dtype, ranks, size)


SHAPES = {
    "mixed": attention.Shape((1, 3, 0, 20, 1), (5, 70, 9, 0, 1100)),
    "one": attention.Shape((1,), (0,)),
    "long": attention.Shape((1, 9), (2100, 1020), heads=8, kv_heads=1, head_dim=128, block_size=64),
    "prefill": attention.Shape((70,), (30,), heads=8, kv_heads=1, head_dim=128, block_size=32),
    # Rows of several wide tiles, some warps' past the end, between decodes; groups that tiles divide unevenly.
    "wide": attention.Shape((1, 27, 2, 0, 7), (40, 1010, 3, 7, 30), heads=5, kv_heads=1),
    "no groups": attention.Shape((5, 17, 2), (1023, 63, 64), heads=2, kv_heads=2),
}


@every_dtype
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention(device: Emulated, rng: np.random.Generator, dtype: str, shape: attention.Shape) -> None:
    attention.attend(device, rng, dtype, shape)


@pytest.fixture
def hopper(device: Emulated) -> Iterator[Emulated]:
    """The device as one that has the kernels for sm_90a."""
    device.library.emulator_be_hopper(1)
    yield device
    device.library.emulator_be_hopper(0)


@every_dtype
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_on_hopper(hopper: Emulated, rng: np.random.Generator, dtype: str, shape: attention.Shape) -> None:
    attention.attend(hopper, rng, dtype, shape)


@every_dtype
@pytest.mark.parametrize("shape", [SHAPES["mixed"], SHAPES["prefill"]], ids=["mixed", "prefill"])
def test_rope_and_store(device: Emulated, rng: np.random.Generator, dtype: str, shape: attention.Shape) -> None:
    attention.rope_and_store(device, rng, dtype, shape)


@every_dtype
@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "experts", "top_k"),
    [
        (5, 128, 64, 8, 2),
        (1, 72, 40, 4, 4),
        (40, 64, 72, 3, 2),
        (3, 64, 64, 64, 6),
        (0, 64, 64, 4, 2),
        (1027, 136, 8, 5, 1),  # as many tokens as are routed four at a time
    ],
)
def test_moe(
    device: Emulated,
    rng: np.random.Generator,
    dtype: str,
    tokens: int,
    hidden: int,
    inner: int,
    experts: int,
    top_k: int,
) -> None:
    checks.moe(device, rng, dtype, tokens, hidden, inner, experts, top_k)


@every_dtype
@pytest.mark.parametrize("bits", [8, 4])
def test_moe_of_integers(device: Emulated, rng: np.random.Generator, dtype: str, bits: int) -> None:
    checks.moe(device, rng, dtype, 9, 128, 64, 4, 2, bits)


@every_dtype
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("tokens", "depth", "columns"), [(1, 192, 130), (16, 64, 128), (17, 128, 40), (70, 64, 8)])
def test_quant_linear(
    device: Emulated, rng: np.random.Generator, dtype: str, bits: int, tokens: int, depth: int, columns: int
) -> None:
    checks.quant_linear(device, rng, dtype, bits, tokens, depth, columns, to_float=tokens == 16)


@pytest.mark.parametrize(
    ("rows", "stride", "vocab_size", "num_top"),
    [(16, 1003, 1003, 5), (16, 9000, 8900, 20), (8, 40, 33, 0), (4, 64, 3, 64), (2, 20000, 20000, 64)],
)
def test_sample(
    device: Emulated, rng: np.random.Generator, rows: int, stride: int, vocab_size: int, num_top: int
) -> None:
    sampling.sample(device, rng, rows, stride, vocab_size, num_top)


@pytest.mark.parametrize(
    ("world_size", "rows", "vocab_size", "num_top"),
    [(2, 24, 2051, 5), (2, 4, 20000, 64), (4, 16, 5000, 20), (8, 12, 8192, 0), (8, 4, 8200, 1)],
)
def test_sample_on_ranks(
    device: Emulated, rng: np.random.Generator, world_size: int, rows: int, vocab_size: int, num_top: int
) -> None:
    sampling_ranks.sample_ranks(device, rng, world_size, rows, vocab_size, num_top)


@pytest.mark.parametrize(("world_size", "rows", "vocab_size"), [(2, 24, 2051), (8, 16, 8200)])
def test_greedy_rows_need_one_gathering(
    device: Emulated, rng: np.random.Generator, world_size: int, rows: int, vocab_size: int
) -> None:
    sampling_ranks.greedy(device, rng, world_size, rows, vocab_size)


@pytest.mark.parametrize(("world_size", "rows"), [(2, 32), (4, 12), (8, 8)])
def test_draws_on_ranks(device: Emulated, rng: np.random.Generator, world_size: int, rows: int) -> None:
    sampling_ranks.draws(device, rng, world_size, rows)


@pytest.mark.parametrize("name", CASES)
def test_traffic(device: Emulated, name: str) -> None:
    """Warps load what lies side by side, and shared memory serves them without one bank being in demand."""
    case, total = CASES[name], Count()
    for count in measure_case(device, case).values():
        total.add(count)
    assert total.wanted_bytes > 0
    assert total.moved_bytes <= case.most_moved * total.wanted_bytes
    assert total.turns <= case.most_turns * total.least_turns
