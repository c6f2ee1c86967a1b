"""Collectives between the tensor-parallel ranks of one host, through shared memory.

Each rank writes its part into a slot of its own, all meet at a barrier, and each reads all slots in rank order: the
order of a sum never changes, and all ranks compute the same bits. Two sets of slots alternate, so that nobody
overwrites a slot that another rank still reads: whoever is two collectives ahead has passed a barrier that the reader
reached only after reading.

The barrier goes through rank 0 by one byte each way over socket pairs. Waiting costs no processor time, which more
ranks than cores need, and a peer that is gone is noticed at once.
"""

from __future__ import annotations

import mmap
import socket
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle

from fdserve.errors import RankError
from fdserve.executor.wire import Load

Floats = npt.NDArray[np.float32]


class Collectives:
    """One rank's end of the collectives; every rank must call the same ones in the same order."""

    def __init__(self, load: Load) -> None:
        self._rank = load.rank
        self._world_size = load.world_size
        self._peers = [socket.socket(fileno=descriptor) for descriptor in load.peers]
        memory = mmap.mmap(load.shared_memory, 0)
        self._slots = np.frombuffer(memory, np.float32).reshape(2, load.world_size, -1)
        self._turn = 0

    def all_reduce(self, x: Any) -> Any:
        """The sum of the ranks' tensors, added in float32 in rank order and rounded once to their dtype."""
        parts = self._exchange(x)
        total = parts[0].copy()
        for part in parts[1:]:
            total += part
        return paddle.to_tensor(total.reshape(x.shape)).cast(x.dtype)

    def all_gather(self, x: Any) -> Any:
        """The ranks' tensors, equal in shape, joined along the last axis in rank order."""
        parts = [part.reshape(x.shape) for part in self._exchange(x)]
        return paddle.to_tensor(np.concatenate(parts, axis=-1)).cast(x.dtype)

    def _exchange(self, x: Any) -> list[Floats]:
        """Every rank's numbers, flat, in rank order; they stay valid until the next collective but one."""
        mine: Floats = x.cast("float32").numpy().ravel()
        slots = self._slots[self._turn]
        self._turn = 1 - self._turn
        if len(mine) > slots.shape[1]:
            raise ValueError(f"{len(mine)} numbers do not fit a slot of {slots.shape[1]}")
        slots[self._rank, : len(mine)] = mine
        self._barrier()
        return [slots[rank, : len(mine)] for rank in range(self._world_size)]

    def _barrier(self) -> None:
        """Rank 0 hears from all others, then releases them."""
        if self._rank == 0:
            for peer in self._peers:
                self._hear(peer)
            for peer in self._peers:
                peer.sendall(b"\0")
        else:
            self._peers[0].sendall(b"\0")
            self._hear(self._peers[0])

    def _hear(self, peer: socket.socket) -> None:
        if not peer.recv(1):
            raise RankError("a rank that it computes with is gone")
