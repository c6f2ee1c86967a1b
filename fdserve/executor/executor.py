"""The ranks of one engine, driven as one: every plan goes to all of them, rank 0 answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from fdserve.errors import RankError
from fdserve.executor.process import RankProcess
from fdserve.executor.wire import Load, Loading, Plan, Ready, StepResult, encode_frame


class Executor:
    """Ranks that are ready. `ready` is what rank 0 said of itself."""

    def __init__(self, ranks: list[RankProcess], ready: Ready) -> None:
        self.ready = ready
        self._ranks = ranks

    async def send(self, plan: Plan) -> None:
        """Give all ranks their next step. RankError if one is gone."""
        frame = encode_frame(plan)
        for rank in self._ranks:
            await rank.send(frame)

    async def receive(self) -> StepResult:
        """What the step sampled. RankError if a rank is gone or failed."""
        message = await self._ranks[0].receive()
        if not isinstance(message, StepResult):
            raise RankError(f"rank 0 sent {type(message).__name__} where a result was due")
        return message

    @property
    def pids(self) -> list[int]:
        """The ranks' process ids."""
        return [rank.pid for rank in self._ranks]


@asynccontextmanager
async def open_executor(loads: list[Load], on_loading: Callable[[Loading], None]) -> AsyncIterator[Executor]:
    """Start one rank for each of `loads` and wait until all are ready; stop them on leaving, however it is left.

    Raises RankError if one cannot start.
    """
    async with AsyncExitStack() as stack:
        ranks = []
        for load in loads:
            rank = await RankProcess.start(load)
            stack.push_async_callback(rank.stop)
            ranks.append(rank)
        ready = [await _loaded(rank, on_loading) for rank in ranks]
        yield Executor(ranks, ready[0])


async def _loaded(rank: RankProcess, on_loading: Callable[[Loading], None]) -> Ready:
    while not isinstance(message := await rank.receive(), Ready):
        if isinstance(message, Loading) and rank.rank == 0:
            on_loading(message)
    return message
