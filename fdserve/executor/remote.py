"""Ranks on other hosts, seen from the server: accepted, exchanged frames with, let go."""

from __future__ import annotations

import logging
import select

import anyio
from anyio.abc import SocketAttribute, SocketStream

from fdserve.errors import RankError
from fdserve.executor.cluster import Cluster, NotTrusted, watch_for_loss, welcome
from fdserve.executor.fingerprint import Different, Fingerprint, examine
from fdserve.executor.frames import FrameStream, connection_lost, told
from fdserve.executor.wire import Loading, Ready, StepResult

logger = logging.getLogger("fdserve.executor")

GREETING_SECONDS = 5.0


class RemoteRank:
    """A rank on another host: what `RankProcess` is for one of this."""

    def __init__(self, rank: int, stream: SocketStream, frames: FrameStream) -> None:
        """`frames` are those of `stream`."""
        self.rank = rank
        self._stream = stream
        self._frames = frames
        self._failure: RankError | None = None  # what it said of its end

    async def send(self, frame: bytes) -> None:
        """As `RankProcess.send`."""
        try:
            await self._frames.send(frame)
        except connection_lost as error:
            raise self._gone() from error

    async def receive(self) -> Loading | Ready | StepResult:
        """As `RankProcess.receive`."""
        if self._failure is not None:
            raise self._failure
        try:
            return told(self.rank, await self._frames.receive())
        except connection_lost as error:
            raise self._gone() from error
        except RankError as error:
            self._failure = error
            raise

    async def failure(self) -> RankError:
        """As `RankProcess.failure`."""
        try:
            while True:
                await self.receive()
        except RankError as error:
            return error

    def check(self) -> None:
        """Raise RankError if its connection is closed."""
        poll = select.poll()
        poll.register(self._stream.extra(SocketAttribute.raw_socket).fileno(), select.POLLRDHUP)
        if poll.poll(0):
            raise self._gone()

    async def stop(self) -> None:
        """Close the connection: its host then kills the rank. Not to be cancelled."""
        with anyio.CancelScope(shield=True):
            await anyio.aclose_forcefully(self._stream)

    def _gone(self) -> RankError:
        return RankError(f"the connection to rank {self.rank}, on another host, is lost")


async def accept_ranks(cluster: Cluster, secret: str, fingerprint: Fingerprint, timeout: float) -> list[RemoteRank]:
    """Every rank but 0, in order; the port is closed again once they are there.

    Raises OSError if it cannot listen, RankError if a rank does not come in time or has another fingerprint. When
    cancelled, no connection is left.
    """
    ranks: dict[int, RemoteRank] = {}
    refusals: list[Different] = []

    async def greet(stream: SocketStream) -> None:
        where = stream.extra(SocketAttribute.remote_address, "one that is gone")
        try:
            with anyio.fail_after(GREETING_SECONDS):
                rank = await welcome(stream, secret, cluster.world_size)
                frames = FrameStream(stream, f"rank {rank}")
                await examine(frames, rank, fingerprint)
        except Different as error:
            refusals.append(error)
            await stream.aclose()
            group.cancel_scope.cancel()
            return
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await anyio.aclose_forcefully(stream)
            if not isinstance(error, (*connection_lost, NotTrusted, TimeoutError)):
                raise
            logger.warning("refused a connection from %s: %s", where, str(error) or type(error).__name__)
            return
        if rank in ranks:
            await ranks[rank].stop()  # it comes again because it lost that one
        ranks[rank] = RemoteRank(rank, stream, frames)
        watch_for_loss(stream.extra(SocketAttribute.raw_socket))
        logger.info("rank %d has come, from %s", rank, where)
        if len(ranks) == cluster.world_size - 1:
            group.cancel_scope.cancel()

    try:
        async with await anyio.create_tcp_listener(local_host=cluster.host, local_port=cluster.port) as listener:
            with anyio.move_on_after(timeout):
                async with anyio.create_task_group() as group:
                    group.start_soon(listener.serve, greet)
        if refusals:
            raise RankError(str(refusals[0]))
        missing = sorted(set(range(1, cluster.world_size)) - ranks.keys())
        if missing:
            raise RankError(f"of {cluster.world_size} ranks these did not come: {', '.join(map(str, missing))}")
    except BaseException:
        for each in ranks.values():
            await each.stop()
        raise
    return [ranks[rank] for rank in sorted(ranks)]
