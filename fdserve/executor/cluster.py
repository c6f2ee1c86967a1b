"""Ranks on several hosts, as `python -m paddle.distributed.launch` starts them: one process a rank.

The process of rank 0 is the server, and the others connect to it at its endpoint, one connection a rank. Both sides
prove that they know the cluster's secret before anything else is read; then the connection carries the rank's frames.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from anyio.abc import ByteStream

from fdserve.errors import StartupError

MIN_SECRET_LENGTH = 16
NONCE_BYTES = 32
DIGEST_BYTES = 32
_HELLO = struct.Struct(f"<8sI{NONCE_BYTES}s")
_MAGIC = b"fdserve1"


@dataclass(frozen=True)
class Cluster:
    """This process's place: rank number `rank` of `world_size`, `local_size` of them on this host.

    Rank 0 is at `host` and `port`.
    """

    rank: int
    world_size: int
    local_size: int
    host: str
    port: int


class NotTrusted(Exception):
    """The other side does not know the secret, or does not speak the protocol."""


def read_cluster(environ: Mapping[str, str]) -> Cluster | None:
    """From the variables that the launcher sets; None where there is but one process.

    Raises:
        StartupError: the variables cannot be read.
    """
    try:
        world_size = int(environ.get("PADDLE_TRAINERS_NUM") or 1)
        if world_size == 1:
            return None
        host, port = environ["PADDLE_TRAINER_ENDPOINTS"].split(",")[0].rsplit(":", 1)
        local_size = int(environ.get("PADDLE_LOCAL_SIZE") or 1)
        return Cluster(int(environ["PADDLE_TRAINER_ID"]), world_size, local_size, host, int(port))
    except KeyError as error:
        raise StartupError(
            f"PADDLE_TRAINERS_NUM says that a launcher started this, but {error.args[0]} is not set."
        ) from None
    except ValueError as error:
        raise StartupError(f"the PADDLE_TRAINER… variables of a launch cannot be read: {error}.") from None


def check_secret(secret: str) -> None:
    """Raise StartupError unless it will do."""
    if len(secret) < MIN_SECRET_LENGTH:
        raise StartupError(
            f"ranks on several hosts need a cluster_secret of at least {MIN_SECRET_LENGTH} characters, the same on "
            "each: set FDSERVE_CLUSTER_SECRET."
        )


async def greet(stream: ByteStream, secret: str, rank: int) -> None:
    """The side of a rank other than 0. Raises NotTrusted, or what the stream raises."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    await stream.send(_HELLO.pack(_MAGIC, rank, nonce))
    answer = await _exactly(stream, NONCE_BYTES + DIGEST_BYTES)
    theirs, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
    if not hmac.compare_digest(proof, _proof(secret, b"server", rank, nonce, theirs)):
        raise NotTrusted("the server has another cluster_secret")
    await stream.send(_proof(secret, b"rank", rank, nonce, theirs))


async def welcome(stream: ByteStream, secret: str, world_size: int) -> int:
    """The server's side: which rank it is. Raises NotTrusted, or what the stream raises."""
    magic, rank, nonce = _HELLO.unpack(await _exactly(stream, _HELLO.size))
    if magic != _MAGIC or not 0 < rank < world_size:
        raise NotTrusted("that is no rank of this cluster")
    ours = secrets.token_bytes(NONCE_BYTES)
    await stream.send(ours + _proof(secret, b"server", rank, nonce, ours))
    if not hmac.compare_digest(await _exactly(stream, DIGEST_BYTES), _proof(secret, b"rank", rank, nonce, ours)):
        raise NotTrusted(f"rank {rank} has another cluster_secret")
    return int(rank)


def watch_for_loss(sock: socket.socket) -> None:
    """Have a host that vanished noticed within about ten seconds; and have frames sent at once."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000)


def _proof(secret: str, side: bytes, rank: int, theirs: bytes, ours: bytes) -> bytes:
    return hmac.digest(secret.encode(), side + struct.pack("<I", rank) + theirs + ours, "sha256")


async def _exactly(stream: ByteStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += await stream.receive(count - len(data))
    return data
