"""What the operator of a whole model refuses; what it computes is in tests/models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from fdserve import ops
from fdserve.models.config import read_config
from fdserve.models.ernie4_5 import Ernie4_5
from fdserve.models.layers import ForwardBatch
from fdserve.models.loader import load_model
from fdserve.ops.collectives import ALONE
from fdserve.ops.library import run
from tests.e2e.engines import random_checkpoint
from tests.models.checkpoints import MOE, write_checkpoint
from tests.models.stepping import Chunk, Stepper


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda decoder: decoder._mlps.pop(), "fewer weights than layers have"),
        (lambda decoder: decoder._mlps.append(decoder._mlps[0]), "more weights than layers have"),
        (lambda decoder: decoder._inner.pop(), "one size a layer"),
        (lambda decoder: decoder._inner.__setitem__(0, 0), "a layer has no MLP"),
        (lambda decoder: decoder._inner.__setitem__(1, 64), "not of this size"),
        (lambda decoder: decoder._experts_inner.__setitem__(2, 128), "not of this size"),
        (lambda decoder: decoder._qkv.pop(), "one tensor a layer"),
        (lambda decoder: setattr(decoder, "_routing", (5, 0.0)), "between 1 and the number of experts"),
        (lambda decoder: setattr(decoder, "_norm", paddle.ones([32, 2])[:, 0]), "contiguous"),
        (lambda decoder: decoder._post_norms.__setitem__(1, paddle.ones([32, 2])[:, 0]), "contiguous"),
    ],
)
def test_layers_that_are_not_whole_are_refused(tmp_path: Path, spoil: Callable[[Any], object], complaint: str) -> None:
    write_checkpoint(tmp_path, MOE)
    model = load_model(tmp_path, read_config(tmp_path), dtype="float32")
    assert Stepper(model).step([Chunk(0, [3])]).shape == (1, 40)
    spoil(model._decoder)
    with pytest.raises(ValueError, match=complaint):
        Stepper(model).step([Chunk(0, [3])])


def int32(*values: Any) -> Any:
    return np.array(values, np.int32)


@pytest.fixture
def model(tmp_path: Path) -> Ernie4_5:
    directory = random_checkpoint(tmp_path / "model", MOE)
    return load_model(directory, read_config(directory), dtype="float32")


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"token_ids": int32(3, 40)}, "an id is out of range"),
        ({"token_ids": int32(-1, 3)}, "an id is out of range"),
        ({"sample_rows": int32(2)}, "a row is out of range"),
        ({"sample_rows": int32(-1)}, "a row is out of range"),
        ({"sample_rows": int32(0, 1, 1)}, "a size is out of range"),
        ({"query_starts": int32(0, 1)}, "query_starts must end at T"),
        ({"query_starts": int32(1, 2)}, "query_starts must ascend from 0"),
        ({"context_lens": int32(-1)}, "context_lens be at least 0"),
        ({"context_lens": int32(15)}, "a block table is too short"),
        ({"block_tables": int32([2])}, "a block is out of range"),
        ({"block_tables": int32([-1])}, "a block is out of range"),
    ],
)
def test_steps_that_would_read_elsewhere_are_refused(model: Ernie4_5, wrong: dict[str, Any], complaint: str) -> None:
    caches = model.new_caches(2, 16)
    rope = model.rope_table(np.arange(2, dtype=np.int32))
    right = ForwardBatch(int32(3, 4), rope, int32(0, 2), int32(0), int32([0]), int32(1))
    expected = model.forward(right, caches).numpy()
    assert expected.any()
    for call in (model.forward, model.hidden):
        with pytest.raises(ValueError, match=complaint):
            call(right._replace(**wrong), caches)
    assert (model.forward(right, caches).numpy() == expected).all()


def test_other_caches_are_looked_at_anew(model: Ernie4_5) -> None:
    batch = ForwardBatch(int32(3), model.rope_table(int32(0)), int32(0, 1), int32(0), int32([1]), np.zeros(0, np.int32))
    first, second = model.new_caches(2, 16), model.new_caches(2, 16)
    for caches in (first, second):
        assert model.forward(batch, caches).shape == (0, 40)
        keys, values = caches.layers[-1]
        assert keys[1].numpy().any()
        assert values[1].numpy().any()
        assert not keys[0].numpy().any()
    with pytest.raises(ValueError, match="a block is out of range"):
        model.forward(batch, model.new_caches(1, 16))


def test_only_a_note_in_its_place_is_one(model: Ernie4_5) -> None:
    Stepper(model).step([Chunk(0, [3])])
    assert model._decoder is not None
    note = model._decoder._note
    assert note is not None
    for other in (note.clone(), note[:8], paddle.zeros([4096], "uint8")):
        with pytest.raises(ValueError, match="no note of a model"):
            run("decoder", other, ops.to_tensor(int32(0)), 0, 0, 0, 0, False, *ALONE)
    with pytest.raises(ValueError, match="fewer inputs"):
        run("decoder", note, ops.to_tensor(int32(0)), 1, 1, 1, 1, False, *ALONE)
