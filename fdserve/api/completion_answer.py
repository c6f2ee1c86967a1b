"""A plain completion's answer, whole or as a stream of events."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import cached_property, partial

import anyio
from msgspec import UNSET, structs

from fdserve.api.choice import Choice, Piece
from fdserve.api.generation import (
    ID_SIZE,
    SYSTEM_FINGERPRINT,
    collect_all,
    entry_size,
    forward_in_turn,
    gathered,
    off_loop_if_long,
)
from fdserve.api.logprobs import CompletionLogprobsWriter, extend, prompt_logprobs
from fdserve.api.usage import RunningUsage, usage, wants_usage
from fdserve.engine.request import TokenLogprobs
from fdserve.http.request import Request
from fdserve.http.response import Reply, encode, encoded_apart, event
from fdserve.protocol.completion import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from fdserve.protocol.generation import OptionalPromptLogprobs, OptionalUsage
from fdserve.server.server import Server
from fdserve.text.detokenizer import decode


class PromptReport:
    """What is told of a prompt's tokens: made once, for all choices that go on with it."""

    def __init__(self, server: Server, request: CompletionRequest, prompt: list[int]) -> None:
        self._untold = request.n or 1  # choices that have not told it
        self._tokenizer = server.tokenizer
        self._prompt = prompt
        self._echoed = request.logprobs if request.echo else None
        self._asked = request.prompt_logprobs
        self.taken = anyio.Event()
        self.echo: CompletionLogprobs | None = None
        self.offset = 0
        """Where the text of a choice begins behind the echo."""
        self.prompt_logprobs: OptionalPromptLogprobs = UNSET
        tops = [top for top in (self._echoed, self._asked) if top is not None]
        self.has_logprobs = bool(tops)
        """Whether it is made of more than the prompt."""
        text_and_ids = 4 * bool(request.echo) + ID_SIZE * bool(request.return_token_ids)
        self.size = len(prompt) * (sum(map(entry_size, tops)) + text_and_ids)
        """About how many characters it comes to."""

    @cached_property
    def text(self) -> str:
        """The prompt itself."""
        return decode(self._tokenizer, self._prompt, skip_special_tokens=False)

    def note_told(self) -> None:
        """A choice has told it; after the last one nothing is kept, for it takes much memory."""
        self._untold -= 1
        if not self._untold:
            self.echo, self.prompt_logprobs = None, UNSET

    def take(self, values: list[TokenLogprobs] | None) -> None:
        """Make it of the values that came with the prompt's first choice."""
        if self._echoed is not None:
            writer = CompletionLogprobsWriter(self._tokenizer, skip_special_tokens=False)
            self.echo = writer.write_prompt(self._prompt, _cut(values or [], self._echoed))
            self.offset = writer.offset
        if self._asked is not None and values is not None:
            self.prompt_logprobs = prompt_logprobs(self._tokenizer, self._prompt, _cut(values, self._asked))


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
        self._running_usage = RunningUsage(choices, per_prompt)
        self._reports = [PromptReport(server, request, choice.prompt) for choice in choices[::per_prompt]]
        self._writers: dict[int, CompletionLogprobsWriter] = {}
        self._begun: set[int] = set()
        """The choices of which something was sent."""

    async def send(self, reply: Reply) -> None:
        """Wait for every choice and send the completion."""
        wholes = await collect_all(self._choices)
        total = self._usage()

        def encoded() -> bytes:
            return encode(self._completion(encoded_apart(self._shapes(wholes)), total))

        size = sum(map(self._size, self._choices, wholes))
        await reply.text(await off_loop_if_long(self._server.encoding, size, encoded), "application/json")

    def _shapes(self, wholes: Sequence[Piece]) -> Iterator[CompletionChoice]:
        """The choices to send, one at a time: what is told of a prompt is made for its choices, and then let go."""
        index = 0
        for report, start in zip(self._reports, range(0, len(wholes), self._per_prompt), strict=True):
            report.take(wholes[start].prompt_logprobs)
            for choice, whole in self._best(wholes, start):
                shape = self._choice(choice, whole, first=True)
                shape.index = index
                index += 1
                yield shape

    def _size(self, choice: Choice, piece: Piece, *, first: bool = True) -> int:
        """About how many characters tell a piece of a choice; the first one comes with what is told of the prompt."""
        size = len(piece.content) + ID_SIZE * len(piece.token_ids)
        size += len(piece.logprobs) * entry_size(self._request.logprobs or 0)
        return size + self._report(choice).size if first else size

    def _report(self, choice: Choice) -> PromptReport:
        return self._reports[choice.index // self._per_prompt]

    def _best(self, wholes: Sequence[Piece], start: int) -> list[tuple[Choice, Piece]]:
        """Of the prompt whose choices begin there, those to send: the likeliest by the mean of a token."""
        n, own = self._request.n or 1, slice(start, start + self._per_prompt)
        pairs = list(zip(self._choices[own], wholes[own], strict=True))
        if n < len(pairs):
            pairs.sort(key=lambda pair: pair[0].mean_logprob, reverse=True)
        return pairs[:n]

    async def stream(self, reply: Reply) -> None:
        """Send an event for whatever comes, as it comes: choices in turn, each in order."""
        await reply.start_events()
        try:
            await forward_in_turn(self._choices, reply, gathered(self._request), self._told, first=self._learn)
        finally:
            total = self._usage()
        await reply.end_events(event(self._completion([], total)) if wants_usage(self._request) else b"")

    async def _learn(self, choice: Choice, piece: Piece) -> None:
        """Of each prompt the first choice learns what is told with the first event of all."""
        report = self._report(choice)
        if report.taken.is_set():
            return
        if choice.index % self._per_prompt == 0:
            await off_loop_if_long(self._server.encoding, report.size, partial(report.take, piece.prompt_logprobs))
            report.taken.set()
        elif report.has_logprobs:
            await report.taken.wait()

    async def _told(self, choice: Choice, piece: Piece) -> bytes:
        """The event of a piece; nothing where there is nothing to tell."""
        self._running_usage.count(choice)
        first = choice.index not in self._begun
        told = piece.logprobs or self._request.return_token_ids or piece.prompt_logprobs is not None
        ends = piece.finish_reason is not None
        if not (piece.content or told or ends or (first and self._request.echo)):
            return b""
        self._begun.add(choice.index)
        if not first and not piece.logprobs:  # nearly all of them
            return self._encoded(choice, piece, first=False)
        size = self._size(choice, piece, first=first)
        return await off_loop_if_long(self._server.encoding, size, partial(self._encoded, choice, piece, first=first))

    def _encoded(self, choice: Choice, piece: Piece, *, first: bool) -> bytes:
        shape = self._choice(choice, piece, first=first)
        shape.arrival_time = choice.arrival_time
        return event(self._event(shape))

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
                shape.text = self._report(choice).text + shape.text
            if self._request.return_token_ids:
                shape.prompt_token_ids = choice.prompt
            shape.prompt_logprobs = self._report(choice).prompt_logprobs
            self._report(choice).note_told()
        return shape

    def _logprobs(self, choice: Choice, piece: Piece, *, echo: bool) -> CompletionLogprobs:
        report = self._report(choice)
        if choice.index not in self._writers:
            skip = self._request.skip_special_tokens is not False
            self._writers[choice.index] = CompletionLogprobsWriter(
                self._server.tokenizer, skip_special_tokens=skip, offset=report.offset
            )
        lists = self._writers[choice.index].write(piece.logprobs, piece.ending)
        return extend(report.echo, lists) if echo and report.echo is not None else lists

    def _usage(self) -> OptionalUsage:
        return usage(self._choices, self._per_prompt, self._http)

    def _event(self, choice: CompletionChoice) -> Completion:
        options = self._request.stream_options
        so_far = self._running_usage.so_far() if options and options.continuous_usage_stats else None
        return self._completion([choice], so_far)

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
