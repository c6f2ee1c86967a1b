from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fdserve.errors import StartupError
from fdserve.models.config import GenerationDefaults, check_world_size, read_config, read_generation_config
from tests.models.checkpoints import DENSE, MOE, write_config


def write_generation(directory: Path, values: Any) -> None:
    (directory / "generation_config.json").write_text(json.dumps(values))


def test_dense(tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path, DENSE))
    assert (config.model_type, config.num_layers, config.num_heads, config.num_kv_heads) == (
        "ernie4_5",
        2,
        4,
        2,
    )
    assert (config.hidden_size, config.head_dim, config.vocab_size) == (32, 16, 40)
    assert (config.rms_norm_eps, config.rope_theta, config.compression_ratio) == (1e-5, 500000.0, 1.0)
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_ids) == (1, 0, (2,))
    assert config.dtype == "bfloat16"
    assert config.tie_word_embeddings
    assert config.moe is None
    assert not config.layer_is_moe(0)


def test_moe(tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path, MOE))
    assert config.moe is not None
    assert (config.moe.num_experts, config.moe.top_k, config.moe.num_shared_experts) == (4, 2, 2)
    assert (config.moe.start, config.moe.end, config.moe.norm_min) == (1, 2, 1e-12)
    assert [config.layer_is_moe(layer) for layer in range(3)] == [False, True, True]


@pytest.mark.parametrize(
    ("start", "end", "interval", "expected"),
    [
        (0, -1, 1, [0, 1, 2, 3, 4, 5]),
        (3, 5, 1, [3, 4, 5]),
        (1, 3, 1, [1, 2, 3]),
        (0, -1, 2, [1, 3, 5]),
        (2, -1, 2, [3, 5]),
    ],
)
def test_which_layers_have_experts(tmp_path: Path, start: int, end: int, interval: int, expected: list[int]) -> None:
    layers = {"moe_layer_start_index": start, "moe_layer_end_index": end, "moe_layer_interval": interval}
    config = read_config(write_config(tmp_path, MOE | {"num_hidden_layers": 6} | layers))
    assert [layer for layer in range(6) if config.layer_is_moe(layer)] == expected


def test_how_transformers_5_writes_it(tmp_path: Path) -> None:
    changes = {
        "rope_theta": ...,
        "torch_dtype": ...,
        "dtype": "float32",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "rope_scaling": None,
    }
    config = read_config(write_config(tmp_path, DENSE | changes))
    assert (config.rope_theta, config.dtype) == (10000.0, "float32")


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("Ernie4_5ForCausalLM", "ernie4_5"),
        ("Ernie4_5_ForCausalLM", "ernie4_5"),
        ("Ernie4_5_MoeForCausalLM", "ernie4_5_moe"),
    ],
)
def test_architectures_stand_in_for_the_model_type(tmp_path: Path, architecture: str, expected: str) -> None:
    changes = {"model_type": ..., "architectures": [architecture]}
    assert read_config(write_config(tmp_path, MOE | changes)).model_type == expected


def test_absent_keys_have_the_defaults_of_the_published_models(tmp_path: Path) -> None:
    absent = dict.fromkeys(
        [
            "head_dim",
            "num_key_value_heads",
            "tie_word_embeddings",
            "torch_dtype",
            "eos_token_id",
            "pad_token_id",
        ],
        ...,
    )
    config = read_config(write_config(tmp_path, DENSE | absent | {"hidden_size": 128}))
    assert (config.head_dim, config.num_kv_heads, config.tie_word_embeddings) == (32, 4, True)
    assert (config.dtype, config.eos_token_ids, config.pad_token_id) == ("bfloat16", (), None)


def test_null_counts_as_absent_and_unknown_keys_are_ignored(tmp_path: Path) -> None:
    changes = {"head_dim": None, "hidden_size": 128, "moe_num_experts": None, "fuse_rms_norm": True, "x": [1]}
    assert read_config(write_config(tmp_path, DENSE | changes)).head_dim == 32


def test_eos_ids_are_merged_in_order(tmp_path: Path) -> None:
    write_config(tmp_path, DENSE | {"eos_token_id": [5, 2]})
    write_generation(tmp_path, {"eos_token_id": [2, 7]})
    assert read_config(tmp_path).eos_token_ids == (5, 2, 7)
    write_generation(tmp_path, {"eos_token_id": 9})
    assert read_config(tmp_path).eos_token_ids == (5, 2, 9)


def test_an_eos_id_of_the_generation_config_outside_the_vocabulary(tmp_path: Path) -> None:
    write_config(tmp_path, DENSE)
    write_generation(tmp_path, {"eos_token_id": [39, 40]})
    with pytest.raises(StartupError, match=r"generation_config\.json: eos_token_id 40 is not in the vocabulary of 40"):
        read_config(tmp_path)


