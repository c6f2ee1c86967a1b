"""A rank seen from the API process, wherever it runs: frames to it, frames from it, and why it is lost."""

from __future__ import annotations

from abc import ABC, abstractmethod

import msgspec

from fdserve.errors import RankError
from fdserve.executor.frames import FrameStream, connection_lost
from fdserve.executor.wire import Failed, FromRank, Loading, Ready, StepResult, decode_from_rank


class LostPeer(RankError):
    """A rank ended because another one did: not the cause."""


class Rank(ABC):
    """Rank number `rank`, at the other end of `frames`."""

    def __init__(self, rank: int, frames: FrameStream) -> None:
        self.rank = rank
        self._frames = frames
        self._failure: RankError | None = None  # what it said of its end

    async def send(self, frame: bytes) -> None:
        """Send a whole frame. Cancelled halfway, the connection is of no more use. RankError if the rank is gone."""
        try:
            await self._frames.send(frame)
        except connection_lost as error:
            raise await self._gone() from error

    async def receive(self) -> Loading | Ready | StepResult:
        """The next frame. RankError if the rank is gone or says that it failed. Cancellation loses nothing."""
        if self._failure is not None:
            raise self._failure
        try:
            return self._read(await self._frames.receive())
        except connection_lost as error:
            raise await self._gone() from error
        except RankError as error:
            self._failure = error
            raise

    async def failure(self) -> RankError:
        """Why the rank is lost; waits until it is. Cancellation loses frames."""
        try:
            while True:
                await self.receive()
        except RankError as error:
            return error

    @abstractmethod
    def check(self) -> None:
        """Raise RankError if the rank is gone."""

    @abstractmethod
    async def stop(self) -> None:
        """End the rank: it has nothing to save. Not to be cancelled."""

    @abstractmethod
    async def _gone(self) -> RankError:
        """The error of a connection that was closed at the rank's end."""

    def _read(self, body: bytes) -> Loading | Ready | StepResult:
        try:
            message: FromRank = decode_from_rank(body)
        except msgspec.DecodeError as error:
            raise RankError(f"rank {self.rank} sent a frame that cannot be read: {error}") from error
        if isinstance(message, Failed):
            kind = LostPeer if message.lost_peer else RankError
            raise kind(f"rank {self.rank}: {message.message}")
        return message
