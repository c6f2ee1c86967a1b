"""A chat's answer, whole or as a stream of chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

import anyio

from fdserve.api.generation import Choice, Piece, collect_all, for_each, usage, wants_usage
from fdserve.api.logprobs import chat_logprobs
from fdserve.http.request import Request
from fdserve.http.response import Reply, event
from fdserve.protocol.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    Delta,
)
from fdserve.protocol.generation import OptionalUsage
from fdserve.server import Server


class ChatAnswer:
    """One response, whole or as a stream of chunks."""

    def __init__(self, request: ChatRequest, server: Server, http: Request, choices: Sequence[Choice]) -> None:
        self._request = request
        self._server = server
        self._http = http
        self._choices = choices
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._include_usage = wants_usage(request)

    async def send(self, reply: Reply) -> None:
        """Wait for every choice and send the completion."""
        wholes = await collect_all(self._choices)
        await reply.json(
            ChatCompletion(
                id=self._id,
                created=self._created,
                model=self._server.model_name,
                choices=[self._choice(*pair) for pair in zip(self._choices, wholes, strict=True)],
                usage=usage(self._choices, len(self._choices), self._http),
            )
        )

    def _choice(self, choice: Choice, whole: Piece) -> ChatChoice:
        assert whole.finish_reason is not None
        message = AssistantMessage(content=whole.content, reasoning_content=whole.reasoning or None)
        if self._request.return_token_ids:
            message.prompt_token_ids = choice.prompt
            message.completion_token_ids = whole.token_ids
        return ChatChoice(
            index=choice.index,
            message=message,
            logprobs=self._logprobs(whole),
            finish_reason=whole.finish_reason,
            stop_reason=choice.stop_reason,
        )

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        return chat_logprobs(self._server.tokenizer, piece.logprobs) if self._request.logprobs else None

    async def stream(self, reply: Reply) -> None:
        """Send an event for whatever comes, as it comes: choices in turn, each in order."""
        lock = anyio.Lock()

        async def forward(choice: Choice) -> None:
            finished = False
            while not finished:
                piece = await choice.next_piece()
                finished = piece.finish_reason is not None
                if data := self._events(choice, piece):
                    async with lock:
                        await reply.events(data)

        await reply.start_events()
        await reply.events(b"".join(self._opening(choice) for choice in self._choices))
        try:
            await for_each(self._choices, forward)
        finally:
            total = usage(self._choices, len(self._choices), self._http)
        await reply.end_events(event(self._chunk([], total)) if self._include_usage else b"")

    def _opening(self, choice: Choice) -> bytes:
        delta = Delta(role="assistant", content="")
        if self._request.return_token_ids:
            delta.prompt_token_ids = choice.prompt
        return event(self._chunk([ChatChunkChoice(index=choice.index, delta=delta)]))

    def _events(self, choice: Choice, piece: Piece) -> bytes:
        """The piece as chunks: reasoning, then content, then the end; nothing where there is nothing to tell."""
        # Content is never left out: clients print it without looking, as FastDeploy's own example does.
        deltas = [Delta(content="", reasoning_content=piece.reasoning)] if piece.reasoning else []
        if piece.content:
            deltas.append(Delta(content=piece.content))
        wants_ids = bool(self._request.return_token_ids)
        if not deltas and (piece.logprobs or (wants_ids and piece.token_ids)):
            deltas.append(Delta(content=""))
        chunks = [
            ChatChunkChoice(index=choice.index, delta=delta, arrival_time=choice.arrival_time) for delta in deltas
        ]
        if chunks:
            # The tokens of a piece are told once, whichever of its texts they belong to.
            chunks[0].logprobs = self._logprobs(piece) if piece.logprobs else None
            if wants_ids:
                deltas[0].completion_token_ids = piece.token_ids
        if piece.finish_reason is not None:
            chunks.append(
                ChatChunkChoice(
                    index=choice.index,
                    delta=Delta(content=""),
                    finish_reason=piece.finish_reason,
                    stop_reason=choice.stop_reason,
                    arrival_time=choice.arrival_time,
                )
            )
        return b"".join(event(self._chunk([chunk])) for chunk in chunks)

    def _chunk(self, choices: list[ChatChunkChoice], total: OptionalUsage = None) -> ChatChunk:
        chunk = ChatChunk(id=self._id, created=self._created, model=self._server.model_name, choices=choices)
        if self._include_usage:
            chunk.usage = total
        return chunk
