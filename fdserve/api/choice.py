"""One choice of a response while it is generated: its text, its calls, its counts."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field

from fdserve.engine.output import Generation
from fdserve.engine.request import Constraint, Group, SamplingParams, TokenDelta, TokenLogprobs
from fdserve.engine.request import Request as EngineRequest
from fdserve.errors import InternalError, RequestCancelled, ServerError, Unavailable
from fdserve.http.request import Request
from fdserve.protocol.generation import FinishReason, GenerationRequest
from fdserve.server.server import Server
from fdserve.text.reasoning import ReasoningFormat
from fdserve.text.stop import StopTable
from fdserve.text.stream import Part, TextStream, calls_of, content_of, joined
from fdserve.text.tools import ToolCallDelta, ToolFormat


@dataclass
class Piece:
    """What one wake-up brought a choice; `finish_reason` is set on its last piece.

    The answer's `parts` are in their order, a delta a call. `token_ids` are the ids that count; `logprobs` has an
    entry for each of them but the one that ended the choice, whose entry is `ending`; both are empty where none were
    asked for. `prompt_logprobs` comes once, where asked for: an entry for every token of the prompt but the first.
    """

    reasoning: str = ""
    parts: list[Part] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    ending: tuple[int, TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None

    @property
    def content(self) -> str:
        """All text of the answer."""
        return content_of(self.parts)

    @property
    def tool_calls(self) -> list[ToolCallDelta]:
        """All that is told of calls."""
        return calls_of(self.parts)


def join(pieces: Iterable[Piece]) -> Piece:
    """The pieces as one."""
    pieces = list(pieces)
    whole = Piece(
        reasoning="".join([piece.reasoning for piece in pieces]),
        parts=joined([part for piece in pieces for part in piece.parts]),
    )
    for piece in pieces:
        whole.token_ids += piece.token_ids
        whole.logprobs += piece.logprobs
        whole.ending = piece.ending or whole.ending
        if piece.prompt_logprobs is not None:
            whole.prompt_logprobs = piece.prompt_logprobs
        whole.finish_reason = piece.finish_reason
    return whole


class Choice:
    """One choice of a response while it is generated, and its totals so far."""

    def __init__(
        self,
        server: Server,
        http: Request,
        index: int,
        request: EngineRequest,
        text: TextStream,
        *,
        thinking: bool,
        continued: bool,
    ) -> None:
        """For `thinking` and `continued` see `TextStream`."""
        self.index = index
        self.prompt = request.prompt
        self.params = request.params
        self.finish_reason: FinishReason | None = None
        self.submitted = self.first_token = self.last_token = 0.0
        """`time.monotonic()` when the engine was asked, and when tokens came; 0 until then."""
        self.thinking = thinking
        self.continued = continued
        self.generated = 0
        self.cached_tokens = 0
        self.stop_reason: str | int | None = None
        self.arrival_time = 0.0
        self._server = server
        self._http = http
        self._request = request
        self._text = text
        self._generation: Generation | None = None
        self._cancelled = False
        self._logprob_sum = 0.0

    @property
    def reasoning_tokens(self) -> int:
        """How many of the generated tokens were reasoning."""
        return self._text.reasoning_tokens

    @property
    def started(self) -> float:
        """`time.monotonic()` when its first step was planned, 0 until then."""
        return 0.0 if self._generation is None else self._generation.started

    @property
    def mean_logprob(self) -> float:
        """Of the generated tokens, the one that ended the choice included; 0 where none has one."""
        return self._logprob_sum / max(1, self.generated)

    def submit(self) -> Generation:
        """Hand the request to the engine. Raises Overloaded or Unavailable."""
        self._generation = self._server.engine.submit(self._request)
        self.submitted = time.monotonic()
        self._http.outputs.append(self)
        return self._generation

    def cancel(self) -> None:
        """End the generation at once; whoever waits for its pieces gets RequestCancelled. Idempotent."""
        self._cancelled = True
        if self._generation is not None:
            self._generation.cancel()

    async def next_piece(self, tokens: int = 1) -> Piece:
        """Wait for tokens and return all that wait, as one piece: at least `tokens` of them, or the last ones.

        Raises the ServerError that ended the generation, if one did. Cancellation loses nothing where `tokens` is 1.
        """
        piece = await self._next_piece()
        if tokens <= 1:
            return piece
        pieces, count = [piece], len(piece.token_ids)
        while count < tokens and pieces[-1].finish_reason is None:
            pieces.append(await self._next_piece())
            count += len(pieces[-1].token_ids)
        return join(pieces)

    async def _next_piece(self) -> Piece:
        assert self._generation is not None
        deltas = await self._generation.receive()
        piece = Piece()
        for delta in deltas:
            self._take(delta, piece)
            if piece.finish_reason is not None:
                break
        if len(piece.parts) > 1:
            piece.parts = joined(piece.parts)
        self._observe(len(piece.token_ids), piece.finish_reason)
        return piece

    def _take(self, delta: TokenDelta, piece: Piece) -> None:
        if delta.finish_reason in ("error", "cancelled"):
            raise RequestCancelled("The request was cancelled.") if self._cancelled else _as_server_error(delta)
        self.cached_tokens = delta.cached_tokens or self.cached_tokens
        self.arrival_time = time.monotonic() - delta.started
        if delta.prompt_logprobs is not None:
            piece.prompt_logprobs = delta.prompt_logprobs
        # The id that ends a choice counts, and is no text.
        shown = delta.token_ids if delta.stop_token_id is None else delta.token_ids[:-1]
        text = self._text.push(shown)
        piece.reasoning += text.reasoning
        piece.parts += text.parts
        used = len(delta.token_ids) if text.stop_matched is None else text.tokens_used
        piece.token_ids += delta.token_ids[:used]
        self.generated += used
        if delta.logprobs is not None:
            self._take_logprobs(list(zip(delta.token_ids[:used], delta.logprobs, strict=False)), len(shown), piece)
        if text.stop_matched is not None:
            assert self._generation is not None
            self._generation.cancel()
            self._finish(piece, "stop", text.stop_matched)
        elif delta.finish_reason is not None:
            reason: FinishReason = "stop" if delta.finish_reason == "stop" else "length"
            eos = delta.stop_token_id in self.params.eos_token_ids
            self._finish(piece, reason, None if eos else delta.stop_token_id)

    def _take_logprobs(self, entries: list[tuple[int, TokenLogprobs]], shown: int, piece: Piece) -> None:
        """Keep the entries of the tokens that count, of which the first `shown` are text."""
        piece.logprobs += entries[:shown]
        if len(entries) > shown:
            piece.ending = entries[shown]
        self._logprob_sum += sum(values.logprob for _, values in entries)

    def _finish(self, piece: Piece, reason: FinishReason, stop_reason: str | int | None) -> None:
        rest = self._text.finish()
        piece.reasoning += rest.reasoning
        piece.parts += rest.parts
        # What was held back may turn out to end with a stop string.
        if rest.stop_matched is not None:
            reason, stop_reason = "stop", rest.stop_matched
        piece.finish_reason = "tool_calls" if reason == "stop" and self._text.complete_calls else reason
        self.finish_reason = piece.finish_reason
        self.stop_reason = stop_reason

    def _observe(self, tokens: int, finish_reason: str | None) -> None:
        metrics = self._server.metrics
        now = time.monotonic()
        if tokens:
            if not self.first_token:
                self.first_token = now
                metrics.first_token.observe(now - self._http.started)
            else:
                metrics.inter_token.observe((now - self.last_token) / tokens)
            self.last_token = now
        if finish_reason is not None:
            metrics.whole.observe(now - self._http.started)


def new_choice(
    request: GenerationRequest,
    server: Server,
    http: Request,
    group: Group,
    *,
    index: int,
    prompt: list[int],
    params: SamplingParams,
    stop: StopTable,
    format: ReasoningFormat | None = None,
    thinking: bool = False,
    continued: bool = False,
    tools: ToolFormat | None = None,
    constraint: Constraint | None = None,
) -> Choice:
    """Choice number `index` of a response; for `thinking` and `continued` see `TextStream`."""
    text = TextStream(
        server.tokenizer,
        format=format,
        thinking=thinking,
        continued=continued,
        tools=tools,
        stop=stop,
        skip_special_tokens=request.skip_special_tokens is not False,
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        min_tokens=params.min_tokens,
    )
    engine_request = EngineRequest(
        id=f"{uuid.uuid4().hex}-{index}",
        prompt=prompt,
        params=params,
        priority=request.priority or 0,
        cache_salt=request.cache_salt or "",
        constraint=constraint,
        group=group,
    )
    return Choice(server, http, index, engine_request, text, thinking=thinking, continued=continued)


def _as_server_error(delta: TokenDelta) -> ServerError:
    if isinstance(delta.error, ServerError):
        return delta.error
    if delta.finish_reason == "cancelled":
        return Unavailable("The request was cancelled by the server.")
    return InternalError("The request failed in the engine.")
