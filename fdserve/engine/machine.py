"""What of this machine the process may use: the machine's own numbers under a container's limits (cgroup v2)."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def available_memory(cgroup: Path = CGROUP) -> int:
    """Bytes that can be taken now without swapping or being killed."""
    try:
        lines = MEMINFO.read_text().splitlines()
        available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is not None and used is not None:
        available = min(available, max(0, limit - used + _file_cache(cgroup)))
    return available


def _file_cache(cgroup: Path) -> int:
    """Bytes of files, a checkpoint's say, which count as used, but are given up as soon as memory is wanted."""
    try:
        lines = [line.split() for line in (cgroup / "memory.stat").read_text().splitlines()]
        return sum(int(value) for name, value in lines if name in ("active_file", "inactive_file"))
    except (OSError, ValueError):
        return 0


def available_cores(cgroup: Path = CGROUP) -> int:
    """Cores that the process may run on, at least 1; a quota of processor time counts as so many whole cores."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        cores = min(cores, -(-int(quota) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        pass  # no such file, or "max": no quota
    return max(1, cores)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
