"""The blocks as one operator on several ranks, which sums between them by itself."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engines import SHAPE, random_checkpoint
from tests.models.checkpoints import DENSE, MOE
from tests.ops.test_collectives import ranks_of

# Prefills, a chunk beside a decode, a step of which no row is asked for, decodes.
FORWARD = """
from pathlib import Path
from fdserve.models.config import read_config
from fdserve.models.loader import load_model
from tests.models.stepping import Chunk, Stepper
directory = Path({directory!r})
def logits(quantization, **options):
    model = load_model(directory, read_config(directory), rank=rank, world_size=ranks, dtype={dtype!r},
                       quantization=quantization, all_reduce=shared.all_reduce, **options)
    assert (model._decoder is None) == (not options)
    stepper = Stepper(model)
    steps = [([Chunk(0, range(3, 33))], None), ([Chunk(1, [9] * 5), Chunk(0, [4])], [4, 5]), ([Chunk(2, [8] * 7)], []),
             ([Chunk(0, [1]), Chunk(1, [2]), Chunk(2, [3])], None)]
    return [stepper.step(*step) for step in steps]
for quantization in {quantizations!r}:
    for one, each in zip(logits(quantization, shared=shared), logits(quantization), strict=True):
        assert one.shape == each.shape and one.tobytes() == each.tobytes()
    print("the same bits,", quantization)
"""


UNTIL_LOST = """
from pathlib import Path
from fdserve.errors import RankError
from fdserve.models.config import read_config
from fdserve.models.loader import load_model
from tests.models.stepping import Chunk, Stepper
directory = Path({directory!r})
model = load_model(directory, read_config(directory), rank=rank, world_size=ranks, dtype="float32", shared=shared,
                   all_reduce=shared.all_reduce)
stepper = Stepper(model)
stepper.step([Chunk(0, [3, 4])])
print("ready", flush=True)
if rank == 1:
    time.sleep(3600)
try:
    stepper.step([Chunk(0, [5])])
except RankError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("config", "count", "dtype", "quantizations"),
    [
        (DENSE, 4, "float32", [None]),
        (DENSE, 2, "bfloat16", [None, "wint4", "w8a8"]),
        (MOE, 2, "bfloat16", [None, "wint4"]),
        (MOE | {"moe_num_shared_experts": 0}, 2, "float32", [None]),
    ],
)
def test_one_operator_has_the_bits_of_many(
    tmp_path: Path, config: dict[str, Any], count: int, dtype: str, quantizations: list[str | None]
) -> None:
    directory = str(random_checkpoint(tmp_path / "model", {**config, **SHAPE}))
    code = FORWARD.format(directory=directory, dtype=dtype, quantizations=quantizations)
    with ranks_of(code, count) as ranks:
        told = "".join(f"the same bits, {quantization}\n" for quantization in quantizations)
        assert [rank.lines.read() for rank in ranks] == [told] * count


def test_a_lost_rank_is_told_from_within_the_operator(tmp_path: Path) -> None:
    code = UNTIL_LOST.format(directory=str(random_checkpoint(tmp_path / "model", {**DENSE, **SHAPE})))
    with ranks_of(code, 2) as (waiting, killed):
        for rank in (waiting, killed):
            assert rank.lines.readline() == "ready\n"
        killed.kill()
        began = time.monotonic()
        assert waiting.lines.read() == "a rank that it computes with is gone\n"
        assert time.monotonic() - began < 10
