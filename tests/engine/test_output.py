"""The channel between the engine's loop and a request's reader, on both event loops."""

from __future__ import annotations

import anyio
import pytest

from fdserve.engine.output import MAX_PENDING_OF_GROUP, MAX_PENDING_TOKENS, Generation
from fdserve.engine.request import Group, TokenDelta, TokenLogprobs
from fdserve.errors import SlowReader

pytestmark = pytest.mark.anyio


def ids(deltas: list[TokenDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


class Fixture:
    """A generation, and how often it was cancelled."""

    def __init__(self, group: Group | None = None) -> None:
        self.cancels = 0
        self.generation = Generation(self._cancel, group or Group())

    def _cancel(self) -> None:
        self.cancels += 1


async def test_all_that_waits_comes_at_once() -> None:
    generation = Fixture().generation
    for token in range(3):
        assert generation.deliver(TokenDelta([token]))
    assert ids(await generation.receive()) == [0, 1, 2]
    assert generation.deliver(TokenDelta([3], finish_reason="length"))
    (last,) = await generation.receive()
    assert (last.token_ids, last.finish_reason) == ([3], "length")


async def test_a_waiting_reader_is_woken() -> None:
    generation = Fixture().generation
    seen: list[int] = []

    async def read() -> None:
        while len(seen) < 100:
            seen.extend(ids(await generation.receive()))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            for token in range(100):
                generation.deliver(TokenDelta([token]))
                if token % 3 == 0:
                    await anyio.lowlevel.checkpoint()
    assert seen == list(range(100))


async def test_a_cancelled_read_loses_nothing() -> None:
    generation = Fixture().generation
    seen: list[int] = []

    async def read() -> None:
        seen.extend(ids(await generation.receive()))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await anyio.lowlevel.checkpoint()
        generation.deliver(TokenDelta([1]))  # the reader is woken and cancelled at the same time
        tasks.cancel_scope.cancel()
    with anyio.move_on_after(0.01):
        await read()
    generation.deliver(TokenDelta([2]))
    with anyio.fail_after(5):
        await read()
    assert seen == [1, 2]


@pytest.mark.parametrize("waiting", [0, 2])
async def test_an_end_from_outside_follows_what_waits(waiting: int) -> None:
    generation = Fixture().generation
    for token in range(waiting):
        generation.deliver(TokenDelta([token]))
    generation.end(TokenDelta([], finish_reason="cancelled"))
    generation.end(TokenDelta([], finish_reason="error"))
    deltas = await generation.receive()
    assert ids(deltas) == list(range(waiting))
    assert [delta.finish_reason for delta in deltas] == [None] * waiting + ["cancelled"]
    assert generation.deliver(TokenDelta([9]))
    (again,) = await generation.receive()
    assert again.finish_reason == "cancelled"


async def test_an_end_wakes_the_reader() -> None:
    generation = Fixture().generation
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:

            async def read() -> None:
                (last,) = await generation.receive()
                assert last.finish_reason == "cancelled"

            tasks.start_soon(read)
            await anyio.lowlevel.checkpoint()
            generation.end(TokenDelta([], finish_reason="cancelled"))


async def test_a_reader_that_falls_behind_loses_its_request() -> None:
    generation = Fixture().generation
    for token in range(MAX_PENDING_TOKENS):
        assert generation.deliver(TokenDelta([token]))
    assert not generation.deliver(TokenDelta([-1]))
    deltas = await generation.receive()
    assert ids(deltas) == list(range(MAX_PENDING_TOKENS))
    assert isinstance(deltas[-1].error, SlowReader)


async def test_the_bound_counts_what_is_held() -> None:
    logprobs = [TokenLogprobs(-1.0, (), ())] * 3
    generation = Fixture().generation
    for _ in range(2):  # what the reader took counts no more
        delivered = 0
        while generation._pending + 9 <= MAX_PENDING_TOKENS:
            assert generation.deliver(TokenDelta([1, 2, 3], logprobs=logprobs))
            delivered += 1
        assert delivered == MAX_PENDING_TOKENS // 9
        assert len(await generation.receive()) == delivered
    for _ in range(MAX_PENDING_TOKENS):
        assert generation.deliver(TokenDelta([]))
    assert not generation.deliver(TokenDelta([]))


async def test_the_choices_of_a_request_have_a_bound_together() -> None:
    group = Group()
    generations = [Fixture(group).generation for _ in range(MAX_PENDING_OF_GROUP // 1024)]
    for generation in generations:
        assert all(generation.deliver(TokenDelta([token])) for token in range(1024))
    first, second, *others = generations
    await first.receive()
    assert not second.deliver(TokenDelta([1]))  # what the first one's reader has is not sent yet
    assert not others[0].deliver(TokenDelta([1]))
    assert Fixture().generation.deliver(TokenDelta([1]))  # of another request


async def test_what_a_reader_has_done_with_counts_no_more() -> None:
    group = Group()
    going, ending = Fixture(group).generation, Fixture(group).generation
    for _ in range(3):
        assert going.deliver(TokenDelta([1]))
        await going.receive()
    assert group.pending == 1
    assert ending.deliver(TokenDelta([1, 2], finish_reason="stop"))
    assert group.pending == 3
    await ending.receive()  # for the last time
    assert group.pending == 1


async def test_leaving_cancels() -> None:
    fixture = Fixture()
    with fixture.generation as generation:
        generation.deliver(TokenDelta([1]))
    assert fixture.cancels == 1
    assert generation.deliver(TokenDelta([2]))  # what the engine still has is dropped
