"""`truncation: "auto"`: leaving out the oldest turns of a conversation that does not fit the context."""

from __future__ import annotations

from fdserve.api.chat import check_chat, rendered
from fdserve.api.params import check_request
from fdserve.http.request import Request
from fdserve.protocol.chat import ChatMessage, ChatRequest
from fdserve.server.server import Server

_SYSTEM = ("system", "developer")


async def drop_oldest_turns(chat: ChatRequest, server: Server, http: Request) -> None:
    """Leave out as many turns from the beginning as it takes, and no system message; the last turn always stays.

    Room is left for the request's limit of tokens, or for an eighth of the context where it has none, and for half of
    the context at most. Raises like `prepare_chat`, and cancellation does the same.
    """
    check_request(chat, server)
    check_chat(chat, server)
    context = server.max_model_len
    room = min(chat.max_completion_tokens or context // 8, context // 2)
    messages = chat.messages or []
    turns = [index for index, message in enumerate(messages) if message.role == "user"] or [0]
    turns[0] = 0

    async def fits(first: int) -> bool:
        chat.messages = _from_turn(messages, turns[first])
        _, prompt = await rendered(chat, server, http)
        return len(prompt) + room <= context

    # Mostly all of it fits. Else: the fewest turns left out, between `least`, which is too few, and `most`.
    if await fits(0):
        return
    least, most = 0, len(turns) - 1
    while most - least > 1:
        middle = (least + most) // 2
        if await fits(middle):
            most = middle
        else:
            least = middle
    chat.messages = _from_turn(messages, turns[most])


def _from_turn(messages: list[ChatMessage], start: int) -> list[ChatMessage]:
    return [message for message in messages[:start] if message.role in _SYSTEM] + messages[start:]
