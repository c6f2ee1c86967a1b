from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdserve.engine.results import Sampled
from fdserve.engine.sequence import Sequence
from tests.engine.simulation import PROMPTS, SimulatedRank, expected_output, make_request, make_scheduler, run

REQUESTS = st.lists(
    st.tuples(PROMPTS, st.integers(1, 30), st.integers(0, 2), st.sampled_from(["", "salt"]), st.integers(0, 20)),
    min_size=1,
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(
    requests=REQUESTS,
    num_blocks=st.integers(16, 40),
    budget=st.integers(1, 48),
    prefix_caching=st.booleans(),
    cancellations=st.dictionaries(st.integers(0, 13), st.integers(0, 30), max_size=4),
    ahead=st.sets(st.integers(0, 60)),
    endings=st.booleans(),
)
def test_every_request_ends_with_its_own_tokens(
    requests: list[tuple[list[int], int, int, str, int]],
    num_blocks: int,
    budget: int,
    prefix_caching: bool,
    cancellations: dict[int, int],
    ahead: set[int],
    endings: bool,
) -> None:
    """Whatever arrives when, in whatever order, with however few blocks: the text is that of the request alone.

    In the steps of `ahead` the next one is planned while one is in flight.
    """
    scheduler = make_scheduler(num_blocks=num_blocks, budget=budget, prefix_caching=prefix_caching)
    rank = SimulatedRank(scheduler)
    eos = tuple(range(0, 997, 9)) if endings else ()
    arriving = [
        (step, make_request(prompt, max_tokens=count, name=str(index), priority=priority, salt=salt, eos=eos))
        for index, (prompt, count, priority, salt, step) in enumerate(requests)
    ]
    live: dict[str, Sequence] = {}
    outputs: dict[str, list[int]] = {request.id: [] for _, request in arriving}
    results: list[Sampled] = []  # of the plans in flight
    for step in range(3000):
        for when, request in arriving:
            if when == step:
                live[request.id] = scheduler.add(request)
        for index, when in cancellations.items():
            if when == step and str(index) in live:
                scheduler.finish(live[str(index)], "cancelled")
        if not results:
            plan = scheduler.schedule()
            if plan is None:
                scheduler.check_integrity()
                if step > 30:
                    break
                continue
            results.append(rank.execute(plan))
        if step in ahead:
            plan = scheduler.schedule_ahead()
            if plan is not None:
                results.append(rank.execute(plan))
        scheduler.check_integrity()
        assert len(scheduler.running) <= 8
        for index, when in cancellations.items():  # also while a step is in flight
            if when + 1 == step and str(index) in live:
                scheduler.finish(live[str(index)], "cancelled")
        for sequence, delta in scheduler.update(results.pop(0)):
            outputs[sequence.request.id] += delta.token_ids
            assert (delta.finish_reason is not None) == (sequence.finish_reason is not None)
    else:
        raise AssertionError("a request never ended")
    scheduler.check_integrity()
    assert scheduler.pool.num_free == num_blocks
    for _, request in arriving:
        expected = expected_output(request, scheduler.max_model_len)
        if live[request.id].finish_reason == "cancelled":
            assert outputs[request.id] == expected[: len(outputs[request.id])]
        else:
            assert outputs[request.id] == expected


@pytest.mark.parametrize(("prompt", "max_tokens"), [(4, 1), (63, 9)])
def test_no_step_is_planned_ahead_behind_the_last_token(prompt: int, max_tokens: int) -> None:
    scheduler = make_scheduler(budget=64)
    scheduler.add(make_request([1] * prompt, max_tokens=max_tokens))
    assert scheduler.schedule() is not None
    assert scheduler.schedule_ahead() is None


def test_no_step_is_planned_ahead_that_may_have_to_preempt() -> None:
    scheduler = make_scheduler(num_blocks=16)
    rank = SimulatedRank(scheduler)
    for index in range(2):
        scheduler.add(make_request([index] * 18, name=str(index), max_tokens=30))
    plan = scheduler.schedule()
    while plan is not None and scheduler.pool.num_free >= 2:
        scheduler.update(rank.execute(plan))
        plan = scheduler.schedule()
    assert len(scheduler.running) == 2
    assert scheduler.schedule_ahead() is None


def test_blocks_that_are_full_before_they_are_known_are_found_by_their_prefix() -> None:
    scheduler = make_scheduler()
    rank = SimulatedRank(scheduler)
    first = scheduler.add(make_request([1, 2, 3], max_tokens=10))  # the last step fills the third block
    results = [rank.execute(scheduler.schedule() or scheduler.plan)]
    while results:  # always one step ahead
        plan = scheduler.schedule_ahead()
        results += [rank.execute(plan)] if plan is not None else []
        scheduler.update(results.pop(0))
    assert len(first.tokens) == 13
    again = scheduler.add(make_request(first.tokens, max_tokens=1))
    run(scheduler, rank)
    assert again.cached_tokens == 12


def test_decodes_run_first_and_a_long_prefill_shares_the_step() -> None:
    scheduler = make_scheduler(budget=8)
    rank = SimulatedRank(scheduler)
    scheduler.add(make_request([1, 2, 3], name="short"))
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.update(rank.execute(plan))
    scheduler.add(make_request(list(range(20)), name="long"))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.num_tokens == [1, 7]


def test_without_chunked_prefill_a_prompt_is_computed_in_one_step() -> None:
    scheduler = make_scheduler(budget=64, chunked_prefill=False)
    rank = SimulatedRank(scheduler)
    for index in range(3):
        scheduler.add(make_request([index] * 30, name=str(index), max_tokens=2))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.num_tokens == [30, 30]
    scheduler.update(rank.execute(plan))
    assert len(run(scheduler, rank)) == 3


def test_prefix_hits_are_exact() -> None:
    scheduler = make_scheduler(budget=64)
    rank = SimulatedRank(scheduler)
    prompt = list(range(17))
    scheduler.add(make_request(prompt, name="first", max_tokens=1))
    run(scheduler, rank)
    second = scheduler.add(make_request(prompt, name="second", max_tokens=1))
    third = scheduler.add(make_request([*prompt[:9], 99, *prompt[10:]], name="third", max_tokens=1))
    salted = scheduler.add(make_request(prompt, name="salted", max_tokens=1, salt="x"))
    run(scheduler, rank)
    assert (second.cached_tokens, third.cached_tokens, salted.cached_tokens) == (16, 8, 0)


def test_at_least_one_token_is_computed_of_a_fully_cached_prompt() -> None:
    scheduler = make_scheduler()
    rank = SimulatedRank(scheduler)
    for name in ("cold", "warm"):
        sequence = scheduler.add(make_request(list(range(16)), name=name, max_tokens=1))
        run(scheduler, rank)
    assert sequence.cached_tokens == 12


def test_choices_of_one_prompt_share_its_blocks_within_a_step() -> None:
    scheduler = make_scheduler(budget=64)
    rank = SimulatedRank(scheduler)
    for index in range(4):
        scheduler.add(make_request(list(range(17)), name=str(index), max_tokens=3))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.num_tokens == [17, 1, 1, 1]
    scheduler.update(rank.execute(plan))
    assert len({tuple(output) for output in run(scheduler, rank).values()}) == 1


def test_out_of_blocks_preempts_the_newest_of_the_lowest_priority() -> None:
    scheduler = make_scheduler(num_blocks=16, model_len=64)
    rank = SimulatedRank(scheduler)
    low_old = scheduler.add(make_request([1] * 15, name="low old", priority=1, max_tokens=30))
    low_new = scheduler.add(make_request([2] * 15, name="low new", priority=1, max_tokens=30))
    high = scheduler.add(make_request([3] * 15, name="high", priority=0, max_tokens=30))
    order: list[Sequence] = []
    for _ in range(500):
        plan = scheduler.schedule()
        if plan is None:
            break
        scheduler.check_integrity()
        if scheduler.stats.preemptions > len(order):
            order.append(next(s for s in (low_old, low_new, high) if s.row < 0 and s.finish_reason is None))
        scheduler.update(rank.execute(plan))
    assert order[0] is low_new
    assert high not in order
    for sequence in (low_old, low_new, high):
        assert sequence.tokens[15:] == expected_output(sequence.request, 64)


def test_a_finished_sequence_frees_its_blocks_at_once_wherever_it_is() -> None:
    scheduler = make_scheduler(seqs=1)
    running = scheduler.add(make_request([1] * 10, name="running"))
    waiting = scheduler.add(make_request([2] * 10, name="waiting"))
    assert scheduler.schedule() is not None
    scheduler.finish(running, "cancelled")
    scheduler.finish(running, "error")
    scheduler.finish(waiting, "cancelled")
    assert running.finish_reason == "cancelled"
    scheduler.check_integrity()
    assert scheduler.pool.num_free == 64
    assert scheduler.num_waiting == 0


def test_a_prompt_of_full_length_can_run_if_nothing_is_generated() -> None:
    scheduler = make_scheduler()
    sequence = scheduler.add(make_request([1] * 64, max_tokens=0))
    assert run(scheduler, SimulatedRank(scheduler)) == {"r": []}
    assert sequence.finish_reason == "length"


def test_a_stream_of_short_requests_does_not_starve_a_long_one() -> None:
    scheduler = make_scheduler(num_blocks=16, seqs=4, budget=16)
    rank = SimulatedRank(scheduler)
    for index in range(4):
        scheduler.add(make_request([index] * 8, name=f"early {index}", max_tokens=4))
    big = scheduler.add(make_request(list(range(60)), name="big", max_tokens=2))
    for step in range(200):
        scheduler.add(make_request([step % 7], name=f"late {step}", max_tokens=2))
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.update(rank.execute(plan))
        if big.finish_reason is not None:
            break
    assert big.finish_reason == "length"
    assert step < 60


@pytest.mark.parametrize("prompt", [[], [1] * 64])
def test_a_prompt_that_cannot_run_is_refused(prompt: list[int]) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        make_scheduler().add(make_request(prompt))


def test_settings_that_could_hang_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        make_scheduler(num_blocks=4, model_len=64)
    with pytest.raises(ValueError, match="chunked prefill"):
        make_scheduler(budget=32, model_len=64, chunked_prefill=False)
