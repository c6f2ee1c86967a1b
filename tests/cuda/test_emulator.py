"""That the emulator tells what kernels do wrong where results may well be right, and what makes them slow."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.cuda.harness import HERE, Emulated, compile_emulated, link_emulated
from tests.cuda.traffic import measure

THREADS = 128


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wrong")
    compile_emulated(directory, [HERE / "wrong_kernels.cc"])
    return link_emulated([*directory.glob("*.o")], directory / "wrong.so")


@pytest.fixture(scope="module")
def device(library: Path) -> Emulated:
    return Emulated(ctypes.CDLL(str(library)))


def run(device: Emulated, kernel: str) -> None:
    values, out = device.put(np.arange(THREADS, dtype=np.int32)), device.empty((THREADS,), np.int32)
    device.call("fdserve_wrong_kernel", kernel.encode(), values, out)


@pytest.mark.parametrize(
    ("kernel", "complaint"),
    [
        ("reads a neighbour", "a read at .* (unordered with a write|not written)"),
        ("trusts a shuffle", "a read at .* (unordered with a write|not written)"),
        ("a warp trusts another's barrier", "a read at .* (unordered with a write|not written)"),
        ("writes what is read", "a (read|write) at .* unordered with a (read|write)"),
        ("adds up", "a (read|write) at .* unordered with a (read|write)"),
        ("copies without waiting", "a read at .* while a copy to there is under way"),
        ("copies without a barrier", "a read at .* (unordered with a write|under way|not written)"),
        ("reads past the end", "a read at .* outside of all buffers"),
        ("writes past the end", "a write at .* outside of all buffers"),
        ("reads what is not written", "a read at .* of what the block has not written"),
        ("loads what is not aligned", "a read at .* at no multiple of its size"),
        ("writes what the other block does", "a write at .* unordered with a write"),
        ("multiplies what is not shown", "a product's read at .* not shown to products"),
        ("multiplies what changes", "a product's read at .* (unordered with a write|not shown)"),
    ],
)
def test_what_is_wrong_is_told(device: Emulated, kernel: str, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint) as raised:
        run(device, kernel)
    assert "wrong_kernels.cc:" in str(raised.value)


ALONE = """
import ctypes, sys
from tests.cuda.harness import Emulated
from tests.cuda.test_emulator import run
run(Emulated(ctypes.CDLL(sys.argv[1])), "lanes part")
"""


def test_lanes_that_meet_for_different_things_end_the_process(library: Path) -> None:
    """Nothing could go on: what the one half waits for does not come."""
    command = [sys.executable, "-c", ALONE, str(library)]
    result = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == -signal.SIGABRT
    assert "emulator: lanes that meet for different operations" in result.stderr


@pytest.mark.parametrize(
    "kernel",
    [
        "reads a neighbour after a barrier",
        "trusts a warp's barrier",
        "writes what was read before a barrier",
        "adds up atomically",
        "copies",
        "is one block",
        "multiplies",
    ],
)
def test_what_is_right_is_not(device: Emulated, kernel: str) -> None:
    run(device, kernel)


@pytest.mark.parametrize(
    ("kernel", "moved", "turns"),
    [
        ("loads a row", 1, 1),
        ("loads a column", 8, 1),  # an element of each sector
        ("has rows of 16", 1, 16),  # every row begins in one of two banks
        ("has rows of 17", 1, 1),
    ],
)
def test_how_memory_serves(device: Emulated, kernel: str, moved: int, turns: int) -> None:
    counts = measure(device, lambda: run(device, kernel))
    assert {line.split(":")[0] for _, line in counts} == {"wrong_kernels.cc"}
    assert max(count.moved_bytes / count.wanted_bytes for count in counts.values() if count.wanted_bytes) == moved
    assert max((count.turns / count.least_turns for count in counts.values() if count.turns), default=1) == turns


def test_a_complaint_is_made_once(device: Emulated) -> None:
    with pytest.raises(AssertionError, match="outside"):
        run(device, "reads past the end")
    run(device, "is one block")
