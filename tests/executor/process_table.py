"""What the system knows of a server's processes."""

from __future__ import annotations

import os
from pathlib import Path

import anyio


def rank_pids(parent: int) -> list[int]:
    """The server's rank processes, dead ones excepted."""
    return [pid for pid in process_tree(parent) if b"fdserve.worker" in command(pid)]


def process_tree(parent: int) -> list[int]:
    """The children of all threads."""
    lists = [path.read_text() for path in Path(f"/proc/{parent}/task").glob("*/children")]
    return [int(pid) for children in lists for pid in children.split()]


def open_files(pid: int) -> list[str]:
    """What its descriptors name; those that are closed meanwhile excepted."""
    return [os.path.realpath(path) for path in Path(f"/proc/{pid}/fd").iterdir()]


def command(pid: int) -> bytes:
    """Its command line; empty for one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def shared_memory() -> set[str]:
    """The names of the machine's shared memory, but for what other programs' multiprocessing makes at any time."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


def is_alive(pid: int) -> bool:
    """Whether a process runs: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def wait_until_gone(pid: int) -> None:
    with anyio.fail_after(10):
        while is_alive(pid):
            await anyio.sleep(0.02)
