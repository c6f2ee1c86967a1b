"""A rank process: read the first frame, load, then answer plans until the connection closes."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import sys
import traceback
import warnings

from fdserve.errors import RankError, StartupError
from fdserve.executor.wire import (
    HEADER,
    MAX_FRAME_BYTES,
    Failed,
    FromRank,
    Load,
    Loading,
    Masks,
    Plan,
    decode_to_rank,
    encode_frame,
)
from fdserve.worker.group import group_variables

_PR_SET_PDEATHSIG = 1


class Connection:
    """Frames over the inherited socket, blocking."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)

    def receive(self) -> Load | Plan | Masks | None:
        """The next frame, or None once the API process is gone."""
        header = self._read(HEADER.size)
        if header is None:
            return None
        (length,) = HEADER.unpack(header)
        if length > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {length} bytes")
        body = self._read(length)
        return None if body is None else decode_to_rank(body)

    def receive_masks(self) -> Masks:
        """The next masks that the last plan waits for. Raises ConnectionResetError once the API process is gone."""
        message = self.receive()
        if message is None:
            raise ConnectionResetError
        if not isinstance(message, Masks):
            raise ValueError("masks were due")
        return message

    def send(self, message: FromRank) -> None:
        """Send a frame whole."""
        self._socket.sendall(encode_frame(message))

    def _read(self, length: int) -> bytes | None:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            count = self._socket.recv_into(view)
            if count == 0:
                return None
            view = view[count:]
        return bytes(data)


def main() -> None:
    """Serve the connection whose descriptor is the only argument; exit status 1 after a failure that was told."""
    connection = Connection(int(sys.argv[1]))
    try:
        _serve(connection)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the API process is gone, and with it whoever could use an answer
    except StartupError as error:
        _tell(connection, str(error))
    except RankError as error:
        _tell(connection, str(error), lost_peer=True)
    except Exception as error:
        traceback.print_exc()
        _tell(connection, f"{type(error).__name__}: {error}")


def _serve(connection: Connection) -> None:
    load = connection.receive()
    if load is None:
        return
    if not isinstance(load, Load):
        raise ValueError("the first frame must say what to load")
    _die_with_parent(load.parent)
    connection.send(Loading("paddle", 0, 1))
    # Importing Paddle recommends a compiler cache to whoever does it.
    warnings.filterwarnings("ignore", message="No ccache found")
    os.environ.update(group_variables(load))
    # Only now: it takes a second or more.
    from fdserve.worker.runner import Runner

    runner = Runner(load, lambda what, done, total: connection.send(Loading(what, done, total)))
    # Modules have more than a hundred thousand objects: no step should wait for the collector to look through them,
    # nor through the runner, which stays as long.
    gc.collect()
    gc.freeze()
    connection.send(runner.ready)
    while (plan := connection.receive()) is not None:
        if not isinstance(plan, Plan):
            raise ValueError("a plan was due")
        result = runner.step(plan, connection.receive_masks)
        if load.rank == 0:
            connection.send(result)


def _tell(connection: Connection, message: str, *, lost_peer: bool = False) -> None:
    try:
        connection.send(Failed(message, lost_peer))
    finally:
        # Not sys.exit: the library's threads may be in any state.
        sys.stderr.flush()
        os._exit(1)


def _die_with_parent(parent: int) -> None:
    """Linux kills this process when the thread that started it ends, even if it is in the middle of a step."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
