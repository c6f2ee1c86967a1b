from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import paddle
import pytest

from fdserve import ops
from fdserve.executor.wire import NewRow, Plan, SamplingParams
from fdserve.ops.sampling import NOTHING_ALLOWED
from fdserve.worker.limits import Limits, id_mask
from fdserve.worker.rows import Rows
from fdserve.worker.sampler import Sampled, Sampler

VOCAB = 50
EOS, END = 2, 9


def make_rows(*states: tuple[list[int], list[int], SamplingParams]) -> Rows:
    """Rows of (prompt, output so far, parameters)."""
    rows = Rows(8, 64, block_size=16, vocab_size=VOCAB)
    for row, (prompt, output, params) in enumerate(states):
        tokens = np.array(prompt + output, np.int32)
        new = NewRow(row, tokens.tobytes(), len(prompt), len(tokens) - 1, (0,), params)
        rows.take_changes(Plan(1, [new], [], [], []))
    return rows


def params(**changes: Any) -> SamplingParams:
    """The ids of `allowed_ids` and `banned_ids` may be given as a tuple."""
    for name in changes.keys() & {"allowed_ids", "banned_ids"}:
        changes[name] = id_mask(changes[name], VOCAB).tobytes()
    return SamplingParams(**{"max_tokens": 20, "seed": 1, "temperature": 0.0, "eos_token_ids": (EOS,), **changes})


def run(rows: Rows, logits: npt.NDArray[Any], masks: dict[int, bytes] | None = None) -> Sampled:
    row_ids = np.arange(len(logits), dtype=np.int32)
    sampled = Sampler(rows, VOCAB).sample(
        row_ids, rows.num_tokens[row_ids], paddle.to_tensor(logits.astype(np.float32)), masks or {}
    )
    rows.append(row_ids, sampled.token_ids)
    return sampled


def logits_favouring(*ids: int) -> npt.NDArray[Any]:
    """Logits that fall in the order of `ids`, everything else far behind."""
    logits = np.full(VOCAB, -20.0)
    for place, token in enumerate(ids):
        logits[token] = 10.0 - place
    return logits


def test_min_tokens_bans_every_ending_id_until_reached() -> None:
    asks = params(min_tokens=2, stop_token_ids=(7,))
    rows = make_rows(([1], [3], asks), ([1], [3, 4], asks))
    sampled = run(rows, np.stack([logits_favouring(EOS, 7, 5)] * 2))
    assert sampled.token_ids.tolist() == [5, EOS]
    assert rows.tokens[0, 2] == 5


def test_repetition_penalty_sees_prompt_and_output_others_only_output() -> None:
    rows = make_rows(
        ([5], [], params(repetition_penalty=3.0)),
        ([5], [], params(presence_penalty=2.0)),
        ([1], [5], params(presence_penalty=2.0)),
        ([5], [], params()),
    )
    sampled = run(rows, np.stack([logits_favouring(5, 6)] * 4))
    assert sampled.token_ids.tolist() == [6, 5, 6, 5]


def test_logprobs_come_only_where_a_row_asks() -> None:
    assert run(make_rows(([1], [], params())), logits_favouring(5)[None]).logprobs is None
    rows = make_rows(([1], [], params()), ([1], [], params(logprobs=3)), ([1], [], params(logprobs=0)))
    logits = np.random.default_rng(0).normal(size=(3, VOCAB))
    sampled = run(rows, logits)
    assert sampled.logprobs is not None
    assert sampled.top_ids is not None
    assert sampled.top_ids.shape == (3, 3)
    expected = logits[1] - np.log(np.exp(logits[1]).sum())
    assert sampled.top_ids[1].tolist() == np.argsort(-expected)[:3].tolist()
    assert sampled.logprobs[1] == pytest.approx(expected.max(), abs=1e-5)


def test_the_same_seed_and_position_give_the_same_token_whatever_the_row() -> None:
    logits = np.random.default_rng(1).normal(size=VOCAB)
    asks = params(temperature=1.0, seed=1234)
    other = params(temperature=1.0, seed=99)
    alone = run(make_rows(([1], [3, 4], asks)), logits[None]).token_ids[0]
    rows = make_rows(([2], [], other), ([7, 8], [3, 4], asks), ([2], [], other))
    assert run(rows, np.stack([logits] * 3)).token_ids[1] == alone


