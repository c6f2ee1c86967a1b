"""Ranks on other hosts, seen from the server: accepted, exchanged frames with, let go."""

from __future__ import annotations

import logging
import select

import anyio
from anyio.abc import SocketAttribute, SocketStream

from fdserve.errors import RankError
from fdserve.executor.cluster import Cluster, NotTrusted, watch_for_loss, welcome
from fdserve.executor.fingerprint import Different, Fingerprint, examine
from fdserve.executor.frames import FrameStream, connection_lost
from fdserve.executor.rank import Rank

logger = logging.getLogger("fdserve.executor")

GREETING_SECONDS = 5.0


class RemoteRank(Rank):
    """A rank on another host."""

    def __init__(self, rank: int, stream: SocketStream, frames: FrameStream) -> None:
        """`frames` are those of `stream`."""
        super().__init__(rank, frames)
        self._stream = stream

    def check(self) -> None:
        poll = select.poll()
        poll.register(self._stream.extra(SocketAttribute.raw_socket).fileno(), select.POLLRDHUP)
        if poll.poll(0):
            raise self._lost()

    async def stop(self) -> None:
        # Its host then kills the rank.
        with anyio.CancelScope(shield=True):
            await anyio.aclose_forcefully(self._stream)

    async def _gone(self) -> RankError:
        return self._lost()

    def _lost(self) -> RankError:
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
