"""What the tensor-parallel ranks of one host do together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fdserve import ops
from fdserve.errors import RankError
from fdserve.executor.wire import Load


class Collectives:
    """One rank's end; every rank must call the same ones in the same order. See `ops.SharedMemory`.

    Raises RankError when a peer is gone.
    """

    def __init__(self, load: Load) -> None:
        self._memory = ops.SharedMemory(
            load.shared_memory,
            slot_bytes=load.slot_bytes,
            rank=load.rank,
            world_size=load.world_size,
            peers=load.peers,
        )

    def all_reduce(self, x: Any) -> Any:
        """The sum of the ranks' tensors, added in float32 in rank order and rounded once to their dtype."""
        return _or_gone(self._memory.all_reduce, x)

    def sample(self, *arguments: Any, **options: Any) -> Any:
        """`ops.sample` from each rank's part of the logits; the same on all ranks."""
        return _or_gone(ops.sample, *arguments, shared=self._memory, **options)


def _or_gone(collective: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return collective(*arguments, **options)
    except RuntimeError as error:
        raise RankError("a rank that it computes with is gone") from error