def test_each_place_of_a_draft_has_its_own_past() -> None:
    """Penalties, bans, forced ids and random numbers are those of a row that came there token by token."""
    output = [5, 6, 6, 7, 8]
    kinds = [
        params(presence_penalty=1.5),
        params(frequency_penalty=0.8),
        params(repetition_penalty=1.3),
        params(min_tokens=3, eos_token_ids=(5,)),
        params(bad_words=((6, 5), (7, 5)), banned_ids=(9,)),
        params(thinking_budget=2, think_end_ids=(8, END), think_end_id=END),
        params(temperature=1.0, top_p=0.9),
    ]
    logits = np.zeros((len(output) + 1, VOCAB))
    logits[:, [5, 6, 7, 8]] = (3.0, 2.7, 2.4, 2.1)
    for asks in kinds:
        one_by_one = [int(run(make_rows(([1], output[:end], asks)), logits[:1]).token_ids[0]) for end in range(6)]
        rows = make_rows(([1], [], asks))
        rows.tokens[0, 1:6] = output
        lens = np.arange(1, 7, dtype=np.int32)
        sampled = Sampler(rows, VOCAB).sample(np.zeros(6, np.int32), lens, paddle.to_tensor(logits.astype(np.float32)))
        assert sampled.token_ids.tolist() == one_by_one
        assert len(set(one_by_one)) > 1, asks


@pytest.mark.parametrize(
    ("asks", "all_greedy"),
    [
        ({}, True),
        ({"presence_penalty": 1.0, "logit_bias": ((3, 1.0),)}, True),
        ({"temperature": 0.5}, False),
        ({"logprobs": 0}, False),
    ],
)
def test_ranks_are_told_that_nothing_is_drawn(asks: dict[str, object], all_greedy: bool) -> None:
    rows = make_rows(([1], [], params()), ([1], [], params(**asks)))
    given: list[object] = []

    def sample(*arguments: Any, **options: Any) -> object:
        given.append(options["all_greedy"])
        return ops.sample(*arguments, **options)

    ids = np.arange(2, dtype=np.int32)
    logits = paddle.to_tensor(np.stack([logits_favouring(5)] * 2).astype(np.float32))
    Sampler(rows, VOCAB, sample).sample(ids, rows.num_tokens[ids], logits)
    assert given == [all_greedy]


def test_a_row_that_another_sequence_enters_is_sampled_as_that_one_asks() -> None:
    rows = make_rows(([1], [], params()), ([1], [], params()))
    sampler = Sampler(rows, VOCAB)
    logits = np.stack([logits_favouring(5, 6, 7)] * 2)

    def tokens(*row_ids: int) -> list[int]:
        ids = np.array(row_ids, np.int32)
        logits_of = paddle.to_tensor(logits[: len(ids)].astype(np.float32))
        return list(sampler.sample(ids, rows.num_tokens[ids], logits_of).token_ids)

    assert tokens(0, 1) == [5, 5]
    for asks, expected in (
        (params(allowed_ids=(7,)), 7),
        (params(presence_penalty=1.5), 6),
        (params(temperature=1.0, top_k=1), 5),
    ):
        row = NewRow(1, np.array([1, 5], np.int32).tobytes(), 1, 1, (0,), asks)
        rows.take_changes(Plan(1, [row], [], [], []))
        assert tokens(0, 1) == [5, expected]
        assert tokens(0, 1) == [5, expected]
        assert tokens(1) == [expected]
        assert tokens(0) == [5]


def test_a_row_of_nan_gives_no_token_and_leaves_the_others_alone() -> None:
    rows = make_rows(([1], [], params()), ([1], [], params()))
    logits = np.stack([np.full(VOCAB, np.nan), logits_favouring(5)])
    assert run(rows, logits).token_ids.tolist() == [-1, 5]


def test_limits_hold_for_their_own_rows() -> None:
    rows = make_rows(
        ([1], [], params(logit_bias=((6, 50.0),))),
        ([1], [], params(allowed_ids=(30, 31))),
        ([1], [7, 8], params(bad_words=((8, 5),), banned_ids=(4,))),
        ([1], [], params(temperature=1.0, banned_ids=(5,), allowed_ids=(5, 49))),
        ([1], [], params()),
        ([1], [], params(allowed_ids=(30, 31))),
        ([1], [], params(allowed_ids=(30, 31))),
        ([1], [], params(min_tokens=3)),
    )
    masks = {row: id_mask(ids, VOCAB).tobytes() for row, ids in {4: (40,), 5: (31, 5), 6: (4, 5), 7: (EOS,)}.items()}
    logits = np.stack([logits_favouring(5, 4, 6, 30, 31)] * 8)
    assert run(rows, logits, masks).token_ids.tolist() == [6, 30, 6, 49, 40, 31, NOTHING_ALLOWED, EOS]
    assert run(rows, logits[:4]).token_ids.tolist() == [6, 30, 5, 49]


