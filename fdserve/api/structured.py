"""What a request says its output must look like, as one grammar."""

from __future__ import annotations

from typing import Any

from fdserve.api.params import unsupported
from fdserve.api.tool_use import ToolUse
from fdserve.protocol.generation import GenerationRequest
from fdserve.server import Server

_FIELDS = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structural_tag", "structured_outputs")


async def compile_grammar(request: GenerationRequest, server: Server, tools: ToolUse | None = None) -> Any:
    """The grammar of the request's output; None where anything goes."""
    for name in _FIELDS:
        if getattr(request, name):
            raise unsupported(name)
    if request.response_format is not None and request.response_format.type != "text":
        raise unsupported("response_format", "with another type than 'text' ")
    if tools is not None and tools.forced:
        raise unsupported(tools.param, "that forces a call ")
