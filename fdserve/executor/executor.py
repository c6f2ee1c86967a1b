"""The ranks of one engine, driven as one: every plan goes to all of them, rank 0 answers."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager

import anyio
from msgspec.structs import replace

from fdserve.errors import RankError
from fdserve.executor.process import RankProcess
from fdserve.executor.rank import LostPeer, Rank
from fdserve.executor.wire import Load, Loading, Masks, Plan, Ready, StepResult, encode_frame
from fdserve.ops.collectives import shared_bytes

LOOK_SECONDS = 0.1
"""How often a wait for rank 0 looks after the other ranks."""
CAUSE_SECONDS = 1.0
"""How long to listen for why ranks are lost."""


class Executor:
    """Ranks that are ready. `ready` is what rank 0 said of itself."""

    def __init__(self, ranks: list[Rank], ready: Ready) -> None:
        self.ready = ready
        self._ranks = ranks

    async def send(self, message: Plan | Masks) -> None:
        """Give all ranks their next step, or the masks it waits for. RankError if one is gone."""
        frame = encode_frame(message)
        try:
            for rank in self._ranks:
                await rank.send(frame)
        except RankError as error:
            raise await _cause(self._ranks, error) from None

    async def receive(self) -> StepResult:
        """What the step sampled. RankError if a rank is gone or failed. Cancellation loses nothing."""
        try:
            message = await self._receive()
        except RankError as error:
            raise await _cause(self._ranks, error) from None
        if not isinstance(message, StepResult):
            raise RankError(f"rank 0 sent {type(message).__name__} where a result was due")
        return message

    async def _receive(self) -> Loading | Ready | StepResult:
        while True:
            with anyio.move_on_after(LOOK_SECONDS):
                return await self._ranks[0].receive()
            self._check()

    async def check(self) -> None:
        """Raise RankError if a rank is gone, also while nothing is asked of it."""
        try:
            self._check()
        except RankError as error:
            raise await _cause(self._ranks, error) from None

    def _check(self) -> None:
        for rank in self._ranks:
            rank.check()

    @property
    def pids(self) -> list[int]:
        """The process ids of the ranks on this host."""
        return [rank.pid for rank in self._ranks if isinstance(rank, RankProcess)]


@asynccontextmanager
async def open_executor(
    load: Load,
    on_loading: Callable[[Loading], None],
    *,
    slot_bytes: int = 0,
    load_timeout: float = 300.0,
    accept: Callable[[], Awaitable[Sequence[Rank]]] | None = None,
) -> AsyncIterator[Executor]:
    """Start `load.world_size` ranks and wait until all are ready; kill them on leaving, however it is left.

    `load` is rank 0's; `slot_bytes` is what their largest exchange needs of memory for each of them; `load_timeout` is
    how many seconds a rank may load without telling of any progress. `accept` gives the ranks but 0 where those are on
    other hosts. Raises RankError if one cannot start.
    """
    slot_bytes = -(-slot_bytes // 64) * 64
    ranks: list[Rank] = []
    try:
        try:
            if accept is None:
                with connected(load, slot_bytes) as loads:
                    for each in loads:
                        ranks.append(await RankProcess.start(each))
            else:
                load = replace(load, slot_bytes=slot_bytes)
                ranks += await accept()
                for remote in ranks:
                    await remote.send(encode_frame(replace(load, rank=remote.rank)))
                ranks.insert(0, await RankProcess.start(load))
        except OSError as error:  # no descriptors, processes, memory or address left: that may pass
            raise RankError(f"the ranks cannot be started: {error.strerror or error}") from error
        yield Executor(ranks, await _all_loaded(ranks, on_loading, load_timeout))
    finally:
        async with anyio.create_task_group() as group:
            for rank in ranks:
                group.start_soon(rank.stop)


@contextmanager
def connected(load: Load, slot_bytes: int) -> Iterator[list[Load]]:
    """Each rank's `load`, with the descriptors by which the ranks reach each other; closed here on leaving.

    The memory has no name: it is gone with the last rank, however that ends. Ranks on GPUs leave it untouched, and meet
    at the rendezvous instead.
    """
    if load.world_size == 1:
        yield [load]
        return
    with ExitStack() as stack:
        memory = os.memfd_create("fdserve-ranks")
        stack.callback(os.close, memory)
        os.ftruncate(memory, shared_bytes(load.world_size, slot_bytes))
        load = replace(load, shared_memory=memory, slot_bytes=slot_bytes, rendezvous=f"127.0.0.1:{free_port()}")
        loads = []
        ends = []
        for rank in range(1, load.world_size):
            zero, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            stack.enter_context(zero)
            stack.enter_context(other)
            ends.append(zero.fileno())
            loads.append(replace(load, rank=rank, peers=(other.fileno(),)))
        yield [replace(load, peers=tuple(ends)), *loads]


def free_port() -> int:
    """A port of the loopback address that nobody listens on. Should another take it first, the ranks fail to start, and
    start again with another one.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def _all_loaded(ranks: list[Rank], on_loading: Callable[[Loading], None], timeout: float) -> Ready:
    """What rank 0 says once all are ready; the first to fail ends it for all, and so do ranks that are not alike."""
    ready: dict[int, Ready] = {}
    errors: list[RankError] = []

    async def watch(rank: Rank) -> None:
        try:
            ready[rank.rank] = await _loaded(rank, on_loading, timeout)
        except RankError as error:
            errors.append(error)
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for rank in ranks:
            group.start_soon(watch, rank)
    if errors:
        raise await _cause(ranks, errors[0])
    for number, own in ready.items():
        # Processors that do not all compute in bfloat16 come to other caches.
        theirs, ours = (f"{each.num_blocks} blocks in {each.dtype}" for each in (own, ready[0]))
        if theirs != ours:
            raise RankError(f"rank {number} has a KV cache of {theirs}, and rank 0 of {ours}")
    return ready[0]


async def _loaded(rank: Rank, on_loading: Callable[[Loading], None], timeout: float) -> Ready:
    while True:
        try:
            with anyio.fail_after(timeout):
                message = await rank.receive()
        except TimeoutError:
            raise RankError(f"rank {rank.rank} made no progress for {timeout:g} s") from None
        if isinstance(message, Ready):
            return message
        if isinstance(message, Loading) and rank.rank == 0:
            on_loading(message)


async def _cause(ranks: list[Rank], error: RankError) -> RankError:
    """Why the ranks are lost, given what was seen of it first: what a rank said last tells more than how it ended.

    The ranks that wait for a lost one end, too, so it may take a moment until that one is known.
    """
    causes: list[RankError] = []

    async def listen(rank: Rank) -> None:
        own = await rank.failure()
        if not isinstance(own, LostPeer):
            causes.append(own)
            group.cancel_scope.cancel()

    with anyio.move_on_after(CAUSE_SECONDS):
        async with anyio.create_task_group() as group:
            for rank in ranks:
                group.start_soon(listen, rank)
    return causes[0] if causes else error
