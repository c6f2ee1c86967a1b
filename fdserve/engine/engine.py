"""The engine: one loop that plans a step, has the ranks execute it, and hands the tokens out.

The next plan is sent before the last result is fanned out, so the ranks compute while the API process is busy with
its clients. Where a step is like the one before it the next plan is sent even before it ends, and the ranks go on at
once. A request that fails ends alone; a rank that is lost ends what was running, is started again, and what was waiting
then runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from typing import Literal, Protocol

import anyio

from fdserve.engine.masking import Turn, run_turns
from fdserve.engine.output import Generation
from fdserve.engine.pace import Pace
from fdserve.engine.request import Request, TokenDelta
from fdserve.engine.results import Sampled
from fdserve.engine.scheduler import Scheduler
from fdserve.engine.sequence import Sequence
from fdserve.engine.stats import EngineStats, stats_of
from fdserve.engine.step_log import StepLog
from fdserve.errors import Overloaded, RankError, ServerError, StartupError, Unavailable
from fdserve.executor.wire import MASKS_PER_FRAME, Masks, Plan, Ready, StepResult

logger = logging.getLogger("fdserve.engine")

Status = Literal["loading", "ready", "restarting", "failed", "draining"]
MAX_BACKOFF_SECONDS = 30.0
IDLE_CHECK_SECONDS = 0.5
GIVE_UP_WAITING_AFTER = 3
"""Failed restarts in a row after which the waiting requests are told."""


class Ranks(Protocol):
    """What the engine needs of an executor."""

    @property
    def ready(self) -> Ready: ...
    async def send(self, message: Plan | Masks) -> None: ...
    async def receive(self) -> StepResult: ...
    async def check(self) -> None: ...


class Engine:
    """Takes requests, gives back their tokens. Everything but `run` and `wait_ready` is synchronous and does not wait.

    `open_ranks` starts the ranks and stops them on exit; `make_scheduler` makes the scheduler once they are ready. A
    `step_log` is told every step.
    """

    def __init__(
        self,
        open_ranks: Callable[[], AbstractAsyncContextManager[Ranks]],
        make_scheduler: Callable[[Ready], Scheduler],
        *,
        max_requests: int,
        step_timeout: float,
        step_log: StepLog | None = None,
    ) -> None:
        self.status: Status = "loading"
        self.reason = "the model is loading"
        self.max_model_len = 0
        """The longest sequence, prompt and output, in tokens; 0 until the engine was ready once."""
        self._open_ranks = open_ranks
        self._make_scheduler = make_scheduler
        self._max_requests = max_requests
        self._step_timeout = step_timeout
        self._step_log = step_log
        self._scheduler: Scheduler | None = None
        self._generations: dict[Sequence, Generation] = {}
        self._outputs: list[tuple[Sequence, TokenDelta]] = []  # of the last step, not handed out yet
        self._work = anyio.Event()  # there may be something to plan that the last plan did not see
        self._was_ready = anyio.Event()
        self._restarts = 0
        self._step_seconds = 0.0
        self._pace = Pace()

    async def run(self) -> None:
        """Serve until cancelled; then everything in flight ends with an error and the ranks are stopped.

        Raises StartupError if the first start fails. A rank that is lost later is started again.
        """
        try:
            with self._step_log or nullcontext():
                await self._run()
        finally:
            self._fail_all(Unavailable("The server is shutting down."))

    async def wait_ready(self) -> None:
        """Wait until the engine was ready for the first time."""
        await self._was_ready.wait()

    def drain(self) -> None:
        """Refuse new requests from now on; what runs goes on."""
        self.status, self.reason = "draining", "the server is shutting down"

    def submit(self, request: Request) -> Generation:
        """Queue a request. Raises Unavailable while there is no model, Overloaded if the queue is full."""
        if self._scheduler is None or self.status != "ready":
            raise Unavailable(f"The server is not ready: {self.reason.rstrip('.')}.")
        if len(self._generations) >= self._max_requests:
            raise Overloaded(f"{self._max_requests} requests are already queued or running: try again later.")
        sequence = self._scheduler.add(request)
        generation = Generation(lambda: self._cancel(sequence), request.group)
        self._generations[sequence] = generation
        self._work.set()
        return generation

    def stats(self) -> EngineStats:
        """The state now."""
        if self._scheduler is None:
            return EngineStats()
        return stats_of(self._scheduler, rank_restarts=self._restarts, step_seconds=self._step_seconds)

    # -- the loop ------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        failures = 0
        while True:
            try:
                async with self._open_ranks() as ranks:
                    self._begin(ranks.ready)
                    failures = 0
                    await self._serve_until_lost(ranks)
            except RankError as error:
                if self._scheduler is None:
                    raise StartupError(str(error)) from error
                failures += 1
                await self._recover(error, failures)

    def _begin(self, ready: Ready) -> None:
        if self._scheduler is None:
            self._scheduler = self._make_scheduler(ready)
            self.max_model_len = self._scheduler.max_model_len
        elif ready.num_blocks != (before := self._scheduler.pool.num_blocks):
            logger.warning("the KV cache has %d blocks, and had %d before", ready.num_blocks, before)
            try:
                self._scheduler.forget_cache(ready.num_blocks)
            except ValueError as error:  # where it is what is left of a GPU's memory, that may pass
                raise RankError(f"the KV cache is too small now: {error}") from None
        if self.status != "draining":
            self.status, self.reason = "ready", ""
        logger.info("the ranks are ready")
        self._was_ready.set()

    async def _serve_until_lost(self, ranks: Ranks) -> None:
        """Serve; when RankError ends it, what ran was told already: stopping the ranks may take time.

        A defect in the loop counts as lost ranks: it must cost requests, not the server.
        """
        try:
            await self._serve(ranks)
        except RankError as error:
            self._lose(error)
            raise
        except Exception as defect:
            logger.exception("a defect in the engine's loop")
            lost = RankError(f"the engine failed with {type(defect).__name__}")
            self._lose(lost)
            # Whatever waits may be what it fails on.
            self._fail_all(Unavailable(f"The request was lost: {lost}."))
            raise lost from defect

    async def _serve(self, ranks: Ranks) -> None:
        """Step for ever; RankError ends it."""
        scheduler = self._scheduler
        assert scheduler is not None
        ahead: Plan | None = None  # sent while the step before it ran
        while True:
            # Renewed before the scheduler looks, and never after: other tasks run wherever the loop waits below, and
            # what they bring must end the sleep at its end.
            if self._work.is_set():
                self._work = anyio.Event()
            plan = ahead or await self._sent(scheduler.schedule(), ranks)
            self._fan_out()
            if self._outputs or scheduler.masked:
                await self._constrain(scheduler, ranks)
            if plan is None:
                await self._wait_for_work(scheduler, ranks)
                continue
            ahead = result = None
            with anyio.move_on_after(self._pace.most_of(sum(plan.num_tokens))):
                result = await self._result(ranks, plan)
            if result is None:
                ahead = await self._sent(scheduler.schedule_ahead(), ranks)
                result = await self._result(ranks, plan)
            self._note_step(plan, result, scheduler)
            self._outputs = scheduler.update(result)

    async def _sent(self, plan: Plan | None, ranks: Ranks) -> Plan | None:
        """Send the scheduler's plan, if there is one, and return it."""
        if plan is not None:
            assert self._scheduler is not None
            self._mark_started(self._scheduler)
            if self._step_log is not None:
                self._step_log.begin()
            with self._step_deadline():
                await ranks.send(plan)
        return plan

    def _note_step(self, plan: Plan, result: Sampled, scheduler: Scheduler) -> None:
        self._step_seconds += result.seconds
        self._pace.note(sum(plan.num_tokens), result.seconds)
        if self._step_log is not None:
            self._step_log.end(plan, result.seconds, len(scheduler.running), scheduler.num_waiting)

    async def _constrain(self, scheduler: Scheduler, ranks: Ranks) -> None:
        """Advance the constraints by their outputs' tokens, and give the ranks the masks that the last plan waits for.

        The outputs are handed out afterwards: a constraint may end one.
        """
        turns = {sequence: Turn(sequence) for sequence, _ in self._outputs}
        for sequence in scheduler.masked:
            if sequence in self._generations:
                turns.setdefault(sequence, Turn(sequence)).wants_mask = True
        for sequence, turn in turns.items():
            turn.tokens = sequence.tokens[sequence.num_prompt + sequence.num_advanced :]
            sequence.num_advanced = sequence.num_generated
        await run_turns(turns.values())
        if scheduler.masked:
            with self._step_deadline():
                for masks in _masks(scheduler, turns):
                    await ranks.send(masks)
        outputs, self._outputs = self._outputs, []
        for sequence, delta in outputs:
            if turns[sequence].finished and turns[sequence].error is None:
                scheduler.finish(sequence, "stop")
                delta.finish_reason = "stop"
            self._deliver(sequence, delta)
        for turn in turns.values():
            self._end_by_constraint(turn, scheduler)

    def _end_by_constraint(self, turn: Turn, scheduler: Scheduler) -> None:
        """End the request of a turn that failed, or that needs no token at all."""
        if turn.sequence not in self._generations:
            return
        if turn.error is not None:
            self._fail(turn.sequence, turn.error)
        elif turn.finished:
            scheduler.finish(turn.sequence, "stop")
            self._deliver(turn.sequence, TokenDelta([], finish_reason="stop"))

    async def _result(self, ranks: Ranks, plan: Plan) -> Sampled:
        with self._step_deadline():
            result = await ranks.receive()
        if result.step != plan.step:
            raise RankError(f"the ranks answered step {result.step} where {plan.step} was due")
        return Sampled(result)

    @contextmanager
    def _step_deadline(self) -> Iterator[None]:
        """Ranks that neither take a plan nor answer it in time are lost."""
        try:
            with anyio.fail_after(self._step_timeout):
                yield
        except TimeoutError:
            raise RankError(f"a step took longer than {self._step_timeout:g} s") from None

    async def _wait_for_work(self, scheduler: Scheduler, ranks: Ranks) -> None:
        """Nothing to do: look the bookkeeping over, and sleep until a request comes, with an eye on the ranks."""
        if self._step_log is not None:
            self._step_log.pause()
        if not scheduler.running:
            try:
                scheduler.check_integrity()
            except AssertionError as error:
                logger.critical("the KV cache's books do not agree (%s): starting with an empty cache", error)
                scheduler.forget_cache()
        while not self._work.is_set():
            with anyio.move_on_after(IDLE_CHECK_SECONDS):
                await self._work.wait()
            await ranks.check()

    def _mark_started(self, scheduler: Scheduler) -> None:
        now = time.monotonic()
        for sequence in scheduler.admitted:
            self._generations[sequence].started = now

    def _fan_out(self) -> None:
        """Hand out what the last step gave, but for the outputs on which a constraint has a say."""
        outputs, self._outputs = self._outputs, []
        for sequence, delta in outputs:
            if sequence.constrained and delta.finish_reason in (None, "length") and delta.token_ids:
                self._outputs.append((sequence, delta))
            else:
                self._deliver(sequence, delta)

    def _deliver(self, sequence: Sequence, delta: TokenDelta) -> None:
        generation = self._generations.get(sequence)
        if generation is None:
            return  # cancelled while the step ran
        if delta.finish_reason is not None:
            del self._generations[sequence]
        if not generation.deliver(delta):
            self._cancel(sequence)

    # -- ends ----------------------------------------------------------------------------------------------------

    def _cancel(self, sequence: Sequence) -> None:
        generation = self._generations.pop(sequence, None)
        if generation is not None and self._scheduler is not None:
            self._scheduler.finish(sequence, "cancelled")
            generation.end(TokenDelta([], finish_reason="cancelled"))
            self._work.set()

    def _fail(self, sequence: Sequence, error: ServerError) -> None:
        assert self._scheduler is not None
        self._scheduler.finish(sequence, "error")
        self._generations.pop(sequence).end(TokenDelta([], finish_reason="error", error=error))

    def _fail_all(self, error: ServerError) -> None:
        for sequence in list(self._generations):
            self._fail(sequence, error)

    def _lose(self, error: RankError) -> None:
        """The ranks are lost: say so, and end what ran. What waits goes on waiting."""
        scheduler = self._scheduler
        assert scheduler is not None
        if self.status != "draining":
            self.status, self.reason = "restarting", f"restarting after a failure: {error}"
        if self._step_log is not None:
            self._step_log.pause()
        # Those that were not told the last result lose its tokens.
        untold = {sequence for sequence, _ in self._outputs}
        self._outputs = []
        for sequence in list(self._generations):
            if sequence.row >= 0 or sequence in untold:
                self._fail(sequence, Unavailable(f"The request was lost: {error}."))
        scheduler.forget_cache()

    async def _recover(self, error: RankError, failures: int) -> None:
        """Pause before the next start; after several failures in a row, end what waits, too."""
        self._lose(error)
        if failures >= GIVE_UP_WAITING_AFTER:
            self._fail_all(Unavailable(f"The ranks do not start: {error}."))
        self._restarts += 1
        pause = min(MAX_BACKOFF_SECONDS, 0.5 * 2 ** min(failures - 1, 10))
        logger.error("%s; restarting the ranks in %.1f s", error, pause)
        await anyio.sleep(pause)


def _masks(scheduler: Scheduler, turns: dict[Sequence, Turn]) -> Iterator[Masks]:
    """The masks of the last plan's rows, less those of requests that end: they may sample anything."""
    masks: dict[int, bytes] = {}
    for row, sequence in zip(scheduler.plan.masked_rows, scheduler.masked, strict=True):
        turn = turns.get(sequence)
        if turn is not None and turn.mask is not None and turn.error is None:
            masks[row] = turn.mask
    rows = list(masks)
    for start in range(0, max(1, len(rows)), MASKS_PER_FRAME):
        part = rows[start : start + MASKS_PER_FRAME]
        more = start + len(part) < len(rows)
        yield Masks(scheduler.plan.step, part, [masks[row] for row in part], more)
