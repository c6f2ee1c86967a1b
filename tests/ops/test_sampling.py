from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from fdserve import ops
from fdserve.ops import sampling_reference as reference
from fdserve.ops.sampling import NO_LOGPROBS, TEMPERATURE_SCALED, TOP_P_NORMALIZED
from tests.ops.arrays import ints
from tests.ops.sampling_rows import Row, arguments, expect, random_logits, random_row, sample

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.parametrize("vocab", [1, 5, 300, 2051, 20000])
def test_against_the_reference(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    rows = [random_row(rng, vocab) for _ in range(150 if vocab < 20000 else 40)]
    logits = random_logits(rng, len(rows), vocab)
    tokens, logprobs, top_ids, top_logprobs = sample(logits, rows, top=min(vocab, 20))
    expected = expect(logits, rows, top=min(vocab, 20))
    # A draw may land on the other side of a boundary that float32 and float64 put elsewhere: rarely, and only there.
    same = tokens == expected[0]
    assert same.mean() >= 0.97
    assert (top_ids == expected[2]).all()
    # The last of a top_p set may be another one, too: all of that row's numbers follow it.
    clear = np.array([close(*each) for each in zip(top_logprobs, expected[3], strict=True)])
    assert clear.mean() >= 0.97
    assert all(close(*each) for each in zip(logprobs[same & clear], expected[1][same & clear], strict=True))
    raw = np.array([row.mode in (0, TEMPERATURE_SCALED) for row in rows])
    assert clear[raw].all()
    assert np.isnan(logprobs[[row.mode == NO_LOGPROBS for row in rows]]).all()


def close(actual: Any, expected: Any) -> bool:
    return bool(np.allclose(actual, expected, rtol=0, atol=5e-5, equal_nan=True))


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = np.zeros((3, 500), np.float32)
    logits[0, [77, 78, 499]] = 3
    logits[1, 499] = 1
    logits[2] = -np.inf
    logits[2, 301] = -50
    tokens, logprobs, _, _ = sample(logits, [Row(temperature=0)] * 3)
    assert tokens.tolist() == [77, 499, 301]
    assert logprobs[2] == 0


def test_top_logprobs_order_ties_by_id() -> None:
    logits = np.zeros((1, 700), np.float32)
    logits[0, [650, 3]] = 1
    for top in (1, 5, 256, 257, 700):
        ids = sample(logits, [Row()], top=top)[2][0]
        assert ids.tolist() == [3, 650, 0, 1, 2, *range(4, 650), *range(651, 700)][:top]


def test_padding_is_never_chosen_nor_counted() -> None:
    rng = np.random.default_rng(0)
    logits = random_logits(rng, 8, 128)
    logits[:, 100:] = 50
    rows = [Row(seed=seed, bias={127: 100.0}, output=[120]) for seed in range(8)]
    actual = sample(logits, rows, vocab=100, top=100)
    clean = sample(np.ascontiguousarray(logits[:, :100]), rows, top=100)
    for got, wanted in zip(actual, clean, strict=True):
        assert (got == wanted).all()


def test_bans_and_forced_tokens() -> None:
    logits = np.zeros((4, 3), np.float32)
    everything = dict.fromkeys(range(3), -np.inf)
    rows = [
        Row(bias={0: -np.inf, 2: -np.inf}),
        Row(bias=everything),
        Row(forced=2, bias={2: -np.inf}),
        Row(forced=2, temperature=0),
    ]
    tokens, logprobs, _, _ = sample(logits, rows)
    assert tokens.tolist() == [1, -2, 2, 2]
    assert np.allclose(logprobs[[0, 2, 3]], -np.log(3))
    assert np.isnan(logprobs[1])


def test_a_mask_outranks_every_bias_and_padding_stays_out() -> None:
    logits = np.zeros((6, 70), np.float32)
    logits[:, 66:] = 9
    rows = [
        Row(allowed=[40], bias={41: 100.0}, temperature=0),
        Row(allowed=[0, 31, 32, 64], top_p=0.99, seed=3),
        Row(allowed=[5, 7], bias={5: -np.inf}, top_k=3),
        Row(allowed=[5], bias={5: -np.inf}, min_p=0.1),
        Row(allowed=[]),
        Row(allowed=[40], forced=3),
    ]
    tokens, logprobs, _, _ = sample(logits, rows, vocab=66)
    assert tokens.tolist()[0] == 40
    assert tokens[1] in (0, 31, 32, 64)
    assert tokens.tolist()[2:] == [7, -2, -2, 3]
    assert np.allclose(logprobs[[0, 1, 2, 5]], -np.log(66))
    assert np.isnan(logprobs[[3, 4]]).all()


def test_logprob_modes() -> None:
    probs = np.array([0.5, 0.2, 0.2, 0.1])
    logits = np.tile(np.log(probs), (6, 1)).astype(np.float32)
    squared = probs**2 / (probs**2).sum()
    rows = [
        Row(temperature=0.5, forced=3),
        Row(temperature=0.5, forced=3, mode=TEMPERATURE_SCALED),
        Row(temperature=0, mode=TEMPERATURE_SCALED),
        Row(top_p=0.65, forced=2, mode=TOP_P_NORMALIZED),
        Row(top_p=0.65, temperature=0.5, mode=TEMPERATURE_SCALED | TOP_P_NORMALIZED, bias={0: -9.0}, forced=1),
        Row(mode=NO_LOGPROBS, forced=0),
    ]
    tokens, logprobs, top_ids, top_logprobs = sample(logits, rows, top=4)
    assert tokens.tolist() == [3, 3, 0, 2, 1, 0]
    outside = [-np.inf, -np.inf]
    head, square = np.log(probs[:2] / 0.7), np.log(squared[:1])
    for row, expected in enumerate(
        [np.log(probs), np.log(squared), np.log(probs), [*head, *outside], [0.0, -np.inf, *outside]]
    ):
        assert top_ids[row].tolist() == [0, 1, 2, 3]
        assert close(top_logprobs[row], expected), row
    assert square[0] > np.log(0.65)
    assert close(logprobs[:5], [np.log(0.1), np.log(squared[3]), np.log(0.5), -np.inf, -np.inf])
    assert np.isnan(logprobs[5])
    assert top_ids[5].tolist() == [-1] * 4


def test_a_hundred_thousand_biases() -> None:
    vocab = 103424
    logits = np.random.default_rng(6).standard_normal((1, vocab)).astype(np.float32)
    bias = dict.fromkeys(range(100_000), -100.0)
    token = sample(logits, [Row(bias=bias, temperature=0)])[0][0]
    assert token == 100_000 + logits[0, 100_000:].argmax()


def test_a_broken_row_disturbs_no_other() -> None:
    rng = np.random.default_rng(1)
    logits = random_logits(rng, 5, 333)
    rows = [random_row(rng, 333) for _ in range(5)]
    expected = sample(logits, rows, top=3)
    for broken in (np.nan, np.inf):
        poisoned = logits.copy()
        poisoned[2, 331] = broken
        tokens, logprobs, top_ids, top_logprobs = sample(poisoned, rows, top=3)
        assert (tokens[2], top_ids[2].tolist()) == (-1, [-1, -1, -1])
        assert np.isnan(logprobs[2])
        assert np.isnan(top_logprobs[2]).all()
        for got, wanted in zip((tokens, logprobs, top_ids, top_logprobs), expected, strict=True):
            assert (np.delete(got, 2, 0) == np.delete(wanted, 2, 0)).all()


def test_a_rows_answer_does_not_depend_on_the_batch_or_the_threads() -> None:
    rng = np.random.default_rng(2)
    rows = [random_row(rng, 5000) for _ in range(24)]
    logits = random_logits(rng, 24, 5000)
    together = sample(logits, rows, top=5)
    ops.set_num_threads(1)
    for row in range(24):
        for got, wanted in zip(sample(logits[row : row + 1], rows[row : row + 1], top=5), together, strict=True):
            assert got[0].tobytes() == wanted[row].tobytes()


@pytest.mark.parametrize(
    "settings",
    [
        Row(),
        Row(temperature=0.7),
        Row(top_p=0.6),
        Row(top_k=7, top_p=0.8, temperature=1.3),
        Row(min_p=0.1),
        Row(top_k=300, top_p=0.9, min_p=0.02),
        Row(min_p=0.01, top_p=0.95),
        Row(allowed=list(range(0, 400, 3)), top_p=0.9),
        Row(prompt=[0, 1], output=[5, 5, 9], repetition=1.3, presence=0.5, frequency=0.2),
    ],
    ids=["plain", "temperature", "top_p", "top_k", "min_p", "all", "min_p and top_p", "mask", "penalties"],
)
def test_draws_follow_the_exact_probabilities(settings: Row) -> None:
    """Chi-square of 20000 draws at as many positions against the reference's probabilities."""
    draws, vocab = 20000, 400
    logits = np.random.default_rng(3).standard_normal(vocab).astype(np.float32) * 2
    args = arguments([settings])
    changed = reference.processed_logits(logits, args[0][0], args[2], int(args[4][0]), args[5], args[6])
    if settings.allowed is not None:
        changed[np.delete(np.arange(vocab), settings.allowed)] = -np.inf
    ids, probs = reference.candidates(changed, args[0][0], settings.top_k)
    row = vars(settings) | {"seed": 1234}
    tokens = np.concatenate(
        [
            sample(np.tile(logits, (2000, 1)), [Row(**(row | {"position": start + i})) for i in range(2000)])[0]
            for start in range(0, draws, 2000)
        ]
    )
    counts = np.bincount(tokens, minlength=vocab)[ids]
    assert counts.sum() == draws, "a token outside the candidates was drawn"
    common = probs * draws >= 5
    expected = np.append(probs[common], probs[~common].sum()) * draws
    observed = np.append(counts[common], counts[~common].sum())
    rare = expected > 0
    statistic = (((observed - expected) ** 2)[rare] / expected[rare]).sum()
    freedom = rare.sum() - 1
    # Mean `freedom`, deviation sqrt(2 * freedom): five deviations never happen by chance.
    assert statistic < freedom + 5 * np.sqrt(2 * freedom) + 5


def test_seeds_and_positions_are_independent_streams() -> None:
    logits = np.zeros((1, 1000), np.float32)
    first = [int(sample(logits, [Row(seed=7, position=p)])[0][0]) for p in range(50)]
    again = [int(sample(logits, [Row(seed=7, position=p)])[0][0]) for p in range(50)]
    other = [int(sample(logits, [Row(seed=8, position=p)])[0][0]) for p in range(50)]
    assert first == again
    assert len(set(first)) > 40
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 5


def test_random_numbers_are_philox() -> None:
    """The known answers published with the generator."""
    assert reference.philox4x32(0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    logits = np.zeros((64, 1 << 16), np.float32)
    tokens = sample(logits, [Row(seed=2**63 - 1 - i, position=i << 33) for i in range(64)])[0]
    expected = [int(reference.uniform(2**63 - 1 - i, i << 33) * (1 << 16)) for i in range(64)]
    assert tokens.tolist() == expected


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999, 0.0])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 30.0])
def test_the_top_p_set_is_the_smallest(top_p: float, spread: float) -> None:
    """Flat rows and peaked ones: every draw lies in the set, and its last member can be drawn."""
    vocab = 3000
    logits = (np.random.default_rng(4).standard_normal(vocab) * spread).astype(np.float32)
    rows = [Row(top_p=top_p, seed=seed) for seed in range(200)]
    tokens = sample(np.tile(logits, (200, 1)), rows)[0]
    ids, _ = reference.candidates(logits, np.array(rows[0].floats), 0)
    order = {int(token): rank for rank, token in enumerate(np.argsort(-logits, kind="stable"))}
    assert max(order[int(token)] for token in tokens) <= len(ids)  # one more: the boundary is a float32 sum


def test_no_rows() -> None:
    out = sample(np.zeros((0, 10), np.float32), [], top=3)
    assert [each.shape for each in out] == [(0,), (0,), (0, 3), (0, 3)]


def test_wrong_arguments_are_refused() -> None:
    logits = np.zeros((1, 10), np.float32)
    with pytest.raises(ValueError, match="vocab_size"):
        sample(logits, [Row()], vocab=11)
    with pytest.raises(ValueError, match="num_top"):
        sample(logits, [Row()], top=11)
    args = [ints(each, each.dtype.name) for each in arguments([Row(bias={1: 1.0})])]
    args[-1] = ints([0, 7])
    with pytest.raises(ValueError, match="offsets"):
        ops.sample(paddle.zeros([1, 10]), *args, vocab_size=10, num_top=0)
