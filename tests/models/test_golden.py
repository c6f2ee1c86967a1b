"""The models against what Hugging Face transformers computed (see tests/golden/make_golden.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fdserve import ops
from fdserve.demo import CHECKPOINT
from fdserve.models.layers import Rope
from tests.golden.layouts import GOLDEN, write_variant
from tests.models.stepping import Chunk, LocalGroup, Stepper, load

NAMES = ("dense", "moe")
VARIANTS = ("torch", "sharded", "paddle", "u16", "float32", "untied", "untied paddle")


@dataclass
class Golden:
    """The golden numbers of one model; logits are those of all prompts' tokens, one prompt after the other."""

    name: str
    prompts: list[list[int]]
    float32: npt.NDArray[np.float32]
    bfloat16: npt.NDArray[np.float32]
    greedy: list[list[int]]
    greedy_logprobs: npt.NDArray[np.float32]


@pytest.fixture(params=NAMES, scope="module")
def golden(request: pytest.FixtureRequest) -> Golden:
    with np.load(GOLDEN / f"{request.param}.npz") as numbers:
        starts = numbers["prompt_starts"]
        prompts = [part.tolist() for part in np.split(numbers["prompts"], starts[1:-1])]
        return Golden(
            request.param,
            prompts,
            numbers["float32"],
            numbers["bfloat16"],
            numbers["greedy"].tolist(),
            numbers["greedy_logprobs"],
        )


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "bfloat16" and ops.compute_dtype() != name:
        pytest.skip("this CPU does not compute in bfloat16")
    return name


@pytest.fixture(params=[None, "wint8", "wint4", "w8a8"])
def quantization(request: pytest.FixtureRequest) -> str | None:
    name: str | None = request.param
    return name


