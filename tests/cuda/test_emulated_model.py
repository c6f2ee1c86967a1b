"""The models on the CUDA ops, through Paddle's custom-op bindings and the same Python as on a GPU; emulated."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cuda.emulated_model import logits_of
from tests.models.checkpoints import DENSE, MOE, write_checkpoint, write_file

ROOT = Path(__file__).parents[2]
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64, "num_attention_heads": 4, "vocab_size": 96}


def checkpoint_of(directory: Path, config: dict[str, Any], quantization: str) -> Path:
    """Random weights that the format holds exactly, so that only the arithmetic can differ."""
    generator = np.random.default_rng(5)
    high, step = {"none": (127, 2.0**-9), "wint8": (127, 2.0**-9), "wint4": (7, 2.0**-5)}[quantization]
    tensors = {}
    for name, zeros in write_checkpoint(directory, config).items():
        if zeros.ndim == 2:
            integers = generator.integers(-high, high + 1, size=zeros.shape)
            integers[:, ::64] = high  # every group's largest, which makes `step` its scale
            tensors[name] = (integers * step).astype(np.float32)
        else:
            tensors[name] = np.ones(zeros.shape, np.float32)
    write_file(directory / "model.safetensors", tensors)
    return directory


SPARSE = MOE | {"moe_intermediate_size": 64}


@pytest.mark.parametrize(
    ("config", "dtype", "quantization"),
    [
        *(
            (config, "bfloat16", quantization)
            for config in (DENSE, SPARSE)
            for quantization in ("none", "wint8", "wint4")
        ),
        *((DENSE, "float16", quantization) for quantization in ("none", "wint8")),
    ],
)
def test_logits_are_those_of_the_cpu(
    library: Path, tmp_path: Path, config: dict[str, Any], dtype: str, quantization: str
) -> None:
    checkpoint = checkpoint_of(tmp_path, config | SHAPE, quantization)
    out = tmp_path / "out.npz"
    command = [sys.executable, "-W", "ignore", "-m", "tests.cuda.emulated_model"]
    arguments = [str(library), str(checkpoint), dtype, quantization, str(out)]
    subprocess.run(
        [*command, *arguments], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=120
    )
    emulated = np.load(out)
    expected = logits_of(checkpoint, "float32")
    # Of the logits' own spread: bfloat16 keeps eight bits and float16 eleven, and the head's results have that, too.
    error = np.abs(emulated["logits"] - expected).max(axis=1) / expected.std(axis=1)
    assert np.median(error) < {"bfloat16": 0.05, "float16": 0.008}[dtype], error
    wide = emulated["logits"].astype(np.float64)
    assert (emulated["tokens"] == wide.argmax(1)).all()
    assert (emulated["top_ids"][:, 0] == emulated["tokens"]).all()
    logprobs = wide.max(1) - np.log(np.exp(wide).sum(1))
    assert np.allclose(emulated["logprobs"], logprobs, atol=1e-4)
