"""Every setting of the server: one table feeds the command line, the FDSERVE_* variables, the YAML file and --help."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from fdserve.config_sources import MAX_INTEGER, parse_bytes, read_settings
from fdserve.errors import StartupError

BLOCK_MULTIPLE = 16
"""The attention kernels take blocks of a multiple of this many tokens."""
_URL = re.compile(r"https?://[^/\s]\S*")


def _setting(
    default: Any,
    metavar: str,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    secret: bool = False,
) -> Any:
    """A field of `Config`: `low` and `high` bound numbers, both included."""
    metadata = {"metavar": metavar, "help": help, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings, converted and checked one by one and against each other.

    A value out of range or a contradiction raises StartupError, however the object is made. What depends on the
    checkpoint (a 0 for `max_model_len`, say) is resolved where the checkpoint is read.
    """

    host: str = _setting("127.0.0.1", "ADDRESS", "address to listen on; 0.0.0.0 or :: for every interface")
    port: int = _setting(8188, "N", "port to listen on; 0 for any free one", low=0, high=65535)
    model: str = _setting("", "DIR|NAME", "checkpoint directory or hub repository; empty for the bundled demo model")
    served_model_name: str = _setting("", "NAME", "the name clients use; empty for the model's last path component")
    max_model_len: int = _setting(
        0, "N", "longest prompt plus completion, in tokens; 0 for what the checkpoint and the memory allow", low=0
    )
    tensor_parallel_size: int = _setting(1, "N", "rank processes that share every layer", low=1, high=64)
    max_num_seqs: int = _setting(256, "N", "sequences that run at the same time", low=1, high=65536)
    max_num_batched_tokens: int = _setting(512, "N", "tokens that one step computes at most", low=1)
    block_size: int = _setting(64, "N", "tokens in one block of the KV cache", low=16, high=1024)
    num_gpu_blocks_override: int = _setting(0, "N", "blocks in the KV cache; 0 to derive it from the memory", low=0)
    kv_cache_memory: str = _setting(
        "",
        "BYTES",
        "memory for the KV cache on each rank, such as 512M or 4G; empty for a quarter of what is free, 4G at most",
    )
    enable_prefix_caching: bool = _setting(True, "true|false", "reuse the blocks of prompts that begin alike")
    enable_chunked_prefill: bool = _setting(True, "true|false", "compute long prompts over several steps")
    enable_logprob: bool = _setting(False, "true|false", "let requests ask for logprobs")
    reasoning_parser: str = _setting(
        "", "NAME", "format of the model's reasoning, or none; empty to detect it from the checkpoint"
    )
    tool_call_parser: str = _setting(
        "", "NAME", "format of the model's tool calls, or none; empty to detect it from the checkpoint"
    )
    chat_template: str = _setting("", "FILE|JINJA", "chat template; empty for the checkpoint's own")
    trust_request_chat_template: bool = _setting(
        False, "true|false", "let requests bring chat templates of their own: only for clients that are trusted"
    )
    api_key: str = _setting("", "KEY[,KEY…]", "keys that clients must present; better given as a variable", secret=True)
    max_concurrency: int = _setting(
        1024,
        "N",
        "requests that generate or tokenize in the server at once, waiting ones included; more get a 429",
        low=1,
    )
    device: str = _setting(
        "auto",
        "NAME",
        "where to compute: auto (a GPU that is ready to use), cpu or gpu",
        choices=("auto", "cpu", "gpu"),
    )
    dtype: str = _setting(
        "auto",
        "NAME",
        "what to compute in: auto (as stored), bfloat16, float32 or, on a GPU, float16",
        choices=("auto", "bfloat16", "float32", "float16"),
    )
    quantization: str = _setting(
        "none",
        "NAME",
        "how weights are stored: none (as computed with), wint8, wint4 or w8a8 (8-bit activations, too)",
        choices=("none", "wint8", "wint4", "w8a8"),
    )
    kv_cache_dtype: str = _setting(
        "auto",
        "NAME",
        "what keys and values are kept in: auto (as computed with), bfloat16 or int8",
        choices=("auto", "bfloat16", "int8"),
    )
    speculative_config: str = _setting(
        "", "JSON", 'how to guess next tokens, such as {"method": "ngram", "num_speculative_tokens": 4}; empty for not'
    )
    tokenizer_backend: str = _setting(
        "auto", "NAME", "what reads the tokenizer: auto, native or paddlenlp", choices=("auto", "native", "paddlenlp")
    )
    num_threads: int = _setting(0, "N", "threads of each rank; 0 shares the cores out", low=0, high=1024)
    max_request_bytes: int = _setting(16 << 20, "BYTES", "largest request body", low=1024)
    graceful_timeout: float = _setting(30.0, "SECONDS", "how long a stop waits for running requests", low=0, high=86400)
    cluster_secret: str = _setting(
        "", "SECRET", "what ranks on several hosts know each other by; better given as a variable", secret=True
    )
    step_timeout: float = _setting(
        300.0, "SECONDS", "a step that takes longer counts as a hung rank", low=0.1, high=86400
    )
    step_log: str = _setting("", "FILE", "where to log every step of the engine, as lines of JSON; empty for nowhere")
    otlp_traces_endpoint: str = _setting(
        "", "URL", "OpenTelemetry collector for a trace of each request, such as http://127.0.0.1:4318/v1/traces"
    )
    log_level: str = _setting(
        "info", "LEVEL", "debug, info, warning or error", choices=("debug", "info", "warning", "error")
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_value(field, getattr(self, field.name))
        if not self.host:
            raise StartupError("host is empty: give an address to listen on, such as 127.0.0.1.")
        if self.api_key and not all(self.api_keys):
            raise StartupError("api_key holds an empty key: separate keys by single commas.")
        if self.block_size % BLOCK_MULTIPLE:
            raise StartupError(f"block_size is {self.block_size}: it must be a multiple of {BLOCK_MULTIPLE}.")
        if self.kv_cache_memory and self.num_gpu_blocks_override:
            raise StartupError("kv_cache_memory and num_gpu_blocks_override both size the KV cache: give only one.")
        if self.kv_cache_memory:
            parse_bytes("kv_cache_memory", self.kv_cache_memory)
        if self.otlp_traces_endpoint and not _URL.fullmatch(self.otlp_traces_endpoint):
            raise StartupError("otlp_traces_endpoint is no URL: it must begin with http:// or https:// and a host.")
        if self.speculative_config:
            parse_speculative(self.speculative_config)
        if self.max_model_len:
            self.check_prefill(self.max_model_len)

    @property
    def api_keys(self) -> tuple[str, ...]:
        """The keys of `api_key`; empty when none is needed."""
        return tuple(key.strip() for key in self.api_key.split(",")) if self.api_key else ()

    @property
    def kv_cache_bytes(self) -> int | None:
        """`kv_cache_memory` in bytes, or None where the memory decides. Raises StartupError when it is garbled."""
        return parse_bytes("kv_cache_memory", self.kv_cache_memory) if self.kv_cache_memory else None

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """`speculative_config`, or None where it is empty. Raises StartupError when it is garbled."""
        return parse_speculative(self.speculative_config) if self.speculative_config else None

    def check_prefill(self, max_model_len: int) -> None:
        """Raise StartupError if whole prompts of `max_model_len` tokens must fit into a step and do not."""
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < max_model_len:
            raise StartupError(
                f"enable_chunked_prefill is off, so max_num_batched_tokens ({self.max_num_batched_tokens}) must be "
                f"at least max_model_len ({max_model_len})."
            )

    @classmethod
    def load(cls, argv: Sequence[str] | None, environ: Mapping[str, str]) -> Config:
        """Settings from flags, over variables, over the file that --config or FDSERVE_CONFIG names, over defaults.

        `argv` holds the arguments after the program's name; None means that there is no command line. --help and
        --version print and raise SystemExit(0). Raises StartupError, one sentence that names the setting, for
        anything unknown, garbled or contradictory.
        """
        return cls(**read_settings({field.name: field for field in dataclasses.fields(cls)}, argv, environ))


class SpeculativeConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How the next tokens are guessed: see `engine.ngram`. The names are vLLM's."""

    method: str
    num_speculative_tokens: Annotated[int, msgspec.Meta(ge=1, le=32)]
    prompt_lookup_min: Annotated[int, msgspec.Meta(ge=1, le=32)] = 2
    """The fewest tokens that must have occurred before."""
    prompt_lookup_max: Annotated[int, msgspec.Meta(ge=1, le=32)] = 4
    """The most that are looked at."""


def parse_speculative(text: str) -> SpeculativeConfig:
    """The setting `speculative_config`. Raises StartupError for anything unknown or out of range.

    Where only one of the two lengths is given and contradicts the other's default, it is both.
    """
    name = "speculative_config"
    try:
        config = msgspec.json.decode(text, type=SpeculativeConfig)
    except msgspec.ValidationError as error:
        raise StartupError(f"{name}: {error}.") from None
    except msgspec.DecodeError as error:
        raise StartupError(f"{name} is {text!r}: expected a JSON object ({error}).") from None
    if config.method != "ngram":
        raise StartupError(f"{name} has the method {config.method!r}: only ngram is supported.")
    given = msgspec.json.decode(text, type=dict[str, Any])
    if config.prompt_lookup_min > config.prompt_lookup_max:
        if "prompt_lookup_min" in given and "prompt_lookup_max" in given:
            raise StartupError(f"{name} has a prompt_lookup_min that is more than its prompt_lookup_max.")
        both = given.get("prompt_lookup_min", config.prompt_lookup_max)
        return msgspec.structs.replace(config, prompt_lookup_min=both, prompt_lookup_max=both)
    return config


def _check_value(field: dataclasses.Field[Any], value: Any) -> None:
    low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
    if choices and value not in choices:
        raise StartupError(f"{field.name} is {value!r}: choose one of {', '.join(choices)}.")
    # Bytes that are no text in the encoding of the environment come as surrogates, which no answer can hold.
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise StartupError(f"{field.name} is not text in the encoding of the environment.")
    if isinstance(value, int) and value > MAX_INTEGER:
        raise StartupError(f"{field.name} is too large: it must be at most {MAX_INTEGER}.")
    # Written so that a NaN fails.
    if low is not None and not value >= low:
        raise StartupError(f"{field.name} is {value}: it must be at least {low}.")
    if high is not None and not value <= high:
        raise StartupError(f"{field.name} is {value}: it must be at most {high}.")
