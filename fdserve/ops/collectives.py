"""What ranks share: memory, by which they add tensors up and sample together."""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fdserve.errors import RankError
from fdserve.ops.library import run

if TYPE_CHECKING:
    from paddle import Tensor

logger = logging.getLogger("fdserve.ops")

Bytes = npt.NDArray[np.uint8]
ALONE: tuple[Any, ...] = (0, 0, 0, 1, [], 0)
_LINE_BYTES = 64
_SUM_BLOCK = 1024  # ids in a block of the GPU sampler's sums, as in sample_scan.cuh


def shared_bytes(world_size: int, slot_bytes: int) -> int:
    """How large the memory must be that `world_size` ranks share: a cache line a rank, and two sets of slots."""
    return world_size * (_LINE_BYTES + 2 * slot_bytes)


def sampling_slot_bytes(vocab_size: int, world_size: int) -> int:
    """How large a slot must be for `sample`, where no row reports more than `vocab_size` ids."""
    starts = vocabulary_starts(vocab_size, world_size)
    widest = max(stop - start for start, stop in pairwise(starts))
    return max(4 * widest, 16384, 16 + 8 * vocab_size)


def vocabulary_starts(vocab_size: int, world_size: int) -> list[int]:
    """The first id of each rank's part of the vocabulary, and `vocab_size` at the end.

    A part is whole blocks of the GPU sampler's sums, so that the sums are those of one rank; a vocabulary that is too
    small for that is shared out in nearly equal parts.
    """
    blocks = -(-vocab_size // _SUM_BLOCK)
    if blocks < world_size:
        return [rank * vocab_size // world_size for rank in range(world_size + 1)]
    return [min(rank * blocks // world_size * _SUM_BLOCK, vocab_size) for rank in range(world_size + 1)]


class SharedMemory:
    """One rank's end of the memory; every rank must call the same ops with it in the same order, on equal shapes.

    `descriptor` is a file of `shared_bytes(world_size, slot_bytes)` zeros, `slot_bytes` a multiple of 64 and no less
    than any rank's part of a sum and `sampling_slot_bytes`. `peers` are descriptors that hang up when a peer is gone:
    whoever waits for it then gets a RuntimeError. A call waits without the interpreter's lock and, if it takes long,
    asleep.

    Ranks of several hosts have no `descriptor` but `gather`, which exchanges what would be shared: it takes this rank's
    bytes, uint8 [N], and returns those of all, [world_size, N]; an exception means that a peer is gone.
    """

    def __init__(
        self,
        descriptor: int,
        *,
        slot_bytes: int,
        rank: int,
        world_size: int,
        peers: Sequence[int] = (),
        gather: Callable[[Bytes], Bytes] | None = None,
    ) -> None:
        self.world_size = world_size
        self._memory = mmap.mmap(-1 if gather else descriptor, shared_bytes(world_size, slot_bytes))
        address = int(np.frombuffer(self._memory, np.uint8).ctypes.data)
        self._exchange = _EXCHANGE()
        if gather is not None:
            self._exchange = _EXCHANGE(_exchange(gather, slot_bytes, rank, world_size))
        exchange = ctypes.cast(self._exchange, ctypes.c_void_p).value or 0
        self.attributes: tuple[Any, ...] = (address, slot_bytes, rank, world_size, list(peers), exchange)
        """As the ops take it; ALONE where there are no other ranks."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of the ranks' x (bfloat16 or float32), added in float32 in rank order and rounded once."""
        return run("all_reduce", x, *self.attributes)[0]


def or_gone(collective: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The result of an operator that waits for peers; RankError where one is gone."""
    try:
        return collective(*arguments, **options)
    except RuntimeError as error:
        raise RankError("a rank that it computes with is gone") from error


_EXCHANGE = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int64)


def _exchange(
    gather: Callable[[Bytes], Bytes], slot_bytes: int, rank: int, world_size: int
) -> Callable[[int, int], bool]:
    """What the ops call, with the address of a set of slots, to fill the others' slots from theirs."""

    def exchange(address: int, count: int) -> bool:
        slots = np.ctypeslib.as_array((ctypes.c_uint8 * (world_size * slot_bytes)).from_address(address))
        slots = slots.reshape(world_size, slot_bytes)
        try:
            slots[:, :count] = gather(slots[rank, :count])
        except Exception as error:
            logger.warning("an exchange with the other ranks failed: %s", error)
            return False
        return True

    return exchange
