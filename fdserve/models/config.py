"""What a checkpoint directory's config.json and generation_config.json say, checked and under one set of names.

Imports no Paddle: the API process reads it before any rank starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fdserve.errors import StartupError
from fdserve.models.fields import Fields

DENSE = "ernie4_5"
MOE = "ernie4_5_moe"
MODEL_TYPES = (DENSE, MOE)
# The published checkpoints spell the dense architecture both with and without the underscore.
ARCHITECTURES = {
    "Ernie4_5ForCausalLM": DENSE,
    "Ernie4_5_ForCausalLM": DENSE,
    "Ernie4_5_MoeForCausalLM": MOE,
}
DTYPES = ("bfloat16", "float32")
HEAD_DIMS = range(16, 257, 2)  # what the attention kernels take


@dataclass(frozen=True)
class MoeConfig:
    """The mixture-of-experts part of a configuration; `start` and `end` are layer numbers, both included."""

    num_experts: int
    top_k: int
    intermediate_size: int
    num_shared_experts: int
    start: int
    end: int
    interval: int
    norm_min: float
    has_correction_bias: bool


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one ERNIE-4.5 text model.

    `eos_token_ids` merges config.json and generation_config.json, in that order and without repeats. `dtype` is
    the weights' ("bfloat16" or "float32"), `moe` is None for a dense model, and positions are divided by
    `compression_ratio` before RoPE.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    compression_ratio: float
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    dtype: str
    moe: MoeConfig | None

    def layer_is_moe(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) has experts instead of one dense MLP."""
        moe = self.moe
        if moe is None:
            return False
        return (layer + 1) % moe.interval == 0 and moe.start <= layer <= moe.end


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling parameters that generation_config.json sets; None where it is silent or absent."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


def read_config(directory: Path) -> ModelConfig:
    """The configuration of the checkpoint in `directory`.

    Unknown keys are ignored. Raises StartupError, naming the file and the field, for anything missing,
    garbled, or not supported.
    """
    if not directory.is_dir():
        raise StartupError(f"{directory} is not a directory: --model must name a checkpoint directory.")
    path = directory / "config.json"
    if not path.is_file():
        raise StartupError(f"{directory} has no config.json, so it is not a checkpoint directory.")
    fields = Fields(path)
    model_type = _model_type(fields)
    _refuse_unsupported(fields)
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    num_layers = fields.integer("num_hidden_layers")
    vocab_size = fields.integer("vocab_size")
    config = ModelConfig(
        model_type=model_type,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", default=num_heads),
        head_dim=_head_dim(fields, hidden_size, num_heads),
        vocab_size=vocab_size,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=_rope_theta(fields),
        compression_ratio=fields.number("compression_ratio", default=1.0),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default=True),
        eos_token_ids=_eos_token_ids(fields, _generation_fields(directory), vocab_size),
        bos_token_id=fields.token_id("bos_token_id"),
        pad_token_id=fields.token_id("pad_token_id"),
        dtype=_dtype(fields),
        moe=_moe(fields, num_layers) if model_type == MOE else None,
    )
    if config.num_heads % config.num_kv_heads != 0:
        raise fields.error(
            f"num_attention_heads {config.num_heads} is not a multiple of num_key_value_heads {config.num_kv_heads}"
        )
    return config


def read_generation_config(directory: Path) -> GenerationDefaults:
    """The defaults in generation_config.json; all None without the file. Raises StartupError if it is garbled."""
    fields = _generation_fields(directory)
    if fields is None:
        return GenerationDefaults()
    return GenerationDefaults(
        temperature=fields.optional_number("temperature", low=0.0),
        top_p=fields.optional_number("top_p", low=0.0, high=1.0),
        top_k=fields.optional_integer("top_k", low=-1),
        min_p=fields.optional_number("min_p", low=0.0, high=1.0),
        repetition_penalty=fields.optional_number("repetition_penalty", low=0.0, low_open=True),
        presence_penalty=fields.optional_number("presence_penalty", low=-2.0, high=2.0),
        frequency_penalty=fields.optional_number("frequency_penalty", low=-2.0, high=2.0),
    )


def check_world_size(config: ModelConfig, world_size: int) -> None:
    """Raise StartupError unless the model can be split over `world_size` tensor-parallel ranks.

    Every split size but the vocabulary's must divide evenly; key/value heads may also be fewer than the ranks, each
    then held by `world_size / num_kv_heads` of them.
    """
    sizes = [
        ("num_attention_heads", config.num_heads),
        ("intermediate_size", config.intermediate_size),
    ]
    if config.moe is not None:
        sizes.append(("moe_intermediate_size", config.moe.intermediate_size))
    for name, size in sizes:
        if size % world_size != 0:
            raise StartupError(
                f"--tensor-parallel-size {world_size} cannot split this model: "
                f"its {name} is {size}, which {world_size} does not divide."
            )
    kv_heads = config.num_kv_heads
    if kv_heads % world_size != 0 and world_size % kv_heads != 0:
        raise StartupError(
            f"--tensor-parallel-size {world_size} cannot split this model: "
            f"neither it nor num_key_value_heads ({kv_heads}) is a multiple of the other."
        )


