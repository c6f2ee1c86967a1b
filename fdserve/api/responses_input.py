"""From the items and options of /v1/responses to a chat request."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fdserve.api.adapted import new_chat
from fdserve.errors import InvalidRequest, ServerError
from fdserve.protocol.chat import ChatMessage, ChatRequest
from fdserve.protocol.responses import FunctionTool, InputItem, InputPart, ResponsesRequest, TextFormat, ToolChoice
from fdserve.protocol.structured import JsonSchemaFormat, ResponseFormat
from fdserve.protocol.tools import (
    AllowedSet,
    AllowedTools,
    CalledFunction,
    FunctionDefinition,
    FunctionName,
    NamedTool,
    PastToolCall,
    Tool,
)
from fdserve.protocol.tools import ToolChoice as ChatToolChoice

LOGPROBS = "message.output_text.logprobs"

# The fields of a chat that are refused -> what to do instead.
REFUSED = {
    "messages": "Send input.",
    "prompt_token_ids": "Send input.",
    "max_tokens": "Send max_output_tokens.",
    "max_completion_tokens": "Send max_output_tokens.",
    "response_format": "Send text.format.",
    "reasoning_effort": "Send reasoning.effort.",
    "logprobs": "Send include or top_logprobs.",
    "functions": "Send tools.",
    "function_call": "Send tool_choice.",
    "n": "A response is one answer.",
    "prompt_logprobs": "",
    "return_token_ids": "",
}

_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
# The fields that a chat's checks complain of -> where their values came from.
_ORIGIN = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "logprobs": "include",
}


@contextmanager
def as_own_fields() -> Iterator[None]:
    """Have the errors of the chat path name the fields of this endpoint."""
    try:
        yield
    except ServerError as error:
        if error.param is not None:
            head = re.split(r"\W", error.param, maxsplit=1)[0]
            error.param = _ORIGIN.get(head) or error.param.replace(".function", "", 1)
            if error.code == "context_length_exceeded":
                error.message = error.message.replace("messages", "input")
        raise


def chat_request(request: ResponsesRequest, history: Sequence[InputItem], own: Sequence[InputItem]) -> ChatRequest:
    """The chat that a request with its own items asks for, after the items of the responses before it.

    Raises InvalidRequest for what cannot be served.
    """
    _check(request)
    chat = new_chat(request, REFUSED)
    messages = [ChatMessage(role="system", content=request.instructions)] if request.instructions else []
    messages += chat_messages(history) if history else []
    messages += chat_messages(own)
    if not messages:
        raise InvalidRequest("The input is empty.", param="input")
    chat.messages = messages
    chat.max_completion_tokens = request.max_output_tokens
    chat.logprobs = wants_logprobs(request)
    chat.tools = [_chat_tool(tool, index) for index, tool in enumerate(request.tools or ())]
    chat.tool_choice = _tool_choice(request)
    chat.response_format = _response_format(request.text.format if request.text else None)
    chat.reasoning_effort = request.reasoning.effort if request.reasoning else None
    return chat


def input_items(request: ResponsesRequest) -> list[InputItem]:
    """The request's own items."""
    if isinstance(request.input, str):
        return [InputItem(type="message", role="user", content=request.input)]
    return request.input


def wants_logprobs(request: ResponsesRequest) -> bool:
    """Whether the tokens of the text are to have their logprobs."""
    return LOGPROBS in (request.include or ()) or bool(request.top_logprobs)


def _check(request: ResponsesRequest) -> None:
    if request.background:
        raise _unsupported("background", "Responses in the background are not supported: leave background out.")
    if request.conversation is not None:
        hint = "Use previous_response_id, or send the items in input."
        raise _unsupported("conversation", f"Conversations are not stored by this server. {hint}")
    if request.prompt is not None:
        raise _unsupported("prompt", "This server has no stored prompts: send instructions and input.")


def _unsupported(param: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="unsupported_parameter")