def test_the_only_token_of_a_form_comes_whatever_is_banned() -> None:
    rows = make_rows(
        ([1], [], params(banned_ids=(31,))),
        ([1], [], params(allowed_ids=(30,))),
        ([1], [8], params(bad_words=((8, 31),))),
        ([1], [], params(banned_ids=(31, 32))),
    )
    masks = {row: id_mask(ids, VOCAB).tobytes() for row, ids in enumerate([(31,)] * 3 + [(31, 32)])}
    logits = np.stack([logits_favouring(5)] * 4)
    assert run(rows, logits, masks).token_ids.tolist() == [31, 31, 31, NOTHING_ALLOWED]


def test_bans_give_what_biases_of_minus_infinity_give() -> None:
    logits = np.random.default_rng(2).normal(size=(1, VOCAB))
    ids = (1, 3, 4, 6, 8, 9, *range(20, 45))
    several: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "top_p": 0.7, "logprobs": 3, "temp_scaled_logprobs": True},
        {"temperature": 1.3, "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.4, "presence_penalty": 0.3},
        {"temperature": 1.0, "min_tokens": 9, "eos_token_ids": (7,), "logit_bias": ((8, 5.0), (7, 9.0))},
    ]
    for changes in several:
        biased = changes | {"logit_bias": (*changes.get("logit_bias", ()), *((token, -np.inf) for token in ids))}
        for seed in range(20):
            one = run(make_rows(([1, 3], [5, 7], params(seed=seed, **changes, banned_ids=ids))), logits)
            other = run(make_rows(([1, 3], [5, 7], params(seed=seed, **biased))), logits)
            for ours, theirs in zip(vars(one).values(), vars(other).values(), strict=True):
                np.testing.assert_array_equal(ours, theirs)
            assert one.token_ids[0] not in ids


def test_each_row_reports_logprobs_its_own_way() -> None:
    asks = {"temperature": 2.0, "top_p": 0.5, "logprobs": 2}
    rows = make_rows(
        ([1], [], params(**asks)),
        ([1], [], params(**asks, temp_scaled_logprobs=True)),
        ([1], [], params(**asks, top_p_normalized_logprobs=True)),
        ([1], [], params(temp_scaled_logprobs=True)),
    )
    logits = np.full(VOCAB, -100.0)
    logits[:2] = np.log([0.8, 0.2])
    sampled = run(rows, np.stack([logits] * 4))
    assert sampled.top_logprobs is not None
    np.testing.assert_allclose(sampled.top_logprobs[0], np.log([0.8, 0.2]), atol=1e-5)
    np.testing.assert_allclose(np.exp(sampled.top_logprobs[1]), [2 / 3, 1 / 3], atol=1e-5)
    np.testing.assert_allclose(sampled.top_logprobs[2], [0, -np.inf])
    assert np.isnan(sampled.top_logprobs[3]).all()


def test_a_thinking_budget_forces_the_end_and_then_lets_go() -> None:
    asks = params(thinking_budget=2, think_end_ids=(8, END, 8), think_end_id=END)
    rows = make_rows(([1], [], asks))
    tokens = [int(run(rows, logits_favouring(5)[None]).token_ids[0]) for _ in range(7)]
    assert tokens == [5, 5, 8, END, 8, 5, 5]


@pytest.mark.parametrize(
    ("output", "expected"),
    [([5], -1), ([5, 5], 8), ([5, 5, 8], END), ([5, 5, 8, END], -1), ([5, END], -1), ([END, 5, 5], -1)],
)
def test_forced_ids_depend_on_the_output_alone(output: list[int], expected: int) -> None:
    asks = params(thinking_budget=2, think_end_ids=(8, END), think_end_id=END)
    assert Limits(asks, VOCAB).forced_id(np.array(output, np.int32)) == expected
