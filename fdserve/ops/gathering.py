"""Ranks on GPUs of their own: they share no memory, and everything joint is made from what all of them gather."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from fdserve.ops.library import run

if TYPE_CHECKING:
    from paddle import Tensor

Gather = Callable[["Tensor"], "Tensor"]
"""Takes this rank's tensor [A, ...] and returns that of every rank, [world_size, A, ...], in rank order."""


class Gathering:
    """One rank's end, as `SharedMemory` is on a CPU; every rank must make the same calls in the same order, on equal
    shapes. What `gather` raises when a peer is gone passes through.

    A sum over ranks is gathered first and then added in rank order, so its bits depend on nothing else: NCCL's own
    all-reduce picks its algorithm, and with it the order, by the size of the data and the machine. The price is
    traffic: world_size - 1 times the data to each rank, where a ring's all-reduce sends 2 (world_size - 1) / world_size
    times.
    """

    def __init__(self, gather: Gather, *, rank: int, world_size: int) -> None:
        self.gather = gather
        self.rank = rank
        self.world_size = world_size

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of the ranks' x (of 16-bit floats), added in float32 in rank order and rounded once."""
        return run("sum_ranks", self.gather(x))[0]

    def join_columns(self, part: Tensor, starts: Sequence[int]) -> Tensor:
        """[R, starts[-1]] from each rank's `part` [R, starts[rank + 1] - starts[rank]]."""
        import paddle

        widths = [stop - start for start, stop in pairwise(starts)]
        missing = max(widths) - widths[self.rank]
        if missing:
            part = paddle.concat([part, paddle.zeros([part.shape[0], missing], part.dtype)], axis=1)
        everyone = self.gather(part)
        return paddle.concat([everyone[rank, :, :width] for rank, width in enumerate(widths)], axis=1)
