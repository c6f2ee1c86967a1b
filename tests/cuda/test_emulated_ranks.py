"""Two ranks on the CUDA ops, emulated, that gather by Gloo where GPUs have NCCL; all else is what runs there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from fdserve.engine.request import Request, SamplingParams
from fdserve.executor.executor import free_port
from tests.cuda.emulated_model import logits_of
from tests.cuda.test_emulated_model import ROOT, SHAPE, checkpoint_of
from tests.e2e.engines import serving
from tests.executor.process_table import rank_pids, wait_until_gone
from tests.models.checkpoints import DENSE


def test_two_ranks_compute_and_sample_as_one(library: Path, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, DENSE | SHAPE | {"vocab_size": 2500}, "none")
    rendezvous = f"127.0.0.1:{free_port()}"
    outs = [tmp_path / f"{rank}.npy" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.cuda.emulated_ranks", library, checkpoint, str(rank),
             rendezvous, out],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for rank, out in enumerate(outs)
    ]  # fmt: skip
    try:
        assert [process.wait(120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait(10)
    logits = np.concatenate([np.load(out) for out in outs], axis=1)
    expected = logits_of(checkpoint, "float32")
    assert logits.shape == expected.shape
    error = np.abs(logits - expected).max(axis=1) / expected.std(axis=1)
    assert np.median(error) < 0.05, error


# Python imports it in every process that finds it on its path, a rank among them.
EMULATE = """
from pathlib import Path
from typing import Any
from tests.cuda.emulated_model import emulate
emulate(Path({library!r}))
"""


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_engine_serves_with_two_ranks_and_survives_the_loss_of_one(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that runs on two GPUs but NCCL and the GPUs."""
    (tmp_path / "model").mkdir()
    checkpoint = checkpoint_of(tmp_path / "model", DENSE | SHAPE | {"vocab_size": 2500}, "none")
    (tmp_path / "sitecustomize.py").write_text(EMULATE.format(library=str(library)), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    settings: Any = {"tensor_parallel_size": 2, "max_model_len": 64, "kv_cache_memory": "1M"}
    async with serving(checkpoint, **settings) as engine:

        async def generate(**params: Any) -> list[int]:
            request = Request(id="r", prompt=[3, 1, 4, 1, 5], params=SamplingParams(**{"max_tokens": 6, **params}))
            tokens: list[int] = []
            with engine.submit(request) as generation, anyio.fail_after(30):
                while True:
                    for delta in await generation.receive():
                        tokens += delta.token_ids
                        if delta.finish_reason is not None:
                            assert delta.finish_reason == "length", delta.error
                            return tokens

        greedy, drawn = await generate(seed=1, temperature=0.0), await generate(seed=2, top_p=0.9)
        assert len(greedy) == len(drawn) == 6

        # NCCL does not see that a peer is gone, and the other rank hangs in the middle of its step: here, by a signal.
        hanging, killed = sorted(rank_pids(os.getpid()))
        os.kill(hanging, signal.SIGSTOP)
        with engine.submit(Request(id="r", prompt=[3, 1], params=SamplingParams(max_tokens=6, seed=3))) as generation:
            await anyio.sleep(0.3)
            os.kill(killed, signal.SIGKILL)
            with anyio.fail_after(10):
                (last,) = await generation.receive()
        assert last.finish_reason == "error"
        assert f"pid {killed}) was killed by SIGKILL" in str(last.error)
        for pid in (hanging, killed):
            await wait_until_gone(pid)
        with anyio.fail_after(60):
            while engine.status != "ready" or engine.stats().rank_restarts == 0:
                await anyio.sleep(0.05)
        assert await generate(seed=1, temperature=0.0) == greedy
        assert await generate(seed=2, top_p=0.9) == drawn
