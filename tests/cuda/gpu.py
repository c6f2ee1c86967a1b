"""A CUDA device through torch, which lends its memory, its clock and what to compare with."""

from __future__ import annotations

import ctypes
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.cuda.harness import LAUNCHERS, SOURCES, Array, Device


class Gpu(Device):
    """The current CUDA device; memory is torch's, kernels run on the default stream."""

    @property
    def multiprocessors(self) -> int:
        return int(torch.cuda.get_device_properties(0).multi_processor_count)

    def allocate(self, content: Array) -> Any:
        return torch.from_numpy(np.ascontiguousarray(content)).cuda()

    def address(self, memory: Any) -> int:
        return int(memory.data_ptr())

    def read(self, memory: Any) -> Array:
        torch.cuda.synchronize()
        return np.asarray(memory.cpu().numpy())


def build_for_gpu(directory: Path) -> ctypes.CDLL:
    """Compile the launchers for the GPU that is here."""
    major, minor = torch.cuda.get_device_capability()
    # Hopper's own instructions want the architecture's name with an "a".
    architecture = f"{major}{minor}{'a' if major >= 9 else ''}"
    objects = []
    processes = []
    for source in LAUNCHERS:
        objects.append(directory / f"{source.stem}.o")
        flags = [
            "-std=c++17",
            "-O3",
            "-Xcompiler",
            "-fPIC",
            "-gencode",
            f"arch=compute_{architecture},code=sm_{architecture}",
        ]
        processes.append(subprocess.Popen(["nvcc", *flags, f"-I{SOURCES}", "-c", str(source), "-o", str(objects[-1])]))
    for process in processes:
        assert process.wait() == 0, process.args
    library = directory / "launchers.so"
    subprocess.run(["nvcc", "-shared", "-o", str(library), *map(str, objects)], check=True)
    return ctypes.CDLL(str(library))


def seconds(work: Callable[[], object], repeats: int = 30) -> float:
    """The median time of `work` on the device, the cache flushed before each run."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a second that are read and written by a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


def matmul_rate() -> float:
    """FLOP/s of a bfloat16 product of 8192 x 8192 matrices."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: a @ b)
