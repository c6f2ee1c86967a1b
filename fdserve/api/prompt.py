"""A chat request's prompt: as text, and as token ids."""

from __future__ import annotations

import uuid
from typing import Any

from fdserve.api.conversation import content_text, template_messages, template_tools
from fdserve.api.fields import EXTRA_FIELDS
from fdserve.api.params import checked_prompt, truncated
from fdserve.api.tool_use import tool_use
from fdserve.errors import InvalidRequest
from fdserve.protocol.chat import ChatRequest
from fdserve.server.server import Server
from fdserve.text.detokenizer import decode
from fdserve.text.template import ChatTemplate

_RESERVED_KWARGS = ("messages", "tools")
_NO_EFFORT = ("none", "minimal")


def check_prompt(request: ChatRequest) -> None:
    """Raise InvalidRequest where there is nothing to make a prompt of, or fields that contradict each other."""
    if request.prompt_token_ids is None:
        if request.messages is None:
            message = "Missing required parameter: 'messages'."
            raise InvalidRequest(message, param="messages", code="missing_required_parameter")
        if not request.messages:
            raise InvalidRequest("messages needs at least one message.", param="messages")
    if request.continue_final_message and request.add_generation_prompt:
        message = "continue_final_message and add_generation_prompt cannot both be true."
        raise InvalidRequest(message, param="continue_final_message")
    for name in _RESERVED_KWARGS:
        if name in (request.chat_template_kwargs or {}):
            raise InvalidRequest(f"chat_template_kwargs cannot set {name}.", param=f"chat_template_kwargs.{name}")


def prompt_field(request: ChatRequest) -> str:
    """The field that the prompt comes in."""
    return "messages" if request.prompt_token_ids is None else "prompt_token_ids"


def max_tokens_of(request: ChatRequest) -> int | None:
    """The limit by its newer name, else by its older one."""
    return request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens


def render_prompt(request: ChatRequest, server: Server) -> tuple[str, list[int]]:
    """The prompt's text and ids. Raises InvalidRequest. Long work: see `off_loop_if_long`."""
    if request.prompt_token_ids is not None:
        ids = checked_prompt(request.prompt_token_ids, server, "prompt_token_ids")
        text = None
    else:
        text = _text(request, server)
        ids = checked_prompt(tokenized(text, server, "messages"), server, "messages")
    kept = truncated(ids, request, server, max_tokens_of(request))
    if text is None or len(kept) < len(ids):
        text = decode(server.tokenizer, kept, skip_special_tokens=False)
    return text, kept


def tokenized(text: str, server: Server, param: str) -> list[int]:
    """The text's ids. Raises InvalidRequest, with the field that it came in, for more than a text may have."""
    try:
        return server.tokenizer.encode(text)
    except InvalidRequest as error:
        error.param, error.code = param, "context_length_exceeded"
        raise


def _text(request: ChatRequest, server: Server) -> str:
    messages = request.messages or []
    if request.disable_chat_template:
        return "".join(content_text(message.content, f"messages[{i}].content") for i, message in enumerate(messages))
    template = server.template
    if request.chat_template is not None:
        template = ChatTemplate(request.chat_template, server.tokenizer.special_tokens, blamed="chat_template")
    use = tool_use(request)
    shown = template_messages(messages)
    # Where the last message ends can only be seen by a mark: templates trim and wrap what they are given.
    mark = uuid.uuid4().hex if request.continue_final_message else ""
    shown[-1]["content"] += mark
    text = template.render(
        shown,
        tools=template_tools(use.tools if use else None),
        add_generation_prompt=False if mark else request.add_generation_prompt is not False,
        **_variables(request),
    )
    if not mark:
        return text
    before, found, _ = text.rpartition(mark)
    if not found:
        raise InvalidRequest("The chat template does not show the final message.", param="continue_final_message")
    return before


def _variables(request: ChatRequest) -> dict[str, Any]:
    """The template's variables: those given for it, and what the request says of thinking."""
    kwargs = {name: value for name, value in (request.chat_template_kwargs or {}).items() if name not in EXTRA_FIELDS}
    if request.reasoning_effort is not None:
        kwargs["reasoning_effort"] = request.reasoning_effort
        kwargs["enable_thinking"] = request.reasoning_effort not in _NO_EFFORT
    if request.enable_thinking is not None:
        kwargs["enable_thinking"] = request.enable_thinking
    return kwargs
