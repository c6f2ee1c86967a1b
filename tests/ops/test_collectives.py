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
from threading import Timer

import pytest

from fdserve.ops.collectives import shared_bytes

ROOT = Path(__file__).parents[2]
SLOT_BYTES = 1 << 16
# Paddle takes longer to import than most ranks have to do, so that they are forked from a process that has it.
START = """
import ctypes, os, random, signal, sys, time
import numpy as np
import paddle
from fdserve.ops import SharedMemory
memory, ranks, slot_bytes, *ends = map(int, sys.argv[1:])
ends, outs = ends[:-ranks], ends[-ranks:]
ends_of = [ends[: ranks - 1], *([end] for end in ends[ranks - 1 :])]
for rank in range(ranks):
    if os.fork() == 0:
        break
else:
    # Only the ranks themselves may hold their ends.
    for each in (*ends, *outs):
        os.close(each)
    for _ in range(ranks):
        os.wait()
    sys.exit()
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # none outlives the process that it was forked from
peers = ends_of[rank]
os.dup2(outs[rank], 1)
for each in {*ends, *outs} - {*peers}:
    os.close(each)
print(os.getpid(), flush=True)
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


class Rank:
    """A process that was forked for it, and what it prints."""

    def __init__(self, out: int) -> None:
        self.lines = open(out, encoding="utf-8")  # noqa: SIM115
        self.pid = int(self.lines.readline())

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


@contextmanager
def ranks_of(code: str, count: int, seconds: float = 120) -> Iterator[list[Rank]]:
    """`count` processes that run START and then the code; none is left on leaving, or after so many seconds."""
    with ExitStack() as stack:
        memory = os.memfd_create("test")
        stack.callback(os.close, memory)
        os.ftruncate(memory, shared_bytes(count, SLOT_BYTES))
        pairs = [socket.socketpair() for _ in range(count - 1)]
        ends = [pair[end].fileno() for end in range(2) for pair in pairs]
        pipes = [os.pipe() for _ in range(count)]
        descriptors = [*ends, *(out for _, out in pipes)]
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", START + code, *map(str, (memory, count, SLOT_BYTES, *descriptors))],
            pass_fds=[memory, *descriptors],
            cwd=ROOT,
        )
        stack.callback(process.wait, 30)
        stack.callback(process.kill)
        timer = Timer(seconds, process.kill)
        timer.start()
        stack.callback(timer.cancel)
        # Only the processes themselves may hold their ends.
        for pair in pairs:
            for end in pair:
                end.close()
        for _, out in pipes:
            os.close(out)
        ranks = [Rank(out) for out, _ in pipes]
        for rank in ranks:
            stack.callback(rank.lines.close)
        yield ranks


@pytest.mark.parametrize("count", [2, 3])
def test_sums_are_those_of_rank_order(count: int) -> None:
    with ranks_of(MANY, count) as ranks:
        assert [rank.lines.read() for rank in ranks] == ["all equal\n"] * count


def test_data_larger_than_a_slot_is_refused() -> None:
    with ranks_of(TOO_LARGE, 1) as (rank,):
        assert rank.lines.read() == "True\n"


def test_whoever_waits_for_a_killed_rank_is_told() -> None:
    with ranks_of(UNTIL_LOST, 2) as (waiting, killed):
        for rank in (waiting, killed):
            assert rank.lines.readline() == "ready\n"
        time.sleep(0.2)
        killed.kill()
        began = time.monotonic()
        assert waiting.lines.read() == "gone\n"
        assert time.monotonic() - began < 10
