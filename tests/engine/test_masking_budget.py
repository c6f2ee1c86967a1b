"""What constraints may compute in a step, on both event loops."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable

import pytest

from fdserve.engine.masking import Turn, run_turns
from fdserve.engine.request import Group
from fdserve.engine.sequence import Sequence
from fdserve.errors import InvalidRequest
from tests.engine.fake_ranks import FakeRanks, drain, serving, wait_until
from tests.engine.simulation import make_request
from tests.engine.test_masking import Script

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("where", ["in the thread", "in the event loop"])
async def test_a_process_that_is_held_up_costs_no_request(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The limit is on what a constraint computes, not on what it and the event loop wait for."""
    monkeypatch.setattr("fdserve.engine.masking.BUDGET_SECONDS", 0.05)
    monkeypatch.setattr("fdserve.engine.masking.HANG_SECONDS", 0.5)
    waiting, go_on = threading.Event(), threading.Event()

    def wait(step: int) -> None:
        if where == "in the thread":
            time.sleep(0.3)
        elif step == 1:
            waiting.set()
            go_on.wait(5)

    async with serving(FakeRanks()) as engine:
        with engine.submit(make_request([1], constraint=Script({1}, {2}, {3}, at=wait))) as generation:
            if where == "in the event loop":
                await wait_until(waiting.is_set)
                time.sleep(1)
                go_on.set()
            assert (await drain(generation))[0] == [1, 2, 3]


async def test_a_constraint_that_computes_too_long_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdserve.engine.masking.BUDGET_SECONDS", 0.1)
    async with serving(FakeRanks()) as engine:
        costly, cheap = Script({1}, {2}, at=lambda step: burn(1)), Script({1}, {2}, at=lambda step: burn(0.03))
        requests = [make_request([1], constraint=each) for each in (costly, cheap)]
        with engine.submit(requests[0]) as one, engine.submit(requests[1]) as other:
            assert isinstance((await drain(one))[1].error, InvalidRequest)
            assert (await drain(other))[0] == [1, 2]


def burn(seconds: float, given_up: Callable[[], bool] = lambda: False) -> None:
    """Compute for so long without Python's lock, as a grammar does."""
    end = time.thread_time() + seconds
    while time.thread_time() < end and not given_up():
        hashlib.sha256(BYTES)


BYTES = bytes(500_000)


class Costing(Script):
    """Goes on for ever, and counts its masks, each of which costs so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(*[{1}] * 1000, at=lambda step: self._count(seconds))
        self.masks = 0
        self.given_up = False

    def _count(self, seconds: float) -> None:
        self.masks += 1
        burn(seconds, lambda: self.given_up)


def turns_of(name: str | None, *scripts: Script) -> list[Turn]:
    """Of requests of one group with that name, or of one each where it is None."""
    group, turns = Group(), []
    for script in scripts:
        request = make_request([1], constraint=script)
        if name is not None:
            request.group = group
        turns.append(Turn(Sequence(request, 0, 64), wants_mask=True))
    return turns


async def test_many_costly_copies_of_one_request_fail_alone_and_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them takes long, but all together do; those of others that stand behind them are not touched."""
    monkeypatch.setattr("fdserve.engine.masking.BUDGET_SECONDS", 0.3)
    heavy = [Costing(0.05) for _ in range(100)]
    others = [Costing(0.0) for _ in range(20)]
    middling = Costing(0.03)
    turns = (
        turns_of("heavy", *heavy),
        turns_of("other", *others),
        turns_of("middling", middling),
        turns_of(None, middling),
    )
    await run_turns([turn for each in turns for turn in each])
    assert all(isinstance(turn.error, InvalidRequest) for turn in turns[0])
    assert sum(script.masks for script in heavy) <= 8
    for turn in (*turns[1], *turns[2]):
        assert turn.error is None
        assert turn.mask is not None


async def test_who_took_most_fails_when_another_one_exceeds_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdserve.engine.masking.BUDGET_SECONDS", 0.3)
    monkeypatch.setattr("fdserve.engine.masking.EXTRA_SECONDS", 0.3)
    first, second = turns_of("costly", Costing(0.26), Costing(0.26)), turns_of(None, Costing(0.2), Costing(0.0))
    await run_turns([*first, *second])
    assert [turn.error is None for turn in (*first, *second)] == [False, False, True, True]
    assert first[1].sequence.request.constraint.masks == 0  # type: ignore[union-attr]


async def test_many_costly_requests_hold_up_a_step_no_longer_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdserve.engine.masking.BUDGET_SECONDS", 0.3)
    scripts = [Costing(0.5) for _ in range(20)]
    turns = turns_of(None, *scripts, Costing(0.0))
    await run_turns(turns)
    for script in scripts:
        script.given_up = True
    assert sum(turn.seconds for turn in turns) < 2  # 0.55, and what passes until it is seen
    assert all(isinstance(turn.error, InvalidRequest) for turn in turns[:20])
    assert turns[20].error is None


async def test_the_cheap_ones_come_first_as_far_as_that_is_known() -> None:
    order = []
    scripts = [Script(*[{1}] * 9, at=lambda step, name=name: order.append(name)) for name in "abcdef"]  # type: ignore[misc]
    turns = [*turns_of("x", *scripts[:3]), *turns_of(None, *scripts[3:])]
    turns[3].sequence.slowest_turn = 0.1
    turns[4].sequence.slowest_turn = 0.0001
    await run_turns(turns)
    # Known to be cheap, unknown, of those one of a group at a time, known to be costly.
    assert order == ["e", "a", "f", "b", "c", "d"]
    assert [turn.sequence.slowest_turn == 0.1 for turn in turns] == [False, False, False, True, False, False]
    assert all(turn.sequence.slowest_turn > 0 for turn in turns)


async def test_the_copies_of_a_request_that_failed_are_not_run() -> None:
    def fail(step: int) -> None:
        raise error

    error = InvalidRequest("too costly")
    bad = turns_of("a", Script({1}, at=fail), Costing(0.0), Costing(0.0))
    good = turns_of("b", Costing(0.0))
    await run_turns([*bad, *good])
    assert [turn.error for turn in bad] == [error] * 3
    assert [turn.sequence.request.constraint.masks for turn in (*bad[1:], *good)] == [0, 0, 1]  # type: ignore[union-attr]
    assert good[0].error is None
