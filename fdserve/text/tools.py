"""The formats in which models write tool calls, and the deltas that clients see of a call."""

from __future__ import annotations

from dataclasses import dataclass

from fdserve.text.parser_names import format_named
from fdserve.text.tokenizer import Tokenizer

# What a parser may be called -> the format. The names are FastDeploy's and vLLM's; "-" reads as "_".
_FORMAT_OF = {
    "ernie_x1": "ernie_x1",
    "ernie_45_vl_thinking": "ernie_x1",
    "ernie45": "ernie_x1",
    "hermes": "hermes",
    "qwen": "hermes",
    "qwen3": "hermes",
}


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """What stands around a call, which is a JSON object with "name" and "arguments".

    "ernie_x1" and "hermes" write `<tool_call>\\n{…}\\n</tool_call>`. ernie_x1 writes its calls in place of
    `<response>…</response>`, or after it. In a vocabulary the tags may be single tokens or not.
    """

    name: str
    start: str = "<tool_call>"
    end: str = "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """New text of the call number `index` of a choice, counted from 0.

    The first delta of a call has its id and its name; the later ones have only a fragment of the arguments. Joined, the
    fragments of all are the text of a JSON object.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


def resolve_tools(name: str | None, tokenizer: Tokenizer, template_source: str) -> ToolFormat | None:
    """The format that a parser's name stands for; None leaves calls in the text.

    "none" is off. A `name` of None looks for itself: a template that writes `<tool_call>` means "hermes", and
    "ernie_x1" where it also writes `<tool_list>` or `<response>`, or where `<response>` is one token.
    Raises StartupError for an unknown name.
    """
    kind = _detect(tokenizer, template_source) if name is None else format_named("tool call", name, _FORMAT_OF)
    return ToolFormat(kind) if kind is not None else None


def _detect(tokenizer: Tokenizer, template_source: str) -> str | None:
    if "<tool_call>" not in template_source:
        return None
    ernie = any(tag in template_source for tag in ("<tool_list>", "<response>"))
    return "ernie_x1" if ernie or tokenizer.token_id("<response>") is not None else "hermes"
