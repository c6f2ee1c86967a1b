from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fdserve.errors import StartupError
from fdserve.models.checkpoint import INDEX, SINGLE, Checkpoint, check_checkpoint
from tests.models.checkpoints import (
    DENSE,
    MOE,
    Array,
    header_entries,
    write_checkpoint,
    write_config,
    write_file,
    write_raw,
    write_sharded,
    zeros,
)


def refusal(directory: Path) -> str:
    with pytest.raises(StartupError) as caught:
        check_checkpoint(directory)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


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


# What the tensors are.


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
    odd = (-1, 0, 1, 1.5, 2**70, 10**400, float("nan"), float("inf"), "", "x", [], [1], ["x"], {}, True, None)
    for value in odd:
        write_config(tmp_path, MOE | {key: value})
        with contextlib.suppress(StartupError):
            check_checkpoint(tmp_path)
