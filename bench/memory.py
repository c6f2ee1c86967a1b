"""The resident memory of a server's processes over time, and whether it grows."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

NUM_MEANS = 12
T_95 = 2.228
"""Student's t for a two-sided 95 % with NUM_MEANS - 2 degrees of freedom."""


@dataclass
class Trace:
    """Resident bytes of a process at times that are seconds after the first sample."""

    pid: int
    command: str
    times: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Growth:
    """A line through a trace; `confidence` is half of the slope's 95 % interval. Both in bytes a second."""

    slope: float
    confidence: float


def tree(pid: int) -> list[int]:
    """A process and all that descend from it, parents first. OSError if it has ended."""
    os.kill(pid, 0)
    found = [pid]
    for parent in found:
        for thread in _entries(f"/proc/{parent}/task"):
            with suppress(OSError):  # it may end meanwhile
                found += map(int, Path(f"/proc/{parent}/task/{thread}/children").read_text().split())
    return found


def _entries(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def resident_bytes(pid: int) -> int:
    """What the process holds in memory. OSError if it has ended, ValueError if it is a zombie."""
    match = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    if match is None:
        raise ValueError(f"process {pid} holds no memory")
    return int(match[1]) << 10


class MemoryLog:
    """Samples a process and all that descend from it; `traces` has one of each, by pid."""

    def __init__(self, pid: int) -> None:
        """OSError if there is no such process."""
        self.traces: dict[int, Trace] = {}
        self._pid = pid
        self._began = time.monotonic()
        self.sample()

    def sample(self) -> None:
        """Take one sample of each. A process that ends has no further ones; OSError if the first has ended."""
        now = time.monotonic() - self._began
        for pid in tree(self._pid):
            try:
                size = resident_bytes(pid)
                if pid not in self.traces:
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                    self.traces[pid] = Trace(pid, b" ".join(words).decode(errors="replace").strip())
            except (OSError, ValueError):
                continue
            self.traces[pid].times.append(now)
            self.traces[pid].resident.append(size)


def growth(times: Sequence[float], resident: Sequence[int]) -> Growth | None:
    """The line through the means of NUM_MEANS equal spans of time; None if a span has no sample.

    Samples that follow each other are much alike, which would make a line through all of them look far more certain
    than it is; the means of long spans are nearly independent.
    """
    if len(times) < NUM_MEANS:
        return None
    at, size = np.array(times), np.array(resident, float)
    spans = np.minimum((at - at[0]) / max(at[-1] - at[0], 1e-9) * NUM_MEANS, NUM_MEANS - 1).astype(int)
    counts = np.bincount(spans, minlength=NUM_MEANS)
    if not counts.all():
        return None
    x = np.bincount(spans, at, NUM_MEANS) / counts
    y = np.bincount(spans, size, NUM_MEANS) / counts
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread
    errors = y - y.mean() - slope * (x - x.mean())
    deviation = math.sqrt(float((errors**2).sum()) / (NUM_MEANS - 2) / spread)
    return Growth(slope, T_95 * deviation)
