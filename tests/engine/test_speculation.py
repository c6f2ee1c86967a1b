from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdserve.config import SpeculativeConfig
from fdserve.engine.ngram import Ngrams
from fdserve.engine.scheduler import Scheduler
from fdserve.engine.sequence import Sequence
from fdserve.engine.speculation import MAX_DRAFTED, Speculation, StepCost
from fdserve.executor.wire import Plan
from tests.engine.simulation import SimulatedRank, allowed_ids, bits, expected_output, make_request, next_token

CONFIG = SpeculativeConfig(method="ngram", num_speculative_tokens=4)


class Oracle(Speculation):
    """Guesses that are right as often as `chance` says, at each place."""

    def __init__(self, chance: float, longest: int, seed: int = 0, *, shortest: int = 0) -> None:
        super().__init__(CONFIG)
        self.chance = chance
        self.shortest = shortest
        self.longest = longest
        self.random = random.Random(seed)

    def draft(self, sequence: Sequence, most: int, decodes: int) -> list[int]:
        tokens = list(sequence.tokens)
        most = min(most, self.longest)
        for _ in range(self.random.randint(min(self.shortest, most), most)):
            right = self.random.random() < self.chance
            tokens.append(next_token(tuple(tokens)) if right else self.random.randrange(997))
        return tokens[len(sequence.tokens) :]


def make_scheduler(speculation: Speculation | None, **changes: Any) -> Scheduler:
    limits: dict[str, Any] = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 8}
    limits |= {"max_num_batched_tokens": 32, "max_model_len": 64}
    return Scheduler(**{**limits, "speculation": speculation, **changes})


