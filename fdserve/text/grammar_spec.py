"""What an output can be made to match: one small class for each way a request may say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class JsonSchema:
    """JSON under a schema; any JSON object where the schema is None.

    `strict` refuses keywords that cannot be enforced; else they are ignored, and `oneOf` reads as `anyOf`.
    `param`, here and below, is the field of the request that errors name.
    """

    schema: Mapping[str, Any] | bool | None
    strict: bool
    param: str


@dataclass(frozen=True)
class Regex:
    """Text that a regular expression matches from its beginning to its end."""

    pattern: str
    param: str


@dataclass(frozen=True)
class Choice:
    """One of some strings, exactly."""

    choices: Sequence[str]
    param: str


@dataclass(frozen=True)
class Lark:
    """A context-free grammar in Lark's syntax (rule `start`), or in GBNF (rule `root`, definitions by `::=`)."""

    source: str
    param: str


@dataclass(frozen=True)
class StructuralTag:
    """Free text with tagged parts that follow schemas.

    `value` has either "structures" and "triggers", or "format": the two forms that XGrammar knows.
    """

    value: Mapping[str, Any]
    param: str


@dataclass(frozen=True)
class ToolCalls:
    """Calls of tools, their arguments under the tools' schemas.

    `tools` maps names to parameter schemas (None: any object). Those in `strict` refuse what cannot be enforced.
    `mode` is "auto" (text, and calls where the model likes), "required" (nothing but calls, one at least) or the name
    of the one tool to call. Not `parallel` is one call at most. `format` is the tool format's name. With a `content`,
    "auto" is either calls and nothing else, or text of that form.
    """

    tools: Mapping[str, Mapping[str, Any] | None]
    mode: str
    parallel: bool
    format: str
    param: str
    strict: frozenset[str] = frozenset()
    content: Spec | None = None


Spec = JsonSchema | Regex | Choice | Lark | StructuralTag | ToolCalls
