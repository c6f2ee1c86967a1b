"""The queue, against a sorted list."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdserve.engine.sequence import Sequence
from fdserve.engine.waiting import WaitingQueue
from tests.engine.simulation import make_request

ACTIONS = st.lists(st.one_of(st.integers(-2, 2), st.just("pop"), st.floats(0, 0.999)), max_size=80)
"""Push with a priority, pop, or finish one of those that wait, by its place among them."""


def sequence(arrival: int, priority: int = 0) -> Sequence:
    return Sequence(make_request([1], priority=priority), arrival, 64)


@given(ACTIONS)
def test_the_order_is_that_of_priority_and_arrival(actions: list[int | float | str]) -> None:
    queue, waiting = WaitingQueue(), list[Sequence]()
    for number, action in enumerate(actions):
        if isinstance(action, int):
            waiting.append(sequence(number, action))
            queue.push(waiting[-1])
            waiting.sort()
        elif action == "pop" and waiting:
            waiting.pop(0)
            queue.pop()
        elif isinstance(action, float) and waiting:
            ended = waiting.pop(int(action * len(waiting)))
            ended.finish_reason = "cancelled"
            queue.note_finished()
        assert queue.first() is (waiting[0] if waiting else None)
        assert len(queue) == len(waiting)
        queue.check_integrity()


def test_finished_ones_are_not_kept() -> None:
    queue = WaitingQueue()
    sequences = [sequence(number) for number in range(1000)]
    for each in sequences:
        queue.push(each)
    for each in reversed(sequences[1:]):
        each.finish_reason = "cancelled"
        queue.note_finished()
    assert queue.first() is sequences[0]
    assert len(queue) == 1
    assert len(queue._heap) < 100


def test_a_wrong_count_is_noticed() -> None:
    queue = WaitingQueue()
    queue.push(sequence(1))
    queue.push(sequence(2))
    queue._heap[1].finish_reason = "cancelled"
    with pytest.raises(AssertionError, match="number of waiting"):
        queue.check_integrity()
