"""What a request asks of the sampler holds from the engine down to the logits of the demo checkpoint."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from fdserve.api.params import MAX_TEMPERATURE
from fdserve.engine.engine import Engine
from fdserve.engine.request import Constraint, Request, SamplingParams, TokenDelta, TokenLogprobs
from fdserve.errors import InternalError, InvalidRequest
from tests.e2e.engines import CHECKPOINT, SHAPE, at_once, bits, random_checkpoint, serving
from tests.e2e.test_reproducible import prompt
from tests.models.checkpoints import DENSE, write_file
from tests.models.stepping import BLOCK_SIZE, BLOCKS_PER_SEQUENCE, Chunk, Stepper, load

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]

Logprobs = npt.NDArray[np.float64]
PROMPT = 150


@cache
def stepper() -> Stepper:
    return Stepper(load(CHECKPOINT, "float32"), sequences=40)


def direct(tokens: list[int]) -> Logprobs:
    """log-softmax of the logits of all tokens, by a forward of its own."""
    assert len(tokens) <= BLOCK_SIZE * BLOCKS_PER_SEQUENCE
    steps = stepper()
    steps.lengths[0] = 0
    wide = steps.step([Chunk(0, tokens)]).astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(1, keepdims=True)))


async def deltas(
    engine: Engine, ids: list[int], *, constraint: Constraint | None = None, **params: Any
) -> list[TokenDelta]:
    asked = SamplingParams(**{"max_tokens": 8, "seed": 7, "temperature": 0.0, **params})
    got: list[TokenDelta] = []
    with engine.submit(Request(id="r", prompt=ids, params=asked, constraint=constraint)) as generation:
        while not got or got[-1].finish_reason is None:
            got += await generation.receive()
    return got


async def generate(engine: Engine, ids: list[int], **params: Any) -> list[int]:
    return [token for delta in await deltas(engine, ids, **params) for token in delta.token_ids]


def check(report: list[TokenLogprobs], expected: Logprobs, ids: list[int], num_top: int) -> None:
    assert len(report) == len(ids) - 1
    for each, row, token in zip(report, expected, ids[1:], strict=False):
        np.testing.assert_allclose(each.logprob, row[token], atol=1e-4)
        assert len(each.top_ids) == len(each.top_logprobs) == num_top
        np.testing.assert_allclose(each.top_logprobs, -np.sort(-row)[:num_top], atol=1e-4)
        np.testing.assert_allclose([row[token] for token in each.top_ids], each.top_logprobs, atol=1e-4)


async def test_prompt_logprobs_are_those_of_a_direct_forward_however_the_prompt_is_chunked() -> None:
    ids = prompt()[:PROMPT]

    async def report(budget: int) -> list[TokenLogprobs]:
        async with serving(dtype="float32", max_num_batched_tokens=budget) as engine:
            await generate(engine, ids)  # its blocks are cached now
            first, *others = await deltas(engine, ids, prompt_logprobs=4, logprobs=4)
            assert first.cached_tokens == 0
            assert first.prompt_logprobs is not None
            assert all(delta.prompt_logprobs is None for delta in others)
            (alone,) = await deltas(engine, ids, prompt_logprobs=0, max_tokens=0)
            assert (alone.token_ids, alone.finish_reason) == ([], "length")
            assert alone.prompt_logprobs is not None
            assert [each.logprob for each in alone.prompt_logprobs] == [each.logprob for each in first.prompt_logprobs]
            return first.prompt_logprobs

    reports = await at_once(*[partial(report, budget) for budget in (2048, 7, 70)])
    check(reports[0], direct(ids), ids, 4)
    assert reports[1] == reports[0]
    assert reports[2] == reports[0]


async def test_prompt_logprobs_of_two_ranks(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "model", {**DENSE, **SHAPE})
    ids = [3 + 7 * i % 37 for i in range(100)]

    async def report(ranks: int) -> list[TokenLogprobs]:
        async with serving(checkpoint, tensor_parallel_size=ranks, max_num_batched_tokens=96) as engine:
            (delta,) = await deltas(engine, ids, prompt_logprobs=3, max_tokens=0)
            assert delta.prompt_logprobs is not None
            return delta.prompt_logprobs

    reports = await at_once(partial(report, 1), partial(report, 2))
    assert len(reports[0]) == 99
    for one, two in zip(*reports, strict=True):
        assert one.top_ids == two.top_ids
        np.testing.assert_allclose([one.logprob, *one.top_logprobs], [two.logprob, *two.top_logprobs], atol=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
async def test_a_model_that_gives_no_numbers_is_an_error_for_prompts_too(tmp_path: Path, ranks: int) -> None:
    checkpoint = random_checkpoint(tmp_path / "model", {**DENSE, **SHAPE})
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"][:] = np.nan
    write_file(checkpoint / "model.safetensors", tensors)
    async with serving(checkpoint, tensor_parallel_size=ranks) as engine:
        several: list[dict[str, Any]] = [{"prompt_logprobs": 1, "max_tokens": 0}, {"prompt_logprobs": 0}, {}]
        for params in several:
            (delta,) = await deltas(engine, [3, 4, 5], **params)
            assert isinstance(delta.error, InternalError)
        assert engine.stats().kv_blocks_used == 0


class Allowing:
    """The same ids at every position, until so many tokens are out."""

    def __init__(self, ids: list[int], count: int) -> None:
        self._mask = bits(*ids)
        self._left = count

    @property
    def finished(self) -> bool:
        return self._left == 0

    def advance(self, token_id: int) -> None:
        self._left -= 1

    def mask(self) -> bytes:
        return self._mask


async def test_limits_steer_the_output() -> None:
    ids = prompt()[:PROMPT]
    expected = direct(ids)[-1]
    best = np.argsort(-expected)
    async with serving(dtype="float32") as engine:
        free = await generate(engine, ids)
        assert free[0] == best[0]
        assert (await generate(engine, ids, banned_ids=bits(int(best[0]))))[0] == best[1]
        steered = await generate(engine, ids, bad_words=(tuple(free[:3]),))
        assert steered[:2] == free[:2]
        assert steered[2] != free[2]
        unlikely = int(best[-1])
        assert (await generate(engine, ids, logit_bias=((unlikely, 1000.0),)))[:2] == [unlikely] * 2
        few = (int(best[500]), int(best[300]), int(best[900]))
        assert set(await generate(engine, ids, allowed_ids=bits(*few))) <= set(few)
        assert (await generate(engine, ids, allowed_ids=bits(*few)))[0] == best[300]
        drawn = await generate(engine, ids, allowed_ids=bits(*few), temperature=5.0, max_tokens=40)
        assert set(drawn) == set(few)
        (last,) = await deltas(engine, ids, allowed_ids=bits(few[0]), banned_ids=bits(few[0]))
        assert isinstance(last.error, InvalidRequest)


async def test_constraints_reach_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their masks may come in several frames."""
    monkeypatch.setattr("fdserve.engine.engine.MASKS_PER_FRAME", 2)
    checkpoint = random_checkpoint(tmp_path / "model", {**DENSE, **SHAPE})
    ids = [3 + 7 * i % 37 for i in range(50)]

    async def check(engine: Engine, token: int) -> None:
        got = await deltas(engine, [3, 4, token], constraint=Allowing([token], 4))
        assert [each for delta in got for each in delta.token_ids] == [token] * 4

    async with serving(checkpoint, tensor_parallel_size=2, max_num_batched_tokens=32) as engine:
        free = await generate(engine, ids)
        got = await deltas(engine, ids, constraint=Allowing([11, 13], 5))
        tokens = [token for delta in got for token in delta.token_ids]
        assert len(tokens) == 5
        assert set(tokens) <= {11, 13}
        assert got[-1].finish_reason == "stop"
        async with anyio.create_task_group() as group:
            for token in range(5, 10):
                group.start_soon(check, engine, token)
        assert await generate(engine, ids) == free


