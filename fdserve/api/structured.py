"""What a request says its output must look like, as one grammar."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from fdserve.api.tool_use import ToolUse
from fdserve.errors import InvalidRequest
from fdserve.protocol.generation import GenerationRequest
from fdserve.protocol.structured import ResponseFormat, StructuredOutputs
from fdserve.server.server import Server
from fdserve.text.grammar import Grammar
from fdserve.text.grammar_rules import MAX_SOURCE
from fdserve.text.grammar_spec import Choice, JsonSchema, Lark, Regex, Spec, StructuralTag, ToolCalls


class Form(NamedTuple):
    """What an output must look like. A `whole` one is JSON or nothing but calls: no stop string or token cuts it."""

    grammar: Grammar
    whole: bool


RESPONSE_FORMAT = "response_format"


async def compile_form(
    request: GenerationRequest, server: Server, tools: ToolUse | None = None, field: str = RESPONSE_FORMAT
) -> Form | None:
    """The form of the request's output; None where anything goes. `field` is what its client calls response_format.

    Raises InvalidRequest for two forms at a time, or for one that cannot be followed, and Overloaded where grammars
    keep all threads busy. When cancelled it returns at once.
    """
    form = output_form(request, field)
    spec = form if tools is None else _with_calls(form, tools, server)
    if spec is None:
        return None
    whole = isinstance(form, JsonSchema) or (tools is not None and tools.forced)
    return Form(await server.grammars.compile(spec), whole)


def output_form(request: GenerationRequest, field: str = RESPONSE_FORMAT) -> Spec | None:
    """The form that the request gives its text. Raises InvalidRequest for two of them, or for one that is no form."""
    forms = list(_forms(request, field))
    if len(forms) > 1:
        message = f"{forms[0].param} and {forms[1].param} both say what the output must look like: give one of them."
        raise InvalidRequest(message, param=forms[1].param)
    return forms[0] if forms else None


def _with_calls(form: Spec | None, tools: ToolUse, server: Server) -> Spec | None:
    """The form of an answer that may call tools."""
    strict = frozenset(tool.function.name for tool in tools.tools if tool.function.strict)
    if server.tools is None or not (tools.forced or strict or form or not tools.parallel):
        return form
    return ToolCalls(
        tools={tool.function.name: tool.function.parameters for tool in tools.tools},
        mode=tools.mode,
        parallel=tools.parallel,
        format=server.tools.name,
        param="functions" if tools.param == "function_call" else "tools",
        strict=strict,
        content=form,
    )


def _forms(request: GenerationRequest, field: str) -> Iterator[Spec]:
    if request.response_format is not None:
        yield from _response_format(request.response_format, field)
    guided = {
        "guided_json": request.guided_json,
        "guided_regex": request.guided_regex,
        "guided_choice": request.guided_choice,
        "guided_grammar": request.guided_grammar,
        "structural_tag": request.structural_tag,
    }
    for param, value in guided.items():
        if value is not None:
            yield from _guided(param, value)
    if request.structured_outputs is not None:
        yield from _guided(*_structured_output(request.structured_outputs))


def _structured_output(newer: StructuredOutputs) -> tuple[str, Any]:
    """The one field that is given, as a path, and its value. Raises InvalidRequest for none and for several.

    A name that is none of the fields is ignored like everywhere; alone it would leave the output as free as without.
    """
    names = newer.__struct_fields__
    given = [name for name in names if getattr(newer, name) is not None]
    if not given:
        message = f"structured_outputs needs one of {', '.join(names[:-1])} and {names[-1]}."
        raise InvalidRequest(message, param="structured_outputs")
    paths = [f"structured_outputs.{name}" for name in given]
    if len(given) > 1:
        message = f"{paths[0]} and {paths[1]} both say what the output must look like: give one of them."
        raise InvalidRequest(message, param=paths[1])
    return paths[0], getattr(newer, given[0])


def _guided(param: str, value: Any) -> Iterator[Spec]:
    kind = param.removeprefix("structured_outputs.").removeprefix("guided_")
    if kind == "json":
        yield JsonSchema(_object(value, param), strict=False, param=param)
    elif kind == "json_object":
        if value:
            yield JsonSchema(None, strict=False, param=param)
    elif kind == "regex":
        yield Regex(value, param)
    elif kind == "choice":
        yield Choice([item if isinstance(item, str) else _json_text(item) for item in value], param)
    elif kind == "grammar":
        yield Lark(value, param)
    else:
        yield StructuralTag(_object(value, param), param)


def _object(value: Any, param: str) -> Any:
    """A schema or the like, which may come as JSON text."""
    if not isinstance(value, str):
        return value
    if len(value) > MAX_SOURCE:  # it may hold far more values than the body that it stands in
        raise InvalidRequest(f"{param} is longer than {MAX_SOURCE} characters.", param=param)
    try:
        value = msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"{param} is not valid JSON: {error}.", param=param) from None
    if not isinstance(value, dict | bool):
        raise InvalidRequest(f"{param} must hold a JSON object.", param=param)
    return value


def _json_text(value: float | bool) -> str:
    return msgspec.json.encode(value).decode()


def _response_format(format: ResponseFormat, field: str) -> Iterator[Spec]:
    if format.type == "json_object":
        yield JsonSchema(None, strict=False, param=field)
    elif format.type == "json_schema":
        # The other endpoints have no object of its own around the schema.
        inner = f"{field}.json_schema" if field == RESPONSE_FORMAT else field
        if format.json_schema is None:
            message = f"Missing required parameter: '{inner}'."
            raise InvalidRequest(message, param=inner, code="missing_required_parameter")
        schema = format.json_schema
        yield JsonSchema(schema.schema, strict=bool(schema.strict), param=f"{inner}.schema")
    elif format.type == "structural_tag":
        parts = {"structures": format.structures, "triggers": format.triggers, "format": format.format}
        value = {name: part for name, part in parts.items() if part is not None}
        yield StructuralTag(value, param=field)
