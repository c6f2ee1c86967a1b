"""Two ranks on the CUDA ops, emulated, that gather by Gloo where GPUs have NCCL; all else is what runs there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from fdserve.executor.executor import free_port
from tests.cuda.emulated_model import logits_of
from tests.cuda.test_emulated_model import ROOT, SHAPE, checkpoint_of
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
