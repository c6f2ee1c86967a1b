"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from typing import Any

import anyio
import msgspec

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
from fdserve.api.logprobs import chat_logprobs
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
from fdserve.http.response import Reply, event
from fdserve.protocol.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    Delta,
)
from fdserve.protocol.generation import OptionalUsage
from fdserve.server import Server
from fdserve.text.reasoning import starts_in_thinking

_RESERVED_KWARGS = ("messages", "tools", "add_generation_prompt")


async def chat_completions(server: Server, http: Request, reply: Reply) -> None:
    """Generate the answer to a conversation. Cancelling it cancels the generation."""
    server.check_ready()
    request = read_request(http.body, ChatRequest)
    check_request(request, server)
    _check_chat(request, server)
    prompt = await off_loop_if_long(server, len(http.body), lambda: _prompt_ids(request, server))
    choices = _choices(request, server, http, prompt)
    with submitted(choices):
        answer = _Answer(request, server, http, choices)
        if request.stream:
            await answer.stream(reply)
        else:
            await answer.send(reply)


def _check_chat(request: ChatRequest, server: Server) -> None:
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


def _prompt_ids(request: ChatRequest, server: Server) -> list[int]:
    kwargs = {name: value for name, value in (request.chat_template_kwargs or {}).items() if name not in EXTRA_FIELDS}
    if request.enable_thinking is not None:
        kwargs["enable_thinking"] = request.enable_thinking
    tools = request.tools if request.tool_choice != "none" else None
    messages = [_message(message, index) for index, message in enumerate(request.messages)]
    return server.tokenizer.encode(server.template.render(messages, tools=tools or None, **kwargs))


def _message(message: ChatMessage, index: int) -> dict[str, Any]:
    """The message as templates expect it: the text of its parts joined, no absent fields."""
    result: dict[str, Any] = {
        name: value for name, value in msgspec.structs.asdict(message).items() if value is not None
    }
    # Templates of the family know no developer: the role is OpenAI's newer word for the same thing.
    if message.role == "developer":
        result["role"] = "system"
    if isinstance(message.content, list):
        for at, part in enumerate(message.content):
            if part.type != "text" or part.text is None:
                raise InvalidRequest(
                    f"Content of type {part.type[:200]!r} cannot be used: this model takes text only."
                    if part.type != "text"
                    else "A text part needs its text.",
                    param=f"messages[{index}].content[{at}]",
                )
        result["content"] = "".join(part.text or "" for part in message.content)
    else:
        result["content"] = message.content or ""
    return result


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


class _Answer:
    """One response, whole or as a stream of chunks."""

    def __init__(self, request: ChatRequest, server: Server, http: Request, choices: list[Choice]) -> None:
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
