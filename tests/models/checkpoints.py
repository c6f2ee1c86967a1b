"""Tiny checkpoints written byte by byte, so that tests can also write broken ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fdserve.errors import StartupError
from fdserve.models.checkpoint import INDEX, SINGLE, check_checkpoint
from fdserve.models.config import read_config
from fdserve.models.layout import Layout, expected_tensors

DENSE: dict[str, Any] = {
    "architectures": ["Ernie4_5ForCausalLM"],
    "model_type": "ernie4_5",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 40,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
MOE: dict[str, Any] = DENSE | {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    "num_hidden_layers": 3,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": 24,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
}
LAYOUTS = {"torch": Layout("model.", in_out=False), "paddle": Layout("ernie.", in_out=True)}

Array = npt.NDArray[Any]


def write_config(directory: Path, config: Mapping[str, Any]) -> Path:
    """Write config.json without the keys whose value is `...`; the directory."""
    present = {key: value for key, value in config.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(present))
    return directory


def zeros(directory: Path, layout: str) -> dict[str, Array]:
    """A tensor of bfloat16 zeros for every one that the directory's config.json asks for."""
    expected = expected_tensors(read_config(directory), LAYOUTS[layout])
    return {name: np.zeros(shape, np.uint16) for name, shape in expected}


def header_entries(tensors: Mapping[str, Array], tags: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The header of a file that holds `tensors` one after the other; `tags` overrides their dtypes."""
    entries: dict[str, dict[str, Any]] = {}
    offset = 0
    for name, tensor in tensors.items():
        tag = tags.get(name, "BF16" if tensor.dtype == np.uint16 else "F32")
        end = offset + tensor.nbytes
        entries[name] = {"dtype": tag, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    return entries


def write_file(path: Path, tensors: Mapping[str, Array], tags: Mapping[str, str] | None = None) -> None:
    """A safetensors file of float32 and bfloat16 (uint16) arrays."""
    header = json.dumps(header_entries(tensors, tags or {})).encode()
    header += b" " * (-len(header) % 8)  # aligns the data, as the format's own writers do
    write_raw(path, header, b"".join(tensor.tobytes() for tensor in tensors.values()))


def write_raw(path: Path, header: bytes, data: bytes) -> None:
    """A file with this header and this data, whatever they say."""
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def write_sharded(directory: Path, tensors: Mapping[str, Array], shards: int) -> list[str]:
    """Spread the tensors over `shards` files with an index; the files' names."""
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    names = list(tensors)
    for i, file in enumerate(files):
        write_file(directory / file, {name: tensors[name] for name in names[i::shards]})
    weight_map = {name: files[i % shards] for i, name in enumerate(names)}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def write_checkpoint(directory: Path, config: Mapping[str, Any] = DENSE, *, layout: str = "torch") -> dict[str, Array]:
    """A whole checkpoint of zeros in one file; its tensors."""
    write_config(directory, config)
    tensors = zeros(directory, layout)
    write_file(directory / SINGLE, tensors)
    return tensors


def refusal(directory: Path) -> str:
    """Why it is refused, in one sentence."""
    with pytest.raises(StartupError) as caught:
        check_checkpoint(directory)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message
