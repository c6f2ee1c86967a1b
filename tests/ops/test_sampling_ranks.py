"""Sampling by ranks that share the vocabulary: what one rank gives, bit for bit."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fdserve import ops
from fdserve.ops.collectives import sampling_slot_bytes, shared_bytes, vocabulary_starts
from tests.ops.arrays import Float, ints, tensor
from tests.ops.sampling_rows import Row, arguments, options, random_logits, random_row, sample

pytestmark = pytest.mark.usefixtures("isa")


def sample_shared(
    logits: Float, rows: list[Row], world_size: int, *, top: int = 0, slot_bytes: int | None = None
) -> list[list[npt.NDArray[Any]]]:
    """Each rank's results, the ranks being threads of this process."""
    vocab = logits.shape[1]
    slot_bytes = slot_bytes or -(-sampling_slot_bytes(vocab, world_size) // 64) * 64
    memory = os.memfd_create("test")
    os.ftruncate(memory, shared_bytes(world_size, slot_bytes))

    def shared(rank: int) -> ops.SharedMemory:
        return ops.SharedMemory(memory, slot_bytes=slot_bytes, rank=rank, world_size=world_size)

    # Twice: nothing may be left over from the call before.
    results = sample_on([shared(rank) for rank in range(world_size)], logits, rows, top, times=2)
    os.close(memory)
    return results


def sample_on(
    ends: list[ops.SharedMemory], logits: Float, rows: list[Row], top: int, times: int = 1
) -> list[list[npt.NDArray[Any]]]:
    """What each rank's end gives, in threads."""
    vocab = logits.shape[1]
    starts = vocabulary_starts(vocab, len(ends))
    results: dict[int, list[npt.NDArray[Any]]] = {}

    def run(rank: int) -> None:
        part = np.ascontiguousarray(logits[:, starts[rank] : starts[rank + 1]])
        args = [ints(each, each.dtype.name) for each in arguments(rows)]
        extra = {name: ints(each, each.dtype.name) for name, each in options(rows, vocab).items()}
        for _ in range(times):
            out = ops.sample(tensor(part, "float32"), *args, vocab_size=vocab, num_top=top, shared=ends[rank], **extra)
        results[rank] = [each.numpy() for each in out]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ends))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results[rank] for rank in range(len(ends))]


