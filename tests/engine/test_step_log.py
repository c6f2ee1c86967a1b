"""The log of steps: what the engine tells it, and what it makes of a slow or full disk."""

from __future__ import annotations

import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest

from fdserve.engine import step_log
from fdserve.engine.engine import Engine
from fdserve.engine.step_log import StepLog
from fdserve.errors import RankError, StartupError
from fdserve.executor.wire import Plan
from tests.engine.fake_ranks import FakeRanks, drain, wait_until
from tests.engine.simulation import make_request

KEYS = {"step", "began", "ended", "computed", "gap", "prefill_tokens", "decode_tokens", "running", "waiting"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def plan(step: int, num_tokens: list[int], drafts: list[tuple[int, list[int]]] | None = None) -> Plan:
    return Plan(step, [], [], list(range(len(num_tokens))), num_tokens, drafts=drafts or [])


@pytest.mark.anyio
async def test_the_engine_tells_every_step(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    ranks = FakeRanks()
    ranks.step_seconds = 0.002
    engine = Engine(ranks.open, ranks.make_scheduler, max_requests=9, step_timeout=5, step_log=StepLog(path))
    before = time.time()
    async with anyio.create_task_group() as group:
        group.start_soon(engine.run)
        with anyio.fail_after(5):
            await engine.wait_ready()
        # Prompts of 40 and 10 tokens under a budget of 32, one after the other, and then 5 tokens.
        first, second = (engine.submit(make_request([size] * size, max_tokens=5)) for size in (40, 10))
        for generation in (first, second):
            with generation:
                await drain(generation)
        await wait_until(lambda: engine.stats().running == 0)
        await anyio.sleep(0.01)
        with engine.submit(make_request([1] * 3, max_tokens=2)) as generation:
            await drain(generation)
        group.cancel_scope.cancel()
    steps = lines(path)
    assert all(step.keys() == KEYS for step in steps)
    assert [step["step"] for step in steps] == list(range(1, len(ranks.plans) + 1))
    assert [(step["prefill_tokens"], step["decode_tokens"]) for step in steps[:3]] == [(32, 0), (18, 0), (0, 2)]
    assert [(step["running"], step["waiting"]) for step in steps[:3]] == [(1, 1), (2, 0), (2, 0)]
    for last, step in pairwise(steps):
        assert step["ended"] - step["began"] >= 0.002
        if step["gap"] is not None:
            assert step["gap"] == pytest.approx(step["began"] - last["ended"], abs=1e-5)
    # Only the first step, and the first after a pause, follow no other.
    assert [step["gap"] is None for step in steps].count(True) == 2
    assert before <= steps[0]["began"] < steps[-1]["ended"] <= time.time()


@pytest.mark.anyio
@pytest.mark.usefixtures("quick_restarts")
async def test_after_a_lost_rank_there_is_no_gap(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    ranks = FakeRanks()

    def die_once(plan: Plan) -> None:
        if plan.step == 3 and ranks.starts == 1:
            raise RankError("rank 0 was killed by SIGKILL")

    ranks.before_step = die_once
    engine = Engine(ranks.open, ranks.make_scheduler, max_requests=9, step_timeout=5, step_log=StepLog(path))
    async with anyio.create_task_group() as group:
        group.start_soon(engine.run)
        with anyio.fail_after(5):
            await engine.wait_ready()
        generations = [engine.submit(make_request([1], max_tokens=4)) for _ in range(5)]  # one more than there are rows
        for generation in generations:
            with generation:
                await drain(generation)
        group.cancel_scope.cancel()
    steps = lines(path)
    assert [step["step"] for step in steps] == [1, 2, 4, 5, 6, 7]
    assert [step["gap"] is None for step in steps] == [True, False, True, False, False, False]


def test_a_step_sent_while_another_ran_began_at_its_end(tmp_path: Path) -> None:
    with StepLog(tmp_path / "steps.jsonl") as log:
        log.begin()
        log.begin()
        log.end(plan(1, [1]), 0.5, 1, 0)
        log.end(plan(2, [1]), 0.5, 1, 0)
    first, second = lines(tmp_path / "steps.jsonl")
    assert (second["began"], second["gap"]) == (first["ended"], 0.0)


def test_guesses_are_decoded(tmp_path: Path) -> None:
    with StepLog(tmp_path / "steps.jsonl") as log:
        log.begin()
        log.end(plan(1, [1, 4, 1, 30], [(1, [7, 7, 7])]), 0.5, 4, 2)
    (step,) = lines(tmp_path / "steps.jsonl")
    assert (step["decode_tokens"], step["prefill_tokens"], step["computed"]) == (6, 30, 0.5)


def test_lines_are_added_to_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    for number in (1, 2):
        with StepLog(path) as log:
            log.begin()
            log.end(plan(number, [1]), 0.0, 1, 0)
    assert [step["step"] for step in lines(path)] == [1, 2]


def test_a_long_file_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_log, "MAX_FILE_BYTES", 400)
    monkeypatch.setattr(step_log, "WRITE_EVERY_SECONDS", 0.001)
    path, aside = tmp_path / "steps.jsonl", tmp_path / "steps.jsonl.1"
    with StepLog(path) as log:
        for number in range(1, 21):
            log.begin()
            log.end(plan(number, [1]), 0.0, 1, 0)
            time.sleep(0.003)
    numbers = [step["step"] for step in lines(aside) + lines(path)]
    assert numbers == list(range(numbers[0], 21))
    assert 1 < numbers[0] < 20
    assert aside.stat().st_size < 1200


def test_a_link_is_never_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/stdout is one, and a superuser could rename it."""
    monkeypatch.setattr(step_log, "MAX_FILE_BYTES", 10)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "steps.jsonl")
    with StepLog(link) as log:
        log.begin()
        log.end(plan(1, [1]), 0.0, 1, 0)
    assert link.is_symlink()
    assert len(lines(tmp_path / "steps.jsonl")) == 1


def test_into_a_pipe(caplog: pytest.LogCaptureFixture) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with os.fdopen(reading, "rb"), os.fdopen(writing, "wb"):
        with StepLog(Path(f"/proc/self/fd/{writing}")) as log:
            log.begin()
            log.end(plan(1, [1]), 0.0, 1, 0)
        assert json.loads(os.read(reading, 1000))["step"] == 1
    assert not caplog.records


def test_what_a_slow_disk_does_not_take_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(step_log, "MAX_PENDING", 3)
    log = StepLog(tmp_path / "steps.jsonl")
    for number in range(1, 6):  # nothing is written before it is entered
        log.begin()
        log.end(plan(number, [1]), 0.0, 1, 0)
    with log:
        pass
    assert [step["step"] for step in lines(tmp_path / "steps.jsonl")] == [1, 2, 3]
    assert "2 steps are missing" in caplog.text


def test_a_full_disk_costs_the_log_and_not_the_server(caplog: pytest.LogCaptureFixture) -> None:
    with StepLog(Path("/dev/full")) as log:
        log.begin()
        log.end(plan(1, [1]), 0.0, 1, 0)
    assert "cannot be written any more: No space left" in caplog.text


def test_a_file_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"missing/steps\.jsonl cannot be written: No such file"):
        StepLog(tmp_path / "missing" / "steps.jsonl")
