"""Checkpoints whose files are missing, damaged or not what they should be."""

from __future__ import annotations

import contextlib
import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fdserve.errors import StartupError
from fdserve.models.checkpoint import INDEX, SINGLE, check_checkpoint
from tests.models.checkpoints import (
    DENSE,
    MOE,
    Array,
    header_entries,
    refusal,
    write_checkpoint,
    write_config,
    write_file,
    write_raw,
    write_sharded,
    zeros,
)

# What the header says.


def test_truncated_data(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    path = tmp_path / SINGLE
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is truncated: tensor model.norm.weight ends at byte" in refusal(tmp_path)


@pytest.mark.parametrize("size", [0, 7])
def test_truncated_before_the_header(tmp_path: Path, size: int) -> None:
    write_checkpoint(tmp_path)
    path = tmp_path / SINGLE
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path} is truncated: it has only {size} bytes" in refusal(tmp_path)


def test_truncated_in_the_header(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    path = tmp_path / SINGLE
    path.write_bytes(path.read_bytes()[:100])
    assert f"{path} is truncated: its header is" in refusal(tmp_path)


def test_absurd_header_length(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / SINGLE).write_bytes(b"\x80\x02cpaddle\n" * 10)
    assert "is not a safetensors file: its header would be" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "has a garbled header: Expecting"),
        (b"\xff\xff", "has a garbled header"),
        (b"[" * 100_000, "has a garbled header"),
        (b"[]", "has a garbled header: it must be a JSON object"),
        (b'{"a": 1}', "the entry of tensor a is malformed"),
        (b'{"a": {"dtype": "BF16", "shape": [1]}}', "the entry of tensor a is malformed"),
        (
            b'{"a": {"dtype": "BF16", "shape": [-1], "data_offsets": [0, 2]}}',
            "entry of tensor a is malformed",
        ),
        (
            b'{"a": {"dtype": "BF16", "shape": [1.0], "data_offsets": [0, 2]}}',
            "entry of tensor a is malformed",
        ),
        (b'{"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0]}}', "entry of tensor a is malformed"),
        (
            b'{"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 2]}}',
            "tensor a has the unknown dtype 'X'",
        ),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2]}}', "does not fit its data offsets"),
        (b'{"a": {"dtype": "BF16", "shape": [1], "data_offsets": [2, 0]}}', "does not fit its data offsets"),
        (b'{"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}', "tensor a ends at byte"),
        (b'{"a": {}, "a": {}}', "a name occurs twice"),
    ],
)
def test_garbled_headers(tmp_path: Path, header: bytes, message: str) -> None:
    write_config(tmp_path, DENSE)
    write_raw(tmp_path / SINGLE, header, bytes(4))
    assert message in refusal(tmp_path)


def test_overlapping_tensors(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path)
    entries = header_entries(tensors, {})
    entries["model.norm.weight"]["data_offsets"] = [2, 66]
    data = b"".join(tensor.tobytes() for tensor in tensors.values())
    write_raw(tmp_path / SINGLE, json.dumps(entries).encode(), data)
    assert "tensors model.embed_tokens.weight and model.norm.weight overlap" in refusal(tmp_path)


# Which files there are.


def test_no_weights(tmp_path: Path) -> None:
    write_config(tmp_path, DENSE)
    assert "has no weights: neither model.safetensors nor model.safetensors.index.json" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model_state.pdparams", "pytorch_model.bin", "model-00001-of-00002.pdparams"])
def test_pickles_are_never_loaded(tmp_path: Path, name: str) -> None:
    write_config(tmp_path, DENSE)
    (tmp_path / name).write_bytes(b"\x80\x02cos\nsystem\n")
    assert f"has only pickled weights ({name}), which are never loaded" in refusal(tmp_path)


