"""The models on the CUDA ops, through Paddle's custom-op bindings and the same Python as on a GPU; emulated."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import chain
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


MODELS = [
    *(
        (kind, config | SHAPE, "bfloat16", quantization)
        for kind, config in (("dense", DENSE), ("sparse", SPARSE))
        for quantization in ("none", "wint8", "wint4")
    ),
    *(("dense", DENSE | SHAPE, "float16", quantization) for quantization in ("none", "wint8")),
]
NAMES = [f"{kind}-{dtype}-{quantization}" for kind, _, dtype, quantization in MODELS]


@pytest.fixture(scope="module")
def directories(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model's checkpoint, and beside it what the emulated ops make of it; half of them by each of 2 processes."""
    directories = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    arguments: list[list[str]] = []
    for (_, config, dtype, quantization), directory in zip(MODELS, directories.values(), strict=True):
        checkpoint = checkpoint_of(directory, config, quantization)
        arguments.append([str(checkpoint), dtype, quantization, str(directory / "out.npz")])
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.cuda.emulated_model", str(library), *chain(*half)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for half in (arguments[::2], arguments[1::2])
    ]
    try:
        for process in processes:
            process.wait(240)  # a failure is that of the models it has not written
    finally:
        for process in processes:
            process.kill()
            process.wait(10)
    return directories


@pytest.mark.parametrize(("name", "dtype"), [(name, model[2]) for name, model in zip(NAMES, MODELS, strict=True)])
def test_logits_are_those_of_the_cpu(directories: dict[str, Path], name: str, dtype: str) -> None:
    emulated = np.load(directories[name] / "out.npz")
    expected = logits_of(directories[name], "float32")
    # Of the logits' own spread: bfloat16 keeps eight bits and float16 eleven, and the head's results have that, too.
    error = np.abs(emulated["logits"] - expected).max(axis=1) / expected.std(axis=1)
    assert np.median(error) < {"bfloat16": 0.05, "float16": 0.008}[dtype], error
    wide = emulated["logits"].astype(np.float64)
    assert (emulated["tokens"] == wide.argmax(1)).all()
    assert (emulated["top_ids"][:, 0] == emulated["tokens"]).all()
    logprobs = wide.max(1) - np.log(np.exp(wide).sum(1))
    assert np.allclose(emulated["logprobs"], logprobs, atol=1e-4)
