"""The engine's loop over simulated ranks, on both event loops."""

from __future__ import annotations

import anyio
import pytest

from fdserve.engine.output import MAX_PENDING_TOKENS, Generation
from fdserve.engine.request import Group, TokenDelta
from fdserve.errors import Overloaded, SlowReader, Unavailable
from fdserve.executor.wire import Plan
from tests.engine.fake_ranks import FakeRanks, drain, serving, wait_until
from tests.engine.simulation import expected_output, make_request

pytestmark = pytest.mark.anyio


async def test_concurrent_requests_get_their_own_tokens() -> None:
    async with serving(FakeRanks()) as engine:
        requests = [make_request([index, 1, 2], name=str(index), max_tokens=5 + index) for index in range(12)]

        async def check(index: int) -> None:
            with engine.submit(requests[index]) as generation:
                tokens, last = await drain(generation)
            assert tokens == expected_output(requests[index], 64)
            assert last.finish_reason == "length"
            assert last.started > 0

        async with anyio.create_task_group() as group:
            for index in range(12):
                group.start_soon(check, index)
        assert engine.stats().running == engine.stats().waiting == engine.stats().kv_blocks_used == 0
        assert engine.stats().generated_tokens == sum(range(5, 17))


@pytest.mark.usefixtures("always_ahead")
async def test_a_step_planned_while_one_runs_changes_no_token() -> None:
    ranks = FakeRanks()
    eos = tuple(range(0, 997, 9))
    async with serving(ranks) as engine:
        requests = [make_request([index, 1, 2], name=str(index), max_tokens=30, eos=eos) for index in range(12)]

        async def check(index: int) -> None:
            with engine.submit(requests[index]) as generation:
                tokens, last = await drain(generation)
            assert tokens == expected_output(requests[index], 64)
            assert last.finish_reason == ("stop" if tokens[-1] in eos else "length")

        async with anyio.create_task_group() as group:
            for index in range(12):
                group.start_soon(check, index)
        assert ranks.most_in_flight == 2
        assert engine.stats().running == engine.stats().waiting == engine.stats().kv_blocks_used == 0


async def test_a_request_that_comes_early_in_a_step_is_in_the_next() -> None:
    ranks = FakeRanks()
    ranks.step_seconds = 0.05
    async with serving(ranks) as engine:
        with engine.submit(make_request([1], max_tokens=60)) as generation:
            for _ in range(6):
                await generation.receive()
            assert ranks.most_in_flight == 2
            sent = len(ranks.plans)
            with engine.submit(make_request([2], max_tokens=60)) as other:
                await other.receive()
            assert len(ranks.plans[sent].new_rows) == 1


async def test_leaving_a_generation_frees_its_blocks_within_a_step() -> None:
    ranks = FakeRanks()
    ranks.step_seconds = 0.002
    async with serving(ranks) as engine:
        with engine.submit(make_request([1] * 20, max_tokens=40)) as generation:
            await generation.receive()
            assert engine.stats().kv_blocks_used > 0
        assert engine.stats().kv_blocks_used == 0
        steps = engine.stats().steps
        await anyio.sleep(0.03)
        assert engine.stats().steps <= steps + 1


async def test_a_cancelled_reader_is_told() -> None:
    ranks = FakeRanks()
    ranks.step_seconds = 0.002
    async with serving(ranks) as engine:
        with engine.submit(make_request([1], max_tokens=60)) as generation:
            generation.cancel()
            generation.cancel()
            _, last = await drain(generation)
        assert last.finish_reason == "cancelled"


async def test_cancelling_a_receive_loses_nothing() -> None:
    ranks = FakeRanks()
    ranks.step_seconds = 0.004
    request = make_request([3], max_tokens=20)
    async with serving(ranks) as engine:
        with engine.submit(request) as generation:
            tokens: list[int] = []
            last = None
            for _ in range(500):
                with anyio.move_on_after(0.001):
                    for delta in await generation.receive():
                        tokens += delta.token_ids
                        last = delta
                if last is not None and last.finish_reason is not None:
                    break
        assert tokens == expected_output(request, 64)


