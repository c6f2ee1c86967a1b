"""A plain completion's answer, whole or as a stream of events."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import anyio
from msgspec import structs

from fdserve.api.generation import SYSTEM_FINGERPRINT, Choice, Piece, collect_all, for_each, usage, wants_usage
from fdserve.api.logprobs import CompletionLogprobsWriter, extend, prompt_logprobs
from fdserve.engine.request import TokenLogprobs
from fdserve.http.request import Request
from fdserve.http.response import Reply, event
from fdserve.protocol.completion import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from fdserve.protocol.generation import OptionalUsage
from fdserve.server import Server
from fdserve.text.detokenizer import decode


class CompletionAnswer:
    """One response, whole or as a stream of events. `per_prompt` choices at a time share a prompt."""

    def __init__(
        self,
        id: str,
        request: CompletionRequest,
        server: Server,
        http: Request,
        choices: Sequence[Choice],
        *,
        per_prompt: int,
    ) -> None:
        self._id = id
        self._request = request
        self._server = server
        self._http = http
        self._choices = choices
        self._per_prompt = per_prompt
        self._created = int(time.time())
        skip = request.skip_special_tokens is not False
        self._writers = [CompletionLogprobsWriter(server.tokenizer, skip_special_tokens=skip) for _ in choices]

    async def send(self, reply: Reply) -> None:
        """Wait for every choice and send the completion."""
        wholes = await collect_all(self._choices)
        best = [pair for pairs in self._by_prompt(wholes) for pair in pairs]
        choices = [self._choice(choice, whole, first=True) for choice, whole in best]
        for index, choice in enumerate(choices):
            choice.index = index
        await reply.json(self._completion(choices, self._usage()))

    def _by_prompt(self, wholes: Sequence[Piece]) -> Iterator[list[tuple[Choice, Piece]]]:
        """For each prompt the choices to send: where more were generated, the likeliest by the mean of a token."""
        n = self._request.n or 1
        pairs = list(zip(self._choices, wholes, strict=True))
        for start in range(0, len(pairs), self._per_prompt):
            own = pairs[start : start + self._per_prompt]
            if n < len(own):
                own.sort(key=lambda pair: pair[0].mean_logprob, reverse=True)
            yield own[:n]

    async def stream(self, reply: Reply) -> None:
        """Send an event for whatever comes, as it comes: choices in turn, each in order."""
        lock = anyio.Lock(fast_acquire=True)
        tokens = self._request.max_streaming_response_tokens or 1

        async def forward(choice: Choice) -> None:
            first, finished = True, False
            while not finished:
                piece = await choice.next_piece(tokens)
                finished = piece.finish_reason is not None
                told = piece.logprobs or self._request.return_token_ids or piece.prompt_logprobs is not None
                if piece.content or told or finished or (first and self._request.echo):
                    shape = self._choice(choice, piece, first=first)
                    shape.arrival_time = choice.arrival_time
                    first = False
                    async with lock:
                        await reply.events(event(self._event(shape)))

        await reply.start_events()
        try:
            await for_each(self._choices, forward)
        finally:
            total = self._usage()
        await reply.end_events(event(self._completion([], total)) if wants_usage(self._request) else b"")

    def _choice(self, choice: Choice, piece: Piece, *, first: bool) -> CompletionChoice:
        """The piece; the first one of a choice, and a whole one, comes with what is told of the prompt."""
        shape = CompletionChoice(index=choice.index, text=piece.content, finish_reason=piece.finish_reason)
        if self._request.logprobs is not None:
            shape.logprobs = self._logprobs(choice, piece, echo=first and bool(self._request.echo))
        if self._request.return_token_ids:
            shape.completion_token_ids = piece.token_ids
        if piece.finish_reason is not None:
            shape.stop_reason = choice.stop_reason
        if first:
            if self._request.echo:
                shape.text = decode(self._server.tokenizer, choice.prompt, skip_special_tokens=False) + shape.text
            if self._request.return_token_ids:
                shape.prompt_token_ids = choice.prompt
        if self._request.prompt_logprobs is not None and piece.prompt_logprobs is not None:
            values = _cut(piece.prompt_logprobs, self._request.prompt_logprobs)
            shape.prompt_logprobs = prompt_logprobs(self._server.tokenizer, choice.prompt, values)
        return shape

    def _logprobs(self, choice: Choice, piece: Piece, *, echo: bool) -> CompletionLogprobs:
        writer = self._writers[choice.index]
        if not echo:
            return writer.write(piece.logprobs, piece.ending)
        assert self._request.logprobs is not None
        values = _cut(piece.prompt_logprobs or [], self._request.logprobs)
        return extend(writer.write_prompt(choice.prompt, values), writer.write(piece.logprobs, piece.ending))

    def _usage(self) -> OptionalUsage:
        return usage(self._choices, self._per_prompt, self._http)

    def _event(self, choice: CompletionChoice) -> Completion:
        options = self._request.stream_options
        return self._completion([choice], self._usage() if options and options.continuous_usage_stats else None)

    def _completion(self, choices: list[CompletionChoice], total: OptionalUsage) -> Completion:
        completion = Completion(
            id=self._id,
            created=self._created,
            model=self._server.model_name,
            choices=choices,
            system_fingerprint=SYSTEM_FINGERPRINT,
        )
        if wants_usage(self._request) or not self._request.stream:
            completion.usage = total
        return completion


def _cut(values: Sequence[TokenLogprobs], k: int) -> list[TokenLogprobs]:
    """The entries with the k likeliest tokens only: an echo and prompt_logprobs may want different numbers."""
    return [structs.replace(value, top_ids=value.top_ids[:k], top_logprobs=value.top_logprobs[:k]) for value in values]
