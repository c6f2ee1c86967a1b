"""What the tensor-parallel ranks do together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
from paddle import Tensor

from fdserve import ops
from fdserve.executor.wire import Load
from fdserve.ops.collectives import Bytes, or_gone
from fdserve.worker.group import join


class Collectives:
    """One rank's end; every rank must call the same ones in the same order. See `ops.SharedMemory`, `ops.Gathering`.

    On a CPU ranks of one host are given memory to share; those of several hosts exchange what would be in it by Gloo.
    On GPUs they gather each other's tensors by NCCL. Either takes the group that the launcher's variables describe, or
    `group_variables`. Raises RankError when a peer is gone, but for NCCL, which does not see it.
    """

    def __init__(self, load: Load) -> None:
        self._ranks = _gathering(load) if ops.on_gpu() else _shared_memory(load)

    @property
    def shared(self) -> ops.SharedMemory | None:
        """What operators on a CPU add up through by themselves."""
        return self._ranks if isinstance(self._ranks, ops.SharedMemory) else None

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of the ranks' tensors, added in float32 in rank order and rounded once to their dtype."""
        return or_gone(self._ranks.all_reduce, x)

    def sample(self, *arguments: Any, **options: Any) -> Any:
        """`ops.sample` from each rank's part of the logits; the same on all ranks."""
        return or_gone(ops.sample, *arguments, shared=self._ranks, **options)

    def least(self, value: int) -> int:
        """The smallest of what the ranks have measured on GPUs of their own; on a CPU all were told the same."""
        if isinstance(self._ranks, ops.SharedMemory):
            return value
        return int(or_gone(self._ranks.gather, paddle.full([1], value, "int64")).min())


def _gathering(load: Load) -> ops.Gathering:
    # The kernels of a GPU may be emulated, and tensors then lie on the CPU.
    backend = "nccl" if paddle.device.get_device().startswith("gpu") else "gloo"
    gather = join(backend)
    # NCCL connects the ranks at its first call, and takes memory for it: before the weights are loaded, and counted.
    gather(paddle.zeros([1]))
    return ops.Gathering(gather, rank=load.rank, world_size=load.world_size)


def _shared_memory(load: Load) -> ops.SharedMemory:
    return ops.SharedMemory(
        load.shared_memory,
        slot_bytes=load.slot_bytes,
        rank=load.rank,
        world_size=load.world_size,
        peers=load.peers,
        gather=_gather_bytes() if load.shared_memory < 0 else None,
    )


def _gather_bytes() -> Callable[[Bytes], Bytes]:
    gather = join("gloo")

    def gather_bytes(mine: Bytes) -> Bytes:
        everyone: Bytes = gather(paddle.to_tensor(mine)).numpy()
        return everyone

    return gather_bytes
