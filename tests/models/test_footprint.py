from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fdserve.models.checkpoint import SINGLE
from fdserve.models.config import read_config
from fdserve.models.ernie4_5 import Ernie4_5
from fdserve.models.ernie4_5_moe import MoeMlp
from fdserve.models.footprint import weight_bytes
from fdserve.models.loader import load_model
from fdserve.ops.weights import FORMATS
from tests.golden.layouts import read_all, widen
from tests.models.checkpoints import DENSE, MOE, write_checkpoint, write_file

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 640, "num_attention_heads": 4}


def packed_bytes(model: Ernie4_5) -> int:
    weights: list[Any] = [model._vocabulary.table]
    if model._vocabulary.head is not model._vocabulary.table:
        weights.append(model._vocabulary.head)
    for layer in model._layers:
        weights += [layer.attention.qkv, layer.attention.o]
        mlp = layer.mlp
        if isinstance(mlp, MoeMlp):
            weights += [mlp.experts.up_gate, mlp.experts.down]
        dense = mlp.shared if isinstance(mlp, MoeMlp) else mlp
        if dense is not None:
            weights += [dense.gate_up, dense.down]
    return sum(weight.data.size * weight.data.element_size() for weight in weights)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "config", [DENSE | WIDE | {"tie_word_embeddings": False}, MOE | WIDE | {"moe_intermediate_size": 128}]
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_it_is_what_the_packed_weights_take(tmp_path: Path, config: dict[str, Any], format: str, ranks: int) -> None:
    write_checkpoint(tmp_path, config)
    if format == "float32":
        write_file(tmp_path / SINGLE, {name: widen(tensor) for name, tensor in read_all(tmp_path).items()})
    dtype, quantization = (format, None) if format in ("float32", "bfloat16") else ("float32", format)
    model = load_model(tmp_path, read_config(tmp_path), world_size=ranks, dtype=dtype, quantization=quantization)
    told, taken = weight_bytes(model.config, ranks, format), packed_bytes(model)
    assert taken / 1.05 <= told <= taken  # scales for every output are much where inputs are few
