"""What the small JSON files beside a vocabulary say: special tokens, added tokens, chat template.

The formats are those of Hugging Face's tokenizer_config.json, special_tokens_map.json, added_tokens.json,
chat_template.jinja and chat_template.json. A class or code that such a file names is never imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from fdserve.errors import StartupError

# Control tokens of the family's dialogue format, which not every checkpoint declares as special.
CONTROL_TOKENS = frozenset({"<|im_start|>", "<|im_end|>", "<|begin_of_sentence|>", "<|end_of_sentence|>"})

# Tags that parsers and clients read: part of the text even where a checkpoint calls them special.
TEXT_TAGS = frozenset(
    {"<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>"}
    | {"<tool_response>", "</tool_response>"}
)


@dataclass(slots=True)
class TokenizerConfig:
    """The settings of one tokenizer directory.

    `special_tokens` maps names such as "eos_token" to the token's text; `special` holds the text of every
    token that a file declares special, named or not; `added` maps added tokens to their ids.
    """

    special_tokens: dict[str, str] = field(default_factory=dict)
    special: set[str] = field(default_factory=set)
    added: dict[str, int] = field(default_factory=dict)
    chat_template: str | None = None

    def control_tokens(self) -> set[str]:
        """The text of every token that decoded text leaves out, as far as these files tell."""
        return (self.special | set(self.special_tokens.values()) | CONTROL_TOKENS) - TEXT_TAGS


def read_tokenizer_config(directory: Path) -> TokenizerConfig:
    """Read what there is; a file that is absent says nothing.

    Raises StartupError when a file is there but cannot be read.
    """
    config = TokenizerConfig()
    main = _read_object(directory / "tokenizer_config.json")
    for source in (_read_object(directory / "special_tokens_map.json"), main):
        for name, value in source.items():
            text = _token_text(value)
            if name.endswith("_token") and text is not None:
                config.special_tokens[name] = text
        additional = source.get("additional_special_tokens")
        if isinstance(additional, list):
            config.special.update(text for text in map(_token_text, additional) if text is not None)
    for text, token_id in _read_object(directory / "added_tokens.json").items():
        if isinstance(token_id, int) and text:
            config.added[text] = token_id
    decoder = main.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        _read_added_tokens(decoder, config, directory / "tokenizer_config.json")
    config.chat_template = _read_chat_template(directory, main.get("chat_template"))
    return config


def _read_added_tokens(decoder: dict[str, Any], config: TokenizerConfig, path: Path) -> None:
    for key, value in decoder.items():
        text = _token_text(value)
        if text is None:
            continue
        if not key.isdecimal():
            raise StartupError(f"{path}: added_tokens_decoder has {key!r} where an id belongs")
        config.added[text] = int(key)
        if isinstance(value, dict) and value.get("special") is True:
            config.special.add(text)


def _token_text(value: object) -> str | None:
    """A token is written as its text, or as an object with its text under "content"."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _read_chat_template(directory: Path, in_config: object) -> str | None:
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        try:
            return jinja.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StartupError(f"cannot read {jinja}: {error}") from None
    value = _read_object(directory / "chat_template.json").get("chat_template", in_config)
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default", next(iter(named.values()), None))
    return value if isinstance(value, str) else None


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StartupError(f"cannot read {path}: {error}") from None
