from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bench import random_checkpoint
from fdserve import ops
from fdserve.errors import StartupError
from fdserve.models import loader
from fdserve.models.checkpoint import SINGLE, Checkpoint, check_checkpoint
from fdserve.models.config import read_config
from fdserve.models.loader import load_model, weight_format
from fdserve.models.parallel import Ranks
from tests.golden.layouts import GOLDEN, read_all, widen, write_variant
from tests.models.checkpoints import MOE, write_checkpoint, write_file
from tests.models.stepping import Chunk, Stepper, load

PROMPT = [5, 17, 80, 3]


@pytest.mark.parametrize(
    ("world_size", "expected"),
    [
        (1, [range(0, 4)]),
        (2, [range(0, 2), range(2, 4)]),
        (4, [range(0, 1), range(1, 2), range(2, 3), range(3, 4)]),
        (8, [range(i // 2, i // 2 + 1) for i in range(8)]),
    ],
)
def test_key_value_heads_of_each_rank(world_size: int, expected: list[range]) -> None:
    assert [Ranks(rank, world_size).kv_heads(4) for rank in range(world_size)] == expected


@pytest.mark.parametrize("world_size", [2, 4, 16])
def test_key_value_heads_are_those_the_query_heads_need(world_size: int) -> None:
    heads, kv_heads = 16, 4
    for rank in range(world_size):
        ranks = Ranks(rank, world_size)
        needed = {head // (heads // kv_heads) for head in ranks.share(heads)}
        assert needed == set(ranks.kv_heads(kv_heads))


def test_weights_of_one_layer_in_two_dtypes(tmp_path: Path) -> None:
    dtype = ops.compute_dtype()
    write_variant("dense", "torch", tmp_path)
    tensors = read_all(tmp_path)
    for name, tensor in tensors.items():
        if ".k_proj." in name or ".up_proj." in name:
            tensors[name] = widen(tensor)
    write_file(tmp_path / SINGLE, tensors)
    expected = Stepper(load(GOLDEN / "dense", dtype)).step([Chunk(0, PROMPT)])
    np.testing.assert_array_equal(Stepper(load(tmp_path, dtype)).step([Chunk(0, PROMPT)]), expected)


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_bfloat16_weights_stay_so_where_float32_is_computed(tmp_path: Path, model: str) -> None:
    """With the bits that the same weights have as floats; a single matrix of floats makes floats of all."""
    write_variant(model, "torch", tmp_path)
    config = read_config(tmp_path)
    tensors = read_all(tmp_path)
    assert weight_format(tmp_path, config, "float32", None) == "bfloat16"
    assert weight_format(tmp_path, config, "float32", "wint4") == "wint4"
    kept = load(tmp_path, "float32")
    logits = Stepper(kept).step([Chunk(0, PROMPT)])
    name = "model.layers.1.self_attn.o_proj.weight"
    for widened in ({name: widen(tensors[name])}, {name: widen(tensor) for name, tensor in tensors.items()}):
        write_file(tmp_path / SINGLE, tensors | widened)
        assert weight_format(tmp_path, config, "float32", None) == "float32"
        np.testing.assert_array_equal(Stepper(load(tmp_path, "float32")).step([Chunk(0, PROMPT)]), logits)


def test_a_router_without_correction_biases_has_zeros(tmp_path: Path) -> None:
    write_variant("moe", "torch", tmp_path)
    tensors = read_all(tmp_path)
    biases = [name for name in tensors if name.endswith("e_score_correction_bias")]
    write_file(tmp_path / SINGLE, tensors | {name: np.zeros((1, 8), np.float32) for name in biases})
    expected = Stepper(load(tmp_path, "float32")).step([Chunk(0, PROMPT)])
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("{", '{"moe_use_aux_free": false,', 1))
    rest = {name: tensor for name, tensor in tensors.items() if name not in biases}
    write_file(tmp_path / SINGLE, rest)
    np.testing.assert_array_equal(Stepper(load(tmp_path, "float32")).step([Chunk(0, PROMPT)]), expected)


def test_the_correction_bias_matters(tmp_path: Path) -> None:
    write_variant("moe", "torch", tmp_path)
    tensors = read_all(tmp_path)
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] = np.zeros((1, 8), np.float32)
    write_file(tmp_path / SINGLE, tensors)
    logits = Stepper(load(tmp_path, "float32")).step([Chunk(0, PROMPT)])
    expected = Stepper(load(GOLDEN / "moe", "float32")).step([Chunk(0, PROMPT)])
    assert np.abs(logits - expected).max() > 0.1


def test_a_rank_that_does_not_fit_is_refused() -> None:
    directory = GOLDEN / "dense"
    with pytest.raises(StartupError, match="--tensor-parallel-size 3 cannot split this model"):
        load_model(directory, read_config(directory), dtype="float32", world_size=3)


def test_a_checkpoint_that_changed_since_it_was_checked_is_refused(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, MOE)
    config = check_checkpoint(tmp_path)
    del tensors["model.layers.2.mlp.experts.3.down_proj.weight"]
    write_file(tmp_path / SINGLE, tensors)
    with pytest.raises(StartupError, match=r"lacks the tensor model\.layers\.2\.mlp\.experts\.3\.down_proj"):
        load_model(tmp_path, config, dtype="float32")


@pytest.mark.parametrize("layout", ["torch", "paddle"])
def test_random_checkpoints_load(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_checkpoint, "SHARD_BYTES", 1 << 21)
    shape = random_checkpoint.SHAPES["moe-small"] | {"vocab_size": 320, "num_hidden_layers": 2}
    monkeypatch.setitem(random_checkpoint.SHAPES, "test", shape)
    random_checkpoint.write_checkpoint("test", layout, tmp_path)
    assert not (tmp_path / SINGLE).exists()
    assert check_checkpoint(tmp_path).moe is not None
    logits = Stepper(load(tmp_path, "float32")).step([Chunk(0, PROMPT)])
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1
    with Checkpoint(tmp_path) as checkpoint:
        spread = widen(checkpoint.read(checkpoint.layout.embedding)).std()
    assert abs(spread - 0.02) < 0.001


@pytest.mark.parametrize("layout", ["torch", "paddle"])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_read_was_asked_for_and_nothing_else(
    tmp_path: Path, layout: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of matrices, slice by slice: the system is asked for what this rank reads, and not far ahead."""
    write_checkpoint(tmp_path, MOE, layout=layout)
    limit = 4000
    monkeypatch.setattr(loader, "READ_AHEAD_BYTES", limit)
    asked: dict[tuple[str, str, str], int] = {}
    most, largest = 0, 0

    class Watched(Checkpoint):
        def read_ahead(self, name: str, rows: slice, columns: slice) -> int:
            nonlocal most, largest
            size = super().read_ahead(name, rows, columns)
            asked[name, str(rows), str(columns)] = size
            most, largest = max(most, sum(asked.values())), max(largest, size)
            return size

        def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> npt.NDArray[Any]:
            if len(self.tensors[name].shape) == 2 and (rows, columns) != (slice(None), slice(None)):
                del asked[name, str(rows), str(columns)]
            return super().read(name, rows, columns)

    monkeypatch.setattr(loader, "Checkpoint", Watched)
    load(tmp_path, "float32", rank=rank, world_size=2)
    assert not asked
    assert limit < most <= limit + 3 * largest  # a matrix beyond it, which has up to three parts


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_gives_back_the_pages_it_read(tmp_path: Path) -> None:
    random_checkpoint.write_checkpoint("tiny", "torch", tmp_path)
    weights = (tmp_path / SINGLE).stat().st_size
    assert weights > 50_000_000
    dtype = ops.compute_dtype()
    load(tmp_path, dtype)
    resident: list[int] = []
    load(tmp_path, dtype, progress=lambda done, total: resident.append(mapped_bytes()))
    # The mapping is gone now, so this is what it held; the embedding alone would make 53 MB.
    assert max(resident) - mapped_bytes() < weights // 10


def mapped_bytes() -> int:
    """How much of files this process has in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))
