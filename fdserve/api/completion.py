"""POST /v1/completions."""

from __future__ import annotations

import msgspec

from fdserve.api.choice import Choice, new_choice
from fdserve.api.completion_answer import CompletionAnswer
from fdserve.api.fields import read_request
from fdserve.api.generation import off_loop_if_long, prepared_words, response_id, running
from fdserve.api.params import (
    check_choices,
    check_logprobs,
    check_logprobs_told,
    check_request,
    checked_prompt,
    for_choice,
    sampling_params,
    truncated,
)
from fdserve.api.prompt import tokenized
from fdserve.api.structured import compile_form
from fdserve.engine.request import Group
from fdserve.errors import InvalidRequest
from fdserve.http.request import Request
from fdserve.http.response import Reply
from fdserve.protocol.completion import CompletionRequest
from fdserve.server.server import Server
from fdserve.text.stop import StopTable

DEFAULT_MAX_TOKENS = 16


async def completions(server: Server, http: Request, reply: Reply) -> None:
    """Continue one or several prompts. Cancelling it cancels the generation."""
    request = read_request(http.take_body(), CompletionRequest)
    check_request(request, server)
    check_logprobs(request.logprobs is not None, server)
    _check_best_of(request)
    prompts = await off_loop_if_long(server.tokenizing, http.body_size, lambda: _prompts(request, server))
    choices = await _choices(request, server, http, prompts)
    id = http.response_id = response_id("cmpl-", request)
    with running(server, http, (id, request.request_id), choices):
        answer = CompletionAnswer(id, request, server, http, choices, per_prompt=candidates(request))
        if request.stream:
            await answer.stream(reply)
        else:
            await answer.send(reply)


def candidates(request: CompletionRequest) -> int:
    """How many choices are generated for each prompt; n of them are sent."""
    return request.best_of or request.n or 1


def _check_best_of(request: CompletionRequest) -> None:
    n = request.n or 1
    if request.best_of is None or request.best_of == n:
        return
    if request.best_of < n:
        raise InvalidRequest(f"best_of is {request.best_of}, less than n ({n}).", param="best_of")
    if request.stream:
        raise InvalidRequest("The best of several choices cannot be streamed: best_of must be n.", param="best_of")


def _prompts(request: CompletionRequest, server: Server) -> list[list[int]]:
    """The prompts' ids; a string, and a list of ids, is one prompt."""
    prompt, param = request.prompt, "prompt"
    if request.prompt_token_ids is not None:
        prompt, param = [*request.prompt_token_ids], "prompt_token_ids"
    if prompt is None:
        message = "Missing required parameter: 'prompt'."
        raise InvalidRequest(message, param="prompt", code="missing_required_parameter")
    given = [prompt] if isinstance(prompt, str) else prompt
    ids = [item for item in given if isinstance(item, int)]
    texts = [item for item in given if isinstance(item, str)]
    lists = [item for item in given if isinstance(item, list)]
    if len(given) not in (len(ids), len(texts), len(lists)):
        raise InvalidRequest("A prompt mixes texts, token ids or lists of token ids.", param="prompt")
    # Before anything is tokenized: a body can hold millions of prompts.
    count = len(texts) or len(lists) or 1
    check_choices(count * candidates(request), server, "prompt" if count > 1 else "n")
    prompts = [tokenized(text, server, param) for text in texts] or lists or [ids]
    limit = max_tokens_of(request)
    return [truncated(checked_prompt(token_ids, server, param), request, server, limit) for token_ids in prompts]


def max_tokens_of(request: CompletionRequest) -> int:
    """The request's limit, or OpenAI's."""
    return DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens


def _check_told(request: CompletionRequest, prompts: list[list[int]]) -> None:
    """Raise InvalidRequest for more logprobs of prompts than the memory may hold: every choice tells them."""
    echoed = request.logprobs if request.echo else None
    entries = sum(1 + top for top in (echoed, request.prompt_logprobs) if top is not None)
    param = "echo" if request.prompt_logprobs is None else "prompt_logprobs"
    check_logprobs_told(entries * (request.n or 1) * sum(map(len, prompts)), param)


async def _choices(request: CompletionRequest, server: Server, http: Request, prompts: list[list[int]]) -> list[Choice]:
    _check_told(request, prompts)
    rules, stop = await prepared_words(request, server, http)
    form = await compile_form(request, server)
    whole = form is not None and form.whole
    count = candidates(request)
    choices: list[Choice] = []
    group = Group()
    for prompt in prompts:
        params = sampling_params(
            request,
            server,
            rules,
            prompt_tokens=len(prompt),
            max_tokens=max_tokens_of(request),
            logprobs=request.logprobs,
            param="prompt" if request.prompt_token_ids is None else "prompt_token_ids",
        )
        if request.echo and request.logprobs is not None:
            most = max(request.logprobs, request.prompt_logprobs or 0)
            params = msgspec.structs.replace(params, prompt_logprobs=most)
        if count > (request.n or 1) and request.logprobs is None:
            params = msgspec.structs.replace(params, logprobs=0)  # what the best are told by
        if whole:
            params = msgspec.structs.replace(params, stop_token_ids=())
        for index in range(count):
            if index:  # the prompt is the same for all of them: its logprobs are asked for once
                params = msgspec.structs.replace(params, prompt_logprobs=None)
            choices.append(
                new_choice(
                    request,
                    server,
                    http,
                    group,
                    index=len(choices),
                    prompt=prompt,
                    params=for_choice(params, index),
                    stop=StopTable() if whole else stop,
                    constraint=form.grammar.constraint(None) if form else None,
                )
            )
    return choices
