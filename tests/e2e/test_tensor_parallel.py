"""Several ranks give the tokens of one, and end together."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import anyio
import numpy as np
import pytest

from fdserve.config import Config
from fdserve.engine.create import create_engine
from fdserve.engine.request import Request, SamplingParams, TokenDelta
from fdserve.errors import StartupError
from fdserve.models.checkpoint import check_checkpoint
from tests.e2e.test_reproducible import serving
from tests.executor.test_process import wait_until_gone
from tests.models.checkpoints import DENSE, MOE, write_checkpoint, write_file

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]

SHAPE = {"torch_dtype": "float32", "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}


def random_checkpoint(directory: Path, config: dict[str, object]) -> Path:
    """A float32 checkpoint of the torch layout, its weights drawn so that logits differ clearly."""
    directory.mkdir()
    generator = np.random.default_rng(3)
    tensors = {}
    for name, zeros in write_checkpoint(directory, config).items():
        values = generator.normal(size=zeros.shape) * (0.3 if zeros.ndim == 2 else 0.1)
        tensors[name] = (values + (zeros.ndim == 1)).astype(np.float32)
    write_file(directory / "model.safetensors", tensors)
    return directory


@pytest.mark.parametrize(("kind", "ranks"), [("dense", 2), ("dense", 8), ("moe", 2)])
async def test_the_tokens_are_those_of_one_rank(tmp_path: Path, kind: str, ranks: int) -> None:
    config = {**(MOE if kind == "moe" else DENSE), **SHAPE}
    checkpoint = random_checkpoint(tmp_path / "model", config)
    alone = await generate(checkpoint, 1)
    together = await generate(checkpoint, ranks)
    assert [delta.token_ids for delta in together] == [delta.token_ids for delta in alone]
    assert len({delta.token_ids[0] for delta in alone}) > 3
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.logprobs is not None
        assert theirs.logprobs is not None
        assert ours.logprobs[0].top_ids == theirs.logprobs[0].top_ids
        np.testing.assert_allclose(ours.logprobs[0].top_logprobs, theirs.logprobs[0].top_logprobs, atol=1e-4)


async def generate(checkpoint: Path, ranks: int) -> list[TokenDelta]:
    params = SamplingParams(max_tokens=20, seed=0, temperature=0.0, logprobs=3)
    async with serving(checkpoint, tensor_parallel_size=ranks, max_num_batched_tokens=32) as engine:
        deltas: list[TokenDelta] = []
        with engine.submit(Request(id="r", prompt=[3 + 7 * i % 37 for i in range(50)], params=params)) as generation:
            while not deltas or deltas[-1].finish_reason is None:
                deltas += await generation.receive()
        return deltas


async def test_all_ranks_start_again_when_one_is_killed(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "model", {**DENSE, **SHAPE})
    async with serving(checkpoint, tensor_parallel_size=2) as engine:
        before = rank_pids()
        assert len(before) == 2
        os.kill(max(before), signal.SIGKILL)
        for pid in before:
            await wait_until_gone(pid)
        with anyio.fail_after(60):
            while engine.status != "ready" or engine.stats().rank_restarts == 0:
                await anyio.sleep(0.05)
        after = rank_pids()
        assert len(after) == 2
    for pid in after:
        await wait_until_gone(pid)


def rank_pids() -> list[int]:
    """This process's rank processes."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in children if b"fdserve.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_split_that_is_impossible_is_one_sentence(tmp_path: Path, anyio_backend: str) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(StartupError, match="--tensor-parallel-size 3 cannot split this model"):
        create_engine(Config(tensor_parallel_size=3), tmp_path, check_checkpoint(tmp_path))
