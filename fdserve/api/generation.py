"""What the endpoints share while tokens come: running choices together."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TypeVar

import anyio
from anyio import CapacityLimiter, to_thread

from fdserve import __version__
from fdserve.api.choice import Choice, Piece, join
from fdserve.api.params import check_logprobs_told, stop_table
from fdserve.api.token_rules import TokenRules, token_rules
from fdserve.http.request import Request
from fdserve.http.response import Reply
from fdserve.protocol.generation import GenerationRequest
from fdserve.server.server import Server
from fdserve.text.stop import StopTable

T = TypeVar("T")

LONG_TEXT = 16_384  # characters from which tokenizing or encoding would hold up the other requests noticeably
MAX_GATHERED = 1024
"""Tokens of a choice that are gathered at most before they are sent."""
JOINED_PIECES = 256
"""The pieces of a whole answer take several times the memory of one that is made of so many."""
SYSTEM_FINGERPRINT = f"fdserve-{__version__}"


def response_id(prefix: str, request: GenerationRequest) -> str:
    """The id of a response: the request's own after the prefix, which is not put there twice, else a new one."""
    given = request.request_id
    return prefix + (given.removeprefix(prefix) if given else uuid.uuid4().hex)


@contextmanager
def running(server: Server, http: Request, ids: Iterable[str | None], choices: Sequence[Choice]) -> Iterator[None]:
    """`submitted`, and inside the block the request can be cancelled by any of the ids and by its X-Request-Id."""

    def cancel() -> None:
        for choice in choices:
            choice.cancel()

    with server.running.register([http.id, *filter(None, ids)], cancel), submitted(choices):
        yield


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


async def forward_in_turn(
    choices: Sequence[Choice],
    reply: Reply,
    tokens: int,
    events: Callable[[Choice, Piece], Awaitable[bytes]],
    *,
    first: Callable[[Choice, Piece], Awaitable[None]] | None = None,
) -> None:
    """Send what `events` makes of all that comes, as it comes: choices in turn, each in order, `tokens` at a time.

    Events are made one after the other, when they can be sent: for a client that reads slowly they would take much more
    memory than what they are made of. `first` comes before the turn, and may wait for another choice. Raises like
    `for_each`. Cancellation loses what was not sent.
    """
    turn = anyio.Lock(fast_acquire=True) if len(choices) > 1 else nullcontext()

    async def forward(choice: Choice) -> None:
        finished = False
        while not finished:
            piece = await choice.next_piece(tokens)
            finished = piece.finish_reason is not None
            if first is not None:
                await first(choice, piece)
            async with turn:
                if data := await events(choice, piece):
                    await reply.events(data)

    await for_each(choices, forward)


def gathered(request: GenerationRequest) -> int:
    """How many tokens of a choice to gather before they are sent."""
    return min(request.max_streaming_response_tokens or 1, MAX_GATHERED)


async def collect_all(choices: Sequence[Choice]) -> list[Piece]:
    """Wait for all choices at the same time; each as one piece, in their order.

    Raises like `Choice.next_piece`, and InvalidRequest for more logprobs than the memory may hold. Cancellation loses
    all.
    """
    wholes: dict[int, Piece] = {}
    logprobs = 0

    async def collect(choice: Choice) -> None:
        nonlocal logprobs
        pieces = [await choice.next_piece()]
        while pieces[-1].finish_reason is None:
            logprobs += sum([1 + len(values.top_ids) for _, values in pieces[-1].logprobs])
            check_logprobs_told(logprobs, "logprobs")
            if len(pieces) >= JOINED_PIECES:
                pieces = [join(pieces)]
            pieces.append(await choice.next_piece())
        wholes[choice.index] = join(pieces)

    await for_each(choices, collect)
    return [wholes[choice.index] for choice in choices]


async def off_loop_if_long(limiter: CapacityLimiter, size: int, work: Callable[[], T], *, always: bool = False) -> T:
    """Run `work`, in a thread where `size` characters make it long, or always. Cancellation waits for the thread.

    `limiter` bounds the threads: one of the server's.
    """
    if size <= LONG_TEXT and not always:
        return work()
    return await to_thread.run_sync(work, limiter=limiter)


ID_SIZE = 6
"""About how many characters tell a token's id."""


async def prepared_words(request: GenerationRequest, server: Server, http: Request) -> tuple[TokenRules, StopTable]:
    """What the request says of tokens, and its stop strings: for all of its choices. Raises like `token_rules`.

    Thousands of words take tens of milliseconds. Cancellation waits for a thread.
    """
    return await off_loop_if_long(
        server.tokenizing, http.body_size, lambda: (token_rules(request, server), stop_table(request))
    )


def entry_size(top: int) -> int:
    """About how many characters tell a token's logprob and those of the `top` likeliest ones."""
    return 48 * (1 + top)