def drafted(plan: Plan) -> dict[int, int]:
    return {row: len(draft) for row, draft in plan.drafts}


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=1, max_size=40),
            st.integers(1, 40),
            st.integers(0, 2),
            st.integers(0, 20),
            st.booleans(),
        ),
        min_size=1,
        max_size=12,
    ),
    num_blocks=st.integers(16, 40),
    budget=st.integers(1, 48),
    prefix_caching=st.booleans(),
    chance=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    longest=st.integers(1, 9),
    cancellations=st.dictionaries(st.integers(0, 11), st.integers(0, 20), max_size=4),
    seed=st.integers(0, 1000),
)
def test_guesses_change_no_token(
    requests: list[tuple[list[int], int, int, int, bool]],
    num_blocks: int,
    budget: int,
    prefix_caching: bool,
    chance: float,
    longest: int,
    cancellations: dict[int, int],
    seed: int,
) -> None:
    """Whatever is guessed, with however few blocks: every request ends with its own tokens, and the books agree."""
    scheduler = make_scheduler(
        Oracle(chance, longest, seed),
        num_blocks=num_blocks,
        max_num_batched_tokens=budget,
        enable_prefix_caching=prefix_caching,
    )
    rank = SimulatedRank(scheduler)
    live: list[Sequence] = []
    outputs: dict[str, list[int]] = {}
    for step in range(2000):
        for index, (prompt, count, priority, when, ends_early) in enumerate(requests):
            if when == step:
                request = make_request(prompt, max_tokens=count, name=str(index), priority=priority)
                if ends_early:  # on an eos somewhere in the middle
                    eos = expected_output(request, 64)[count // 2 : count // 2 + 1]
                    request = make_request(prompt, max_tokens=count, name=str(index), eos=tuple(eos))
                live.append(scheduler.add(request))
                outputs[request.id] = []
        plan = scheduler.schedule()
        scheduler.check_integrity()
        if plan is None:
            if step > 20:
                break
            continue
        assert sum(drafted(plan).values()) <= MAX_DRAFTED
        result = rank.execute(plan)
        for sequence in live:
            if cancellations.get(int(sequence.request.id)) == step:
                scheduler.finish(sequence, "cancelled")
        for sequence, delta in scheduler.update(result):
            assert delta.token_ids
            outputs[sequence.request.id] += delta.token_ids
            assert (delta.finish_reason is not None) == (sequence.finish_reason is not None)
        scheduler.check_integrity()
    else:
        raise AssertionError("a request never ended")
    assert scheduler.pool.num_free == num_blocks
    for sequence in live:
        expected = expected_output(sequence.request, 64)
        output = outputs[sequence.request.id]
        assert output == (expected[: len(output)] if sequence.finish_reason == "cancelled" else expected)
    assert scheduler.stats.generated_tokens == sum(map(len, outputs.values()))
    assert scheduler.stats.accepted_tokens <= scheduler.stats.drafted_tokens


def run(scheduler: Scheduler, rank: SimulatedRank) -> list[list[int]]:
    """The tokens of each delta."""
    deltas = []
    while (plan := scheduler.schedule()) is not None:
        deltas += [delta.token_ids for _, delta in scheduler.update(rank.execute(plan))]
        scheduler.check_integrity()
    return deltas


def test_right_guesses_save_steps_and_never_pass_the_end() -> None:
    scheduler = make_scheduler(Oracle(1.0, 4, shortest=4))
    sequence = scheduler.add(make_request([1, 2, 3], max_tokens=14))
    deltas = run(scheduler, SimulatedRank(scheduler))
    assert [len(delta) for delta in deltas] == [1, 5, 5, 3]
    assert [token for delta in deltas for token in delta] == expected_output(sequence.request, 64)
    assert (scheduler.stats.drafted_tokens, scheduler.stats.accepted_tokens) == (10, 10)


def test_blocks_filled_by_guesses_are_found_once_they_are_right() -> None:
    for chance in (1.0, 0.0):
        scheduler = make_scheduler(Oracle(chance, 4, shortest=4))
        rank = SimulatedRank(scheduler)
        first = scheduler.add(make_request([1, 2, 3], max_tokens=18))
        run(scheduler, rank)
        again = scheduler.add(make_request(list(first.tokens), max_tokens=1))
        run(scheduler, rank)
        assert again.cached_tokens == 20  # of 21: the last one was never computed


def test_a_guess_takes_no_block_that_others_may_need() -> None:
    scheduler = make_scheduler(Oracle(1.0, 8), num_blocks=16, max_num_seqs=2)
    rank = SimulatedRank(scheduler)
    for index in range(2):
        scheduler.add(make_request([index] * 30, name=str(index), max_tokens=30))
    without = make_scheduler(None, num_blocks=16, max_num_seqs=2)
    plain = SimulatedRank(without)
    for index in range(2):
        without.add(make_request([index] * 30, name=str(index), max_tokens=30))
    run(scheduler, rank)
    run(without, plain)
    assert scheduler.stats.accepted_tokens > 10
    assert scheduler.stats.preemptions <= without.stats.preemptions


class Anything:
    """A constraint that allows ten ids."""

    finished = False

    def advance(self, token_id: int) -> None: ...

    def mask(self) -> bytes:
        return bits(range(10))


def test_a_constrained_sequence_is_not_guessed() -> None:
    assert allowed_ids(Anything().mask()) == list(range(10))
    scheduler = make_scheduler(Oracle(1.0, 4, shortest=4))
    scheduler.add(make_request([1], constraint=Anything()))
    assert scheduler.schedule() is not None
    scheduler._in_flight[0][0][0].tokens.append(5)
    plan = scheduler.schedule()
    assert plan is not None
    assert not plan.drafts


def ngrams(tokens: list[int], *, prompt: int | None = None, shortest: int = 2, longest: int = 4) -> Ngrams:
    index = Ngrams(tokens, len(tokens) if prompt is None else prompt, shortest, longest)
    assert index.take(len(tokens))
    return index


def test_the_longest_match_is_continued_the_latest_of_equals() -> None:
    assert ngrams([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]).guess(2) == [4, 9]
    assert ngrams([7, 2, 3, 4, 8, 2, 3, 5, 1, 2, 3]).guess(3) == [5, 1, 2]
    assert ngrams([1, 2, 3, 4, 3]).guess(3) == []
    assert ngrams([1, 2, 3, 4, 3], shortest=1).guess(3) == [4, 3, 4]
    assert ngrams([1]).guess(3) == []


def test_what_repeats_up_to_the_end_goes_on_repeating() -> None:
    assert ngrams([5, 6, 6, 6]).guess(4) == [6, 6, 6, 6]
    assert ngrams([0, 1, 2, 3, 1, 2, 3, 1, 2]).guess(5) == [3, 1, 2, 3, 1]


def test_a_place_is_kept_while_it_is_right_and_the_rate_follows() -> None:
    tokens = [1, 2, 3, 4, 5, 1, 2]
    index = ngrams(tokens)
    assert index.guess(2) == [3, 4]
    tokens += [3, 4]
    assert index.take(8)
    rate = index.rate
    assert rate > 0.5
    assert index.guess(2) == [5, 1]
    tokens.append(9)
    assert index.take(8)
    assert index.rate < rate
    assert index.guess(2) == []


def test_a_long_prompt_is_taken_in_piece_by_piece() -> None:
    tokens = list(range(100)) * 3
    index = Ngrams(tokens, 300, 2, 4)
    assert [index.take(120) for _ in range(3)] == [False, False, True]
    assert index.guess(3) == [0, 1, 2]


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60), data=st.data())
def test_a_guess_follows_an_earlier_match(tokens: list[int], data: st.DataObject) -> None:
    shortest = data.draw(st.integers(1, 3))
    index = Ngrams(tokens, len(tokens), shortest, shortest + data.draw(st.integers(0, 2)))
    while not index.take(data.draw(st.integers(1, 20))):
        pass
    ending = tokens[-shortest:]
    earlier = [i for i in range(shortest, len(tokens)) if tokens[i - shortest : i] == ending]
    draft = index.guess(1)
    assert bool(draft) == bool(earlier and len(ending) == shortest)
    assert not draft or draft[0] in [tokens[i] for i in earlier]


def test_the_cost_of_a_token_is_learnt() -> None:
    cost = StepCost()
    assert cost.fixed_tokens == 16
    for _ in range(20):
        cost.note(3, 0.023)
    assert cost.fixed_tokens == 16  # steps of one size say nothing
    for tokens in (1, 5, 9, 17) * 10:
        cost.note(tokens, 0.020 + 0.001 * tokens)
    assert cost.fixed_tokens == pytest.approx(20, rel=0.05)


def sequence_of(tokens: list[int]) -> Sequence:
    return Sequence(make_request(tokens), 0, 4096)


def test_only_what_pays_is_drafted() -> None:
    speculation = Speculation(CONFIG)
    copying = sequence_of([1, 2, 3, 4, 5, 1, 2])
    assert speculation.draft(copying, 9, decodes=1) == [3, 4, 5]
    assert speculation.draft(copying, 2, decodes=1) == [3, 4]
    assert speculation.draft(copying, 9, decodes=8) == [3]
    assert speculation.draft(copying, 9, decodes=64) == []
    assert copying.ngrams is not None
    copying.ngrams.rate = 0.95
    assert speculation.draft(copying, 9, decodes=64) == [3, 4]
    assert speculation.draft(copying, 9, decodes=8) == [3, 4, 5, 1]
    copying.ngrams.rate = 0.02
    assert speculation.draft(copying, 9, decodes=1) == []
    speculation.cost.fixed_tokens = 200
    assert speculation.draft(copying, 9, decodes=1) == [3]
    assert speculation.draft(sequence_of([1, 2, 3]), 9, decodes=1) == []
