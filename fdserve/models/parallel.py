"""What tensor parallelism asks of the model: which part is this rank's, and how the parts come together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fdserve.ops import vocabulary_starts

if TYPE_CHECKING:
    from paddle import Tensor

    from fdserve.ops import SharedMemory

Collective = Callable[["Tensor"], "Tensor"]
"""Takes this rank's tensor, blocks until every rank has given its own, and returns the joint result."""


def identity(x: Tensor) -> Tensor:
    """The sum of a rank that is alone."""
    return x


@dataclass(frozen=True)
class Ranks:
    """Rank number `rank` of `world_size`, and how it adds up."""

    rank: int = 0
    world_size: int = 1
    all_reduce: Collective = identity  # the sum over the ranks
    shared: SharedMemory | None = None  # what operators on a CPU sum through by themselves

    def share(self, size: int) -> range:
        """This rank's features of `size`, which are shared out in equal parts."""
        part = size // self.world_size
        return range(self.rank * part, (self.rank + 1) * part)

    def vocabulary(self, size: int) -> range:
        """This rank's ids of `size`."""
        starts = vocabulary_starts(size, self.world_size)
        return range(starts[self.rank], starts[self.rank + 1])

    def kv_heads(self, count: int) -> range:
        """This rank's key/value heads: those its query heads need.

        With fewer heads than ranks several ranks hold the same one.
        """
        if count >= self.world_size:
            return self.share(count)
        head = self.rank * count // self.world_size
        return range(head, head + 1)
