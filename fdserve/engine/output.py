"""Fan-out: the channel between the engine's loop and the one who waits for a request's tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType

import anyio

from fdserve.engine.request import Group, TokenDelta
from fdserve.errors import SlowReader, Unavailable

MAX_PENDING_TOKENS = 4096
MAX_PENDING_OF_GROUP = 65_536
"""In all choices of a client's request together: about 16 MB."""
LOGPROBS_WEIGHT = 2
"""How many tokens the logprobs of one count for: they take 300 to 450 bytes, and a token alone takes 200."""


class Generation:
    """The tokens of one request, as they come.

    A context manager: leaving it cancels the request unless it has ended, which frees its row and blocks at once.
    The engine never waits for the reader. One that falls `MAX_PENDING_TOKENS` behind loses its request, and so does
    one that falls `MAX_PENDING_OF_GROUP` behind in all requests of the `group`.
    """

    def __init__(self, on_cancel: Callable[[], None], group: Group) -> None:
        self.started = 0.0
        """`time.monotonic()` when the first step of the request was planned; 0 while it waits."""
        self._on_cancel = on_cancel
        self._send, self._receive = anyio.create_memory_object_stream[TokenDelta](math.inf)
        self._group = group
        self._waiting = 0  # deltas in the channel
        self._pending = 0  # tokens that wait for the reader, logprobs with their weight
        self._held = 0  # of the group's, those that the reader took last and is at work on
        self._arrived: anyio.Event | None = None  # what the reader waits for
        self._ended = False
        self._last: TokenDelta | None = None  # an end from outside, which follows all deltas

    async def receive(self) -> list[TokenDelta]:
        """At least one delta, and all that wait. Nothing follows the one with a `finish_reason`.

        For one reader. Cancellation loses nothing: what was not returned is there at the next call. Where something
        waits it returns at once, without letting other tasks run: what comes next can come from them only.
        """
        # The stream's own `receive` gives all other tasks a turn before it waits, and to ask it for more than there is
        # raises an exception: with many streams that is much of what a token costs.
        while not self._waiting and not self._ended:
            self._settle()
            self._arrived = anyio.Event()
            await self._arrived.wait()
        deltas = [self._receive.receive_nowait() for _ in range(self._waiting)]
        self._waiting = 0
        self._settle()
        if self._ended:
            self._settle()  # for the last time: nothing more is taken
            if not deltas or deltas[-1].finish_reason is None:
                deltas.append(self._end())
        return deltas

    def cancel(self) -> None:
        """End the request. Idempotent; a reader that still waits gets a last delta."""
        self._on_cancel()

    def deliver(self, delta: TokenDelta) -> bool:
        """The engine's side: hand over a delta. False if the reader is too far behind, and the request is to end."""
        delta.started = self.started
        weight = max(1, len(delta.token_ids)) + LOGPROBS_WEIGHT * len(delta.logprobs or ())
        self._pending += weight
        self._group.pending += weight
        if self._pending > MAX_PENDING_TOKENS or self._group.pending > MAX_PENDING_OF_GROUP:
            error = SlowReader(
                f"The client fell too far behind: by {MAX_PENDING_TOKENS} tokens of a choice or {MAX_PENDING_OF_GROUP} "
                "of all, or a third as many with logprobs."
            )
            self.end(TokenDelta([], finish_reason="error", error=error))
            return False
        try:
            self._send.send_nowait(delta)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return True  # the reader left, and says so itself by `cancel`
        self._waiting += 1
        if delta.finish_reason is not None:
            self._close()
        self._wake()
        return True

    def end(self, last: TokenDelta) -> None:
        """The engine's side: end it with `last`, also when the reader is far behind. The first end counts."""
        self._last = self._last or last
        self._close()
        self._wake()

    def _close(self) -> None:
        self._ended = True
        self._send.close()

    def _settle(self) -> None:
        """The reader has done with what it took last, and is about to take what waits."""
        self._group.pending -= self._held
        self._held, self._pending = self._pending, 0

    def _wake(self) -> None:
        if self._arrived is not None:
            self._arrived.set()
            self._arrived = None

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()
        self._send.close()
        self._receive.close()

    def _end(self) -> TokenDelta:
        return self._last or TokenDelta([], finish_reason="error", error=Unavailable("The request was ended."))
