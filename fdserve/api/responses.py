"""POST /v1/responses, and GET and DELETE of the responses that are stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

import msgspec
from msgspec import structs

from fdserve.api.chat import prepare_chat
from fdserve.api.choice import Choice, Piece
from fdserve.api.fields import read_request
from fdserve.api.generation import gathered, off_loop_if_long, running
from fdserve.api.responses_input import as_own_fields, chat_request, input_items, wants_logprobs
from fdserve.api.responses_output import OutputWriter
from fdserve.api.responses_truncation import drop_oldest_turns
from fdserve.api.text_logprobs import TextLogprobs
from fdserve.api.usage import usage
from fdserve.errors import InvalidRequest, NotFound, Overloaded, PayloadTooLarge, ServerError
from fdserve.http.body_values import check_values
from fdserve.http.request import Request
from fdserve.http.response import Reply, encode, named_event
from fdserve.protocol.response_events import (
    ResponseCompleted,
    ResponseCreated,
    ResponseEvent,
    ResponseFailed,
    ResponseIncomplete,
    ResponseInProgress,
)
from fdserve.protocol.responses import (
    DeletedResponse,
    IncompleteDetails,
    InputItem,
    InputTokensDetails,
    OutputItem,
    OutputMessage,
    OutputTokensDetails,
    Reasoning,
    Response,
    ResponseError,
    ResponsesRequest,
    ResponseUsage,
    TextFormat,
    TextOptions,
)
from fdserve.server.response_store import StoredResponse
from fdserve.server.server import Server

_ITEMS = msgspec.json.Decoder(list[InputItem])
_ITEM = msgspec.json.Decoder(InputItem)
# What OpenAI's clients may ask of a stored response. With any of it they wait for another answer than they would get.
_QUERY = ("stream", "starting_after", "include")


async def create_response(server: Server, http: Request, reply: Reply) -> None:
    """Generate a response. Cancelling it cancels the generation, and then nothing is stored."""
    request = read_request(http.take_body(), ResponsesRequest)
    history = await _history(server, request.previous_response_id)
    own = _resolved(server, input_items(request))
    chat = chat_request(request, history, own)
    with as_own_fields():
        if request.truncation == "auto":
            await drop_oldest_turns(chat, server, http)
        choices = await prepare_chat(chat, server, http, form_field="text.format")
    id = http.response_id = f"resp_{uuid.uuid4().hex}"
    # Whoever knows a response's id can read it, so that is none that a client may choose.
    with running(server, http, (id, request.request_id), choices):
        answer = _Answer(id, request, server, http, choices[0], [*history, *own])
        if request.stream:
            await answer.stream(reply)
        else:
            await answer.send(reply)


async def retrieve_response(server: Server, http: Request, reply: Reply) -> None:
    """A stored response as it was sent. Raises InvalidRequest where the query asks for anything else."""
    _check_query(http)
    id = http.path_parameters["id"]
    stored = server.responses.get(id)
    if stored is None:
        raise _unknown(id)
    await reply.text(stored.body, "application/json")


async def delete_response(server: Server, http: Request, reply: Reply) -> None:
    """Forget a stored response. Those that continue it keep what they took from it."""
    id = http.path_parameters["id"]
    if not server.responses.delete(id):
        raise _unknown(id)
    await reply.json(DeletedResponse(id=id))


def _check_query(http: Request) -> None:
    for field, value in http.query:
        name = field.partition("[")[0]  # a list's is include[]
        if name in _QUERY and (name, value.lower()) != ("stream", "false"):
            message = f"{name} is not supported here: a stored response comes whole, as it was sent."
            raise InvalidRequest(message, param=name, code="unsupported_parameter")


def _unknown(id: str) -> NotFound:
    return NotFound(f"Response with id '{id[:200]}' not found.", code="response_not_found")


async def _history(server: Server, id: str | None) -> list[InputItem]:
    """The conversation up to a stored response, and with it. PayloadTooLarge where no body may be so large."""
    if id is None:
        return []
    stored = server.responses.get(id)
    if stored is None:
        message = f"Previous response with id '{id[:200]}' not found."
        raise InvalidRequest(message, param="previous_response_id", code="previous_response_not_found")
    texts = stored.conversation
    size = sum(map(len, texts))
    if size > server.config.max_request_bytes:
        message = f"The conversation is larger than the limit of {server.config.max_request_bytes} bytes for a request."
        raise PayloadTooLarge(message, param="previous_response_id")

    def decoded() -> list[InputItem]:
        check_values(*texts, holder="The conversation")
        return [*_ITEMS.decode(stored.history), *map(_ITEM.decode, stored.output.values())]

    # Python's lock is held all the same, but others get on between one conversation and the next.
    return await off_loop_if_long(server.tokenizing, size, decoded)


def _resolved(server: Server, items: Sequence[InputItem]) -> list[InputItem]:
    """The items, with those that references lead to in their places. Each stored item is read once at most."""
    known: dict[str, InputItem] = {}
    result = []
    for index, item in enumerate(items):
        if item.type == "item_reference" and item.id is not None:
            if item.id not in known and (stored := server.responses.item(item.id)) is not None:
                known[item.id] = _ITEM.decode(stored)
            if item.id not in known:
                message = f"Item with id '{item.id[:200]}' not found: send the item itself."
                raise NotFound(message, param=f"input[{index}].id", code="item_not_found")
            item = known[item.id]
        result.append(item)
    return result


class _Answer:
    """One response, whole or as a stream of events. `conversation` is all that the model was given."""

    def __init__(
        self,
        id: str,
        request: ResponsesRequest,
        server: Server,
        http: Request,
        choice: Choice,
        conversation: Sequence[InputItem],
    ) -> None:
        self._request = request
        self._server = server
        self._http = http
        self._choice = choice
        self._conversation = conversation
        logprobs = TextLogprobs(server, thinking=choice.thinking, continued=choice.continued)
        self._writer = OutputWriter(
            summarize=request.reasoning is not None and request.reasoning.summary is not None,
            logprobs=logprobs if wants_logprobs(request) else None,
        )
        self._sent = 0  # events
        self._response = _begun(id, request, server)

    async def send(self, reply: Reply) -> None:
        """Wait for the end and send the response."""
        piece = Piece()
        while piece.finish_reason is None:
            piece = await self._choice.next_piece()
            self._writer.push(piece)
        self._end(piece)
        await reply.json(self._response)

    async def stream(self, reply: Reply) -> None:
        """Send events for whatever comes, as it comes."""
        await reply.start_events()
        await reply.events(
            self._encoded([ResponseCreated(response=self._response), ResponseInProgress(response=self._response)])
        )
        tokens = gathered(self._request)
        try:
            piece = Piece()
            while piece.finish_reason is None:
                piece = await self._choice.next_piece(tokens)
                if data := self._encoded(self._writer.push(piece)):
                    await reply.events(data)
            last = self._end(piece)
        except ServerError as error:
            last = self._fail(error)
        finally:
            self._usage()
        # Each of them may be large: it has the whole answer.
        for event in last[:-1]:
            await reply.events(self._encoded([event]))
        await reply.end_events(self._encoded(last[-1:]), mark=b"")

    def _encoded(self, events: Sequence[ResponseEvent]) -> bytes:
        for event in events:
            event.sequence_number = self._sent
            self._sent += 1
        return b"".join(named_event(str(event.__struct_config__.tag), event) for event in events)

    def _end(self, piece: Piece) -> list[ResponseEvent]:
        """Finish the response after its last piece, and store it; returns the last events."""
        complete = piece.finish_reason != "length"
        events = self._writer.finish(complete=complete)
        response = self._snapshot()
        if complete:
            response.status, response.completed_at = "completed", int(time.time())
            events.append(ResponseCompleted(response=response))
        else:
            response.status, response.incomplete_details = "incomplete", IncompleteDetails("max_output_tokens")
            events.append(ResponseIncomplete(response=response))
        if response.store:
            self._store(response)
        return events

    def _fail(self, error: ServerError) -> list[ResponseEvent]:
        """The last event of a stream that an error ends."""
        self._http.failure = error.code
        self._writer.finish(complete=False)
        response = self._snapshot()
        response.status = "failed"
        overloaded = isinstance(error, Overloaded)
        response.error = ResponseError("rate_limit_exceeded" if overloaded else "server_error", error.message)
        return [ResponseFailed(response=response)]

    def _snapshot(self) -> Response:
        self._response.output = self._writer.items
        self._response.usage = self._usage()
        return self._response

    def _usage(self) -> ResponseUsage:
        total = usage([self._choice], 1, self._http)
        return ResponseUsage(
            input_tokens=total.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=total.prompt_tokens_details.cached_tokens),
            output_tokens=total.completion_tokens,
            output_tokens_details=OutputTokensDetails(total.completion_tokens_details.reasoning_tokens),
            total_tokens=total.total_tokens,
        )

    def _store(self, response: Response) -> None:
        # What came out is a fit input as it is; no model is given logprobs. Ids that a client made up are no secret:
        # they must lead nobody to an item.
        output = {item.id: encode(_without_logprobs(item)) for item in response.output}
        stored = StoredResponse(encode(response), encode(self._conversation), output)
        self._server.responses.put(response.id, stored)


def _without_logprobs(item: OutputItem) -> OutputItem:
    if not isinstance(item, OutputMessage):
        return item
    return structs.replace(item, content=[structs.replace(part, logprobs=[]) for part in item.content])


def _begun(id: str, request: ResponsesRequest, server: Server) -> Response:
    """The response before there is any output: what the request said, and what holds where it said nothing."""
    defaults = server.defaults
    temperature = request.temperature if request.temperature is not None else defaults.temperature
    top_p = request.top_p if request.top_p is not None else defaults.top_p
    text = request.text or TextOptions()
    return Response(
        id=id,
        created_at=int(time.time()),
        status="in_progress",
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        max_tool_calls=request.max_tool_calls,
        metadata=request.metadata or {},
        model=server.model_name,
        output=[],
        parallel_tool_calls=request.parallel_tool_calls is not False,
        previous_response_id=request.previous_response_id,
        prompt_cache_key=request.prompt_cache_key,
        reasoning=request.reasoning or Reasoning(),
        safety_identifier=request.safety_identifier,
        store=request.store is not False,
        temperature=1.0 if temperature is None else temperature,
        text=TextOptions(format=text.format or TextFormat(type="text"), verbosity=text.verbosity),
        tool_choice=request.tool_choice or "auto",
        tools=request.tools or [],
        top_logprobs=request.top_logprobs or 0,
        top_p=1.0 if top_p is None else top_p,
        truncation=request.truncation or "disabled",
        user=request.user,
    )
