"""A chat's answer, whole or as a stream of chunks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from msgspec import UNSET, UnsetType

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
from fdserve.api.logprobs import chat_logprobs, prompt_logprobs
from fdserve.api.usage import RunningUsage, usage, wants_usage
from fdserve.http.request import Request
from fdserve.http.response import Reply, encode, encoded_apart, event
from fdserve.protocol.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatFinishReason,
    ChatLogprobs,
    ChatRequest,
    Delta,
)
from fdserve.protocol.generation import OptionalPromptLogprobs, Usage
from fdserve.protocol.tools import FunctionCall, FunctionCallDelta, ToolCall, ToolCallPart
from fdserve.server.server import Server
from fdserve.text.tools import ToolCallDelta


class ChatAnswer:
    """One response, whole or as a stream of chunks."""

    def __init__(self, id: str, request: ChatRequest, server: Server, http: Request, choices: Sequence[Choice]) -> None:
        self._id = id
        self._request = request
        self._server = server
        self._http = http
        self._choices = choices
        self._created = int(time.time())
        self._running_usage = RunningUsage(choices, len(choices))
        # About how many characters tell the ids of the prompt, which each choice does.
        self._ids_size = ID_SIZE * len(choices) * len(choices[0].prompt) if request.return_token_ids else 0
        self._legacy = bool(request.functions)
        options = request.stream_options
        self._usage_in_each = options is not None and bool(options.continuous_usage_stats)
        self._usage_at_end = wants_usage(request)
        self._service_tier: str | UnsetType = "default" if request.service_tier is not None else UNSET

    async def send(self, reply: Reply) -> None:
        """Wait for every choice and send the completion."""
        wholes = await collect_all(self._choices)
        total = self._usage()

        def encoded() -> bytes:
            completion = ChatCompletion(
                id=self._id,
                created=self._created,
                model=self._server.model_name,
                choices=encoded_apart(self._choice(*pair) for pair in zip(self._choices, wholes, strict=True)),
                usage=total,
                service_tier=self._service_tier,
                system_fingerprint=SYSTEM_FINGERPRINT,
                prompt_logprobs=self._prompt_logprobs(wholes[0]),
            )
            return encode(completion)

        size = self._size(wholes) + self._ids_size
        await reply.text(await off_loop_if_long(self._server.encoding, size, encoded), "application/json")

    def _size(self, pieces: Sequence[Piece]) -> int:
        """About how many characters tell the pieces."""
        size = len(pieces[0].prompt_logprobs or ()) * entry_size(self._request.prompt_logprobs or 0)
        for piece in pieces:
            size += len(piece.content) + len(piece.reasoning) + ID_SIZE * len(piece.token_ids)
            size += len(piece.logprobs) * entry_size(self._request.top_logprobs or 0)
        return size

    def _choice(self, choice: Choice, whole: Piece) -> ChatChoice:
        message = AssistantMessage(content=whole.content, reasoning_content=whole.reasoning or None)
        calls = [_tool_call(delta) for delta in whole.tool_calls]
        if calls and not whole.content:
            message.content = None
        if calls and self._legacy:
            message.function_call = calls[0].function
        elif calls:
            message.tool_calls = calls
        if self._request.return_token_ids:
            message.prompt_token_ids = choice.prompt
            message.completion_token_ids = whole.token_ids
        finish_reason = self._finish_reason(whole)
        assert finish_reason is not None
        return ChatChoice(
            index=choice.index,
            message=message,
            logprobs=self._logprobs(whole),
            finish_reason=finish_reason,
            stop_reason=choice.stop_reason,
        )

    def _finish_reason(self, piece: Piece) -> ChatFinishReason | None:
        if piece.finish_reason == "tool_calls" and self._legacy:
            return "function_call"
        return piece.finish_reason

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        return chat_logprobs(self._server.tokenizer, piece.logprobs) if self._request.logprobs else None

    def _prompt_logprobs(self, piece: Piece) -> OptionalPromptLogprobs:
        if piece.prompt_logprobs is None:
            return UNSET
        return prompt_logprobs(self._server.tokenizer, self._choices[0].prompt, piece.prompt_logprobs)

    def _usage(self) -> Usage:
        return usage(self._choices, len(self._choices), self._http)

    async def stream(self, reply: Reply) -> None:
        """Send an event for whatever comes, as it comes: choices in turn, each in order."""
        await reply.start_events()
        opening = await off_loop_if_long(
            self._server.encoding, self._ids_size, lambda: b"".join(self._opening(choice) for choice in self._choices)
        )
        await reply.events(opening)
        try:
            await forward_in_turn(self._choices, reply, gathered(self._request), self._encoded)
        finally:
            total = self._usage()
        last = ChatChunk(
            id=self._id,
            created=self._created,
            model=self._server.model_name,
            choices=[],
            usage=total,
            service_tier=self._service_tier,
            system_fingerprint=SYSTEM_FINGERPRINT,
        )
        await reply.end_events(event(last) if self._usage_at_end else b"")

    async def _encoded(self, choice: Choice, piece: Piece) -> bytes:
        if not piece.logprobs and piece.prompt_logprobs is None:  # nearly all of them
            return self._events(choice, piece)
        return await off_loop_if_long(self._server.encoding, self._size([piece]), partial(self._events, choice, piece))

    def _opening(self, choice: Choice) -> bytes:
        delta = Delta(role="assistant", content="")
        if self._request.return_token_ids:
            delta.prompt_token_ids = choice.prompt
        return event(self._chunk(ChatChunkChoice(index=choice.index, delta=delta)))

    def _events(self, choice: Choice, piece: Piece) -> bytes:
        """The piece as chunks: reasoning, content, calls, then the end; nothing where there is nothing to tell."""
        if self._usage_in_each:
            self._running_usage.count(choice)
        deltas = self._deltas(piece)
        chunks = [
            self._chunk(ChatChunkChoice(index=choice.index, delta=delta, arrival_time=choice.arrival_time))
            for delta in deltas
        ]
        if chunks:
            # The tokens of a piece are told once, whichever of its texts they belong to.
            chunks[0].choices[0].logprobs = self._logprobs(piece) if piece.logprobs else None
            chunks[0].prompt_logprobs = self._prompt_logprobs(piece)
            if self._request.return_token_ids:
                deltas[0].completion_token_ids = piece.token_ids
        if piece.finish_reason is not None:
            end = ChatChunkChoice(
                index=choice.index,
                delta=Delta(content=""),
                finish_reason=self._finish_reason(piece),
                stop_reason=choice.stop_reason,
                arrival_time=choice.arrival_time,
            )
            chunks.append(self._chunk(end))
        return b"".join(map(event, chunks))

    def _deltas(self, piece: Piece) -> list[Delta]:
        # Content is never left out: clients print it without looking, as FastDeploy's own example does.
        deltas = [Delta(content="", reasoning_content=piece.reasoning)] if piece.reasoning else []
        if content := piece.content:
            deltas.append(Delta(content=content))
        parts = [_part(delta) for delta in piece.tool_calls]
        if parts and not self._legacy:
            deltas.append(Delta(content=None, tool_calls=parts))
        elif parts and parts[0].index == 0:
            deltas.append(Delta(content=None, function_call=parts[0].function))
        told = piece.logprobs or (self._request.return_token_ids and piece.token_ids)
        return deltas or ([Delta(content="")] if told or piece.prompt_logprobs is not None else [])

    def _chunk(self, choice: ChatChunkChoice) -> ChatChunk:
        chunk = ChatChunk(
            id=self._id,
            created=self._created,
            model=self._server.model_name,
            choices=[choice],
            service_tier=self._service_tier,
            system_fingerprint=SYSTEM_FINGERPRINT,
        )
        if self._usage_in_each:
            chunk.usage = self._running_usage.so_far()
        elif self._usage_at_end:
            chunk.usage = None
        return chunk


def _tool_call(call: ToolCallDelta) -> ToolCall:
    assert call.id is not None
    assert call.name is not None
    return ToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))


def _part(delta: ToolCallDelta) -> ToolCallPart:
    part = ToolCallPart(index=delta.index, function=FunctionCallDelta(arguments=delta.arguments))
    if delta.id is not None:
        part.id, part.type = delta.id, "function"
    if delta.name is not None:
        part.function.name = delta.name
    return part
