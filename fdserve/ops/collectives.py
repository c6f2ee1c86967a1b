"""Collectives between the ranks of one host, through memory that they share."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fdserve.ops.library import run

if TYPE_CHECKING:
    from paddle import Tensor

_LINE_BYTES = 64


def shared_bytes(world_size: int, slot_bytes: int) -> int:
    """How large the memory must be that `world_size` ranks share: a cache line a rank, and two sets of slots."""
    return world_size * (_LINE_BYTES + 2 * slot_bytes)


class SharedMemory:
    """One rank's end of the memory; every rank must call the same collectives in the same order, on equal shapes.

    `descriptor` is a file of `shared_bytes(world_size, slot_bytes)` zeros, `slot_bytes` a multiple of 64 and no less
    than any rank's part of a collective. `peers` are descriptors that hang up when a peer is gone: whoever waits for
    it then gets a RuntimeError. A call waits without the interpreter's lock and, if it takes long, asleep.
    """

    def __init__(
        self, descriptor: int, *, slot_bytes: int, rank: int, world_size: int, peers: Sequence[int] = ()
    ) -> None:
        self._memory = mmap.mmap(descriptor, shared_bytes(world_size, slot_bytes))
        address = int(np.frombuffer(self._memory, np.uint8).ctypes.data)
        self._where = (address, slot_bytes, rank, world_size, list(peers))
        self._turn = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of the ranks' x (bfloat16 or float32), added in float32 in rank order and rounded once."""
        self._turn += 1
        return run("all_reduce", x, *self._where, self._turn)[0]

    def all_gather(self, x: Tensor) -> Tensor:
        """[R, N] of any dtype -> [R, N * world_size]: the ranks' columns in rank order."""
        self._turn += 1
        return run("all_gather", x, *self._where, self._turn)[0]
