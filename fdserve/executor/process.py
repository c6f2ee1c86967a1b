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
import msgspec
from anyio.abc import UNIXSocketStream

from fdserve.errors import RankError
from fdserve.executor.wire import (
    HEADER,
    MAX_FRAME_BYTES,
    Failed,
    FromRank,
    Load,
    Loading,
    Ready,
    StepResult,
    decode_from_rank,
    encode_frame,
)

STOP_SECONDS = 5.0
PACKAGE_PARENT = Path(__file__).resolve().parents[2]


class RankProcess:
    """A rank, seen from the API process."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes], stream: UNIXSocketStream) -> None:
        self.rank = rank
        self._process = process
        self._stream = stream
        self._buffer = bytearray()

    @classmethod
    async def start(cls, load: Load) -> RankProcess:
        """Start the process and tell it what to load; `receive` then gives its progress.

        Raises OSError if the system has no process to give. When cancelled, no process is left.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            # A session of its own: a Ctrl-C in the terminal is for the API process, which then stops the ranks.
            process = subprocess.Popen(
                [sys.executable, "-m", "fdserve.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno(), *load.peers, *([load.shared_memory] if load.peers else [])],
                stdin=subprocess.DEVNULL,
                cwd=PACKAGE_PARENT,  # so that the rank runs this package, not one in the current directory
                start_new_session=True,
                env=_environment(),
            )
        rank = cls(load.rank, process, await UNIXSocketStream.from_socket(ours))
        try:
            await rank.send(encode_frame(load))
        except BaseException:
            await rank.stop()
            raise
        return rank

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    async def send(self, frame: bytes) -> None:
        """Send a whole frame. Cancelled halfway, the connection is of no more use. RankError if the rank is gone."""
        try:
            await self._stream.send(frame)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise await self._gone() from error

    async def receive(self) -> Loading | Ready | StepResult:
        """The next frame. RankError if the rank is gone or says that it failed. Cancellation loses nothing."""
        message = await self._receive_frame()
        if isinstance(message, Failed):
            raise RankError(f"rank {self.rank}: {message.message}")
        return message

    def check(self) -> None:
        """Raise RankError if the process has ended."""
        if self._process.poll() is not None:
            raise self._ended()

    async def stop(self) -> None:
        """Close the connection, which ends the rank, and wait for its exit; after some seconds kill it."""
        with anyio.CancelScope(shield=True):
            await self._stream.aclose()
            if not await self._exited(STOP_SECONDS):
                self._process.kill()
                await self._exited(STOP_SECONDS)

    async def _receive_frame(self) -> FromRank:
        while (end := self._frame_end()) is None:
            try:
                self._buffer += await self._stream.receive(1 << 20)
            except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
                raise await self._gone() from error
        body = bytes(self._buffer[HEADER.size : end])
        del self._buffer[:end]
        try:
            return decode_from_rank(body)
        except msgspec.DecodeError as error:
            raise RankError(f"rank {self.rank} sent a frame that cannot be read: {error}") from error

    def _frame_end(self) -> int | None:
        """Where the first frame in the buffer ends, or None while it is not whole."""
        if len(self._buffer) < HEADER.size:
            return None
        (length,) = HEADER.unpack_from(self._buffer)
        if length > MAX_FRAME_BYTES:
            raise RankError(f"rank {self.rank} sent a frame of {length} bytes")
        end = HEADER.size + int(length)
        return end if len(self._buffer) >= end else None

    async def _gone(self) -> RankError:
        if not await self._exited(1.0):
            return RankError(f"rank {self.rank} (pid {self.pid}) closed its connection")
        return self._ended()

    def _ended(self) -> RankError:
        status = self._process.returncode
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        return RankError(f"rank {self.rank} (pid {self.pid}) {how}")

    async def _exited(self, seconds: float) -> bool:
        """Wait for the exit, by polling: a child watcher would depend on the event loop. Reaps the process."""
        with anyio.move_on_after(seconds, shield=True):
            while self._process.poll() is None:
                await anyio.sleep(0.01)
        return self._process.returncode is not None


def _environment() -> dict[str, str]:
    paths = [str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The kernels have threads of their own; those of Paddle's libraries would only be in their way.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
