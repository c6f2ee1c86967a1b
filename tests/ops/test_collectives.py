"""Collectives between real processes that share memory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from fdserve.ops.collectives import shared_bytes

ROOT = Path(__file__).parents[2]
SLOT_BYTES = 1 << 16
START = """
import os, random, sys, time
import numpy as np
import paddle
from fdserve.ops import SharedMemory
memory, rank, ranks, slot_bytes, *peers = map(int, sys.argv[1:])
shared = SharedMemory(memory, slot_bytes=slot_bytes, rank=rank, world_size=ranks, peers=peers)
"""
# Every rank draws all ranks' parts, so each can tell what the result must be.
MANY = """
draw, nap = np.random.default_rng(5), random.Random(rank)
for step in range(200):
    shape = (int(draw.integers(1, 9)), int(draw.integers(1, 700)))
    dtype = ("float32", "bfloat16")[step % 2]
    parts = [paddle.to_tensor(draw.normal(size=shape).astype(np.float32)).cast(dtype) for _ in range(ranks)]
    if step % 10 == 0:
        time.sleep(nap.random() / 100)
    total = parts[0].cast("float32")
    for part in parts[1:]:
        total = total + part.cast("float32")
    assert bool((shared.all_reduce(parts[rank]) == total.cast(dtype)).all())
print("all equal")
"""
TOO_LARGE = """
try:
    shared.all_reduce(paddle.zeros([slot_bytes // 4 + 1]))
except ValueError as error:
    print("does not fit" in str(error))
"""
UNTIL_LOST = """
print("ready", flush=True)
try:
    while True:
        shared.all_reduce(paddle.zeros([8]))
        if rank == 1:
            time.sleep(3600)
except RuntimeError as error:
    print("gone" if "is gone" in str(error) else error)
"""


@contextmanager
def ranks_of(code: str, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """`count` processes that run START and then the code; none is left on leaving."""
    with ExitStack() as stack:
        memory = os.memfd_create("test")
        stack.callback(os.close, memory)
        os.ftruncate(memory, shared_bytes(count, SLOT_BYTES))
        pairs = [socket.socketpair() for _ in range(count - 1)]
        peers = [[pair[0].fileno() for pair in pairs]] + [[pair[1].fileno()] for pair in pairs]
        processes = []
        for rank in range(count):
            arguments = [memory, rank, count, SLOT_BYTES, *peers[rank]]
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", START + code, *map(str, arguments)],
                pass_fds=[memory, *peers[rank]],
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            stack.callback(process.wait, 30)
            stack.callback(process.kill)
            assert process.stdout is not None
            stack.callback(process.stdout.close)
            processes.append(process)
        # Only the processes themselves may hold their ends.
        for pair in pairs:
            for end in pair:
                end.close()
        yield processes


@pytest.mark.parametrize("count", [2, 3])
def test_sums_are_those_of_rank_order(count: int) -> None:
    with ranks_of(MANY, count) as processes:
        assert [process.communicate(timeout=60)[0] for process in processes] == ["all equal\n"] * count


def test_data_larger_than_a_slot_is_refused() -> None:
    with ranks_of(TOO_LARGE, 1) as (process,):
        assert process.communicate(timeout=60)[0] == "True\n"


def test_whoever_waits_for_a_killed_rank_is_told() -> None:
    with ranks_of(UNTIL_LOST, 2) as (waiting, killed):
        for process in (waiting, killed):
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        killed.send_signal(signal.SIGKILL)
        assert waiting.communicate(timeout=10)[0] == "gone\n"
