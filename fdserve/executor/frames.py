"""Frames over a byte stream."""

from __future__ import annotations

import anyio
from anyio.abc import ByteStream

from fdserve.errors import RankError
from fdserve.executor.wire import HEADER, MAX_FRAME_BYTES

connection_lost = (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError)
"""What sending and receiving raise when the other side is gone."""


class FrameStream:
    """Whole frames, of a length that is limited. `peer` is what errors call the other side."""

    def __init__(self, stream: ByteStream, peer: str) -> None:
        self._stream = stream
        self._peer = peer
        self._buffer = bytearray()

    async def send(self, frame: bytes) -> None:
        """Send a whole frame. Cancelled halfway, the stream is of no more use. Raises `connection_lost`."""
        await self._stream.send(frame)

    async def receive(self) -> bytes:
        """The next frame's body. Cancellation loses nothing. Raises `connection_lost`; RankError if it is too long."""
        while (end := self._frame_end()) is None:
            self._buffer += await self._stream.receive(1 << 20)
        body = bytes(self._buffer[HEADER.size : end])
        del self._buffer[:end]
        return body

    @property
    def rest(self) -> bytes:
        """What was received behind the last frame."""
        return bytes(self._buffer)

    async def aclose(self) -> None:
        """Close the stream."""
        await self._stream.aclose()

    def _frame_end(self) -> int | None:
        """Where the first frame in the buffer ends, or None while it is not whole."""
        if len(self._buffer) < HEADER.size:
            return None
        (length,) = HEADER.unpack_from(self._buffer)
        if length > MAX_FRAME_BYTES:
            raise RankError(f"{self._peer} sent a frame of {length} bytes")
        end = HEADER.size + int(length)
        return end if len(self._buffer) >= end else None