def test_shards_without_an_index(tmp_path: Path) -> None:
    write_config(tmp_path, DENSE)
    files = write_sharded(tmp_path, zeros(tmp_path, "torch"), 2)
    (tmp_path / INDEX).unlink()
    assert f"has {files[0]} but neither model.safetensors nor" in refusal(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    write_config(tmp_path, DENSE)
    files = write_sharded(tmp_path, zeros(tmp_path, "torch"), 3)
    (tmp_path / files[1]).unlink()
    assert f"names {files[1]}, which is not in the directory (1 of 3 files are missing)" in refusal(tmp_path)


def test_an_index_that_names_a_tensor_its_shard_lacks(tmp_path: Path) -> None:
    write_config(tmp_path, DENSE)
    files = write_sharded(tmp_path, zeros(tmp_path, "torch"), 2)
    write_file(tmp_path / files[1], {})
    assert f"is in {files[1]}, and it is not there" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "a/b.safetensors",
        "..\\b.safetensors",
        "b.safetensors\0",
        "..",
        "",
        "model.pdparams",
        3,
        None,
        ["x.safetensors"],
    ],
)
def test_an_index_that_names_no_plain_safetensors_file(tmp_path: Path, name: Any) -> None:
    write_config(tmp_path, DENSE)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert f"names {name!r}, which is not the plain name of a safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_an_index_without_a_map(tmp_path: Path, index: Any) -> None:
    write_config(tmp_path, DENSE)
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "weight_map is missing, empty, or not an object" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["config.json", SINGLE, "tokenizer.model"])
def test_links_to_files_that_are_not_there(tmp_path: Path, name: str) -> None:
    """As in a snapshot of the hub's cache that was copied, or mounted, without the files that it links to."""
    write_checkpoint(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("../../blobs/0123")
    assert f"{tmp_path / name} is a link to ../../blobs/0123, and nothing is there" in refusal(tmp_path)


@pytest.mark.parametrize("name", [SINGLE, "tokenizer.model"])
def test_pointers_of_a_clone_without_lfs(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 721509640\n")
    assert f"{tmp_path / name} is only Git LFS's pointer to the file: run `git lfs pull`" in refusal(tmp_path)


def test_a_directory_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(directory: Path) -> list[str]:  # modes of files do not bind the superuser
        raise PermissionError(errno.EACCES, "Permission denied", str(directory))

    monkeypatch.setattr("os.listdir", refuse)
    assert refusal(tmp_path) == f"{tmp_path} cannot be read: Permission denied."


def test_ranks_are_checked_with_the_rest(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    check_checkpoint(tmp_path, world_size=2)
    with pytest.raises(StartupError, match="--tensor-parallel-size 3 cannot split"):
        check_checkpoint(tmp_path, world_size=3)


def shorten(header: bytes) -> bytes:
    return header[: len(header) // 2]


def flip(header: bytes) -> bytes:
    return bytes(byte ^ 0x11 if i % 97 == 0 else byte for i, byte in enumerate(header))


def empty(header: bytes) -> bytes:
    return b"{}"


@pytest.mark.parametrize("damage", [shorten, flip, empty])
def test_any_damage_to_the_header_is_one_startup_error(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    tensors: dict[str, Array] = write_checkpoint(tmp_path)
    header = json.dumps(header_entries(tensors, {})).encode()
    write_raw(tmp_path / SINGLE, damage(header), b"".join(tensor.tobytes() for tensor in tensors.values()))
    refusal(tmp_path)


def test_checking_imports_no_paddle() -> None:
    code = "import sys, fdserve.models.checkpoint; sys.exit('paddle' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_no_damaged_byte_ends_in_any_other_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    path = tmp_path / SINGLE
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    random = np.random.default_rng(3)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for at in random.integers(0, 8 + header, random.integers(1, 4)):
            damaged[at] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            check_checkpoint(tmp_path)
        except StartupError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("key", sorted(MOE))
def test_no_odd_value_ends_in_any_other_error(tmp_path: Path, key: str) -> None:
    write_checkpoint(tmp_path, MOE)
    odd: list[object] = [-1, 0, 1, 1.5, 2**70, 10**400, float("nan"), float("inf"), True, None]
    odd += ["", "x", [], [1], ["x"], {}]
    for value in odd:
        write_config(tmp_path, MOE | {key: value})
        with contextlib.suppress(StartupError):
            check_checkpoint(tmp_path)