async def test_a_request_may_be_cancelled_while_its_first_plan_is_sent() -> None:
    ranks = FakeRanks()
    async with serving(ranks) as engine:
        generation = engine.submit(make_request([1]))
        ranks.before_step = lambda plan: generation.cancel()
        _, last = await drain(generation)
        assert last.finish_reason == "cancelled"
        ranks.before_step = lambda plan: None
        with engine.submit(make_request([2])) as other:
            _, last = await drain(other)
        assert last.finish_reason == "length"
        assert engine.stats().rank_restarts == 0


@pytest.mark.usefixtures("quick_restarts")
async def test_a_defect_in_the_loop_costs_the_requests_and_not_the_server(caplog: pytest.LogCaptureFixture) -> None:
    ranks = FakeRanks()

    def fail_once(plan: Plan) -> None:
        if ranks.starts == 1:
            raise KeyError("a defect")

    ranks.before_step = fail_once
    async with serving(ranks) as engine:
        with engine.submit(make_request([1])) as generation:
            _, last = await drain(generation)
        assert isinstance(last.error, Unavailable)
        assert "defect" in caplog.text
        await wait_until(lambda: engine.status == "ready")
        with engine.submit(make_request([1])) as generation:
            _, last = await drain(generation)
        assert last.finish_reason == "length"


async def test_a_full_queue_refuses() -> None:
    ranks = FakeRanks()
    ranks.step_seconds = 0.01
    async with serving(ranks, max_requests=2) as engine:
        with engine.submit(make_request([1])), engine.submit(make_request([2])), pytest.raises(Overloaded):
            engine.submit(make_request([3]))
        with engine.submit(make_request([3])) as generation:
            await drain(generation)


async def test_a_reader_too_far_behind_loses_its_own_request_only() -> None:
    cancelled = []
    generation = Generation(lambda: cancelled.append(True), Group())
    for index in range(MAX_PENDING_TOKENS):
        assert generation.deliver(TokenDelta([index]))
    assert not generation.deliver(TokenDelta([7]))
    deltas = await generation.receive()
    assert len(deltas) == MAX_PENDING_TOKENS + 1
    assert isinstance(deltas[-1].error, SlowReader)


async def test_a_slow_reader_is_told_why_its_request_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdserve.engine.output.MAX_PENDING_TOKENS", 5)
    async with serving(FakeRanks()) as engine:
        with engine.submit(make_request([1], max_tokens=50)) as slow:
            with engine.submit(make_request([2], max_tokens=50)) as other:
                tokens, _ = await drain(other)
            assert len(tokens) == 50
            _, last = await drain(slow)
        assert isinstance(last.error, SlowReader)
        assert engine.stats().kv_blocks_used == 0


async def test_shutting_down_ends_every_request() -> None:
    ranks = FakeRanks()
    ranks.step_seconds = 0.002
    async with serving(ranks) as engine:
        generation = engine.submit(make_request([1], max_tokens=50))
        engine.drain()
        with pytest.raises(Unavailable, match="shutting down"):
            engine.submit(make_request([2]))
    _, last = await drain(generation)
    assert isinstance(last.error, Unavailable)


async def test_the_books_are_looked_over_when_idle(caplog: pytest.LogCaptureFixture) -> None:
    """A block that is lost, by a bug, costs the cache and not the server."""
    ranks = FakeRanks()
    async with serving(ranks) as engine:
        assert ranks.scheduler is not None
        ranks.scheduler.pool.allocate(1)
        with engine.submit(make_request([1])) as generation:
            await drain(generation)
        await wait_until(lambda: engine.stats().kv_blocks_used == 0)
        assert "books do not agree" in caplog.text
