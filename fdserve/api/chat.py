"""POST /v1/chat/completions, and what other endpoints that lead to a chat need of it."""

from __future__ import annotations

import msgspec

from fdserve.api.chat_answer import ChatAnswer
from fdserve.api.choice import Choice, new_choice
from fdserve.api.fields import read_request
from fdserve.api.generation import off_loop_if_long, prepared_words, response_id, running
from fdserve.api.params import (
    check_choices,
    check_logprobs,
    check_logprobs_told,
    check_request,
    for_choice,
    sampling_params,
    unsupported,
)
from fdserve.api.prompt import check_prompt, max_tokens_of, prompt_field, render_prompt
from fdserve.api.structured import RESPONSE_FORMAT, compile_form
from fdserve.api.token_rules import TokenRules
from fdserve.api.tool_use import check_tools, tool_use
from fdserve.engine.request import Group, SamplingParams
from fdserve.errors import InvalidRequest
from fdserve.http.request import Request
from fdserve.http.response import Reply
from fdserve.protocol.chat import ChatRequest
from fdserve.server.server import Server
from fdserve.text.reasoning import starts_in_thinking
from fdserve.text.stop import StopTable


async def chat_completions(server: Server, http: Request, reply: Reply) -> None:
    """Generate the answer to a conversation. Cancelling it cancels the generation."""
    request = read_request(http.take_body(), ChatRequest)
    choices = await prepare_chat(request, server, http)
    id = http.response_id = response_id("chatcmpl-", request)
    with running(server, http, (id, request.request_id), choices):
        answer = ChatAnswer(id, request, server, http, choices)
        if request.stream:
            await answer.stream(reply)
        else:
            await answer.send(reply)


async def prepare_chat(
    request: ChatRequest, server: Server, http: Request, *, form_field: str = RESPONSE_FORMAT
) -> list[Choice]:
    """Check everything, render and tokenize the prompt, and make the choices, which nobody has submitted yet.

    `form_field` is where the client said what its response_format is.
    Raises NotFound for another model's name and InvalidRequest. Cancellation waits for a thread that tokenizes.
    """
    check_request(request, server)
    check_chat(request, server)
    _, prompt = await rendered(request, server, http)
    # A prompt without a template is gone on with, too.
    continued = bool(request.continue_final_message or request.disable_chat_template)
    thinking = server.reasoning is not None and starts_in_thinking(server.reasoning, prompt, continued)
    rules, stop = await prepared_words(request, server, http)
    params = _params(request, server, rules, len(prompt), thinking)
    if request.prompt_logprobs is not None:
        check_logprobs_told((1 + request.prompt_logprobs) * len(prompt), "prompt_logprobs")
    tools = tool_use(request)
    form = await compile_form(request, server, tools, form_field)
    whole = form is not None and form.whole
    if whole:
        params = msgspec.structs.replace(params, stop_token_ids=())
    group = Group()
    return [
        new_choice(
            request,
            server,
            http,
            group,
            index=index,
            prompt=prompt,
            # The prompt is the same for all of them: its logprobs are asked for once.
            params=for_choice(params if not index else msgspec.structs.replace(params, prompt_logprobs=None), index),
            stop=StopTable() if whole else stop,
            format=server.reasoning,
            thinking=thinking,
            continued=continued,
            tools=server.tools if tools else None,
            constraint=form.grammar.constraint(thinking) if form else None,
        )
        for index in range(request.n or 1)
    ]


async def rendered(request: ChatRequest, server: Server, http: Request) -> tuple[str, list[int]]:
    """`render_prompt`, in a thread where it may take long. Cancellation waits for the thread."""
    long = request.chat_template is not None  # whoever wrote it may have written a slow one
    # The body does not have all of a conversation that goes on from a stored one.
    size = max(http.body_size, sum(len(message.content or "") for message in request.messages or ()))
    return await off_loop_if_long(server.tokenizing, size, lambda: render_prompt(request, server), always=long)


def check_chat(request: ChatRequest, server: Server) -> None:
    """Raise InvalidRequest for what only a chat can have wrong."""
    check_prompt(request)
    if request.chat_template is not None and not server.config.trust_request_chat_template:
        message = (
            "This server takes no chat_template in a request: --trust-request-chat-template "
            "(trust_request_chat_template) allows it."
        )
        raise InvalidRequest(message, param="chat_template")
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true.", param="top_logprobs")
    check_logprobs(bool(request.logprobs), server)
    check_choices(request.n or 1, server, "n")
    check_tools(request, server)
    if request.modalities not in (None, [], ["text"]):
        raise unsupported("modalities", "other than text ")


def _params(
    request: ChatRequest, server: Server, rules: TokenRules, prompt_tokens: int, thinking: bool
) -> SamplingParams:
    params = sampling_params(
        request,
        server,
        rules,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens_of(request),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        param=prompt_field(request),
    )
    # A budget that max_tokens ends first would only spoil the last tokens.
    if thinking and request.reasoning_max_tokens is not None and request.reasoning_max_tokens < params.max_tokens:
        params = _with_thinking_budget(params, server, request.reasoning_max_tokens)
    if request.response_max_tokens is not None:
        params = _with_answer_limit(params, server, request.response_max_tokens, thinking)
    return params


def _with_thinking_budget(params: SamplingParams, server: Server, budget: int) -> SamplingParams:
    """After at most `budget` tokens of thought its end is forced, as the model would write it."""
    assert server.reasoning is not None
    end = server.reasoning.think_end
    forced = server.tokenizer.encode("\n</think>\n\n") if server.reasoning.name == "ernie_x1" else [end]
    # What is forced before the tag is thought, too.
    free = max(0, budget - forced.index(end))
    return msgspec.structs.replace(params, thinking_budget=free, think_end_ids=tuple(forced), think_end_id=end)


def _with_answer_limit(params: SamplingParams, server: Server, limit: int, thinking: bool) -> SamplingParams:
    """At most `limit` tokens come after the thought; without one, in all."""
    limit = min(limit, params.max_tokens)
    if thinking:
        assert server.reasoning is not None
        return msgspec.structs.replace(params, answer_limit=limit, think_end_id=server.reasoning.think_end)
    return msgspec.structs.replace(params, max_tokens=limit, min_tokens=min(limit, params.min_tokens))
