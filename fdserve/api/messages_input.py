"""From a request in Anthropic's form to a chat request."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from fdserve.api.adapted import new_chat
from fdserve.errors import InvalidRequest
from fdserve.protocol.chat import ChatMessage, ChatRequest
from fdserve.protocol.messages import (
    ContentBlock,
    CountTokensRequest,
    InputMessage,
    MessagesRequest,
    MessageTool,
    MessageToolChoice,
    ResultBlock,
)
from fdserve.protocol.structured import JsonSchemaFormat, ResponseFormat
from fdserve.protocol.tools import CalledFunction, FunctionDefinition, FunctionName, NamedTool, PastToolCall, Tool
from fdserve.protocol.tools import ToolChoice as ChatToolChoice

# The fields of a chat that are refused -> what to do instead.
REFUSED = {
    "prompt_token_ids": "Send messages.",
    "max_completion_tokens": "Send max_tokens.",
    "stop": "Send stop_sequences.",
    "response_format": "Send output_config.format.",
    "reasoning_effort": "Send output_config.effort.",
    "parallel_tool_calls": "Send tool_choice.disable_parallel_tool_use.",
    "functions": "Send tools.",
    "function_call": "Send tool_choice.",
    "n": "A message is one answer.",
    "logprobs": "",
    "top_logprobs": "",
    "prompt_logprobs": "",
    "temp_scaled_logprobs": "",
    "top_p_normalized_logprobs": "",
    "return_token_ids": "",
}
_TOOL_CHOICES: dict[str, ChatToolChoice] = {"auto": "auto", "any": "required", "none": "none"}


def prompt_request(request: CountTokensRequest) -> ChatRequest:
    """A chat with all but the form of its answer. Raises InvalidRequest for what cannot be served."""
    chat = new_chat(request, REFUSED)
    messages = [ChatMessage(role="system", content=_text(request.system, "system"))] if request.system else []
    for index, message in enumerate(request.messages):
        messages += _chat_messages(message, f"messages[{index}]")
    chat.messages = messages
    chat.max_completion_tokens = request.max_tokens
    chat.stop = request.stop_sequences
    chat.tools = [_chat_tool(tool, index) for index, tool in enumerate(request.tools or ())]
    if (choice := request.tool_choice) is not None:
        chat.tool_choice = _tool_choice(choice)
        chat.parallel_tool_calls = not choice.disable_parallel_tool_use
    if chat.continue_final_message is None and not chat.add_generation_prompt:
        # An answer that the client began goes on where it ends.
        chat.continue_final_message = request.messages[-1].role == "assistant" or None
    _set_thinking(chat, request)
    return chat


def chat_request(request: MessagesRequest) -> ChatRequest:
    """The chat that a request asks for. Raises InvalidRequest for what cannot be served."""
    thinking = request.thinking
    if thinking is not None and thinking.budget_tokens is not None and thinking.budget_tokens >= request.max_tokens:
        message = "max_tokens must be greater than thinking.budget_tokens."
        raise InvalidRequest(message, param="thinking.budget_tokens")
    chat = prompt_request(request)
    format = request.output_config.format if request.output_config else None
    if format is not None:
        schema = JsonSchemaFormat(schema=format.schema, strict=True)
        chat.response_format = ResponseFormat(type="json_schema", json_schema=schema)
    return chat


def _set_thinking(chat: ChatRequest, request: CountTokensRequest) -> None:
    thinking = request.thinking
    if thinking is not None:
        for name in ("enable_thinking", "reasoning_max_tokens"):
            if getattr(chat, name) is not None:
                raise InvalidRequest(f"thinking and {name} both say how to think: give one of them.", param=name)
        if thinking.type == "enabled":
            if thinking.budget_tokens is None:
                raise _missing("thinking.budget_tokens")
            chat.reasoning_max_tokens = thinking.budget_tokens
    if chat.enable_thinking is None:
        chat.enable_thinking = thinking is not None and thinking.type != "disabled"
    if request.output_config is not None:
        chat.reasoning_effort = request.output_config.effort


def _chat_messages(message: InputMessage, path: str) -> list[ChatMessage]:
    """A message as one or several: results of tools are messages of their own in a chat."""
    if isinstance(message.content, str):
        return [ChatMessage(role=message.role, content=message.content)]
    if message.role == "assistant":
        return [_assistant_message(message.content, path)]
    messages: list[ChatMessage] = []
    places = [(block, f"{path}.content[{index}]") for index, block in enumerate(message.content)]
    for results, group in groupby(places, lambda place: message.role == "user" and place[0].type == "tool_result"):
        if results:
            messages += [_result_message(block, where) for block, where in group]
        else:
            text = "".join(_block_text(block, where) for block, where in group)
            messages.append(ChatMessage(role=message.role, content=text))
    return messages or [ChatMessage(role=message.role, content="")]


def _result_message(block: ContentBlock, path: str) -> ChatMessage:
    if block.tool_use_id is None:
        raise _missing(f"{path}.tool_use_id")
    text = _text(block.content or "", f"{path}.content")
    return ChatMessage(role="tool", tool_call_id=block.tool_use_id, content=text)


def _assistant_message(blocks: Sequence[ContentBlock], path: str) -> ChatMessage:
    texts, thoughts = [], []
    calls: list[PastToolCall] = []
    for index, block in enumerate(blocks):
        where = f"{path}.content[{index}]"
        if block.type == "tool_use":
            if block.id is None or block.name is None or block.input is None:
                absent = next(name for name in ("id", "name", "input") if getattr(block, name) is None)
                raise _missing(f"{where}.{absent}")
            function = CalledFunction(name=block.name, arguments=block.input)
            calls.append(PastToolCall(id=block.id, type="function", function=function))
        elif block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type != "redacted_thinking":
            texts.append(_block_text(block, where))
    return ChatMessage(
        role="assistant",
        content="".join(texts),
        reasoning_content="".join(thoughts) or None,
        tool_calls=calls or None,
    )


def _text(content: str | Sequence[ResultBlock], path: str) -> str:
    if isinstance(content, str):
        return content
    return "".join(_block_text(block, f"{path}[{index}]") for index, block in enumerate(content))


def _block_text(block: ContentBlock | ResultBlock, path: str) -> str:
    if block.type != "text":
        message = f"Content of type {block.type[:200]!r} cannot be used here: this model is text-only."
        raise InvalidRequest(message, param=path)
    if block.text is None:
        raise _missing(f"{path}.text")
    return block.text


def _missing(path: str) -> InvalidRequest:
    return InvalidRequest(f"Missing required parameter: '{path}'.", param=path, code="missing_required_parameter")


def _chat_tool(tool: MessageTool, index: int) -> Tool:
    if tool.type not in (None, "custom"):
        raise InvalidRequest(
            f"Tools of type {tool.type[:200]!r} are not supported: this server runs none itself.",
            param=f"tools[{index}].type",
            code="unsupported_parameter",
        )
    if tool.input_schema is None:
        raise _missing(f"tools[{index}].input_schema")
    function = FunctionDefinition(
        name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
    )
    return Tool(type="function", function=function)


def _tool_choice(choice: MessageToolChoice) -> ChatToolChoice:
    if choice.type != "tool":
        return _TOOL_CHOICES[choice.type]
    if choice.name is None:
        raise _missing("tool_choice.name")
    return NamedTool(function=FunctionName(name=choice.name))
