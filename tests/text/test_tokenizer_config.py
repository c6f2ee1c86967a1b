from __future__ import annotations

import json
from pathlib import Path

import pytest

from fdserve.errors import StartupError
from fdserve.text.tokenizer_config import read_tokenizer_config


def write(directory: Path, name: str, value: object) -> None:
    (directory / name).write_text(json.dumps(value), encoding="utf-8")


def test_nothing_there(tmp_path: Path) -> None:
    config = read_tokenizer_config(tmp_path)
    assert (config.special_tokens, config.special, config.added, config.chat_template) == (
        {},
        set(),
        {},
        None,
    )


def test_added_tokens_of_both_files(tmp_path: Path) -> None:
    write(tmp_path, "added_tokens.json", {"<a>": 7})
    decoder = {"8": {"content": "<b>", "special": True}, "9": {"content": "<c>", "special": False}}
    write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": decoder})
    config = read_tokenizer_config(tmp_path)
    assert config.added == {"<a>": 7, "<b>": 8, "<c>": 9}
    assert config.special == {"<b>"}


def test_tokenizer_config_goes_over_special_tokens_map(tmp_path: Path) -> None:
    write(tmp_path, "special_tokens_map.json", {"eos_token": "<old>", "bos_token": {"content": "<s>"}})
    write(tmp_path, "tokenizer_config.json", {"eos_token": "<new>", "pad_token": None, "add_bos_token": True})
    assert read_tokenizer_config(tmp_path).special_tokens == {"eos_token": "<new>", "bos_token": "<s>"}


def test_tags_are_never_control_tokens(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer_config.json", {"additional_special_tokens": ["<think>", {"content": "<x>"}, 3]})
    control = read_tokenizer_config(tmp_path).control_tokens()
    assert "<x>" in control
    assert "<|im_end|>" in control
    assert "<think>" not in control


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("A", "A"),
        ([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}], "D"),
        ([{"name": "rag", "template": "R"}], "R"),
        ([], None),
        (None, None),
    ],
)
def test_chat_template_in_tokenizer_config(tmp_path: Path, value: object, expected: str | None) -> None:
    write(tmp_path, "tokenizer_config.json", {"chat_template": value})
    assert read_tokenizer_config(tmp_path).chat_template == expected


def test_chat_template_files_in_order(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer_config.json", {"chat_template": "config"})
    write(tmp_path, "chat_template.json", {"chat_template": "json"})
    assert read_tokenizer_config(tmp_path).chat_template == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja é", encoding="utf-8")
    assert read_tokenizer_config(tmp_path).chat_template == "jinja é"


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(StartupError, match=r"cannot read .*chat_template\.jinja"):
        read_tokenizer_config(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(StartupError, match=r"cannot read .*tokenizer_config\.json"):
        read_tokenizer_config(tmp_path)
    write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<a>"}}})
    with pytest.raises(StartupError, match="has 'x' where an id belongs"):
        read_tokenizer_config(tmp_path)
