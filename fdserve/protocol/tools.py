"""Tools: their definitions, the choice among them, and calls."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

ToolName = Annotated[str, Meta(min_length=1, max_length=256)]


class FunctionDefinition(msgspec.Struct, kw_only=True, omit_defaults=True):
    """`parameters` is a JSON schema; without one the function takes any object."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(msgspec.Struct, kw_only=True):
    name: ToolName


class NamedTool(msgspec.Struct, kw_only=True, tag_field="type", tag="function"):
    """A tool by its name."""

    function: FunctionName


class AllowedSet(msgspec.Struct, kw_only=True):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedTools(msgspec.Struct, kw_only=True, tag_field="type", tag="allowed_tools"):
    """Some of the tools, as if the request had no others."""

    allowed_tools: AllowedSet


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


class CalledFunction(msgspec.Struct, kw_only=True):
    """In a conversation. `arguments` is JSON text for OpenAI; the object itself is taken as well."""

    name: str
    arguments: str | dict[str, Any]


class PastToolCall(msgspec.Struct, kw_only=True):
    """A call in a conversation."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class FunctionCall(msgspec.Struct, kw_only=True):
    """In an answer: `arguments` is JSON text."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True):
    """A call in an answer."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class FunctionCallDelta(msgspec.Struct, kw_only=True):
    """Part of a call in a stream: the name comes once, the pieces of the arguments join."""

    name: str | UnsetType = UNSET
    arguments: str


class ToolCallPart(msgspec.Struct, kw_only=True):
    """Part of call number `index` of a choice; id and type come with its first part."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionCallDelta
