"""The machine's own limits, and timing that stands neighbours."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

CACHE_BYTES = 256 << 20
"""What is read in turn must exceed this, so that it comes from memory and not from a cache."""
LEAST_CALLS = 5


def fastest(calls: Mapping[str, Callable[[], Any]], *, budget: float) -> dict[str, float]:
    """The shortest time of each call in seconds, after one to warm up, within about `budget` seconds for each.

    The calls take turns, so that what else the machine does slows all of them. The shortest time counts because
    everything else only adds to it.
    """
    for call in calls.values():
        call()
    best = dict.fromkeys(calls, float("inf"))
    until = time.perf_counter() + budget * len(calls)
    turns = 0
    while turns < LEAST_CALLS or time.perf_counter() < until:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
        turns += 1
    return best


def seconds(call: Callable[[], Any], *, budget: float) -> float:
    """`fastest` of one call."""
    return fastest({"": call}, budget=budget)[""]


@contextmanager
def memory_reads(threads: int, size: int) -> Iterator[dict[str, Callable[[], Any]]]:
    """Calls that each read `size` bytes of memory with `threads` threads together: scans of the C library and NumPy."""
    parts = np.ones((threads, size // threads // 16 * 16), np.uint8)
    words = parts.view(np.uint64)
    libc = ctypes.CDLL(None)
    half = parts.shape[1] // 2
    addresses = [part.ctypes.data for part in parts]

    def find(index: int) -> None:
        libc.memchr(ctypes.c_void_p(addresses[index]), 0, ctypes.c_size_t(2 * half))

    def compare(index: int) -> None:
        start = addresses[index]
        libc.memcmp(ctypes.c_void_p(start), ctypes.c_void_p(start + half), ctypes.c_size_t(half))

    with ThreadPoolExecutor(threads) as pool:
        yield {
            "memchr": lambda: list(pool.map(find, range(threads))),
            "memcmp": lambda: list(pool.map(compare, range(threads))),
            "numpy": lambda: list(pool.map(np.bitwise_or.reduce, words)),
        }


def read_bandwidth(threads: int, *, budget: float = 0.5) -> float:
    """Bytes a second at which `threads` threads read memory together: the best of some plain scans."""
    with memory_reads(threads, CACHE_BYTES) as calls:
        return CACHE_BYTES / min(fastest(calls, budget=budget).values())


def describe() -> str:
    """The processor, and how many of its cores this process may use."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}"
