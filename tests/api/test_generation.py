"""Choices that share a stream."""

from __future__ import annotations

from typing import cast

import anyio
import pytest

from fdserve.api.choice import Choice, Piece
from fdserve.api.generation import forward_in_turn
from fdserve.http.response import Reply

pytestmark = pytest.mark.anyio


class Finished:
    """A choice that is over with its first piece."""

    async def next_piece(self, tokens: int) -> Piece:
        return Piece(finish_reason="stop")


class Stuck:
    """A reply to a client that does not read until it is told to."""

    def __init__(self) -> None:
        self.sent = 0
        self.reads = anyio.Event()

    async def events(self, data: bytes) -> None:
        await self.reads.wait()
        self.sent += 1


async def test_events_are_made_when_they_can_be_sent() -> None:
    """They take several times the memory of the tokens that they tell of."""
    reply, made = Stuck(), 0

    async def events(choice: Choice, piece: Piece) -> bytes:
        nonlocal made
        made += 1
        return b"x"

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            choices = cast(list[Choice], [Finished() for _ in range(8)])
            tasks.start_soon(forward_in_turn, choices, cast(Reply, reply), 1, events)
            await anyio.wait_all_tasks_blocked()
            assert made == 1
            reply.reads.set()
    assert (made, reply.sent) == (8, 8)


async def test_what_comes_first_may_wait_for_another_choice() -> None:
    reply, learnt, order = Stuck(), anyio.Event(), list[str]()
    reply.reads.set()
    first, second = cast(list[Choice], [Finished(), Finished()])

    async def learn(choice: Choice, piece: Piece) -> None:
        if choice is first:
            await learnt.wait()
        else:
            learnt.set()

    async def events(choice: Choice, piece: Piece) -> bytes:
        order.append("first" if choice is first else "second")
        return b"x"

    with anyio.fail_after(5):
        await forward_in_turn([first, second], cast(Reply, reply), 1, events, first=learn)
    assert order == ["second", "first"]