def test_compression_ratio(tmp_path: Path) -> None:
    assert read_config(write_config(tmp_path, DENSE | {"compression_ratio": 2.5})).compression_ratio == 2.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"rope_theta": ...}, "rope_theta is missing"),
        ({"vocab_size": "40"}, "vocab_size must be an integer of at least 1, not '40'"),
        ({"vocab_size": True}, "vocab_size must be an integer of at least 1, not True"),
        ({"num_attention_heads": 0}, "num_attention_heads must be an integer of at least 1, not 0"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be a number above 0, not -1e-05"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number above 0, not nan"),
        ({"rope_theta": 10**400}, "rope_theta must be a number above 0, not 1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, not 'yes'"),
        ({"eos_token_id": ["2"]}, r"eos_token_id must be a token id or a list of token ids, not \['2'\]"),
        ({"eos_token_id": -1}, "eos_token_id must be a token id or a list of token ids, not -1"),
        ({"eos_token_id": 40}, "config.json: eos_token_id 40 is not in the vocabulary of 40 tokens"),
        ({"eos_token_id": [2, 41]}, "config.json: eos_token_id 41 is not in the vocabulary of 40 tokens"),
        ({"model_type": "llama"}, "model_type 'llama' is not supported, only ernie4_5 and ernie4_5_moe are"),
        ({"model_type": "ernie4_5_moe_vl"}, "model_type 'ernie4_5_moe_vl' is not supported"),
        ({"model_type": ["ernie4_5"]}, "model_type .* is not supported"),
        ({"model_type": ..., "architectures": ["Other"]}, r"architectures \['Other'\] is not supported"),
        ({"model_type": ..., "architectures": ...}, "architectures None is not supported"),
        ({"use_bias": True}, "use_bias is true, and projections with biases are not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu' is"),
        (
            {"quantization_config": {"bits": 4}},
            "quantization_config is set, and quantised checkpoints are not",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "rope_scaling has rope type 'linear', only 'default'",
        ),
        ({"rope_scaling": 2}, "rope_scaling must be an object, not 2"),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope_parameters has rope type 'yarn', only 'default' is",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters has a partial_rotary_factor"),
        ({"torch_dtype": "float16"}, "dtype 'float16' is not supported, only bfloat16 and float32 are"),
        ({"head_dim": 17}, "head_dim is 17, supported are even sizes from 16 to 256"),
        ({"head_dim": ..., "hidden_size": 33}, "head_dim is missing, and hidden_size is not a multiple of"),
        ({"num_attention_heads": 3}, "num_attention_heads 3 is not a multiple of num_key_value_heads 2"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_config(tmp_path, DENSE | changes)
    with pytest.raises(StartupError, match=message) as caught:
        read_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_num_experts": ...}, "moe_num_experts is missing"),
        ({"moe_num_experts": [64, 64]}, r"moe_num_experts must be an integer of at least 1, not \[64, 64\]"),
        ({"moe_k": 5}, "moe_k is 5, more than the 4 experts there are"),
        ({"moe_intermediate_size": ...}, "moe_intermediate_size is missing"),
        ({"moe_layer_interval": 0}, "moe_layer_interval must be an integer of at least 1, not 0"),
    ],
)
def test_refused_experts(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        read_config(write_config(tmp_path, MOE | changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not valid JSON"),
        ("\xff", "config.json is not valid JSON"),
        ("[" * 100_000, "config.json is not valid JSON"),
        ("[]", "config.json must hold a JSON object"),
    ],
)
def test_garbled_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(StartupError, match=message):
        read_config(tmp_path)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"has no config\.json, so it is not a checkpoint directory"):
        read_config(tmp_path)
    with pytest.raises(StartupError, match="nowhere is not a directory"):
        read_config(tmp_path / "nowhere")


def test_generation_defaults(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == GenerationDefaults()
    write_generation(tmp_path, {"temperature": 0.8, "top_p": 1, "top_k": 0, "do_sample": True, "min_p": None})
    assert read_generation_config(tmp_path) == GenerationDefaults(temperature=0.8, top_p=1.0, top_k=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a number of at least 0, not -0.1"),
        ({"temperature": float("inf")}, "temperature must be a number of at least 0, not inf"),
        ({"top_p": 1.1}, "top_p must be a number of at least 0 and at most 1, not 1.1"),
        ({"top_k": 2.5}, "top_k must be an integer of at least -1, not 2.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0, not 0"),
        (
            {"presence_penalty": "1"},
            "presence_penalty must be a number of at least -2 and at most 2, not '1'",
        ),
        ([], "generation_config.json must hold a JSON object"),
    ],
)
def test_garbled_generation_defaults(tmp_path: Path, values: Any, message: str) -> None:
    write_generation(tmp_path, values)
    with pytest.raises(StartupError, match=message):
        read_generation_config(tmp_path)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_that_fit(tmp_path: Path, world_size: int) -> None:
    check_world_size(read_config(write_config(tmp_path, MOE)), world_size)


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({}, 8, "num_attention_heads is 4, which 8 does not divide"),
        ({"intermediate_size": 47}, 2, "its intermediate_size is 47, which 2 does not divide"),
        ({"moe_intermediate_size": 25}, 2, "its moe_intermediate_size is 25, which 2 does not divide"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 4},
            6,
            r"neither it nor num_key_value_heads \(4\) is a multiple",
        ),
    ],
)
def test_ranks_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], world_size: int, message: str) -> None:
    config = read_config(write_config(tmp_path, MOE | {"intermediate_size": 48, "vocab_size": 41} | changes))
    with pytest.raises(StartupError, match=message) as caught:
        check_world_size(config, world_size)
    assert str(caught.value).startswith(f"--tensor-parallel-size {world_size} cannot split this model")
