"""Which tensors a checkpoint holds, and what they must be."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fdserve.models.checkpoint import SINGLE, Checkpoint, check_checkpoint
from tests.models.checkpoints import (
    DENSE,
    MOE,
    header_entries,
    refusal,
    write_checkpoint,
    write_config,
    write_file,
    write_raw,
    write_sharded,
    zeros,
)


@pytest.mark.parametrize("layout", ["torch", "paddle"])
@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_whole_checkpoints(tmp_path: Path, config: dict[str, Any], layout: str) -> None:
    tensors = write_checkpoint(tmp_path, config, layout=layout)
    assert check_checkpoint(tmp_path).model_type == config["model_type"]
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.layout.in_out == (layout == "paddle")
        assert set(checkpoint.tensors) == set(tensors)


def test_reading_slices_of_shards(tmp_path: Path) -> None:
    write_config(tmp_path, DENSE)
    tensors = zeros(tmp_path, "torch")
    random = np.random.default_rng(0)
    for name, tensor in tensors.items():
        tensors[name] = random.integers(0, 2**16, tensor.shape, np.uint16)
    write_sharded(tmp_path, tensors, 3)
    with Checkpoint(tmp_path) as checkpoint:
        for name, tensor in tensors.items():
            read = checkpoint.read(name)
            assert read.dtype == np.uint16
            assert not read.flags.writeable
            np.testing.assert_array_equal(read, tensor)
            checkpoint.release(name)
            np.testing.assert_array_equal(checkpoint.read(name, slice(3, 9)), tensor[3:9])
        name = "model.embed_tokens.weight"
        part = checkpoint.read(name, slice(8, 16), slice(4, 8))
    np.testing.assert_array_equal(part, tensors[name][8:16, 4:8])


@pytest.mark.skipif(sys.platform != "linux", reason="looks into the page cache")
def test_reading_ahead_reads_these_rows_and_columns_alone(tmp_path: Path) -> None:
    name = "lm_head.weight"
    tensors = write_checkpoint(tmp_path, DENSE | {"vocab_size": 1 << 18, "tie_word_embeddings": False}, layout="paddle")
    page, width = mmap.PAGESIZE, 2 << 18  # of a row
    assert tensors[name].shape == (32, 1 << 18)
    with Checkpoint(tmp_path) as checkpoint:
        begin = checkpoint.tensors[name].begin
        for rows, columns, ranges in [
            (slice(3, 5), slice(0, 1 << 18), [(3 * width, 5 * width)]),
            (slice(0, 32), slice(1000, 9000), [(row * width + 2000, row * width + 18000) for row in range(32)]),
            (slice(1, 3), slice(0, 250_000), [(width, 2 * width + 500_000)]),  # a gap that is not worth leaving out
            (slice(4, 4), slice(0, 9), []),
        ]:
            forget(tmp_path / SINGLE)
            before = pages_in_cache(tmp_path / SINGLE)
            assert checkpoint.read_ahead(name, rows, columns) == sum(last - first for first, last in ranges)
            expected = np.zeros_like(before)
            for first, last in ranges:
                expected[(begin + first) // page : (begin + last - 1) // page + 1] = True
            until = time.monotonic() + 30
            while (pages := pages_in_cache(tmp_path / SINGLE) & ~before).sum() < (expected & ~before).sum():
                assert time.monotonic() < until
            # The system may put a page to those before or behind it.
            assert pages.sum() <= (expected & ~before).sum() + 16 * len(ranges)


def test_a_tensor_the_file_does_not_align_is_read_right(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path)
    name = "model.norm.weight"
    tensors[name] = np.arange(32, dtype=np.float32)
    header = json.dumps(header_entries(tensors, {})).encode()
    header += b" " * (9 - len(header) % 8)
    write_raw(tmp_path / SINGLE, header, b"".join(tensor.tobytes() for tensor in tensors.values()))
    with Checkpoint(tmp_path) as checkpoint:
        read = checkpoint.read(name)
    assert read.flags.aligned
    np.testing.assert_array_equal(read, tensors[name])


def test_bfloat16_tagged_as_uint16(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, layout="paddle")
    write_file(tmp_path / SINGLE, tensors, dict.fromkeys(tensors, "U16"))
    check_checkpoint(tmp_path)


def test_tensors_that_do_not_matter_are_skipped(tmp_path: Path) -> None:
    extra = {
        "ernie.mtp_block.0.self_attn.q_proj.weight": "BF16",
        "ernie.mtp_linear_proj.0.weight": "F16",
        "mtp_emb_norm.0.weight": "BF16",
        "ernie.layers.1.mlp.moe_statics.expert_usage": "I16",
        "ernie.layers.0.self_attn.rotary_emb.inv_freq": "BF16",
        "lm_head.weight": "BF16",
    }
    tensors = write_checkpoint(tmp_path, MOE, layout="paddle")
    write_file(tmp_path / SINGLE, tensors | dict.fromkeys(extra, np.zeros((3, 2), np.uint16)), extra)
    check_checkpoint(tmp_path)


def test_an_untied_head_is_asked_for_in_the_layout(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, DENSE | {"tie_word_embeddings": False}, layout="paddle")
    assert tensors["lm_head.weight"].shape == (32, 40)
    del tensors["lm_head.weight"]
    write_file(tmp_path / SINGLE, tensors)
    assert "lacks the tensor lm_head.weight, of shape [32, 40]" in refusal(tmp_path)


def test_a_model_without_correction_biases(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, MOE | {"moe_use_aux_free": False})
    assert not any("e_score_correction_bias" in name for name in tensors)
    check_checkpoint(tmp_path)


def test_the_correction_bias_may_have_a_leading_1(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, MOE)
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] = tensors[name].reshape(1, -1)
    write_file(tmp_path / SINGLE, tensors)
    check_checkpoint(tmp_path)


@pytest.mark.parametrize("layout", ["torch", "paddle"])
@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_each_tensor_is_needed_and_its_shape_checked(tmp_path: Path, config: dict[str, Any], layout: str) -> None:
    tensors = write_checkpoint(tmp_path, config, layout=layout)
    for name in tensors:
        if name.endswith("embed_tokens.weight"):
            continue  # without it there is no layout to speak of
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        write_file(tmp_path / SINGLE, rest)
        assert f"lacks the tensor {name}, of shape {list(tensors[name].shape)}" in refusal(tmp_path)
        wrong = np.zeros((*tensors[name].shape[:-1], 7), np.uint16)
        write_file(tmp_path / SINGLE, tensors | {name: wrong})
        message = refusal(tmp_path)
        assert f"tensor {name} has the shape {list(wrong.shape)}, and by config.json" in message
        assert f"it should have {list(tensors[name].shape)}" in message


def test_a_guessed_head_dim_that_the_tensors_refute(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, DENSE | {"hidden_size": 128})
    write_config(tmp_path, DENSE | {"hidden_size": 128, "head_dim": ...})
    message = refusal(tmp_path)
    assert "self_attn.q_proj.weight has the shape [64, 128]" in message
    assert "(num_attention_heads 4, num_key_value_heads 2, head_dim 32) it should have [128, 128]" in message


@pytest.mark.parametrize("tag", ["F16", "I16"])
def test_other_dtypes_are_refused(tmp_path: Path, tag: str) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    write_file(tmp_path / SINGLE, write_checkpoint(tmp_path), {name: tag})
    assert f"tensor {name} is {tag}; only BF16 and F32 weights are supported" in refusal(tmp_path)


def test_8_bit_floats_are_refused(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path)
    entries = header_entries(tensors, {})
    for entry in entries.values():
        entry["dtype"] = "F8_E4M3"
        entry["data_offsets"] = [offset // 2 for offset in entry["data_offsets"]]
    write_raw(tmp_path / SINGLE, json.dumps(entries).encode(), bytes(sum(t.nbytes for t in tensors.values())))
    assert "is F8_E4M3; only BF16 and F32 weights are supported" in refusal(tmp_path)


@pytest.mark.parametrize("suffix", ["quant_weight", "weight_scale", "activation_scale", "weight_scale_inv"])
def test_quantised_weights_are_refused(tmp_path: Path, suffix: str) -> None:
    tensors = write_checkpoint(tmp_path, layout="paddle")
    name = f"ernie.layers.0.mlp.down_proj.{suffix}"
    write_file(tmp_path / SINGLE, tensors | {name: np.zeros(4, np.uint16)})
    assert f"is quantised (it has the tensor {name}), which is not supported" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.2.input_layernorm.weight",
    ],
)
def test_a_layer_with_more_than_the_model_knows_is_refused(tmp_path: Path, name: str) -> None:
    tensors = write_checkpoint(tmp_path)
    write_file(tmp_path / SINGLE, tensors | {name: np.zeros(4, np.uint16)})
    assert f"has the tensor {name}, which is not part of the model" in refusal(tmp_path)


def test_other_models_and_mixtures_are_refused(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path)
    write_file(tmp_path / SINGLE, {f"gpt.{name}": tensor for name, tensor in tensors.items()})
    assert "holds no ERNIE-4.5 text model" in refusal(tmp_path)
    fused = {"model.layers.0.self_attn.qkv_proj.weight": np.zeros((32, 128), np.uint16)}
    write_file(tmp_path / SINGLE, tensors | fused)
    assert "mixes two layouts" in refusal(tmp_path)
    write_file(tmp_path / SINGLE, {})
    assert "holds no ERNIE-4.5 text model" in refusal(tmp_path)


def forget(path: Path) -> None:
    """Have the system drop the file's pages from its cache; skips the test where it keeps them."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if pages_in_cache(path).mean() > 0.1:
        pytest.skip("the file system has no cache that forgets")


def pages_in_cache(path: Path) -> npt.NDArray[np.bool_]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        pages = np.zeros(-(-len(mapping) // mmap.PAGESIZE), np.uint8)
        address = ctypes.c_char.from_buffer(mapping)
        found = ctypes.CDLL(None).mincore(
            ctypes.byref(address), ctypes.c_size_t(len(mapping)), pages.ctypes.data_as(ctypes.c_void_p)
        )
        del address
    assert found == 0
    in_cache: npt.NDArray[np.bool_] = pages & 1 == 1
    return in_cache
