"""The process group of paddle.distributed: which variables describe it, and what its ranks do in it."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING

from fdserve.executor.wire import Load
from fdserve.ops.gathering import Gather

if TYPE_CHECKING:
    from paddle import Tensor

_SIOCGIFADDR = 0x8915
_SELECTED = "FLAGS_selected_gpus"  # Paddle's; its launcher may name several


def group_variables(load: Load) -> dict[str, str]:
    """What to set before Paddle is imported; nothing where a launcher has set it, or the rank needs no group.

    Ranks of one host meet at `load.rendezvous`, and each has the GPU of its own number.
    """
    if not load.rendezvous or load.device == "cpu":
        return {}
    return {
        "PADDLE_MASTER": load.rendezvous,
        "PADDLE_TRAINER_ENDPOINTS": ",".join([load.rendezvous] * load.world_size),
        "PADDLE_CURRENT_ENDPOINT": load.rendezvous,
        "PADDLE_TRAINERS_NUM": str(load.world_size),
        "PADDLE_TRAINER_ID": str(load.rank),
        _SELECTED: str(load.rank),
    }


def gpu_number() -> int:
    """The GPU that the variables give to this process, counted among those it can see; 0 if they name none."""
    return int(os.environ.get(_SELECTED, "").split(",")[0] or 0)


def join(backend: str) -> Gather:
    """Join the group, which waits for the others, and return what gathers all ranks' tensors.

    `backend` is "nccl", for tensors of GPUs, or "gloo", for those of CPUs. NCCL's calls are put on the stream that
    kernels run on and return at once; a peer that is gone makes that stream wait for ever, which whoever supervises the
    ranks must notice. Gloo's calls raise then.
    """
    import paddle

    os.environ["PADDLE_DISTRI_BACKEND"] = backend
    if interface := interface_of(os.environ.get("PADDLE_CURRENT_ENDPOINT", "").rsplit(":", 1)[0]):
        # Gloo would go by the host's name, which often stands for the loopback address, and NCCL by its own taste. What
        # NCCL is told it takes for a prefix, but for "=".
        name = f"={interface}" if backend == "nccl" else interface
        os.environ.setdefault(f"{backend.upper()}_SOCKET_IFNAME", name)
    paddle.distributed.init_parallel_env()
    world_size = paddle.distributed.get_world_size()

    def gather(x: Tensor) -> Tensor:
        everyone = paddle.empty([world_size * x.shape[0], *x.shape[1:]], x.dtype)
        paddle.distributed.stream.all_gather(everyone, x, sync_op=True, use_calc_stream=backend == "nccl")
        return everyone.reshape([world_size, *x.shape])

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
