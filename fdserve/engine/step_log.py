"""The step log: a line of JSON for every step, for whoever wants to know what the engine did when.

The engine's loop only appends a record to a list; a thread encodes and writes what has gathered, twice a second.
"""

from __future__ import annotations

import logging
import stat
import threading
import time
from collections import deque
from pathlib import Path

import msgspec

from fdserve.errors import StartupError
from fdserve.executor.wire import Plan

logger = logging.getLogger("fdserve.engine")

WRITE_EVERY_SECONDS = 0.5
MAX_PENDING = 10_000
"""Records that wait to be written; where the disk does not keep up, further ones are dropped."""
MAX_FILE_BYTES = 64 << 20
"""A file that exceeds this is put aside, in place of the one put aside before it: no pipe, device or link is."""
CLOSE_SECONDS = 2.0

_encoder = msgspec.json.Encoder()


class StepRecord(msgspec.Struct, frozen=True):
    """One step, as the log has it."""

    step: int
    began: float
    """When its plan was sent, or the step before it ended if that was later, in seconds since 1970. Differences between
    times are those of a monotonic clock."""
    ended: float
    """When its result had come."""
    computed: float
    """Seconds that the ranks computed."""
    gap: float | None
    """Seconds since the step before it ended; None if there was nothing to do in between, or no such step."""
    prefill_tokens: int
    decode_tokens: int
    """Of sequences that computed one token, and guesses at those that follow it."""
    running: int
    """Sequences with a row while it ran."""
    waiting: int


class StepLog:
    """Writes the steps to a file while it is entered as a context manager."""

    def __init__(self, path: Path) -> None:
        """Append to `path`. Raises StartupError if it cannot be written."""
        self._path = path
        try:
            self._file = path.open("ab")
            self._put_aside = stat.S_ISREG(path.lstat().st_mode)
        except OSError as error:
            raise StartupError(f"the step log {path} cannot be written: {error.strerror}.") from None
        self._since_1970 = time.time() - time.monotonic()
        self._sent: deque[float] = deque()  # when, of each plan in flight
        self._last_end: float | None = None
        self._pending: deque[StepRecord] = deque()
        self._dropped = 0
        self._closing = threading.Event()
        self._writer = threading.Thread(target=self._write_until_closed, name="step log", daemon=True)

    def __enter__(self) -> StepLog:
        self._writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._writer.join(CLOSE_SECONDS)

    def begin(self) -> None:
        """A plan is about to be sent."""
        self._sent.append(time.monotonic())

    def end(self, plan: Plan, computed: float, running: int, waiting: int) -> None:
        """The result of the first plan in flight has come; the ranks say that they computed for so many seconds."""
        before, self._last_end = self._last_end, time.monotonic()
        began, ended = self._sent.popleft(), self._last_end
        if before is not None:
            began = max(began, before)
        if len(self._pending) >= MAX_PENDING:
            self._dropped += 1
            return
        decode = plan.num_tokens.count(1) + sum([1 + len(draft) for _, draft in plan.drafts])
        prefill = sum(plan.num_tokens) - decode
        gap = None if before is None else began - before
        began, ended = began + self._since_1970, ended + self._since_1970
        self._pending.append(StepRecord(plan.step, began, ended, computed, gap, prefill, decode, running, waiting))

    def pause(self) -> None:
        """There is nothing to do, or the ranks are lost: what follows is no gap between steps."""
        self._sent.clear()
        self._last_end = None

    def _write_until_closed(self) -> None:
        try:
            while not self._closing.wait(WRITE_EVERY_SECONDS):
                self._write()
            self._write()
            self._file.close()
        except OSError as error:
            logger.error("the step log %s cannot be written any more: %s", self._path, error.strerror)

    def _write(self) -> None:
        # One by one, for the loop goes on appending.
        self._file.write(_encoder.encode_lines([self._pending.popleft() for _ in range(len(self._pending))]))
        self._file.flush()
        if self._dropped:
            logger.warning("%d steps are missing from the step log: it is written too slowly", self._dropped)
            self._dropped = 0
        if self._put_aside and self._file.tell() > MAX_FILE_BYTES:
            self._file.close()
            self._path.replace(self._path.with_name(self._path.name + ".1"))
            self._file = self._path.open("ab")
