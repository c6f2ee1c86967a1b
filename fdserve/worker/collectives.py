"""What the tensor-parallel ranks do together."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

import paddle

from fdserve import ops
from fdserve.errors import RankError
from fdserve.executor.wire import Load
from fdserve.ops.collectives import Bytes

_SIOCGIFADDR = 0x8915


class Collectives:
    """One rank's end; every rank must call the same ones in the same order. See `ops.SharedMemory`.

    Ranks of one host are given memory to share; others exchange what would be in it by Gloo, in the group that the
    launcher's variables describe. Raises RankError when a peer is gone.
    """

    def __init__(self, load: Load) -> None:
        self._memory = ops.SharedMemory(
            load.shared_memory,
            slot_bytes=load.slot_bytes,
            rank=load.rank,
            world_size=load.world_size,
            peers=load.peers,
            gather=_gloo_gather(load.world_size) if load.shared_memory < 0 else None,
        )

    def all_reduce(self, x: Any) -> Any:
        """The sum of the ranks' tensors, added in float32 in rank order and rounded once to their dtype."""
        return _or_gone(self._memory.all_reduce, x)

    def sample(self, *arguments: Any, **options: Any) -> Any:
        """`ops.sample` from each rank's part of the logits; the same on all ranks."""
        return _or_gone(ops.sample, *arguments, shared=self._memory, **options)


def _or_gone(collective: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return collective(*arguments, **options)
    except RuntimeError as error:
        raise RankError("a rank that it computes with is gone") from error


def _gloo_gather(world_size: int) -> Callable[[Bytes], Bytes]:
    """Joins the group, which waits for the others, and returns what gathers all ranks' bytes."""
    os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
    if interface := interface_of(os.environ.get("PADDLE_CURRENT_ENDPOINT", "").rsplit(":", 1)[0]):
        # Gloo would go by the host's name, which often stands for the loopback address.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    paddle.distributed.init_parallel_env()

    def gather(mine: Bytes) -> Bytes:
        everyone = paddle.empty([world_size * len(mine)], "uint8")
        paddle.distributed.stream.all_gather(everyone, paddle.to_tensor(mine), sync_op=True)
        joint: Bytes = everyone.numpy().reshape(world_size, len(mine))
        return joint

    return gather


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(sock, _SIOCGIFADDR, request)
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