def chat_messages(items: Sequence[InputItem]) -> list[ChatMessage]:
    """The items as messages of a chat. Reasoning, text and calls that follow each other are one assistant's turn.

    Raises InvalidRequest with the path of an item that cannot be served.
    """
    messages: list[ChatMessage] = []
    for index, item in enumerate(items):
        path = f"input[{index}]"
        kind = item.type or "message"
        if kind == "message":
            _add_message(messages, item, path)
        elif kind == "reasoning":
            text = _text(item.content or item.summary, f"{path}.content")
            _assistant_turn(messages, fresh=True).reasoning_content = text or None
        elif kind == "function_call":
            name, arguments = _given(item.name, f"{path}.name"), _given(item.arguments, f"{path}.arguments")
            function = CalledFunction(name=name, arguments=arguments)
            call = PastToolCall(id=_given(item.call_id, f"{path}.call_id"), type="function", function=function)
            turn = _assistant_turn(messages)
            if turn.tool_calls is None:
                turn.tool_calls = []
            turn.tool_calls.append(call)
        elif kind == "function_call_output":
            id = _given(item.call_id, f"{path}.call_id")
            messages.append(ChatMessage(role="tool", tool_call_id=id, content=_text(item.output, f"{path}.output")))
        else:
            raise InvalidRequest(f"Items of type {kind[:200]!r} cannot be used here.", param=f"{path}.type")
    return messages


def _add_message(messages: list[ChatMessage], item: InputItem, path: str) -> None:
    role = item.role
    if role is None:
        raise _missing(f"{path}.role")
    text = _text(item.content, f"{path}.content")
    last = messages[-1] if messages else None
    # After its own thought a message belongs to the same turn.
    if role == "assistant" and last is not None and last.role == "assistant" and last.content is None:
        last.content = text
    else:
        messages.append(ChatMessage(role=role, content=text))


def _assistant_turn(messages: list[ChatMessage], fresh: bool = False) -> ChatMessage:
    """The assistant's turn at the end, or a new one; a `fresh` one has nothing in it yet."""
    if fresh or not messages or messages[-1].role != "assistant":
        messages.append(ChatMessage(role="assistant"))
    return messages[-1]


def _text(content: str | list[InputPart] | None, path: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for index, part in enumerate(content):
        if part.type not in (*_TEXT_PARTS, "refusal"):
            message = f"Content of type {part.type[:200]!r} cannot be used: this model takes text only."
            raise InvalidRequest(message, param=f"{path}[{index}]")
        text = part.refusal if part.type == "refusal" else part.text
        if text is None:
            raise _missing(f"{path}[{index}].{'refusal' if part.type == 'refusal' else 'text'}")
        texts.append(text)
    return "".join(texts)


def _given(value: str | None, path: str) -> str:
    if value is None:
        raise _missing(path)
    return value


def _missing(path: str) -> InvalidRequest:
    return InvalidRequest(f"Missing required parameter: '{path}'.", param=path, code="missing_required_parameter")


def _tool_choice(request: ResponsesRequest) -> ChatToolChoice | None:
    choice = request.tool_choice
    if not isinstance(choice, ToolChoice):
        return choice
    if choice.type == "function":
        return NamedTool(function=FunctionName(name=_given(choice.name, "tool_choice.name")))
    if choice.type == "allowed_tools":
        names = [_given(tool.name, f"tool_choice.tools[{i}].name") for i, tool in enumerate(choice.tools or ())]
        tools = [NamedTool(function=FunctionName(name=name)) for name in names]
        return AllowedTools(allowed_tools=AllowedSet(mode=choice.mode or "auto", tools=tools))
    message = f"A tool_choice of type {choice.type[:200]!r} is not supported: there are only functions to choose from."
    raise _unsupported("tool_choice.type", message)


def _chat_tool(tool: FunctionTool, index: int) -> Tool:
    if tool.type != "function":
        message = (
            f"Tools of type {tool.type[:200]!r} are not supported: this server runs none itself, so send functions."
        )
        raise _unsupported(f"tools[{index}].type", message)
    function = FunctionDefinition(
        name=_given(tool.name, f"tools[{index}].name"),
        description=tool.description,
        parameters=tool.parameters,
        strict=tool.strict,
    )
    return Tool(type="function", function=function)


def _response_format(format: TextFormat | None) -> ResponseFormat | None:
    if format is None or format.type != "json_schema":
        return ResponseFormat(type=format.type) if format else None
    _given(format.name, "text.format.name")
    if format.schema is None:
        raise _missing("text.format.schema")
    schema = JsonSchemaFormat(
        name=format.name, description=format.description, schema=format.schema, strict=format.strict
    )
    return ResponseFormat(type="json_schema", json_schema=schema)
