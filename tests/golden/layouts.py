"""The golden checkpoints, and the same weights in the other forms checkpoints are published in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fdserve.models.checkpoint import SINGLE, Checkpoint
from tests.models.checkpoints import write_file, write_sharded

GOLDEN = Path(__file__).parent
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "up_gate_proj": ("gate_proj", "up_proj")}

Array = npt.NDArray[Any]


def read_all(directory: Path) -> dict[str, Array]:
    """Every tensor of a checkpoint, copied."""
    with Checkpoint(directory) as checkpoint:
        return {name: checkpoint.read(name).copy() for name in checkpoint.tensors}


def to_paddle(tensors: dict[str, Array]) -> dict[str, Array]:
    """Torch layout to Paddle layout.

    Every matrix but the embedding is transposed; query, key and value become the columns of qkv_proj; gate and
    up, in this order, those of up_gate_proj; "model." becomes "ernie.".
    """
    converted: dict[str, Array] = {}
    for name, tensor in tensors.items():
        target = name if name == "lm_head.weight" else f"ernie.{name.removeprefix('model.')}"
        if tensor.ndim == 1 or name.endswith(("embed_tokens.weight", "e_score_correction_bias")):
            converted[target] = tensor
            continue
        module = name.split(".")[-2]
        fused, parts = next((item for item in FUSED.items() if module in item[1]), (module, (module,)))
        columns = [tensors[name.replace(module, part)].T for part in parts]
        converted[target.replace(module, fused)] = np.concatenate(columns, axis=1)
    return converted


def write_variant(name: str, variant: str, directory: Path) -> Path:
    """Golden model `name` in a form of its own, in `directory`:

    "torch": as transformers wrote it. "sharded": in three files with an index. "paddle": Paddle layout, in
    two files. "u16": Paddle layout, bfloat16 tagged U16. "float32": all weights float32. "untied": with an output
    head of its own, equal to the embedding; "untied paddle": the same in Paddle layout.
    """
    source = GOLDEN / name
    directory.mkdir(exist_ok=True)
    for file in ("config.json", "generation_config.json"):
        shutil.copy(source / file, directory)
    tensors = read_all(source)
    if variant.startswith("untied"):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        config = directory / "config.json"
        tied = '"tie_word_embeddings": true'
        assert tied in config.read_text()
        config.write_text(config.read_text().replace(tied, '"tie_word_embeddings": false'))
    if variant == "sharded":
        write_sharded(directory, tensors, 3)
    elif variant == "paddle":
        write_sharded(directory, to_paddle(tensors), 2)
    elif variant == "u16":
        paddle = to_paddle(tensors)
        tags = {name: "U16" for name, tensor in paddle.items() if tensor.dtype == np.uint16}
        write_file(directory / SINGLE, paddle, tags)
    elif variant == "float32":
        write_file(directory / SINGLE, {key: widen(tensor) for key, tensor in tensors.items()})
    elif variant == "untied paddle":
        write_file(directory / SINGLE, to_paddle(tensors))
    else:
        write_file(directory / SINGLE, tensors)
    return directory


def widen(tensor: Array) -> Array:
    """bfloat16 bits (uint16) as float32."""
    if tensor.dtype != np.uint16:
        return tensor
    return (tensor.astype(np.uint32) << 16).view(np.float32)
