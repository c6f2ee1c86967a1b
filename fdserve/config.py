"""Every setting of the server: one table feeds the command line, the FDSERVE_* variables, the YAML file and --help."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
import yaml

import fdserve
from fdserve.errors import StartupError

PREFIX = "FDSERVE_"
BLOCK_MULTIPLE = 16
"""The attention kernels take blocks of a multiple of this many tokens."""
MAX_INTEGER = 2**63 - 1
"""Beyond it nothing can be counted: the ranks are told in 64 bits."""
# What Kubernetes sets in every container for a service whose name begins with "fdserve".
_OF_A_SERVICE = re.compile(r"(.+_)?(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://.+")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


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
        flags = _read_flags(argv) if argv is not None else {}
        variables = _read_variables(environ)
        given = {**variables, **flags}
        file = given.pop("config", "")
        return cls(**{**(_read_file(Path(file)) if file else {}), **given})


def parse_bytes(name: str, text: str) -> int:
    """A size such as "4096", "512M" or "1.5GiB" in bytes (K, M and G are powers of 1024); StartupError if garbled."""
    match = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?)\s*([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if not 0 < size <= MAX_INTEGER:
        raise StartupError(f"{name} is {text!r:.200}: expected a number of bytes such as 4096, 512M or 4G.")
    return size


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
    if isinstance(value, int) and value > MAX_INTEGER:
        raise StartupError(f"{field.name} is too large: it must be at most {MAX_INTEGER}.")
    # Written so that a NaN fails.
    if low is not None and not value >= low:
        raise StartupError(f"{field.name} is {value}: it must be at least {low}.")
    if high is not None and not value <= high:
        raise StartupError(f"{field.name} is {value}: it must be at most {high}.")


def _fields() -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(Config)}


def _convert(field: dataclasses.Field[Any], value: object, origin: str) -> Any:
    """The value in the field's type, from the text of a flag or variable or from a YAML scalar."""
    kind = field.type
    if kind == "str" and isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, dict) and field.metadata["metavar"] == "JSON":
        try:
            return json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:  # dates, say, or a mapping inside itself
            raise StartupError(f"{origin} is not JSON: {error}.") from None
    if kind == "bool":
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.strip().lower() in _BOOLEANS:
            return _BOOLEANS[value.strip().lower()]
    elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            if kind == "int" and not isinstance(value, float):
                # Sizes in bytes may carry a unit, in max_request_bytes as in kv_cache_memory.
                return int(value) if field.metadata["metavar"] != "BYTES" else parse_bytes(origin, str(value))
            if kind == "float":
                return float(value)
        except ValueError:
            pass
    expected = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text"}[str(kind)]
    raise StartupError(f"{origin} is {value!r:.200}: expected {expected}.")


def _read_variables(environ: Mapping[str, str]) -> dict[str, Any]:
    fields = _fields()
    values: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(PREFIX):
            continue
        upper = variable.removeprefix(PREFIX)
        if _OF_A_SERVICE.fullmatch(upper) or (upper.endswith("PORT") and _SERVICE_ADDRESS.fullmatch(text)):
            continue
        name = upper.lower()
        if name != "config" and name not in fields:
            raise _unknown("the environment variable", PREFIX, upper, [known.upper() for known in (*fields, "config")])
        # Compose files and manifests write "not set" as an empty value.
        if text:
            if name in values:
                raise StartupError(f"the environment variable {variable} stands for the second time, in other letters.")
            values[name] = text if name == "config" else _convert(fields[name], text, variable)
    return values


class _Loader(yaml.SafeLoader):
    """Raises StartupError for a key that stands twice, be it once with hyphens, where YAML takes the later one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value.replace("-", "_") if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                where = f"in {self.name}, line {key.start_mark.line + 1}"
                raise StartupError(f"{where}, the setting {key.value} stands for the second time.")
            seen.add(name)
        return super().construct_mapping(node, deep)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        loader.name = str(path)
        content = loader.get_single_data()
    except OSError as error:
        raise StartupError(f"the configuration file {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # besides YAML's own, those of dates and integers
        problem = " ".join(str(error).split())
        raise StartupError(f"the configuration file {path} is not valid YAML: {problem}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise StartupError(f"the configuration file {path} must hold settings as `name: value` lines.")
    fields = _fields()
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise _unknown(f"in {path}, the setting", "", str(key), fields)
        if value is not None:
            values[name] = _convert(fields[name], value, f"{key} in {path}")
    return values


def _read_flags(argv: Sequence[str]) -> dict[str, Any]:
    parser = _parser()
    known, rest = parser.parse_known_args(list(argv))
    if rest:
        flag = rest[0].split("=")[0]
        if not flag.startswith("-"):
            raise StartupError(f"{flag!r} belongs to no flag: settings are written as --name value.")
        raise _unknown("the flag", "--", flag.lstrip("-"), parser.flags)
    fields = _fields()
    return {
        name: text if name == "config" else _convert(fields[name], text, "--" + name.replace("_", "-"))
        for name, text in vars(known).items()
    }


def _unknown(what: str, prefix: str, name: str, known: Iterable[str]) -> StartupError:
    # The shared prefix is left out of the comparison: with it, everything looks alike.
    close = difflib.get_close_matches(name, list(known), n=1)
    return StartupError(f"{what} {prefix}{name} is unknown" + (f": did you mean {prefix}{close[0]}?" if close else "."))


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors as StartupError."""

    flags: list[str]

    def error(self, message: str) -> NoReturn:
        raise StartupError(message + "." if not message.endswith(".") else message)


def _parser() -> _Parser:
    """Flags leave text under the setting's name, and nothing where they are absent."""
    parser = _Parser(
        prog="fdserve",
        description="An OpenAI-compatible inference server for ERNIE-4.5 on PaddlePaddle.",
        epilog=f"Every setting is also a variable ({PREFIX}MAX_MODEL_LEN=4096) and a key of the YAML file "
        "(max_model_len: 4096). Flags win over variables, variables over the file.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fdserve {fdserve.__version__}")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    for name, field in _fields().items():
        flag = "--" + name.replace("_", "-")
        default = f" (default: {str(field.default).lower() if field.type == 'bool' else field.default})"
        text = (field.metadata["help"] + (default if field.default != "" else "")).replace("%", "%%")
        metavar = field.metadata["metavar"]
        if field.type == "bool":
            parser.add_argument(flag, dest=name, metavar=metavar, nargs="?", const="true", help=text)
            parser.add_argument(
                flag.replace("--", "--no-", 1), dest=name, action="store_const", const="false", help=argparse.SUPPRESS
            )
        else:
            parser.add_argument(flag, dest=name, metavar=metavar, help=text)
    parser.flags = [flag.lstrip("-") for action in parser._actions for flag in action.option_strings]
    return parser
