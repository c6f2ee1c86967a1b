"""What chat and completions share while tokens come: choices, their text, and running them together."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import anyio
from anyio import to_thread

from fdserve.api.params import stop_strings
from fdserve.engine.output import Generation
from fdserve.engine.request import Request as EngineRequest
from fdserve.engine.request import SamplingParams, TokenDelta, TokenLogprobs
from fdserve.errors import InternalError, ServerError, Unavailable
from fdserve.http.request import Request
from fdserve.protocol.generation import (
    CompletionTokensDetails,
    FinishReason,
    GenerationRequest,
    PromptTokensDetails,
    Usage,
)
from fdserve.server import Server
from fdserve.text.reasoning import ReasoningFormat
from fdserve.text.stream import TextStream

if TYPE_CHECKING:
    from fdserve.text.tools import ToolCallDelta

T = TypeVar("T")

LONG_TEXT = 16_384  # characters from which tokenizing would hold up the other requests noticeably


@dataclass
class Piece:
    """What one wake-up brought a choice; `finish_reason` is set on its last piece.

    `token_ids` are the ids that count; `logprobs` has an entry for each of them but the one that ended the
    choice, or is empty where none were asked for.
    """

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Choice:
    """One choice of a response while it is generated, and its totals so far."""

    def __init__(self, server: Server, http: Request, index: int, request: EngineRequest, text: TextStream) -> None:
        self.index = index
        self.prompt = request.prompt
        self.generated = 0
        self.cached_tokens = 0
        self.stop_reason: str | int | None = None
        self.arrival_time = 0.0
        self._server = server
        self._http = http
        self._request = request
        self._text = text
        self._generation: Generation | None = None
        self._last_token = 0.0

    @property
    def reasoning_tokens(self) -> int:
        """How many of the generated tokens were reasoning."""
        return self._text.reasoning_tokens

    def submit(self) -> Generation:
        """Hand the request to the engine. Raises Overloaded or Unavailable."""
        self._generation = self._server.engine.submit(self._request)
        return self._generation

    async def next_piece(self) -> Piece:
        """Wait for tokens and return all that wait, as one piece.

        Raises the ServerError that ended the generation, if one did. Cancellation loses nothing.
        """
        assert self._generation is not None
        deltas = await self._generation.receive()
        piece = Piece()
        for delta in deltas:
            self._take(delta, piece)
            if piece.finish_reason is not None:
                break
        self._observe(len(piece.token_ids), piece.finish_reason)
        return piece

    def _take(self, delta: TokenDelta, piece: Piece) -> None:
        if delta.finish_reason in ("error", "cancelled"):
            raise _as_server_error(delta)
        self.cached_tokens = delta.cached_tokens or self.cached_tokens
        self.arrival_time = time.monotonic() - delta.started
        # The id that ends a choice counts, and is no text.
        shown = delta.token_ids if delta.stop_token_id is None else delta.token_ids[:-1]
        text = self._text.push(shown)
        piece.reasoning += text.reasoning
        piece.content += text.content
        used = len(delta.token_ids) if text.stop_matched is None else text.tokens_used
        piece.token_ids += delta.token_ids[:used]
        self.generated += used
        if delta.logprobs is not None:
            piece.logprobs += zip(shown[:used], delta.logprobs, strict=False)
        if text.stop_matched is not None:
            assert self._generation is not None
            self._generation.cancel()
            self._finish(piece, "stop", text.stop_matched)
        elif delta.finish_reason is not None:
            reason: FinishReason = "stop" if delta.finish_reason == "stop" else "length"
            eos = delta.stop_token_id in self._request.params.eos_token_ids
            self._finish(piece, reason, None if eos else delta.stop_token_id)

    def _finish(self, piece: Piece, reason: FinishReason, stop_reason: str | int | None) -> None:
        rest = self._text.finish()
        piece.reasoning += rest.reasoning
        piece.content += rest.content
        # What was held back may turn out to end with a stop string.
        matched = rest.stop_matched is not None
        piece.finish_reason = "stop" if matched else reason
        self.stop_reason = rest.stop_matched if matched else stop_reason

    def _observe(self, tokens: int, finish_reason: str | None) -> None:
        metrics = self._server.metrics
        now = time.monotonic()
        if tokens:
            if not self._last_token:
                metrics.first_token.observe(now - self._http.started)
            else:
                metrics.inter_token.observe((now - self._last_token) / tokens)
            self._last_token = now
        if finish_reason is not None:
            metrics.whole.observe(now - self._http.started)


def new_choice(
    request: GenerationRequest,
    server: Server,
    http: Request,
    *,
    index: int,
    prompt: list[int],
    params: SamplingParams,
    format: ReasoningFormat | None = None,
    thinking: bool = False,
) -> Choice:
    """Choice number `index` of a response; `thinking` says whether its first token is a thought in `format`."""
    text = TextStream(
        server.tokenizer,
        format=format,
        thinking=thinking,
        stop=stop_strings(request),
        skip_special_tokens=request.skip_special_tokens is not False,
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        min_tokens=params.min_tokens,
    )
    engine_request = EngineRequest(
        id=f"{uuid.uuid4().hex}-{index}", prompt=prompt, params=params, priority=request.priority or 0
    )
    return Choice(server, http, index, engine_request, text)


def _as_server_error(delta: TokenDelta) -> ServerError:
    if isinstance(delta.error, ServerError):
        return delta.error
    if delta.finish_reason == "cancelled":
        return Unavailable("The request was cancelled by the server.")
    return InternalError("The request failed in the engine.")


@contextmanager
def submitted(choices: Sequence[Choice]) -> Iterator[None]:
    """Have the engine generate the choices inside the block; leaving it cancels what is not finished.

    Raises Overloaded or Unavailable, and then none of them runs.
    """
    with ExitStack() as stack:
        for choice in choices:
            stack.enter_context(choice.submit())
        yield


async def for_each(choices: Sequence[Choice], consume: Callable[[Choice], Awaitable[None]]) -> None:
    """Run `consume` on all choices at the same time; the first error cancels the others and is raised."""
    if len(choices) == 1:
        await consume(choices[0])
        return
    errors: list[Exception] = []

    async def guarded(choice: Choice) -> None:
        try:
            await consume(choice)
        except Exception as error:
            errors.append(error)
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for choice in choices:
            tasks.start_soon(guarded, choice)
    if errors:
        raise errors[0]


async def collect(choice: Choice) -> Piece:
    """Wait for the whole choice, as one piece. Raises like `Choice.next_piece`; cancellation loses it."""
    whole = Piece()
    reasonings: list[str] = []
    contents: list[str] = []
    while whole.finish_reason is None:
        piece = await choice.next_piece()
        reasonings.append(piece.reasoning)
        contents.append(piece.content)
        whole.token_ids += piece.token_ids
        whole.logprobs += piece.logprobs
        whole.finish_reason = piece.finish_reason
    whole.reasoning, whole.content = "".join(reasonings), "".join(contents)
    return whole


async def collect_all(choices: Sequence[Choice]) -> list[Piece]:
    """`collect` for all choices at the same time, in their order."""
    wholes: dict[int, Piece] = {}

    async def one(choice: Choice) -> None:
        wholes[choice.index] = await collect(choice)

    await for_each(choices, one)
    return [wholes[choice.index] for choice in choices]


def usage(choices: Sequence[Choice], per_prompt: int, http: Request) -> Usage:
    """The counts of a response in which `per_prompt` choices at a time share a prompt; the access log gets them too."""
    firsts = choices[::per_prompt]
    prompt = sum(len(choice.prompt) for choice in firsts)
    completion = sum(choice.generated for choice in choices)
    http.prompt_tokens, http.completion_tokens = prompt, completion
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(sum(choice.cached_tokens for choice in firsts)),
        completion_tokens_details=CompletionTokensDetails(sum(choice.reasoning_tokens for choice in choices)),
    )


def wants_usage(request: GenerationRequest) -> bool:
    """Whether the last event of a stream is to carry the usage."""
    return request.stream_options is not None and bool(request.stream_options.include_usage)


async def off_loop_if_long(server: Server, size: int, work: Callable[[], T]) -> T:
    """Run `work`, in a thread where `size` characters make it long. Cancellation waits for the thread."""
    if size <= LONG_TEXT:
        return work()
    return await to_thread.run_sync(work, limiter=server.tokenizing)
