"""How much memory a model's weights take once they are packed."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fdserve.models.config import ModelConfig
from fdserve.models.layout import Expected, Layout, expected_tensors

WEIGHT_BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "wint8": 1 + 2 / 512,
    "wint4": 1 / 2 + 2 / 128,
    "w8a8": 1.0,
}
"""Of one weight with its part of a scale; the formats are those of `fdserve.ops.weights.FORMATS`."""


def weight_bytes(config: ModelConfig, world_size: int, format: str) -> int:
    """Bytes of the matrices that a rank of `world_size` holds, stored in `format`.

    No less than this is needed, and hardly more: vectors, routers, replicated heads and what fills panels come to it.
    """
    sizes = (math.prod(matrix.shape) for matrix in matrices(config, Layout("model.", in_out=False)))
    return int(sum(sizes) * WEIGHT_BYTES[format]) // world_size


def matrices(config: ModelConfig, layout: Layout) -> Iterator[Expected]:
    """The tensors that are stored in the weights' format: all matrices but the routers'."""
    for tensor in expected_tensors(config, layout):
        if len(tensor.shape) == 2 and not tensor.name.endswith(".gate.weight"):
            yield tensor
