"""What tensor parallelism asks of the model: which part is this rank's, and how the parts come together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Collective = Callable[[Any], Any]
"""Takes this rank's tensor, blocks until every rank has given its own, and returns the joint result."""


def identity(x: Any) -> Any:
    """Either collective of a rank that is alone."""
    return x


@dataclass(frozen=True)
class Ranks:
    """Rank number `rank` of `world_size`, and its collectives."""

    rank: int = 0
    world_size: int = 1
    all_reduce: Collective = identity  # the sum over the ranks
    all_gather: Collective = identity  # the ranks' tensors joined along the last axis, in rank order

    def share(self, size: int) -> range:
        """This rank's features of `size`, which are shared out in equal parts."""
        part = size // self.world_size
        return range(self.rank * part, (self.rank + 1) * part)

    def kv_heads(self, count: int) -> range:
        """This rank's key/value heads: those its query heads need.

        With fewer heads than ranks several ranks hold the same one.
        """
        if count >= self.world_size:
            return self.share(count)
        head = self.rank * count // self.world_size
        return range(head, head + 1)
