"""Several ranks give the tokens of one, and end together."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from fdserve.config import Config
from fdserve.engine.create import create_engine
from fdserve.engine.engine import Engine
from fdserve.engine.request import Request, SamplingParams, TokenDelta, TokenLogprobs
from fdserve.errors import StartupError
from fdserve.models.checkpoint import check_checkpoint
from tests.e2e.engines import SHAPE, at_once, bits, random_checkpoint, serving
from tests.executor.process_table import rank_pids, wait_until_gone
from tests.models.checkpoints import DENSE, MOE, write_checkpoint

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]

# ERNIE-4.5-0.3B's blocks, two of them: with four ranks two hold the same key/value head.
PUBLISHED = {"num_attention_heads": 16, "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072}


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 0.0, "logprobs": 0, "prompt_logprobs": 4},
    {"seed": 1, "logprobs": 2},
    {"seed": 2, "top_k": 5, "logprobs": 1, "temp_scaled_logprobs": True, "temperature": 0.7},
    {"seed": 3, "top_p": 0.9, "logprobs": 1, "top_p_normalized_logprobs": True},
    {"seed": 4, "top_p": 0.6, "min_p": 0.01, "temperature": 1.3},
    {"seed": 5, "min_p": 0.1, "logit_bias": ((7, 5.0), (8, 4.0)), "bad_words": ((7, 8),), "banned_ids": bits(9)},
    {"seed": 6, "allowed_ids": bits(3, 5, 8, 11, 30, 39), "min_tokens": 20, "eos_token_ids": (5,)},
    {"temperature": 0.0, "banned_ids": bits(*range(0, 40, 2)), "logprobs": 2},
]


# What one rank gives, which several tests compare with.
OF_ONE: dict[tuple[str, int], list[list[TokenDelta]]] = {}


@pytest.mark.parametrize(
    ("kind", "vocab_size", "ranks"),
    [
        *[("dense", 40, 4), ("dense", 8192, 2), ("dense", 5000, 4), ("moe", 40, 2), ("moe", 8192, 8)],
        *[("0.3B", 4096, 2), ("0.3B", 4096, 4)],
    ],
)
async def test_the_tokens_are_those_of_one_rank(tmp_path: Path, kind: str, vocab_size: int, ranks: int) -> None:
    """With a vocabulary that is shared out in whole blocks, or is too small for that, or does not divide."""
    config = {**(MOE if kind == "moe" else DENSE), **SHAPE, "vocab_size": vocab_size}
    samplings = SAMPLINGS
    if kind == "0.3B":
        # Sums of this length round differently when they are split, which a draw may show: greedily alone.
        config, samplings = config | PUBLISHED, [each for each in SAMPLINGS if each.get("temperature") == 0.0]
    checkpoint = random_checkpoint(tmp_path / "model", config)

    async def of_one() -> list[list[TokenDelta]]:
        if (kind, vocab_size) not in OF_ONE:
            OF_ONE[kind, vocab_size] = await generate_all(checkpoint, 1, samplings)
        return OF_ONE[kind, vocab_size]

    alone, together = await at_once(of_one, partial(generate_all, checkpoint, ranks, samplings))
    for sampling, ours, theirs in zip(samplings, together, alone, strict=True):
        assert len(theirs) >= 20
        assert [delta.token_ids for delta in ours] == [delta.token_ids for delta in theirs], sampling
        for mine, other in zip(ours, theirs, strict=True):
            assert_same_logprobs(mine.logprobs, other.logprobs)
            assert_same_logprobs(mine.prompt_logprobs, other.prompt_logprobs)
    assert len({delta.token_ids[0] for delta in alone[0]}) > 3


def assert_same_logprobs(ours: list[TokenLogprobs] | None, theirs: list[TokenLogprobs] | None) -> None:
    for mine, other in zip(ours or [], theirs or [], strict=True):
        assert mine.top_ids == other.top_ids
        np.testing.assert_allclose(mine.logprob, other.logprob, atol=1e-4)
        np.testing.assert_allclose(mine.top_logprobs, other.top_logprobs, atol=1e-4)


async def generate_all(checkpoint: Path, ranks: int, samplings: list[dict[str, Any]]) -> list[list[TokenDelta]]:
    """What each of the samplings gives, together in one batch."""
    deltas: list[list[TokenDelta]] = [[] for _ in samplings]

    async def generate(engine: Engine, index: int) -> None:
        params = SamplingParams(**{"max_tokens": 20, "seed": 0, **samplings[index]})
        prompt = [3 + 7 * i % (37 - index) for i in range(50)]
        with engine.submit(Request(id="r", prompt=prompt, params=params)) as generation:
            while not deltas[index] or deltas[index][-1].finish_reason is None:
                deltas[index] += await generation.receive()

    async with (
        serving(checkpoint, tensor_parallel_size=ranks, max_num_batched_tokens=32) as engine,
        anyio.create_task_group() as group,
    ):
        for index in range(len(samplings)):
            group.start_soon(generate, engine, index)
    return deltas


async def test_all_ranks_start_again_when_one_is_killed(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "model", {**DENSE, **SHAPE})
    async with serving(checkpoint, tensor_parallel_size=2) as engine:
        before = rank_pids(os.getpid())
        assert len(before) == 2
        os.kill(max(before), signal.SIGKILL)
        for pid in before:
            await wait_until_gone(pid)
        with anyio.fail_after(60):
            while engine.status != "ready" or engine.stats().rank_restarts == 0:
                await anyio.sleep(0.05)
        after = rank_pids(os.getpid())
        assert len(after) == 2
    for pid in after:
        await wait_until_gone(pid)


def test_a_split_that_is_impossible_is_one_sentence(tmp_path: Path, anyio_backend: str) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(StartupError, match="--tensor-parallel-size 3 cannot split this model"):
        create_engine(Config(tensor_parallel_size=3), tmp_path, check_checkpoint(tmp_path))
