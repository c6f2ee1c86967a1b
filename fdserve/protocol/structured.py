"""What an output must look like: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

# None is empty: an empty form would be one that lets everything come.
Source = Annotated[str, Meta(min_length=1)]
Options = Annotated[list[str | int | float | bool], Meta(min_length=1)]
Schema = Source | dict[str, Any] | bool
Tags = Source | dict[str, Any]


class JsonSchemaFormat(msgspec.Struct, kw_only=True):
    """`name` and `description` have no effect. The schema is `true`, any object, where there is none."""

    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """`json_schema` belongs to type "json_schema"; `structures`, `triggers` and `format` to "structural_tag"."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None
    format: dict[str, Any] | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True):
    """Exactly one of these; they are what the `guided_…` fields are."""

    json: Schema | None = None
    regex: Source | None = None
    choice: Options | None = None
    grammar: Source | None = None
    json_object: bool | None = None
    structural_tag: Tags | None = None
