from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fdserve.executor.wire import SamplingParams
from fdserve.worker.limits import Limits, id_mask, leaves_one, read_mask

VOCAB = 70


def limits(**params: Any) -> Limits:
    """The ids of `allowed_ids` and `banned_ids` are given as a tuple."""
    for name in params.keys() & {"allowed_ids", "banned_ids"}:
        params[name] = id_mask(params[name], VOCAB).tobytes()
    return Limits(SamplingParams(**{"max_tokens": 20, "seed": 1, **params}), VOCAB)


def output(*ids: int) -> npt.NDArray[np.int32]:
    return np.array(ids, np.int32)


def bans(asked: Limits, *ids: int, mask: npt.NDArray[np.int32] | None = None) -> list[int]:
    tokens, values = asked.biases(output(*ids), mask)
    assert (values == -np.inf).all()
    return sorted(tokens.tolist())


def test_a_bad_word_is_banned_where_it_would_be_completed() -> None:
    asked = limits(bad_words=((1, 2, 3), (2, 4), (1, 2, 5), (6, 6)))
    assert bans(asked) == []
    assert bans(asked, 1) == []
    assert bans(asked, 1, 2) == [3, 4, 5]
    assert bans(asked, 7, 2) == [4]
    assert bans(asked, 1, 2, 3) == []
    assert bans(asked, 6) == [6]


def test_many_bad_words_that_begin_alike_are_looked_at_once() -> None:
    """A step looks at them for every row that has them, of which one request can have 128."""
    asked = limits(bad_words=tuple((7, 7, index) for index in range(2048)))
    began = time.process_time()
    for _ in range(100):
        assert len(asked.biases(output(7, 7), None)[0]) == 2048
    assert time.process_time() - began < 0.1


def test_min_tokens_yields_to_a_mask_that_allows_only_endings() -> None:
    asked = limits(min_tokens=2, eos_token_ids=(2,), stop_token_ids=(69,))
    assert bans(asked, 5) == [2, 69]
    assert bans(asked, 5, 5) == []
    assert bans(asked, 5, mask=id_mask((2, 3), VOCAB)) == [2, 69]
    assert bans(asked, 5, mask=id_mask((2, 69), VOCAB)) == []
    only_eos = limits(min_tokens=2, eos_token_ids=(2,), allowed_ids=(2,))
    assert bans(only_eos, 5, mask=only_eos.mask(None)) == []


def test_biases_keep_their_values() -> None:
    asked = limits(logit_bias=((3, 1.5), (4, -100.0)), bad_words=((7, 8),))
    ids, values = asked.biases(output(7), None)
    assert ids.tolist() == [3, 4, 8]
    assert values.tolist() == [1.5, -100, -np.inf]


def test_masks_are_bits_from_the_lowest() -> None:
    mask = id_mask((0, 33, 69, 70, -1), VOCAB)
    assert mask.view(np.uint32).tolist() == [1, 2, 32]
    assert read_mask(b"\x01\x00\x00\x00\x02", VOCAB).tolist() == [1, 2, 0]
    assert read_mask(b"\xff" * 100, VOCAB).tolist() == [-1] * 3
    both = limits(allowed_ids=(1, 33)).mask(mask)
    assert both is not None
    assert both.tolist() == [0, 2, 0]
    assert limits(logit_bias=((1, 1.0),)).mask(None) is None


@pytest.mark.parametrize(
    ("ids", "one"), [((), False), ((0,), True), ((31,), True), ((63, 64), False), ((3, 31), False)]
)
def test_masks_that_leave_one_id(ids: tuple[int, ...], one: bool) -> None:
    assert leaves_one(id_mask(ids, VOCAB)) is one


def test_bans_are_taken_from_whatever_is_allowed() -> None:
    asked = limits(allowed_ids=(1, 2, 33), banned_ids=(2, 40))
    mask = asked.without_banned(asked.mask(None))
    assert mask is not None
    assert mask.tolist() == [2, 2, 0]
    mask = limits(banned_ids=(0, 33)).without_banned(None)
    assert mask is not None
    assert mask.view(np.uint32).tolist() == [2**32 - 2, 2**32 - 3, 2**32 - 1]
    # `min_tokens` yields to what is allowed, and not to what is banned.
    banned = limits(min_tokens=2, eos_token_ids=(2,), allowed_ids=(2, 3), banned_ids=(3,))
    assert bans(banned, 5, mask=banned.mask(None)) == [2]


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": ((1, 0.5),)},
        {"bad_words": ((1, 2),)},
        {"banned_ids": (1,)},
        {"allowed_ids": (1,)},
        {"thinking_budget": 1},
        {"min_tokens": 1, "eos_token_ids": (2,)},
    ],
)
def test_only_rows_with_limits_have_any(params: dict[str, Any]) -> None:
    params = {name: bytes(12) if name in ("allowed_ids", "banned_ids") else value for name, value in params.items()}
    assert Limits.needed(SamplingParams(max_tokens=1, seed=0, **params))
    assert not Limits.needed(SamplingParams(max_tokens=1, seed=0, min_tokens=1, top_k=4))
