"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

from __future__ import annotations

from collections.abc import Sequence

from fdserve.api.chat import check_chat, prepare_chat, rendered
from fdserve.api.choice import Choice, Piece
from fdserve.api.fields import read_request
from fdserve.api.generation import gathered, response_id, running
from fdserve.api.messages_input import chat_request, prompt_request
from fdserve.api.messages_output import BlockWriter
from fdserve.api.params import check_request
from fdserve.api.usage import usage
from fdserve.http.request import Request
from fdserve.http.response import Reply, named_event
from fdserve.protocol.message_events import MessageDelta, MessageEvent, MessageStart, MessageStop, Ping, StopDelta
from fdserve.protocol.messages import (
    CountTokensRequest,
    Message,
    MessageDeltaUsage,
    MessagesRequest,
    MessageStopReason,
    MessageTokensDetails,
    MessageUsage,
    TokenCount,
)
from fdserve.server.server import Server


async def create_message(server: Server, http: Request, reply: Reply) -> None:
    """Generate the answer to a conversation. Cancelling it cancels the generation."""
    request = read_request(http.take_body(), MessagesRequest)
    choices = await prepare_chat(chat_request(request), server, http, form_field="output_config.format")
    id = http.response_id = response_id("msg_", request)
    with running(server, http, (id, request.request_id), choices):
        answer = _Answer(id, request, server, http, choices[0])
        if request.stream:
            await answer.stream(reply)
        else:
            await answer.send(reply)


async def count_tokens(server: Server, http: Request, reply: Reply) -> None:
    """How many tokens the prompt has, in all."""
    chat = prompt_request(read_request(http.take_body(), CountTokensRequest))
    check_request(chat, server)
    check_chat(chat, server)
    _, prompt = await rendered(chat, server, http)
    await reply.json(TokenCount(len(prompt)))


class _Answer:
    """One message, whole or as a stream of events."""

    def __init__(self, id: str, request: MessagesRequest, server: Server, http: Request, choice: Choice) -> None:
        self._id = id
        self._server = server
        self._http = http
        self._choice = choice
        self._tokens = gathered(request)
        hidden = request.thinking is not None and request.thinking.display == "omitted"
        self._writer = BlockWriter(hide_thoughts=hidden)

    async def send(self, reply: Reply) -> None:
        """Wait for the end and send the message."""
        piece = Piece()
        while piece.finish_reason is None:
            piece = await self._choice.next_piece()
            self._writer.push(piece)
        self._writer.finish()
        message = self._message()
        message.content = self._writer.blocks
        message.stop_reason, message.stop_sequence = self._stop(piece)
        await reply.json(message)

    async def stream(self, reply: Reply) -> None:
        """Send events for whatever comes, as it comes."""
        await reply.start_events()
        # How much of the prompt was cached is known with the first token, and clients look for it in the first event.
        piece = await self._choice.next_piece(self._tokens)
        await reply.events(_encoded([MessageStart(message=self._message()), Ping(), *self._writer.push(piece)]))
        try:
            while piece.finish_reason is None:
                piece = await self._choice.next_piece(self._tokens)
                if data := _encoded(self._writer.push(piece)):
                    await reply.events(data)
        finally:
            total = self._usage()
        stop_reason, stop_sequence = self._stop(piece)
        end = MessageDelta(
            delta=StopDelta(stop_reason=stop_reason, stop_sequence=stop_sequence),
            usage=MessageDeltaUsage(
                input_tokens=total.input_tokens,
                cache_read_input_tokens=total.cache_read_input_tokens,
                output_tokens=total.output_tokens,
                output_tokens_details=total.output_tokens_details,
            ),
        )
        await reply.end_events(_encoded([*self._writer.finish(), end, MessageStop()]), mark=b"")

    def _stop(self, piece: Piece) -> tuple[MessageStopReason, str | None]:
        if piece.finish_reason == "tool_calls":
            return "tool_use", None
        if piece.finish_reason == "length":
            return "max_tokens", None
        stop = self._choice.stop_reason
        return ("stop_sequence", stop) if isinstance(stop, str) else ("end_turn", None)

    def _message(self) -> Message:
        """The message as it stands, without content."""
        return Message(
            id=self._id,
            model=self._server.model_name,
            content=[],
            stop_reason=None,
            stop_sequence=None,
            usage=self._usage(),
        )

    def _usage(self) -> MessageUsage:
        total = usage([self._choice], 1, self._http)
        cached = total.prompt_tokens_details.cached_tokens
        return MessageUsage(
            input_tokens=total.prompt_tokens - cached,
            cache_read_input_tokens=cached,
            output_tokens=total.completion_tokens,
            output_tokens_details=MessageTokensDetails(total.completion_tokens_details.reasoning_tokens),
        )


def _encoded(events: Sequence[MessageEvent]) -> bytes:
    return b"".join(named_event(str(event.__struct_config__.tag), event) for event in events)
