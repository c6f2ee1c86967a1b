"""How much memory a model's weights take once they are packed."""

from __future__ import annotations

import math

from fdserve.models.config import ModelConfig
from fdserve.models.layout import Layout, expected_tensors

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
    matrices = [
        shape
        for name, shape in expected_tensors(config, Layout("model.", in_out=False))
        if len(shape) == 2 and not name.endswith(".gate.weight")
    ]
    return int(sum(map(math.prod, matrices)) * WEIGHT_BYTES[format]) // world_size
