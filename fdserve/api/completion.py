"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid

import anyio

from fdserve.api.generation import (
    Choice,
    Piece,
    collect_all,
    for_each,
    new_choice,
    off_loop_if_long,
    submitted,
    usage,
    wants_usage,
)
from fdserve.api.logprobs import CompletionLogprobsWriter
from fdserve.api.params import (
    check_choices,
    check_logprobs,
    check_request,
    check_token_ids,
    for_choice,
    read_request,
    sampling_params,
    unsupported,
)
from fdserve.errors import InvalidRequest
from fdserve.http.request import Request
from fdserve.http.response import Reply, event
from fdserve.protocol.completion import Completion, CompletionChoice, CompletionRequest
from fdserve.protocol.generation import OptionalUsage
from fdserve.server import Server

DEFAULT_MAX_TOKENS = 16


async def completions(server: Server, http: Request, reply: Reply) -> None:
    """Continue one or several prompts. Cancelling it cancels the generation."""
    server.check_ready()
    request = read_request(http.body, CompletionRequest)
    check_request(request, server)
    check_logprobs(request.logprobs is not None, server)
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise unsupported("best_of", "other than n ")
    prompts = await off_loop_if_long(server, len(http.body), lambda: _prompts(request, server))
    check_choices(len(prompts) * (request.n or 1), server, "prompt")
    choices = _choices(request, server, http, prompts)
    with submitted(choices):
        answer = _Answer(request, server, http, choices)
        if request.stream:
            await answer.stream(reply)
        else:
            await answer.send(reply)


def _prompts(request: CompletionRequest, server: Server) -> list[list[int]]:
    """The prompts' ids; a string, and a list of ids, is one prompt."""
    prompt = request.prompt
    if isinstance(prompt, str):
        prompts = [server.tokenizer.encode(prompt)]
    else:
        ids = [item for item in prompt if isinstance(item, int)]
        texts = [item for item in prompt if isinstance(item, str)]
        lists = [item for item in prompt if isinstance(item, list)]
        if len(prompt) not in (len(ids), len(texts), len(lists)):
            raise InvalidRequest("A prompt mixes texts, token ids or lists of token ids.", param="prompt")
        prompts = [server.tokenizer.encode(text) for text in texts] or lists or [ids]
    for token_ids in prompts:
        if not token_ids:
            raise InvalidRequest("A prompt is empty.", param="prompt")
        if min(token_ids) < 0:
            raise InvalidRequest("Token ids cannot be negative.", param="prompt")
        check_token_ids(token_ids, server, "prompt")
    return prompts


def _choices(request: CompletionRequest, server: Server, http: Request, prompts: list[list[int]]) -> list[Choice]:
    choices: list[Choice] = []
    for prompt in prompts:
        params = sampling_params(
            request,
            server,
            prompt_tokens=len(prompt),
            max_tokens=DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens,
            logprobs=request.logprobs,
            param="prompt",
        )
        for index in range(request.n or 1):
            own = for_choice(params, index)
            choices.append(new_choice(request, server, http, index=len(choices), prompt=prompt, params=own))
    return choices


class _Answer:
    """One response, whole or as a stream of events."""

    def __init__(self, request: CompletionRequest, server: Server, http: Request, choices: list[Choice]) -> None:
        self._request = request
        self._server = server
        self._http = http
        self._choices = choices
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._include_usage = wants_usage(request)
        skip = request.skip_special_tokens is not False
        self._writers = [CompletionLogprobsWriter(server.tokenizer, skip_special_tokens=skip) for _ in choices]

    async def send(self, reply: Reply) -> None:
        """Wait for every choice and send the completion."""
        wholes = await collect_all(self._choices)
        choices = [self._choice(*pair) for pair in zip(self._choices, wholes, strict=True)]
        for choice, shape in zip(self._choices, choices, strict=True):
            if self._request.return_token_ids:
                shape.prompt_token_ids = choice.prompt
        await reply.json(self._completion(choices, self._usage()))

    def _choice(self, choice: Choice, piece: Piece) -> CompletionChoice:
        shape = CompletionChoice(index=choice.index, text=piece.content, finish_reason=piece.finish_reason)
        if self._request.logprobs is not None:
            shape.logprobs = self._writers[choice.index].write(piece.logprobs)
        if self._request.return_token_ids:
            shape.completion_token_ids = piece.token_ids
        if piece.finish_reason is not None:
            shape.stop_reason = choice.stop_reason
        return shape

    async def stream(self, reply: Reply) -> None:
        """Send an event for whatever comes, as it comes: choices in turn, each in order."""
        lock = anyio.Lock()

        async def forward(choice: Choice) -> None:
            first, finished = True, False
            while not finished:
                piece = await choice.next_piece()
                finished = piece.finish_reason is not None
                ids = self._request.return_token_ids
                if piece.content or piece.logprobs or ids or finished:
                    shape = self._choice(choice, piece)
                    shape.arrival_time = choice.arrival_time
                    if ids and first:
                        shape.prompt_token_ids = choice.prompt
                    first = False
                    async with lock:
                        await reply.events(event(self._completion([shape], None)))

        await reply.start_events()
        try:
            await for_each(self._choices, forward)
        finally:
            total = self._usage()
        await reply.end_events(event(self._completion([], total)) if self._include_usage else b"")

    def _usage(self) -> OptionalUsage:
        return usage(self._choices, self._request.n or 1, self._http)

    def _completion(self, choices: list[CompletionChoice], total: OptionalUsage) -> Completion:
        completion = Completion(id=self._id, created=self._created, model=self._server.model_name, choices=choices)
        if self._include_usage or not self._request.stream:
            completion.usage = total
        return completion
