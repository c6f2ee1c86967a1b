"""What a step's result makes of its sequences."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from fdserve.engine.request import Request, SamplingParams, TokenDelta
from fdserve.engine.results import Sampled
from fdserve.engine.sequence import Sequence
from fdserve.errors import InternalError, InvalidRequest
from fdserve.executor.wire import StepResult
from tests.engine.simulation import (
    PROMPTS,
    SimulatedRank,
    expected_output,
    make_request,
    make_scheduler,
    prompt_logprob,
    run,
)


@settings(max_examples=100, deadline=None)
@given(
    requests=st.lists(
        st.tuples(PROMPTS, st.integers(0, 20), st.booleans(), st.integers(0, 10)), min_size=1, max_size=10
    ),
    num_blocks=st.integers(16, 40),
    budget=st.integers(1, 48),
)
def test_prompt_logprobs_come_once_and_whole(
    requests: list[tuple[list[int], int, bool, int]], num_blocks: int, budget: int
) -> None:
    """However the prompts are chunked, cached and preempted; and a request for no tokens gets none."""
    scheduler = make_scheduler(num_blocks=num_blocks, budget=budget)
    rank = SimulatedRank(scheduler)
    deltas: dict[str, list[TokenDelta]] = {}
    live = {}
    for step in range(2000):
        for index, (prompt, count, asks, when) in enumerate(requests):
            if when == step:
                asked = make_request(prompt, name=str(index), max_tokens=count, prompt_logprobs=2 if asks else None)
                live[asked.id] = scheduler.add(asked)
        plan = scheduler.schedule()
        if plan is not None:
            for sequence, delta in scheduler.update(rank.execute(plan)):
                deltas.setdefault(sequence.request.id, []).append(delta)
        elif step > 10:
            break
        scheduler.check_integrity()
    for index, (prompt, count, asks, _) in enumerate(requests):
        got = deltas[str(index)]
        assert [token for delta in got for token in delta.token_ids] == expected_output(live[str(index)].request, 64)
        assert len(got) == max(count, 1)
        assert got[-1].finish_reason == "length"
        assert all(delta.prompt_logprobs is None for delta in got[1:])
        if asks:
            assert got[0].prompt_logprobs is not None
            logprobs = [each.logprob for each in got[0].prompt_logprobs]
            assert logprobs == [prompt_logprob(prompt[: end + 1]) for end in range(1, len(prompt))]
            assert all(len(each.top_ids) == 2 for each in got[0].prompt_logprobs)
        else:
            assert got[0].prompt_logprobs is None


def test_prompt_logprobs_do_without_the_cache_and_fill_it() -> None:
    scheduler = make_scheduler(budget=64)
    rank = SimulatedRank(scheduler)
    prompt = list(range(17))
    for asks in (1, 1, None):
        sequence = scheduler.add(make_request(prompt, max_tokens=2, prompt_logprobs=asks))
        run(scheduler, rank)
        assert sequence.cached_tokens == (0 if asks else 16)


@pytest.mark.parametrize(
    ("think_end", "limit", "expected"), [(-1, 3, 3), (5, 3, 5), (5, 0, 2), (99, 3, 9), (5, None, 9)]
)
def test_an_answer_limit_counts_from_the_end_of_thinking(think_end: int, limit: int | None, expected: int) -> None:
    params = SamplingParams(max_tokens=9, seed=0, think_end_id=think_end, answer_limit=limit)
    sequence = Sequence(Request(id="r", prompt=[5, 5], params=params), 0, 64)
    tokens = [1, 5, 1, 5, 1, 1, 1, 1, 1, 1]
    reasons = [sequence.ends_with(token) for token in tokens]
    assert reasons.index("length") + 1 == expected


def test_a_row_that_may_sample_nothing_is_told_why() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request([1]))
    assert scheduler.schedule() is not None
    ((_, delta),) = scheduler.update(Sampled(StepResult(1, b"\xfe\xff\xff\xff")))
    assert delta.finish_reason == "error"
    assert isinstance(delta.error, InvalidRequest)


def test_a_row_without_a_number_fails_alone() -> None:
    scheduler = make_scheduler()
    bad = scheduler.add(make_request([1], name="bad"))
    good = scheduler.add(make_request([2], name="good"))
    assert scheduler.schedule() is not None
    outputs = scheduler.update(Sampled(StepResult(1, b"\xff\xff\xff\xff\x07\x00\x00\x00")))
    assert [(s.request.id, d.finish_reason, d.token_ids) for s, d in outputs] == [
        ("bad", "error", []),
        ("good", None, [7]),
    ]
    assert isinstance(outputs[0][1].error, InternalError)
    assert bad.finish_reason == "error"
    assert good.finish_reason is None
    scheduler.check_integrity()


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("max_tokens", [0, 3])
def test_a_prompt_without_numbers_fails_alone(at: int, max_tokens: int) -> None:
    """At the first chunk that has one, whether or not it is the last."""
    scheduler = make_scheduler(budget=5)
    rank = SimulatedRank(scheduler)
    bad = scheduler.add(make_request([1] * 8, name="bad", max_tokens=max_tokens, prompt_logprobs=1))
    good = scheduler.add(make_request([2] * 8, name="good", max_tokens=2, prompt_logprobs=1))
    plan = scheduler.schedule()
    assert plan is not None
    result = rank.result(plan)
    logprobs = array("f", result.prompt_logprobs)
    logprobs[at] = float("nan")
    ((sequence, delta),) = scheduler.update(Sampled(structs.replace(result, prompt_logprobs=logprobs.tobytes())))
    assert (sequence, delta.finish_reason, delta.token_ids, delta.prompt_logprobs) == (bad, "error", [], None)
    assert isinstance(delta.error, InternalError)
    scheduler.check_integrity()
    assert run(scheduler, rank) == {"good": expected_output(good.request, 64)}


def test_finish_reasons_tell_what_happened() -> None:
    scheduler = make_scheduler()
    rank = SimulatedRank(scheduler)
    first = expected_output(make_request([5], max_tokens=1), 64)[0]
    eos_on_last = scheduler.add(make_request([5], name="eos", max_tokens=1, eos=(first,)))
    length = scheduler.add(make_request([6], name="length", max_tokens=3))
    context = scheduler.add(make_request([7] * 60, name="context", max_tokens=100))
    run(scheduler, rank)
    assert (eos_on_last.finish_reason, length.finish_reason, context.finish_reason) == ("stop", "length", "length")
    assert len(context.tokens) == 64


@pytest.mark.parametrize("tokens", [[], [5], [5, 6, 7]])
def test_a_step_with_other_tokens_than_were_due(tokens: list[int]) -> None:
    """A sequence without its token would run for ever: such ranks count as lost."""
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.add(make_request([1, 2, 3], name=name))
    scheduler.schedule()
    with pytest.raises(ValueError, match=f"a step gave {len(tokens)} tokens, and 2 were due"):
        scheduler.update(Sampled(StepResult(1, array("i", tokens).tobytes())))
