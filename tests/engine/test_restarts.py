"""Ranks that are lost, and come back or not, on both event loops."""

from __future__ import annotations

import pytest

from fdserve.engine.engine import Engine
from fdserve.errors import RankError, StartupError, Unavailable
from fdserve.executor.wire import Plan, Ready
from tests.engine.fake_ranks import FakeRanks, drain, serving, wait_until
from tests.engine.simulation import expected_output, make_request

pytestmark = pytest.mark.anyio


def lose_at(ranks: FakeRanks, step: int) -> None:
    """Have the ranks be lost when they get the plan of that step."""

    def before_step(plan: Plan) -> None:
        if plan.step == step and ranks.starts == 1:
            raise RankError("rank 0 was killed by SIGKILL")

    ranks.before_step = before_step


@pytest.mark.usefixtures("quick_restarts")
async def test_a_lost_rank_ends_what_ran_and_what_waited_then_runs() -> None:
    ranks = FakeRanks()
    ranks.step_seconds = 0.002
    lose_at(ranks, 5)
    async with serving(ranks) as engine:
        requests = [make_request([index] * 4, name=str(index), max_tokens=20) for index in range(6)]
        generations = [engine.submit(request) for request in requests]
        results = [await drain(generation) for generation in generations]
        for generation in generations:
            generation.__exit__(None, None, None)
        for tokens, last in results[:4]:
            assert last.finish_reason == "error"
            assert isinstance(last.error, Unavailable)
            assert "SIGKILL" in str(last.error)
            assert len(tokens) < 20
        for request, (tokens, last) in zip(requests[4:], results[4:], strict=True):
            assert tokens == expected_output(request, 64)
            assert last.finish_reason == "length"
        assert engine.status == "ready"
        assert engine.stats().rank_restarts == 1
        assert engine.stats().kv_blocks_used == 0


@pytest.mark.usefixtures("quick_restarts", "always_ahead")
@pytest.mark.parametrize("step", [2, 6, 7])
async def test_a_rank_may_be_lost_with_two_plans_in_flight(step: int) -> None:
    ranks = FakeRanks()
    lose_at(ranks, step)
    async with serving(ranks) as engine:
        requests = [make_request([index] * 4, name=str(index), max_tokens=20) for index in range(6)]
        generations = [engine.submit(request) for request in requests]
        results = [await drain(generation) for generation in generations]
        assert [last.finish_reason for _, last in results] == ["error"] * 4 + ["length"] * 2
        for request, (tokens, _) in zip(requests[4:], results[4:], strict=True):
            assert tokens == expected_output(request, 64)
        assert ranks.most_in_flight == 2
        assert engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize("blocks", [16, 200])
async def test_ranks_may_come_back_with_another_cache(blocks: int) -> None:
    """On a GPU its size is what is left of the memory: no plan may name a block that is not there any more."""
    ranks = FakeRanks()
    ranks.step_seconds = 0.002

    def die_once(plan: Plan) -> None:
        if plan.step == 5 and ranks.starts == 1:
            ranks.ready = Ready(blocks, "float32", 0)
            ranks.plans.clear()
            raise RankError("rank 0 was killed by SIGKILL")

    ranks.before_step = die_once
    async with serving(ranks) as engine:
        requests = [make_request([index] * 30, name=str(index), max_tokens=20) for index in range(9)]
        generations = [engine.submit(request) for request in requests]
        results = [await drain(generation) for generation in generations]
        for request, (tokens, _) in zip(requests[4:], results[4:], strict=True):
            assert tokens == expected_output(request, 64)
        assert engine.stats().kv_blocks_total == blocks
        named = [block for plan in ranks.plans for new in plan.new_rows for block in new.blocks]
        named += [block for plan in ranks.plans for _, block in plan.new_blocks]
        assert 0 <= max(named) < blocks


async def test_ranks_that_come_back_with_too_small_a_cache_are_started_again() -> None:
    ranks = FakeRanks()

    def die_once(plan: Plan) -> None:
        if ranks.starts == 1:
            ranks.ready = Ready(15, "float32", 0)
            raise RankError("rank 0 was killed by SIGKILL")

    ranks.before_step = die_once
    async with serving(ranks) as engine:
        with engine.submit(make_request([1])) as generation:
            await drain(generation)
        await wait_until(lambda: "15 blocks" in engine.reason)
        assert engine.status == "restarting"
        assert "64 tokens" in engine.reason
        ranks.ready = Ready(64, "float32", 0)
        await wait_until(lambda: engine.status == "ready")
        request = make_request([1] * 50, max_tokens=14)
        with engine.submit(request) as generation:
            assert (await drain(generation))[0] == expected_output(request, 64)


