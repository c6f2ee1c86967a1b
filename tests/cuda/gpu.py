"""A CUDA device through torch, which lends its memory, its clock and what to compare with."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.cuda.harness import Array, Device
from tests.cuda.report import Limits


class Gpu(Device):
    """The current CUDA device; memory is torch's, kernels run on the default stream."""

    @property
    def multiprocessors(self) -> int:
        return int(torch.cuda.get_device_properties(0).multi_processor_count)

    def allocate(self, content: Array) -> Any:
        return torch.from_numpy(np.ascontiguousarray(content)).cuda()

    def address(self, memory: Any) -> int:
        return int(memory.data_ptr())

    def is_usable(self) -> bool:
        """Whether kernels still run: an access to the wrong place ends that for the whole process."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def read(self, memory: Any) -> Array:
        torch.cuda.synchronize()
        return np.asarray(memory.cpu().numpy())


def measured_limits() -> Limits:
    """By a copy of 4 GiB and a product of 8192 x 8192 matrices."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda").random_(0, 255)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return Limits(2 * source.numel() / seconds(lambda: target.copy_(source)), 2 * 8192**3 / seconds(lambda: a @ b))


def described() -> dict[str, str]:
    """The device in words, and what to compile for."""
    major, minor = torch.cuda.get_device_capability()
    properties = torch.cuda.get_device_properties(0)
    processors, cache = properties.multi_processor_count, getattr(properties, "L2_cache_size", 0) >> 20
    name = f"{torch.cuda.get_device_name()}, {processors} multiprocessors, {cache} MiB of L2"
    return {
        "told": f"{name}; CUDA {torch.version.cuda}, torch {torch.__version__}",
        # Hopper's own instructions want the architecture's name with an "a".
        "architecture": f"{major}{minor}{'a' if major >= 9 else ''}",
    }


_flush: Any = None


def seconds(work: Callable[[], object], repeats: int = 20) -> float:
    """The median time of `work` on the device, the cache flushed before each run."""
    global _flush
    if _flush is None:
        _flush = torch.zeros(128 << 20, dtype=torch.float32, device="cuda")
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(repeats):
        # It takes longer than the host needs to launch the work, so that the device never waits in between. It reads:
        # what it wrote would lie in the cache still, and be written to memory in the work's time.
        _flush.sum()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)