def expect_that_of_one(logits: Float, rows: list[Row], world_size: int, *, top: int = 0, **settings: Any) -> Any:
    alone = sample(logits, rows, top=top)
    for results in sample_shared(logits, rows, world_size, top=top, **settings):
        for ours, theirs in zip(results, alone, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    return alone


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("vocab", [40, 2051, 8192, 20000])
def test_random_rows(world_size: int, vocab: int) -> None:
    rng = np.random.default_rng(vocab + world_size)
    rows = [random_row(rng, vocab) for _ in range(100 if vocab < 20000 else 40)]
    for row in rows:
        if rng.random() < 0.1:
            row.forced = int(rng.integers(0, vocab))
    expect_that_of_one(random_logits(rng, len(rows), vocab), rows, world_size, top=min(vocab, 20))


@pytest.mark.parametrize("world_size", [2, 8])
def test_draws_where_candidates_decide_and_where_they_do_not(world_size: int) -> None:
    """Peaked rows have a small nucleus, flat ones one that is wider than any number of candidates."""
    rng = np.random.default_rng(world_size)
    rows = [Row(top_p=float(rng.uniform(0.05, 0.99)), seed=seed, position=seed % 7) for seed in range(120)]
    for row in rows[::3]:
        row.min_p = float(rng.uniform(0.0001, 0.2))
    for row in rows[::5]:
        row.top_p = 1.0
    spreads = np.array([0.0, 0.01, 1, 4, 8])[np.arange(120) % 5]
    logits = (rng.standard_normal((120, 9000)) * spreads[:, None]).astype(np.float32)
    tokens = expect_that_of_one(logits, rows, world_size, top=5)[0]
    assert len(set(tokens.tolist())) > 60


def test_flat_rows_of_the_real_size() -> None:
    rng = np.random.default_rng(1)
    rows = [Row(seed=seed) for seed in range(4)] + [Row(top_p=0.9, seed=seed) for seed in range(4)]
    rows += [Row(top_p=0.5, mode=mode, seed=mode) for mode in range(4)] + [Row(top_k=k) for k in (1, 256, 257, 5000)]
    expect_that_of_one((rng.standard_normal((16, 103424)) * 0.01).astype(np.float32), rows, 2, top=20)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_sets_that_end_anywhere(world_size: int) -> None:
    """Rows of equals, of two values, of neighbouring floats, with one peak, mostly banned; shares from none to all."""
    rng = np.random.default_rng(world_size)
    vocab = 12000
    normal = rng.standard_normal((7, vocab))
    kinds = [
        np.full(vocab, 3.5),
        np.where(normal[0] > 0, 1.0, 0.999),
        np.where(normal[1] > 0, np.nextafter(np.float32(7), np.float32(8)), 7),
        np.where(np.arange(vocab) == 9000, 20.0, normal[2] * 1e-4),
        np.where(normal[3] > 2, normal[3], -np.inf),
        normal[4] * 60,
        np.round(normal[5]) / 2,
        normal[6] * 1e-7,
        np.zeros(vocab) - 0.0,
    ]
    shares = [0.0, 1e-6, 0.3, 0.8, 0.999999]
    rows = [Row(top_p=top_p, seed=seed, mode=-1) for seed, top_p in enumerate(shares * len(kinds))]
    for row in rows[::4]:
        row.min_p = float(rng.uniform(1e-9, 1))
    for row in rows[::7]:
        row.top_k = int(rng.integers(257, vocab))
    for row in rows[::3]:
        row.temperature = float(rng.uniform(0.01, 3))
    expect_that_of_one(np.repeat(np.array(kinds, np.float32), len(shares), axis=0), rows, world_size)


EXCHANGES = {
    "greedy": (Row(temperature=0, mode=-1), -1, 1),
    "greedy, biased": (Row(temperature=0, mode=-1, bias={3: 5.0}), -1, 1),
    "a few": (Row(top_k=20, mode=-1), -1, 1),
    "a few, with logprobs": (Row(top_k=20), 5, 3),
    "all": (Row(mode=-1), -1, 3),
    "peaked": (Row(top_p=0.9, mode=-1), 8, 5),
    "flat": (Row(top_p=0.9, mode=-1), 1, 5),
    "min_p": (Row(min_p=0.1, mode=-1), 1, 3),
}
"""(the row, the deviation of its logits, exchanges at most)"""


@pytest.mark.parametrize("name", EXCHANGES)
def test_how_often_ranks_exchange(name: str) -> None:
    row, spread, most = EXCHANGES[name]
    logits = (np.random.default_rng(3).standard_normal((4, 103424)) * spread).astype(np.float32)
    barrier, parts, calls = threading.Barrier(2), [np.zeros(0, np.uint8)] * 2, [0, 0]

    def gather(rank: int, mine: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        calls[rank] += 1
        parts[rank] = mine.copy()
        barrier.wait(30)
        everyone = np.stack(parts)
        barrier.wait(30)
        return everyone

    ends = [
        ops.SharedMemory(-1, slot_bytes=1 << 20, rank=rank, world_size=2, gather=partial(gather, rank))
        for rank in range(2)
    ]
    rows = [replace(row, seed=seed) for seed in range(4)]
    alone = sample(logits, rows)
    for results in sample_on(ends, logits, rows, 0):
        assert results[0].tolist() == alone[0].tolist()
    assert calls[0] == calls[1] <= most
    if name.startswith("greedy") or name == "a few":
        assert calls == [1, 1]


def test_a_draw_at_every_place_of_the_running_sum() -> None:
    """The ends of blocks and of parts included."""
    logits = np.full((1, 4096), -200, np.float32)
    logits[0, [0, 1023, 1024, 2047, 2048, 4095]] = [1, 2, 3, 3, 2, 1]
    rows = [Row(seed=seed) for seed in range(200)]
    tokens = expect_that_of_one(np.repeat(logits, 200, axis=0), rows, 4)[0]
    assert set(tokens.tolist()) == {0, 1023, 1024, 2047, 2048, 4095}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("top_k", [0, 5])
def test_rows_that_cannot_be_sampled(rank: int, top_k: int) -> None:
    logits = np.zeros((6, 4096), np.float32)
    logits[0, rank * 2048] = np.nan
    logits[1, rank * 2048 + 5] = np.inf
    logits[2] = -np.inf
    logits[5, : rank * 2048] = logits[5, rank * 2048 + 1 :] = -np.inf
    rows = [Row(), Row(temperature=0.0), Row(), Row(allowed=[]), Row(bias={rank * 2048: float("nan")}), Row()]
    rows = [replace(row, top_k=top_k) for row in rows]
    tokens = expect_that_of_one(logits, rows, 2, top=3)[0]
    assert tokens.tolist() == [-1, -1, -1, -2, -1, rank * 2048]


def test_more_rows_than_a_slot_holds() -> None:
    rng = np.random.default_rng(2)
    rows = [random_row(rng, 4096) for _ in range(50)]
    logits = random_logits(rng, 50, 4096)
    expect_that_of_one(logits, rows, 2, top=5, slot_bytes=3 * 8192)


def test_parts_are_whole_blocks_where_there_are_enough() -> None:
    assert vocabulary_starts(103424, 2) == [0, 51200, 103424]
    assert vocabulary_starts(103424, 8)[-2:] == [90112, 103424]
    assert vocabulary_starts(40, 8) == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    assert vocabulary_starts(10, 4) == [0, 2, 5, 7, 10]
    assert vocabulary_starts(5000, 4) == [0, 1024, 2048, 3072, 5000]
