"""The ranks of one engine, driven as one: every plan goes to all of them, rank 0 answers."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager

from msgspec.structs import replace

from fdserve.errors import RankError
from fdserve.executor.process import RankProcess
from fdserve.executor.wire import Load, Loading, Plan, Ready, StepResult, encode_frame
from fdserve.ops.collectives import shared_bytes


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

    def check(self) -> None:
        """Raise RankError if a rank's process has ended, also while nothing is asked of it."""
        for rank in self._ranks:
            rank.check()

    @property
    def pids(self) -> list[int]:
        """The ranks' process ids."""
        return [rank.pid for rank in self._ranks]


@asynccontextmanager
async def open_executor(
    load: Load, on_loading: Callable[[Loading], None], *, slot_bytes: int = 0
) -> AsyncIterator[Executor]:
    """Start `load.world_size` ranks and wait until all are ready; stop them on leaving, however it is left.

    `load` is rank 0's; `slot_bytes` is what their largest collective needs of shared memory for each of them. Raises
    RankError if one cannot start.
    """
    async with AsyncExitStack() as stack:
        ranks = []
        try:
            with connected(load, slot_bytes) as loads:
                for each in loads:
                    rank = await RankProcess.start(each)
                    stack.push_async_callback(rank.stop)
                    ranks.append(rank)
        except OSError as error:  # no descriptors, processes or memory left: that may pass
            raise RankError(f"the ranks cannot be started: {error.strerror}") from error
        ready = [await _loaded(rank, on_loading) for rank in ranks]
        yield Executor(ranks, ready[0])


@contextmanager
def connected(load: Load, slot_bytes: int) -> Iterator[list[Load]]:
    """Each rank's `load`, with the descriptors by which the ranks reach each other; closed here on leaving.

    The memory has no name: it is gone with the last rank, however that ends.
    """
    if load.world_size == 1:
        yield [load]
        return
    with ExitStack() as stack:
        memory = os.memfd_create("fdserve-ranks")
        stack.callback(os.close, memory)
        slot_bytes = -(-slot_bytes // 64) * 64
        os.ftruncate(memory, shared_bytes(load.world_size, slot_bytes))
        load = replace(load, shared_memory=memory, slot_bytes=slot_bytes)
        loads = []
        ends = []
        for rank in range(1, load.world_size):
            zero, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            stack.enter_context(zero)
            stack.enter_context(other)
            ends.append(zero.fileno())
            loads.append(replace(load, rank=rank, peers=(other.fileno(),)))
        yield [replace(load, peers=tuple(ends)), *loads]


async def _loaded(rank: RankProcess, on_loading: Callable[[Loading], None]) -> Ready:
    while not isinstance(message := await rank.receive(), Ready):
        if isinstance(message, Loading) and rank.rank == 0:
            on_loading(message)
    return message
