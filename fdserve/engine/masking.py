"""Constraints at work: beside the ranks' forward pass, in a thread, with a limit on what a step's take together."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

import anyio
import anyio.from_thread
import anyio.lowlevel

from fdserve.engine.request import Constraint
from fdserve.engine.sequence import Sequence
from fdserve.errors import InternalError, InvalidRequest, ServerError

logger = logging.getLogger("fdserve.engine")

BUDGET_SECONDS = 1.0
"""What the constraints may compute in one step, all together: the other streams wait no longer, but for the extra. It
is their threads' time on a processor, whatever else holds the process up."""
EXTRA_SECONDS = 0.25
"""What those share whose turn had not come by then: enough for all that are not costly themselves."""
LEAST_SECONDS = 0.002
UNKNOWN_SECONDS = 0.01
"""What a turn is taken to cost of a sequence that had none yet."""
HANG_SECONDS = 5.0
"""How long to wait for a turn that takes its time without computing."""
LOOK_SECONDS = 0.002
"""How soon to look again after one that is nearly at its limit."""
MOST_NICE = 19


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
    seconds: float = 0.0
    """What it took, once it has ended."""

    @property
    def group(self) -> Hashable:
        """What fails together."""
        return self.sequence.request.group

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


async def run_turns(turns: Iterable[Turn]) -> None:
    """Run the turns one after the other, the cheap ones first.

    Where they use up the step's budget, the turns of the group that took most get an error, and the others go on with a
    share of a small extra each: only what is costly fails. A thread whose turn took too long is left behind in it: that
    holds up neither the engine nor the end of the process. Cancellation leaves the thread behind, too: what the turns
    hold is then undefined.
    """
    step = _Step(turns)
    while step.queue:
        worker = _Worker(step)
        try:
            await worker.wait()
        finally:
            worker.stop()


class _Step:
    """The turns of a step: those to come, and what the others took. Used by one thread at a time."""

    def __init__(self, turns: Iterable[Turn]) -> None:
        self._spent = 0.0
        self._groups: dict[Hashable, list[Turn]] = {}  # those that have not failed
        places: list[tuple[float, int, int, Turn]] = []
        for turn in turns:
            group = self._groups.setdefault(turn.group, [])
            group.append(turn)
            # By what is known of its cost; and of one group a turn at a time, for they cost alike.
            places.append((turn.sequence.slowest_turn or UNKNOWN_SECONDS, len(group), len(places), turn))
        self.queue = deque(turn for _, _, _, turn in sorted(places))

    def next(self) -> tuple[Turn, float] | None:
        """The next turn and the seconds that it may take, or None when there is none left."""
        if not self.queue:
            return None
        limit = max(BUDGET_SECONDS - self._spent, self._share(0.0, len(self.queue)))
        return self.queue.popleft(), limit

    def end(self, turn: Turn, seconds: float) -> None:
        """Note what a turn took. If it failed, so does its group, and what is left of it is not run."""
        turn.seconds = seconds
        self._spent += seconds
        turn.sequence.slowest_turn = max(turn.sequence.slowest_turn, seconds)
        if turn.error is not None and turn.group in self._groups:
            self._fail(turn.group, turn.error)

    def exceed(self, turn: Turn, seconds: float) -> float:
        """The turn that runs has taken all it may, so somebody must fail. Returns what it may take, if not itself."""
        took = {group: sum([each.seconds for each in turns]) for group, turns in self._groups.items()}
        took[turn.group] += seconds
        heaviest = max(took, key=lambda group: (took[group], group == turn.group))
        if heaviest == turn.group:
            self.fail(turn, seconds)
        else:
            self._fail(heaviest, _too_slow())
        return seconds + self._share(seconds, len(self.queue) + 1)

    def fail(self, turn: Turn, seconds: float) -> None:
        """The turn that runs has taken too long."""
        turn.error = _too_slow()
        self.end(turn, seconds)

    def _share(self, seconds: float, count: int) -> float:
        return max((BUDGET_SECONDS + EXTRA_SECONDS - self._spent - seconds) / count, LEAST_SECONDS)

    def _fail(self, group: Hashable, error: ServerError) -> None:
        for turn in self._groups.pop(group):
            turn.error = error
        self.queue = deque(turn for turn in self.queue if turn.error is None)


class _Worker:
    """A thread that runs turns until there are none left, or it is stopped."""

    def __init__(self, step: _Step) -> None:
        self._lock = threading.Lock()  # over the step and the next five
        self._step = step
        self._turn: Turn | None = None
        self._began = 0.0  # by the thread's clock
        self._limit = BUDGET_SECONDS
        self._stopped = False
        self._clock = 0
        self._done = anyio.Event()
        self._loop = anyio.lowlevel.current_token()
        self._thread = threading.Thread(target=self._main, name="fdserve-constraints", daemon=True)
        self._thread.start()

    async def wait(self) -> None:
        """Wait until all is done, or the turn that runs fails for what it took: then the thread is stopped."""
        turn, waited = None, 0.0
        while not self._done.is_set():
            with self._lock:
                if self._turn is not turn:
                    turn, waited = self._turn, 0.0
                left = self._limit if turn is None else self._left(turn, hangs=waited >= HANG_SECONDS)
                if turn is not None and turn.error is not None:
                    self._stopped = True
                    _leave_behind(self._thread)
                    return
            pause = max(left, LOOK_SECONDS)
            with anyio.move_on_after(pause):
                await self._done.wait()
            # Not by a clock: where this thread was held up, so may the other have been.
            waited += pause

    def _left(self, turn: Turn, *, hangs: bool) -> float:
        """What the turn that runs may still compute; at its end somebody fails for it, perhaps the turn itself."""
        used = time.clock_gettime(self._clock) - self._began
        if hangs:
            self._step.fail(turn, used)
        elif used >= self._limit:
            self._limit = self._step.exceed(turn, used)
        return self._limit - used

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
            now = time.thread_time()
            if self._turn is not None:
                self._step.end(self._turn, now - self._began)
            self._turn, self._limit = self._step.next() or (None, BUDGET_SECONDS)
            self._began = now
            return self._turn


def _too_slow() -> InvalidRequest:
    return InvalidRequest(
        f"The constraint on the output is too slow: those of one step took more than {BUDGET_SECONDS:g} s."
    )


def _leave_behind(thread: threading.Thread) -> None:
    """Have a thread that nobody waits for any more give way to everything else."""
    with suppress(OSError):  # it has just ended
        assert thread.native_id is not None
        os.setpriority(os.PRIO_PROCESS, thread.native_id, MOST_NICE)
