from __future__ import annotations

import pytest

from fdserve.errors import StartupError
from fdserve.text.tokenizer import Tokenizer
from fdserve.text.tools import ToolFormat, resolve_tools

from .vocabulary import ListTokenizer

PLAIN = ListTokenizer([b"a", b"b"])


class TestResolve:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("ernie_x1", "ernie_x1"),
            ("ernie-x1", "ernie_x1"),
            ("Ernie-X1", "ernie_x1"),
            ("ernie-45-vl-thinking", "ernie_x1"),
            ("ernie45", "ernie_x1"),
            ("hermes", "hermes"),
            ("qwen", "hermes"),
            ("Qwen3", "hermes"),
        ],
    )
    def test_names(self, name: str, kind: str) -> None:
        # The tags need not be tokens.
        assert resolve_tools(name, PLAIN, "") == ToolFormat(kind, "<tool_call>", "</tool_call>")

    def test_detection(self, ernie: Tokenizer) -> None:
        def detect(template: str, tokenizer: Tokenizer) -> str | None:
            format = resolve_tools(None, tokenizer, template)
            return format.name if format else None

        assert detect("{{ messages }}", ernie) is None
        assert detect("...<tool_call>...", PLAIN) == "hermes"
        assert detect("...<tools>...<tool_call>...<think>", PLAIN) == "hermes"
        assert detect("...<tool_list>...<tool_call>...", PLAIN) == "ernie_x1"
        assert detect("...<response>...<tool_call>...", PLAIN) == "ernie_x1"
        assert detect("...<tool_call>...", ernie) == "ernie_x1"

    def test_off(self, ernie: Tokenizer) -> None:
        assert resolve_tools("none", ernie, "<tool_call>") is None
        assert resolve_tools("None", ernie, "<tool_call>") is None

    def test_unknown_name(self) -> None:
        with pytest.raises(StartupError, match=r"unknown tool call parser 'gpt': choose one of ernie_x1, .*none"):
            resolve_tools("gpt", PLAIN, "")
