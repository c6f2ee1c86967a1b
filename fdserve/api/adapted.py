"""A chat's fields at /v1/responses and /v1/messages: the chat that they make, and those that are refused there."""

from __future__ import annotations

from collections.abc import Mapping

from fdserve.errors import InvalidRequest
from fdserve.protocol.chat import ChatRequest, ConversationRequest
from fdserve.protocol.structured import ResponseFormat

# Values that ask for what there is anyway; of the other fields false and what is empty.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "top_logprobs": (0,),
    "response_format": (ResponseFormat(type="text"),),
    "parallel_tool_calls": (True,),
    "function_call": ("auto", "none"),
}


def new_chat(request: ConversationRequest, refused: Mapping[str, str]) -> ChatRequest:
    """A chat with all that the request says in a chat's own fields, and nothing else yet.

    `refused` are the fields that change a chat's answer and have no place at this endpoint, each with what to do
    instead, or "". Raises InvalidRequest where one of them is used.
    """
    for name, hint in refused.items():
        value = getattr(request, name)
        if _says_something(name, value):
            raise _unsupported(name, hint)
    options = request.stream_options
    if options is not None and options.continuous_usage_stats:
        raise _unsupported("stream_options.continuous_usage_stats", "The usage comes at the end.")
    chat = ChatRequest()
    for name in ConversationRequest.__struct_fields__:
        if name not in refused:
            setattr(chat, name, getattr(request, name))
    return chat


def _says_something(name: str, value: object) -> bool:
    if name in _NEUTRAL:
        return value is not None and value not in _NEUTRAL[name]
    # Of a number of logprobs, 0 says something, too.
    return value is not None and value is not False and value not in ("", [], {})


def _unsupported(name: str, hint: str) -> InvalidRequest:
    message = f"{name} is not supported here. {hint}".rstrip()
    return InvalidRequest(message, param=name, code="unsupported_parameter")
