"""One rank process: start it, exchange frames with it, stop it.

The transport is a socket pair whose other end only the rank inherits: nothing on the machine can connect to it, and
either side sees at once when the other is gone.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import anyio
from anyio.abc import UNIXSocketStream

from fdserve.errors import RankError
from fdserve.executor.frames import FrameStream
from fdserve.executor.rank import Rank
from fdserve.executor.wire import Load, encode_frame

REAP_SECONDS = 5.0
PACKAGE_PARENT = Path(__file__).resolve().parents[2]


class RankProcess(Rank):
    """A rank on this host."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes], frames: FrameStream) -> None:
        super().__init__(rank, frames)
        self._process = process

    @classmethod
    async def start(cls, load: Load) -> RankProcess:
        """Start the process and tell it what to load; `receive` then gives its progress.

        Raises OSError if the system has no process to give. When cancelled, no process is left.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                process = spawn(load, theirs)
            except BaseException:
                ours.close()
                raise
        try:
            rank = cls(load.rank, process, FrameStream(await UNIXSocketStream.from_socket(ours), f"rank {load.rank}"))
            await rank.send(encode_frame(load))
        except BaseException:
            ours.close()
            await kill([process])
            raise
        return rank

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def check(self) -> None:
        if self._process.poll() is not None:
            raise self._ended()

    async def stop(self) -> None:
        await kill([self._process])
        with anyio.CancelScope(shield=True):
            await self._frames.aclose()

    async def _gone(self) -> RankError:
        if not await _exited(self._process, 1.0):
            return RankError(f"rank {self.rank} (pid {self.pid}) closed its connection")
        return self._ended()

    def _ended(self) -> RankError:
        return RankError(f"rank {self.rank} (pid {self.pid}) {ending(self._process.returncode)}")


def spawn(load: Load, connection: socket.socket) -> subprocess.Popen[bytes]:
    """A rank process that has inherited its end of the connection, and what `load` names. OSError if there is none."""
    # A session of its own: a Ctrl-C in the terminal is for the API process, which then stops the ranks.
    return subprocess.Popen(
        [sys.executable, "-m", "fdserve.worker", str(connection.fileno())],
        pass_fds=[connection.fileno(), *load.peers, *([load.shared_memory] if load.peers else [])],
        stdin=subprocess.DEVNULL,
        cwd=PACKAGE_PARENT,  # so that the rank runs this package, not one in the current directory
        start_new_session=True,
        env=_environment(),
    )


async def kill(processes: list[subprocess.Popen[bytes]]) -> None:
    """Kill them and wait until they are gone, stopped ones included. Not to be cancelled."""
    for process in processes:
        process.kill()
    for process in processes:
        await _exited(process, REAP_SECONDS)


def ending(status: int) -> str:
    """How a process with this return code ended."""
    if status >= 0:
        return f"exited with status {status}"
    # Nothing else tells where the log of the system is not at hand, as in most containers.
    hint = ", as by a system that runs out of memory" if -status == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-status).name}{hint}"


async def _exited(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for the exit, by polling: a child watcher would depend on the event loop. Reaps the process."""
    with anyio.move_on_after(seconds, shield=True):
        while process.poll() is None:
            await anyio.sleep(0.005)
    return process.returncode is not None


def _environment() -> dict[str, str]:
    paths = [str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The kernels have threads of their own; those of Paddle's libraries would only be in their way.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
