"""POST /v1/chat/completions, and what other endpoints that lead to a chat need of it."""

from __future__ import annotations

import msgspec

from fdserve.api.chat_answer import ChatAnswer
from fdserve.api.conversation import template_message
from fdserve.api.generation import Choice, new_choice, off_loop_if_long, submitted
from fdserve.api.params import (
    EXTRA_FIELDS,
    check_choices,
    check_logprobs,
    check_request,
    for_choice,
    read_request,
    sampling_params,
    unsupported,
)
from fdserve.engine.request import SamplingParams
from fdserve.errors import InvalidRequest
from fdserve.http.request import Request
from fdserve.http.response import Reply
from fdserve.protocol.chat import ChatRequest
from fdserve.server import Server
from fdserve.text.reasoning import starts_in_thinking

_RESERVED_KWARGS = ("messages", "tools", "add_generation_prompt")


async def chat_completions(server: Server, http: Request, reply: Reply) -> None:
    """Generate the answer to a conversation. Cancelling it cancels the generation."""
    server.check_ready()
    request = read_request(http.body, ChatRequest)
    choices = await prepare_chat(request, server, http)
    with submitted(choices):
        answer = ChatAnswer(request, server, http, choices)
        if request.stream:
            await answer.stream(reply)
        else:
            await answer.send(reply)


async def prepare_chat(request: ChatRequest, server: Server, http: Request) -> list[Choice]:
    """Check everything, render and tokenize the prompt, and make the choices, which nobody has submitted yet.

    Raises NotFound for another model's name and InvalidRequest. Cancellation waits for a thread that tokenizes.
    """
    check_request(request, server)
    check_chat(request, server)
    _, prompt = await off_loop_if_long(server, len(http.body), lambda: render_prompt(request, server))
    return _choices(request, server, http, prompt)


def render_prompt(request: ChatRequest, server: Server) -> tuple[str, list[int]]:
    """The prompt's text and ids. Raises InvalidRequest. Long work: see `off_loop_if_long`."""
    kwargs = {name: value for name, value in (request.chat_template_kwargs or {}).items() if name not in EXTRA_FIELDS}
    if request.enable_thinking is not None:
        kwargs["enable_thinking"] = request.enable_thinking
    tools = request.tools if request.tool_choice != "none" else None
    messages = [template_message(message, index) for index, message in enumerate(request.messages)]
    text = server.template.render(messages, tools=tools or None, **kwargs)
    return text, server.tokenizer.encode(text)


def check_chat(request: ChatRequest, server: Server) -> None:
    """Raise InvalidRequest for what only a chat can have wrong."""
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true.", param="top_logprobs")
    check_logprobs(bool(request.logprobs), server)
    check_choices(request.n or 1, server, "n")
    if request.tool_choice not in (None, "none", "auto"):
        raise unsupported("tool_choice", "other than 'auto' and 'none' ")
    if request.modalities not in (None, [], ["text"]):
        raise unsupported("modalities", "other than text ")
    for name in _RESERVED_KWARGS:
        if name in (request.chat_template_kwargs or {}):
            raise InvalidRequest(f"chat_template_kwargs cannot set {name}.", param=f"chat_template_kwargs.{name}")


def _choices(request: ChatRequest, server: Server, http: Request, prompt: list[int]) -> list[Choice]:
    max_tokens = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    thinking = server.reasoning is not None and starts_in_thinking(server.reasoning, prompt)
    params = sampling_params(
        request,
        server,
        prompt_tokens=len(prompt),
        max_tokens=max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        param="messages",
    )
    # A budget that max_tokens ends first would only spoil the last tokens.
    if thinking and request.reasoning_max_tokens is not None and request.reasoning_max_tokens < params.max_tokens:
        params = _with_thinking_budget(params, server, request.reasoning_max_tokens)
    return [
        new_choice(
            request,
            server,
            http,
            index=index,
            prompt=prompt,
            params=for_choice(params, index),
            format=server.reasoning,
            thinking=thinking,
        )
        for index in range(request.n or 1)
    ]


def _with_thinking_budget(params: SamplingParams, server: Server, budget: int) -> SamplingParams:
    """After at most `budget` tokens of thought its end is forced, as the model would write it."""
    assert server.reasoning is not None
    end = server.reasoning.think_end
    forced = server.tokenizer.encode("\n</think>\n\n") if server.reasoning.name == "ernie_x1" else [end]
    # What is forced before the tag is thought, too.
    free = max(0, budget - forced.index(end))
    return msgspec.structs.replace(params, thinking_budget=free, think_end_ids=tuple(forced), think_end_id=end)
