"""An engine over simulated ranks, and how its tests wait for what it gives."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
from msgspec.structs import replace

from fdserve.engine.engine import Engine
from fdserve.engine.output import Generation
from fdserve.engine.request import TokenDelta
from fdserve.engine.scheduler import Scheduler
from fdserve.errors import RankError
from fdserve.executor.wire import Masks, Plan, Ready, StepResult
from tests.engine.simulation import SimulatedRank


class FakeRanks:
    """Ranks in this process. `before_step` may wait, or raise what a lost rank raises."""

    def __init__(self) -> None:
        self.ready = Ready(64, "float32", 0)
        self.scheduler: Scheduler | None = None
        self.rank: SimulatedRank | None = None
        self.starts = 0
        self.fail_starts = 0
        self.dead_while_idle = False
        self.stop_seconds = 0.0
        self.step_seconds = 0.0
        self.before_step: Callable[[Plan], None] = lambda plan: None
        self.plans: list[Plan] = []
        self.answered = 0  # of the plans
        self.most_in_flight = 0
        self.masks: list[Masks] = []

    @asynccontextmanager
    async def open(self) -> AsyncIterator[FakeRanks]:
        self.starts += 1
        if self.fail_starts > 0:
            self.fail_starts -= 1
            raise RankError("rank 0: no such model")
        if self.scheduler is not None:
            self.rank = SimulatedRank(self.scheduler)
        self.answered = len(self.plans)
        try:
            yield self
        finally:
            await anyio.sleep(self.stop_seconds)

    def make_scheduler(self, ready: Ready) -> Scheduler:
        self.scheduler = Scheduler(
            num_blocks=ready.num_blocks, block_size=4, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64
        )
        self.rank = SimulatedRank(self.scheduler)
        return self.scheduler

    async def check(self) -> None:
        if self.dead_while_idle:
            self.dead_while_idle = False
            raise RankError("rank 0 was killed by SIGKILL")

    async def send(self, message: Plan | Masks) -> None:
        if isinstance(message, Masks):
            assert message.step == self.plans[-1].step
            if self.masks and self.masks[-1].more:
                before = self.masks.pop()
                message = Masks(before.step, before.rows + message.rows, before.masks + message.masks, message.more)
            self.masks.append(message)
        else:
            self.before_step(message)
            self.plans.append(message)
            self.most_in_flight = max(self.most_in_flight, len(self.plans) - self.answered)

    async def receive(self) -> StepResult:
        await anyio.sleep(self.step_seconds)
        assert self.rank is not None
        plan = self.plans[self.answered]
        self.answered += 1
        assert not plan.masked_rows or not self.masks[-1].more
        result = self.rank.result(plan, self.masks[-1] if plan.masked_rows else None)
        return replace(result, seconds=self.step_seconds)


@asynccontextmanager
async def serving(ranks: FakeRanks, *, max_requests: int = 100, step_timeout: float = 5.0) -> AsyncIterator[Engine]:
    engine = Engine(ranks.open, ranks.make_scheduler, max_requests=max_requests, step_timeout=step_timeout)
    async with anyio.create_task_group() as group:
        group.start_soon(engine.run)
        with anyio.fail_after(5):
            await engine.wait_ready()
        yield engine
        group.cancel_scope.cancel()


async def drain(generation: Generation) -> tuple[list[int], TokenDelta]:
    tokens: list[int] = []
    with anyio.fail_after(10):
        while True:
            for delta in await generation.receive():
                tokens += delta.token_ids
                if delta.finish_reason is not None:
                    return tokens, delta


async def wait_until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(5):
        while not condition():
            await anyio.sleep(0.001)