async def test_the_highest_temperatures_draw_from_all_tokens_alike() -> None:
    ids = prompt()[:PROMPT]
    async with serving() as engine:
        for params in ({}, {"banned_ids": bits(7)}, {"top_p": 0.5, "logit_bias": ((5, -np.inf),)}):
            drawn = [
                await generate(engine, ids, temperature=temperature, max_tokens=40, **params)
                for temperature in (1e25, MAX_TEMPERATURE)
            ]
            assert drawn[0] == drawn[1]
            assert len(set(drawn[0])) > 30


async def test_logprob_modes() -> None:
    ids = prompt()[:PROMPT]
    raw = direct(ids)[-1]
    asks: dict[str, Any] = {"temperature": 2.0, "top_p": 0.9, "logprobs": 20, "max_tokens": 1}
    async with serving(dtype="float32") as engine:
        for scaled in (False, True):
            for normalized in (False, True):
                (delta,) = await deltas(
                    engine, ids, **asks, temp_scaled_logprobs=scaled, top_p_normalized_logprobs=normalized
                )
                expected = raw / 2 if scaled else raw
                expected = expected - np.log(np.exp(expected).sum())
                order = np.argsort(-expected, kind="stable")
                if normalized:
                    size = int(np.argmax(np.cumsum(np.exp(expected[order])) >= 0.9)) + 1
                    expected[order[:size]] -= np.log(np.exp(expected[order[:size]]).sum())
                    expected[order[size:]] = -np.inf
                assert delta.logprobs is not None
                np.testing.assert_allclose(delta.logprobs[0].top_logprobs, expected[order[:20]], atol=1e-4)
                np.testing.assert_allclose(delta.logprobs[0].logprob, expected[delta.token_ids[0]], atol=1e-4)