def _model_type(fields: Fields) -> str:
    model_type = fields.get("model_type")
    if model_type in MODEL_TYPES:
        return str(model_type)
    architectures = fields.get("architectures")
    if model_type is None and isinstance(architectures, list):
        for name in architectures:
            if isinstance(name, str) and name in ARCHITECTURES:
                return ARCHITECTURES[name]
    found = f"model_type {model_type!r}" if model_type is not None else f"architectures {architectures!r}"
    raise fields.error(f"{found} is not supported, only {' and '.join(MODEL_TYPES)} are")


def _refuse_unsupported(fields: Fields) -> None:
    if fields.boolean("use_bias", default=False):
        raise fields.error("use_bias is true, and projections with biases are not supported")
    activation = fields.get("hidden_act")
    if activation not in (None, "silu"):
        raise fields.error(f"hidden_act {activation!r} is not supported, only 'silu' is")
    if fields.get("quantization_config") is not None:
        raise fields.error("quantization_config is set, and quantised checkpoints are not supported")


def _head_dim(fields: Fields, hidden_size: int, num_heads: int) -> int:
    # Where the key is absent hidden_size is shared out among the heads; the tensors' shapes confirm or refute it.
    if fields.get("head_dim") is None and hidden_size % num_heads != 0:
        raise fields.error("head_dim is missing, and hidden_size is not a multiple of num_attention_heads")
    head_dim = fields.integer("head_dim", default=hidden_size // num_heads)
    if head_dim not in HEAD_DIMS:
        raise fields.error(f"head_dim is {head_dim}, supported are even sizes from 16 to 256")
    return head_dim


def _rope_theta(fields: Fields) -> float:
    # rope_parameters is where transformers 5 puts both the base and the scaling.
    sections = [fields.section("rope_parameters"), fields.section("rope_scaling")]
    for name, section in zip(("rope_parameters", "rope_scaling"), sections, strict=True):
        kind = section.get("rope_type", "type")
        if kind not in (None, "default"):
            raise fields.error(f"{name} has rope type {kind!r}, only 'default' is supported")
        if section.get("partial_rotary_factor") not in (None, 1):
            raise fields.error(f"{name} has a partial_rotary_factor, which is not supported")
    if sections[0].get("rope_theta") is not None:
        return sections[0].number("rope_theta")
    return fields.number("rope_theta")


def _dtype(fields: Fields) -> str:
    value = fields.get("dtype", "torch_dtype")
    if value is None:
        return "bfloat16"
    dtype = str(value).removeprefix("torch.").removeprefix("paddle.")
    if dtype not in DTYPES:
        raise fields.error(f"dtype {value!r} is not supported, only {' and '.join(DTYPES)} are")
    return dtype


def _moe(fields: Fields, num_layers: int) -> MoeConfig:
    end = fields.integer("moe_layer_end_index", default=-1, low=-1)
    moe = MoeConfig(
        num_experts=fields.integer("moe_num_experts", "num_experts"),
        top_k=fields.integer("moe_k", "num_experts_per_tok"),
        intermediate_size=fields.integer("moe_intermediate_size"),
        num_shared_experts=fields.integer("moe_num_shared_experts", default=0, low=0),
        start=fields.integer("moe_layer_start_index", default=0, low=0),
        end=num_layers - 1 if end == -1 else end,
        interval=fields.integer("moe_layer_interval", default=1),
        norm_min=fields.number("moe_norm_min", default=1e-12),
        has_correction_bias=fields.boolean("moe_use_aux_free", default=True),
    )
    if moe.top_k > moe.num_experts:
        raise fields.error(f"moe_k is {moe.top_k}, more than the {moe.num_experts} experts there are")
    return moe


def _generation_fields(directory: Path) -> Fields | None:
    path = directory / "generation_config.json"
    return Fields(path) if path.is_file() else None


def _eos_token_ids(fields: Fields, generation: Fields | None, vocab_size: int) -> tuple[int, ...]:
    ids: list[int] = []
    for file in (fields,) if generation is None else (fields, generation):
        for token in file.token_ids("eos_token_id"):
            # One that no step can sample ends no answer: the files are of another model, or miswritten.
            if token >= vocab_size:
                raise file.error(f"eos_token_id {token} is not in the vocabulary of {vocab_size} tokens")
            ids.append(token)
    return tuple(dict.fromkeys(ids))
