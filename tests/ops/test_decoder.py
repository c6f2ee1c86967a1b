"""What the operator of all blocks refuses; what it computes is in tests/models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fdserve.models.config import read_config
from fdserve.models.loader import load_model
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
    ],
)
def test_layers_that_are_not_whole_are_refused(tmp_path: Path, spoil: Callable[[Any], object], complaint: str) -> None:
    write_checkpoint(tmp_path, MOE)
    model = load_model(tmp_path, read_config(tmp_path), dtype="float32")
    assert Stepper(model).step([Chunk(0, [3])]).shape == (1, 40)
    spoil(model._decoder)
    with pytest.raises(ValueError, match=complaint):
        Stepper(model).step([Chunk(0, [3])])