def all_logits(stepper: Stepper, prompts: list[list[int]]) -> npt.NDArray[np.float32]:
    """Of every prompt token, all prompts in one step."""
    return stepper.step([Chunk(sequence, prompt) for sequence, prompt in enumerate(prompts)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_logits_in_every_form_of_checkpoint(golden: Golden, variant: str, tmp_path: Path) -> None:
    model = load(write_variant(golden.name, variant, tmp_path), "float32")
    logits = all_logits(Stepper(model), golden.prompts)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, golden.float32, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_form_of_checkpoint_gives_the_same_bits(golden: Golden, variant: str, tmp_path: Path, dtype: str) -> None:
    expected = all_logits(Stepper(load(GOLDEN / golden.name, dtype)), golden.prompts)
    model = load(write_variant(golden.name, variant, tmp_path), dtype)
    np.testing.assert_array_equal(all_logits(Stepper(model), golden.prompts), expected)


def test_bfloat16_logits_are_off_by_rounding_alone(golden: Golden) -> None:
    if ops.compute_dtype() != "bfloat16":
        pytest.skip("this CPU does not compute in bfloat16")
    logits = all_logits(Stepper(load(GOLDEN / golden.name, "bfloat16")), golden.prompts)
    # Two correct programs that round to bfloat16 at about the same places differ from the float32 numbers by
    # errors of the same size and not of the same sign. Transformers' own error is therefore the yardstick; a wrong
    # norm, rotation or routing is off by the logits' spread, which is fifty times larger. The median token is
    # compared, because a token whose k-th and next expert are nearly tied may be routed otherwise by either.
    ours = rms_by_token(logits - golden.float32)
    theirs = rms_by_token(golden.bfloat16 - golden.float32)
    assert np.median(ours) < 1.25 * np.median(theirs)
    assert np.quantile(ours, 0.9) < 1.5 * np.quantile(theirs, 0.9)


def rms_by_token(errors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    rms: npt.NDArray[np.float32] = np.sqrt(np.square(errors).mean(axis=1))
    return rms


def test_greedy_continuations(golden: Golden) -> None:
    stepper = Stepper(load(GOLDEN / golden.name, "float32"))
    for sequence, (prompt, expected) in enumerate(zip(golden.prompts, golden.greedy, strict=True)):
        assert stepper.greedy(sequence, prompt, len(expected)) == expected


def test_logprobs_of_the_greedy_tokens(golden: Golden) -> None:
    stepper = Stepper(load(GOLDEN / golden.name, "float32"))
    for sequence, (prompt, tokens) in enumerate(zip(golden.prompts, golden.greedy, strict=True)):
        rows = range(len(prompt) - 1, len(prompt) + len(tokens) - 1)
        logits = stepper.step([Chunk(sequence, prompt + tokens)], rows)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        chosen = logprobs[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose(chosen, golden.greedy_logprobs[sequence], rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [1, 3, 16, 23])
def test_chunked_prefill_gives_the_same_bits(golden: Golden, dtype: str, quantization: str | None, size: int) -> None:
    prompt = golden.prompts[-1]
    model = load(GOLDEN / golden.name, dtype, quantization=quantization)
    whole = Stepper(model).step([Chunk(0, prompt)])
    stepper = Stepper(model)
    parts = [stepper.step([Chunk(0, prompt[at : at + size])]) for at in range(0, len(prompt), size)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_company_changes_no_bits(golden: Golden, dtype: str, quantization: str | None) -> None:
    model = load(GOLDEN / golden.name, dtype, quantization=quantization)
    alone = [Stepper(model).step([Chunk(0, prompt)]) for prompt in golden.prompts]
    stepper = Stepper(model)
    np.testing.assert_array_equal(all_logits(stepper, golden.prompts), np.concatenate(alone))
    # A decode of the second sequence beside a prefill of the first in fresh blocks.
    expected = Stepper(model).step([Chunk(0, golden.prompts[1]), Chunk(1, [9])])[:-1]
    last = Stepper(model).step([Chunk(0, [*golden.prompts[1], 7])])[-1]
    stepper.lengths[0] = 0
    mixed = stepper.step([Chunk(1, [7]), Chunk(0, golden.prompts[1])])
    np.testing.assert_array_equal(mixed[0], last)
    np.testing.assert_array_equal(mixed[1:], expected)


def test_one_operator_for_all_blocks_gives_the_bits_of_many(
    golden: Golden, dtype: str, quantization: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(GOLDEN / golden.name, dtype, quantization=quantization)
    chunks = [Chunk(sequence, prompt) for sequence, prompt in enumerate(golden.prompts)]
    assert model._decoder is not None
    together = Stepper(model).step(chunks, [26, 0, 7])
    monkeypatch.setattr(model, "_decoder", None)
    np.testing.assert_array_equal(Stepper(model).step(chunks, [26, 0, 7]), together)


def test_many_rows_at_once_give_the_bits_of_few(dtype: str, quantization: str | None) -> None:
    """With layers wide enough for SwiGLU to take its inputs as they are computed."""
    model = load(CHECKPOINT, dtype, quantization=quantization)
    tokens = np.random.default_rng(3).integers(3, 1536, 150).tolist()
    whole = Stepper(model).step([Chunk(0, tokens)])
    stepper = Stepper(model)
    parts = [stepper.step([Chunk(0, tokens[at : at + 25])]) for at in range(0, len(tokens), 25)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_only_the_rows_asked_for(golden: Golden, dtype: str) -> None:
    model = load(GOLDEN / golden.name, dtype)
    whole = all_logits(Stepper(model), golden.prompts)
    chunks = [Chunk(sequence, prompt) for sequence, prompt in enumerate(golden.prompts)]
    np.testing.assert_array_equal(Stepper(model).step(chunks, [26, 0, 7]), whole[[26, 0, 7]])
    assert Stepper(model).step(chunks, []).shape == (0, whole.shape[1])


def test_a_shared_block_is_read_in_the_step_that_fills_it(golden: Golden) -> None:
    model = load(GOLDEN / golden.name, "float32")
    prompt = golden.prompts[-1]
    expected = Stepper(model).step([Chunk(0, prompt)])[16:]
    stepper = Stepper(model)
    stepper.tables[1][0] = stepper.tables[0][0]
    stepper.lengths[1] = 16
    both = stepper.step([Chunk(0, prompt[:16]), Chunk(1, prompt[16:])])
    np.testing.assert_array_equal(both[16:], expected)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("variant", ["torch", "paddle", "untied", "untied paddle"])
def test_ranks_together_give_the_logits(golden: Golden, variant: str, world_size: int, tmp_path: Path) -> None:
    directory = write_variant(golden.name, variant, tmp_path)

    def rank_main(ranks: dict[str, Any]) -> Any:
        stepper = Stepper(load(directory, "float32", **ranks))
        prefill = all_logits(stepper, golden.prompts)
        return prefill, stepper.step([Chunk(1, [5])]), stepper.caches.layers[0][0].shape

    single = Stepper(load(directory, "float32"))
    all_logits(single, golden.prompts)
    decode = single.step([Chunk(1, [5])])
    results = LocalGroup(world_size).run(rank_main)
    logits, next_logits = (np.concatenate([result[which] for result in results], axis=1) for which in (0, 1))
    np.testing.assert_allclose(logits, golden.float32, rtol=0, atol=1e-4)
    np.testing.assert_allclose(next_logits, decode, rtol=0, atol=1e-4)
    assert [result[2][1] for result in results] == [
        1
    ] * world_size  # 2 key/value heads: one a rank, or one for two ranks


# Of the logits' spread. The random weights of these models amplify every error: bfloat16's own is 0.06.
@pytest.mark.parametrize(("quantization", "bound"), [("wint8", 0.08), ("wint4", 0.8), ("w8a8", 0.12)])
@pytest.mark.parametrize("variant", ["torch", "untied paddle"])
def test_quantized_logits(golden: Golden, quantization: str, bound: float, variant: str, tmp_path: Path) -> None:
    directory = write_variant(golden.name, variant, tmp_path)
    logits = all_logits(Stepper(load(directory, "float32", quantization=quantization)), golden.prompts)
    # The median token: the routing of a token whose experts are nearly tied may differ.
    assert np.median(rms_by_token(logits - golden.float32)) < bound * golden.float32.std()


@pytest.mark.parametrize("quantization", ["wint8", "wint4", "w8a8"])
def test_quantized_ranks_together_give_the_logits(golden: Golden, quantization: str) -> None:
    def rank_main(ranks: dict[str, Any]) -> Any:
        return all_logits(
            Stepper(load(GOLDEN / golden.name, "float32", quantization=quantization, **ranks)), golden.prompts
        )

    results = LocalGroup(2).run(rank_main)
    logits = np.concatenate(results, axis=1)
    assert np.median(rms_by_token(logits - golden.float32)) < 0.8 * golden.float32.std()


def test_rope_is_that_of_transformers() -> None:
    with np.load(GOLDEN / "rope.npz") as numbers:
        positions, theta = numbers["positions"], float(numbers["theta"])
        expected = np.concatenate([numbers["cos"], numbers["sin"]], axis=1)
    table = Rope(128, theta, 1.0).table(positions)
    assert table.dtype == np.float32
    # At position 131071 one unit in the last place of a frequency near 1 is an angle of 0.008.
    np.testing.assert_allclose(table[:5], expected[:5], rtol=0, atol=1e-4)
    np.testing.assert_allclose(table, expected, rtol=0, atol=1e-2)


def test_compression_divides_the_positions() -> None:
    positions = np.array([0, 2, 4, 600], np.int32)
    compressed = Rope(32, 10000.0, 2.0).table(positions)
    np.testing.assert_array_equal(compressed, Rope(32, 10000.0, 1.0).table(positions // 2))


def test_progress_ends_at_the_total(golden: Golden) -> None:
    calls: list[tuple[int, int]] = []
    load(GOLDEN / golden.name, "float32", progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert len({total for _, total in calls}) == 1
    assert calls[-1][0] == calls[-1][1] > 100_000


def test_bytes_of_a_block(golden: Golden) -> None:
    model = load(GOLDEN / golden.name, "float32")
    caches = model.new_caches(3, 32)
    total = sum(cache.numel() * cache.element_size() for layer in caches.layers for cache in layer)
    assert model.kv_bytes_per_block(32) * 3 == total