@pytest.mark.usefixtures("quick_restarts")
async def test_while_ranks_restart_health_tells_and_new_requests_are_refused() -> None:
    ranks = FakeRanks()

    def die_once(plan: Plan) -> None:
        if ranks.starts == 1:
            ranks.fail_starts = 1
            raise RankError("rank 0 hung")

    ranks.before_step = die_once
    async with serving(ranks) as engine:
        with engine.submit(make_request([1])) as generation:
            _, last = await drain(generation)
        assert last.finish_reason == "error"
        assert engine.status == "restarting"
        assert "rank 0 hung" in engine.reason
        with pytest.raises(Unavailable, match="rank 0 hung"):
            engine.submit(make_request([1]))
        await wait_until(lambda: engine.status == "ready")
        with engine.submit(make_request([1])) as generation:
            _, last = await drain(generation)
        assert last.finish_reason == "length"


@pytest.mark.usefixtures("quick_restarts")
async def test_a_step_that_takes_too_long_counts_as_a_lost_rank() -> None:
    ranks = FakeRanks()
    ranks.step_seconds = 10
    async with serving(ranks, step_timeout=0.05) as engine:
        with engine.submit(make_request([1])) as generation:
            _, last = await drain(generation)
        assert "longer than 0.05 s" in str(last.error)
        ranks.step_seconds = 0
        await wait_until(lambda: engine.status == "ready")


@pytest.mark.usefixtures("quick_restarts", "always_ahead")
async def test_a_step_that_takes_too_long_counts_with_two_plans_in_flight() -> None:
    ranks = FakeRanks()

    def hang(plan: Plan) -> None:
        if plan.step == 6:
            ranks.step_seconds = 10

    ranks.before_step = hang
    async with serving(ranks, step_timeout=0.05) as engine:
        with engine.submit(make_request([1], max_tokens=30)) as generation:
            tokens, last = await drain(generation)
        assert "longer than 0.05 s" in str(last.error)
        assert tokens
        assert ranks.most_in_flight == 2
        ranks.step_seconds = 0
        await wait_until(lambda: engine.status == "ready")
        with engine.submit(make_request([1])) as generation:
            assert (await drain(generation))[1].finish_reason == "length"


async def test_a_lost_rank_is_told_before_it_has_stopped() -> None:
    """Stopping a rank that hangs takes seconds; neither health nor clients wait for that."""
    ranks = FakeRanks()
    ranks.step_seconds = 10
    ranks.stop_seconds = 3600
    async with serving(ranks, step_timeout=0.05) as engine:
        with engine.submit(make_request([1])) as generation:
            _, last = await drain(generation)
        assert last.finish_reason == "error"
        assert engine.status == "restarting"


async def test_ranks_that_never_come_back_end_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdserve.engine.engine.MAX_BACKOFF_SECONDS", 0.0001)
    ranks = FakeRanks()
    ranks.step_seconds = 0.002

    def die(plan: Plan) -> None:
        if plan.step == 3:
            ranks.fail_starts = 2000
            raise RankError("rank 0 was killed by SIGKILL")

    ranks.before_step = die
    async with serving(ranks) as engine:
        generations = [engine.submit(make_request([index], max_tokens=20)) for index in range(6)]
        for generation in generations:
            _, last = await drain(generation)
            assert isinstance(last.error, Unavailable)
        assert ranks.starts >= 3
        # However long that goes on: 2 ** 1100 is too large for a float.
        await wait_until(lambda: ranks.starts > 1100)
        assert engine.status == "restarting"


async def test_a_rank_lost_while_idle_is_noticed() -> None:
    ranks = FakeRanks()
    async with serving(ranks) as engine:
        ranks.dead_while_idle = True
        await wait_until(lambda: engine.status == "restarting")
        await wait_until(lambda: engine.status == "ready")
        with engine.submit(make_request([1])) as generation:
            _, last = await drain(generation)
        assert last.finish_reason == "length"


async def test_a_first_start_that_fails_is_a_startup_error() -> None:
    ranks = FakeRanks()
    ranks.fail_starts = 1
    engine = Engine(ranks.open, ranks.make_scheduler, max_requests=1, step_timeout=1)
    with pytest.raises(Unavailable, match="loading"):
        engine.submit(make_request([1]))
    with pytest.raises(StartupError, match="no such model"):
        await engine.run()
