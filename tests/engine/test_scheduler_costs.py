"""What a step of the scheduler costs, and what its plan weighs."""

from __future__ import annotations

import time
from typing import Any

import pytest

from fdserve.engine.request import Request, SamplingParams
from fdserve.executor.wire import Plan, encode_frame
from tests.engine.simulation import SimulatedRank, make_request, make_scheduler


def test_waiting_requests_cost_a_step_nothing() -> None:
    """A plan takes as long with ten thousand requests waiting as with forty."""

    def seconds_a_step(waiting: int) -> float:
        scheduler = make_scheduler(num_blocks=512, model_len=256, budget=64)
        rank = SimulatedRank(scheduler)
        request = make_request([1] * 200, max_tokens=50)
        for _ in range(8 + waiting):
            scheduler.add(request)
        times = []
        for _ in range(180):
            started = time.perf_counter()
            plan = scheduler.schedule()
            times.append(time.perf_counter() - started)
            assert plan is not None
            scheduler.update(rank.execute(plan))
        return min(sorted(times[part : part + 60])[30] for part in (0, 60, 120))

    assert seconds_a_step(10_000) < 3 * seconds_a_step(40) + 50e-6


def test_what_a_plan_weighs_is_bounded_however_heavy_its_requests_are(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 60_000
    monkeypatch.setattr("fdserve.engine.scheduler.MAX_NEW_ROWS_BYTES", limit)
    scheduler = make_scheduler(seqs=16, budget=64)
    rank = SimulatedRank(scheduler)
    heavy: dict[str, Any] = {
        "logit_bias": tuple((index, 1.5) for index in range(300)),
        "bad_words": tuple((70_000 + index, 80_000) for index in range(500)),
        "allowed_ids": bytes(12928),
        "banned_ids": bytes(12928),
        "stop_token_ids": tuple(range(90_000, 90_128)),
    }
    for index in range(16):
        params = SamplingParams(max_tokens=4, seed=2**62, **(heavy if index % 2 else {}))
        scheduler.add(Request(id=str(index), prompt=[index] * 9, params=params))
    largest = 0
    counts = []
    while (plan := scheduler.schedule()) is not None:
        largest = max(largest, len(encode_frame(plan)))
        counts.append(len(plan.new_rows))
        for new in plan.new_rows:
            assert len(encode_frame(Plan(1, [new], [], [], []))) <= new.weight
        scheduler.update(rank.execute(plan))
    assert counts[:4] == [4, 4, 4, 4]  # the second heavy one fills it
    assert limit < largest < limit + 40_000
