"""A host's part in a cluster: it runs its rank for the server on rank 0's host, again and again."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import anyio
from anyio.abc import ByteReceiveStream, ByteSendStream, SocketAttribute, SocketStream, UNIXSocketStream
from msgspec.structs import replace

from fdserve.executor.cluster import Cluster, NotTrusted, greet, watch_for_loss
from fdserve.executor.fingerprint import Different, Fingerprint, show
from fdserve.executor.frames import FrameStream, connection_lost
from fdserve.executor.process import ending, kill, spawn
from fdserve.executor.wire import Failed, Load, decode_to_rank, encode_frame

logger = logging.getLogger("fdserve.executor")

RETRY_SECONDS = 0.5
DISTRUST_SECONDS = 5.0
GREETING_SECONDS = 5.0


class Host(NamedTuple):
    """What a rank has here: the checkpoint, so many threads to compute with, and so much of the memory."""

    directory: Path
    num_threads: int
    host_bytes: int


async def follow(cluster: Cluster, secret: str, fingerprint: Fingerprint, host: Host) -> None:
    """Connect to the server and run the rank that it asks for until the connection is lost; then again, for ever.

    A server that does not match the `fingerprint` is asked again later: it may be another one then. When cancelled, no
    process is left.
    """
    server = f"the server at {cluster.host}:{cluster.port}"
    logger.info("rank %d waits for %s", cluster.rank, server)
    while True:
        try:
            async with await anyio.connect_tcp(cluster.host, cluster.port) as stream:
                watch_for_loss(stream.extra(SocketAttribute.raw_socket))
                with anyio.fail_after(GREETING_SECONDS):
                    await greet(stream, secret, cluster.rank)
                    frames = FrameStream(stream, "the server")
                    await show(frames, fingerprint)
                logger.info("rank %d serves %s", cluster.rank, server)
                await _serve(stream, frames, host)
                logger.info("rank %d lost %s, and waits for it", cluster.rank, server)
        except (NotTrusted, Different) as error:
            logger.error("%s", error)
            await anyio.sleep(DISTRUST_SECONDS)
        except (OSError, TimeoutError, *connection_lost):
            pass
        await anyio.sleep(RETRY_SECONDS)


async def _serve(stream: SocketStream, frames: FrameStream, host: Host) -> None:
    """Start a rank as the first of the frames says, and pass them on until either side ends."""
    load = decode_to_rank(await frames.receive())
    if not isinstance(load, Load):
        raise NotTrusted("the first frame must say what to load")
    here = host._asdict() | {"directory": str(host.directory), "parent": os.getpid()}
    load = replace(load, **here)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        process = spawn(load, theirs)
    try:
        async with await UNIXSocketStream.from_socket(ours) as rank:
            await rank.send(encode_frame(load))
            if frames.rest:
                await rank.send(frames.rest)
            await _relay(stream, rank)
            await _tell_end(stream, process)
    finally:
        await kill([process])


async def _relay(server: SocketStream, rank: UNIXSocketStream) -> None:
    async def pump(source: ByteReceiveStream, sink: ByteSendStream) -> None:
        try:
            while True:
                await sink.send(await source.receive(1 << 20))
        except connection_lost:
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(pump, server, rank)
        group.start_soon(pump, rank, server)


async def _tell_end(server: SocketStream, process: subprocess.Popen[bytes]) -> None:
    """How the rank ended, for it may have been killed."""
    with anyio.move_on_after(1.0):
        while process.poll() is None:
            await anyio.sleep(0.01)
        message = f"its process on {socket.gethostname()} (pid {process.pid}) {ending(process.returncode)}"
        with suppress(*connection_lost):
            await server.send(encode_frame(Failed(message)))
