"""A conversation and its tools as chat templates expect them, from OpenAI's forms, old and new."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from fdserve.errors import InvalidRequest
from fdserve.http.body_values import check_values
from fdserve.protocol.chat import ChatMessage, ContentPart
from fdserve.protocol.tools import CalledFunction, PastToolCall, Tool

# Templates of the family know neither: these are other words for roles that they know.
_ROLES = {"developer": "system", "function": "tool"}


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The messages with the text of their parts joined, calls with their arguments as objects, no absent fields.

    Raises InvalidRequest for content that is no text, and PayloadTooLarge for arguments of more values than a body.
    """
    check_values(*_argument_texts(messages))
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def template_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """The tools as plain objects; None where there are none."""
    return [msgspec.to_builtins(tool) for tool in tools] if tools else None


def _argument_texts(messages: Sequence[ChatMessage]) -> Iterator[bytes]:
    """What the messages' calls have as JSON inside of the body's strings."""
    for message in messages:
        functions = [call.function for call in message.tool_calls or ()]
        for function in (*functions, message.function_call):
            if function is not None and isinstance(function.arguments, str):
                yield function.arguments.encode("utf-8", "replace")


def _message(message: ChatMessage, path: str) -> dict[str, Any]:
    content = content_text(message.content, f"{path}.content")
    result: dict[str, Any] = {
        "role": _ROLES.get(message.role, message.role),
        "content": content or message.refusal or "",
    }
    for name in ("name", "reasoning_content", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            result[name] = value
    calls = list(message.tool_calls or ())
    if message.function_call is not None:
        calls.append(PastToolCall(function=message.function_call))
    if calls:
        result["tool_calls"] = [_call(call) for call in calls]
    return result


def content_text(content: str | list[ContentPart] | None, path: str) -> str:
    """The text of a message, its parts joined. Raises InvalidRequest, with the part's path, for any other part."""
    if not isinstance(content, list):
        return content or ""
    return "".join(_part_text(part, f"{path}[{index}]") for index, part in enumerate(content))


def _part_text(part: ContentPart, path: str) -> str:
    if part.type not in ("text", "refusal"):
        message = f"Content of type {part.type[:200]!r} cannot be used: this model is text-only."
        raise InvalidRequest(message, param=path)
    text = part.text if part.type == "text" else part.refusal
    if text is None:
        raise InvalidRequest(f"A {part.type} part needs its {part.type}.", param=path)
    return text


def _call(call: PastToolCall) -> dict[str, Any]:
    result: dict[str, Any] = {} if call.id is None else {"id": call.id}
    return {**result, "type": "function", "function": _function(call.function)}


def _function(function: CalledFunction) -> dict[str, Any]:
    return {"name": function.name, "arguments": _arguments(function.arguments)}


def _arguments(arguments: str | dict[str, Any]) -> Any:
    """Templates want the object; text that is none stays what it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments
