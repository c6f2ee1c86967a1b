"""Constraints at work: beside the ranks' forward pass, in a thread, with a limit on each one's time."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

import anyio
import anyio.from_thread
import anyio.lowlevel

from fdserve.engine.request import Constraint
from fdserve.engine.sequence import Sequence
from fdserve.errors import InternalError, InvalidRequest, ServerError

logger = logging.getLogger("fdserve.engine")

LIMIT_SECONDS = 1.0
"""What a constraint may compute for one token: its thread's time on a processor, whatever else holds the process up."""
HURRIED_SECONDS = 0.1
"""The same in a step in which one took too long already, so that several do not add up."""
HANG_SECONDS = 5.0
"""How long to wait for one that takes its time without computing."""
LOOK_SECONDS = 0.005
"""How soon to look again after one that is nearly at its limit."""


@dataclass
class Turn:
    """One constraint's work between two tokens of its sequence, and what came of it; an `error` outranks the rest."""

    sequence: Sequence
    tokens: list[int] = field(default_factory=list)
    """What the constraint has to advance by."""
    wants_mask: bool = False
    finished: bool = False
    mask: bytes | None = None
    error: ServerError | None = None

    def run(self, constraint: Constraint) -> None:
        """Do the work; never raises."""
        try:
            for token in self.tokens:
                constraint.advance(token)
            if constraint.finished:
                self.finished = True
            elif self.wants_mask:
                self.mask = constraint.mask()
        except ServerError as error:
            self.error = error
        except Exception:
            logger.exception("a defect in a constraint")
            self.error = InternalError("The constraint on this request's output failed.")


async def run_turns(turns: list[Turn]) -> None:
    """Run the turns one after the other; one that takes too long gets an error, and those after it go on.

    A thread that hangs in a constraint is left behind: it holds up neither the engine nor the end of the process.
    Cancellation leaves the thread behind, too: what the turns hold is then undefined.
    """
    limit = LIMIT_SECONDS
    while turns:
        worker = _Worker(turns)
        try:
            turns = await worker.wait(limit)
        finally:
            worker.stop()
        limit = HURRIED_SECONDS


class _Worker:
    """A thread that runs turns until all are done, or it is stopped between two."""

    def __init__(self, turns: list[Turn]) -> None:
        self._turns = turns
        self._lock = threading.Lock()  # over the next four
        self._at = -1
        self._began = 0.0  # by the thread's clock
        self._stopped = False
        self._clock = 0
        self._done = anyio.Event()
        self._loop = anyio.lowlevel.current_token()
        threading.Thread(target=self._main, name="fdserve-constraints", daemon=True).start()

    async def wait(self, limit: float) -> list[Turn]:
        """Wait until all is done. If one turn takes `limit` seconds, or hangs, it gets an error, the thread is stopped,
        and the turns after it are returned.
        """
        at, waited = -1, 0.0
        while not self._done.is_set():
            with self._lock:
                if self._at != at:
                    at, waited = self._at, 0.0
                left = limit
                if 0 <= at < len(self._turns):
                    left += self._began - time.clock_gettime(self._clock)
                    if left <= 0 or waited >= HANG_SECONDS:
                        self._stopped = True
                        self._turns[at].error = InvalidRequest(
                            f"The constraint on the output took more than {limit:g} s for one token."
                        )
                        return self._turns[at + 1 :]
            pause = max(left, LOOK_SECONDS)
            with anyio.move_on_after(pause):
                await self._done.wait()
            # Not by a clock: where this thread was held up, so may the other have been.
            waited += pause
        return []

    def stop(self) -> None:
        """Begin no other turn."""
        with self._lock:
            self._stopped = True

    def _main(self) -> None:
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        while (turn := self._next()) is not None:
            constraint = turn.sequence.request.constraint
            assert constraint is not None
            turn.run(constraint)
        if not self._stopped:
            with suppress(RuntimeError):  # the event loop has ended
                anyio.from_thread.run_sync(self._done.set, token=self._loop)

    def _next(self) -> Turn | None:
        with self._lock:
            if self._stopped:
                return None
            self._at += 1
            self._began = time.thread_time()
            return self._turns[self._at] if self._at < len(self._turns) else None
