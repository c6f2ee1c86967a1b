"""A checkpoint directory opened and checked: safetensors only, headers only, before any rank starts.

Imports no Paddle: the API process calls `check_checkpoint`, which reads no weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy.typing as npt

from fdserve.errors import StartupError
from fdserve.models.config import ModelConfig, check_world_size, read_config
from fdserve.models.fields import read_json_object
from fdserve.models.files import check_files
from fdserve.models.layout import IGNORED, LAYER, Layout, detect_layout, expected_tensors
from fdserve.models.safetensors_file import READABLE, SafetensorsFile, TensorInfo

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".pdparams", ".bin", ".pt", ".pth", ".ckpt")
_SHARD_NAME = re.compile(r"[^/\\\0]*\.safetensors")


class Checkpoint:
    """The tensors of a directory's safetensors files, `tensors` by name, and the `layout` they are in.

    A context manager: leaving it drops the mappings.
    """

    def __init__(self, directory: Path) -> None:
        """Open every file and read its header. Raises StartupError, naming the file or tensor at fault."""
        self.directory = directory
        self.tensors: dict[str, TensorInfo] = {}
        self._files: dict[Path, SafetensorsFile] = {}
        try:
            if (directory / SINGLE).is_file():
                self.tensors.update(self._open(directory / SINGLE).tensors)
            elif (directory / INDEX).is_file():
                self._open_shards(directory / INDEX)
            else:
                raise StartupError(_why_no_weights(directory))
            self.layout: Layout = detect_layout(self.tensors, str(directory))
        except StartupError:
            self.close()
            raise

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> npt.NDArray[Any]:
        """A view of these rows and columns (of a vector: elements) of a tensor, float32 or bfloat16 bits as uint16.

        Raises StartupError for any other dtype.
        """
        tensor = self._files[self.tensors[name].file].read(name)
        return tensor[rows] if tensor.ndim == 1 else tensor[rows, columns]

    def read_ahead(self, name: str, rows: slice, columns: slice) -> int:
        """Have the system begin to read what `read` of a matrix will want; how many bytes that are."""
        return self._files[self.tensors[name].file].read_ahead(name, rows, columns)

    def release(self, name: str) -> None:
        """Give back the memory that reading this tensor took; it can be read again."""
        self._files[self.tensors[name].file].release(name)

    def close(self) -> None:
        """Drop the mappings. Views that are still in use stay valid."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, path: Path) -> SafetensorsFile:
        if path not in self._files:
            self._files[path] = SafetensorsFile(path)
        return self._files[path]

    def _open_shards(self, index: Path) -> None:
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise StartupError(f"{index}: weight_map is missing, empty, or not an object.")
        for name in weight_map.values():
            _check_shard_name(index, name)
        missing = sorted({name for name in weight_map.values() if not (self.directory / name).is_file()})
        if missing:
            raise StartupError(
                f"{index} names {missing[0]}, which is not in the directory "
                f"({len(missing)} of {len(set(weight_map.values()))} files are missing)."
            )
        for tensor, name in weight_map.items():
            file = self._open(self.directory / name)
            if tensor not in file.tensors:
                raise StartupError(f"{index} says that tensor {tensor} is in {name}, and it is not there.")
            self.tensors[tensor] = file.tensors[tensor]


def check_checkpoint(directory: Path, world_size: int = 1) -> ModelConfig:
    """The configuration of the checkpoint in `directory`, once it is certain that `world_size` ranks can load it.

    Reads config.json and the headers of the safetensors files, no weights. Raises StartupError with one
    sentence that names the file, field or tensor at fault.
    """
    check_files(directory)
    config = read_config(directory)
    check_world_size(config, world_size)
    with Checkpoint(directory) as checkpoint:
        validate(config, checkpoint)
    return config


def validate(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raise StartupError unless every tensor the model needs is there with the right shape and dtype.

    A tensor inside a layer that the model would not use is refused too: answers without it would be wrong.
    """
    needed = set()
    for name, shape in expected_tensors(config, checkpoint.layout):
        info = checkpoint.tensors.get(name)
        if info is None:
            raise StartupError(f"{checkpoint.directory} lacks the tensor {name}, of shape {list(shape)}.")
        if info.shape != shape and (len(shape) > 1 or info.shape != (1, *shape)):
            raise StartupError(
                f"{info.file}: tensor {name} has the shape {list(info.shape)}, "
                f"and by config.json{_head_sizes(config, name)} it should have {list(shape)}."
            )
        if info.dtype not in READABLE:
            raise StartupError(f"{info.file}: tensor {name} is {info.dtype}; only BF16 and F32 weights are supported.")
        needed.add(name)
    for name, info in checkpoint.tensors.items():
        if name not in needed and LAYER.match(name) and not IGNORED.search(name):
            raise StartupError(
                f"{info.file} has the tensor {name}, which is not part of the model that config.json describes."
            )


def _head_sizes(config: ModelConfig, name: str) -> str:
    if ".self_attn." not in name:
        return ""
    return (
        f" (num_attention_heads {config.num_heads}, num_key_value_heads {config.num_kv_heads}, "
        f"head_dim {config.head_dim})"
    )


def _check_shard_name(index: Path, name: object) -> None:
    if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
        raise StartupError(f"{index} names {name!r}, which is not the plain name of a safetensors file.")


def _why_no_weights(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir())
    pickled = next((name for name in names if name.endswith(PICKLED)), None)
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return f"{directory} has {shards[0]} but neither {SINGLE} nor {INDEX}."
    if pickled is not None:
        return (
            f"{directory} has only pickled weights ({pickled}), which are never loaded "
            "because a pickle can run code: convert them to safetensors."
        )
    return f"{directory} has no weights: neither {SINGLE} nor {INDEX} is there."
