"""Engines over real ranks, in the test's own process, and what they serve."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio
import numpy as np

import fdserve
from fdserve.config import Config
from fdserve.engine.create import create_engine
from fdserve.engine.engine import Engine
from fdserve.models.checkpoint import check_checkpoint
from fdserve.worker.limits import id_mask
from tests.models.checkpoints import write_checkpoint, write_file

CHECKPOINT = Path(fdserve.__file__).parent / "demo" / "checkpoint"
SHAPE = {"torch_dtype": "float32", "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}
T = TypeVar("T")


@asynccontextmanager
async def serving(checkpoint: Path = CHECKPOINT, **settings: Any) -> AsyncIterator[Engine]:
    config = Config(**{"max_model_len": 512, "max_num_seqs": 32, "block_size": 16, **settings})
    engine = create_engine(config, checkpoint, check_checkpoint(checkpoint))
    with anyio.fail_after(120):
        async with anyio.create_task_group() as group:
            group.start_soon(engine.run)
            await engine.wait_ready()
            yield engine
            group.cancel_scope.cancel()


async def at_once(*works: Callable[[], Awaitable[T]]) -> list[T]:
    """What each of them gives. One engine after the other would leave a core idle while its rank starts."""
    results: dict[int, T] = {}

    async def run(index: int) -> None:
        results[index] = await works[index]()

    async with anyio.create_task_group() as group:
        for index in range(len(works)):
            group.start_soon(run, index)
    return [results[index] for index in range(len(works))]


def random_checkpoint(directory: Path, config: dict[str, Any]) -> Path:
    """A float32 checkpoint of the torch layout, its weights drawn so that logits differ clearly."""
    directory.mkdir()
    generator = np.random.default_rng(3)
    tensors = {}
    for name, zeros in write_checkpoint(directory, config).items():
        values = generator.normal(size=zeros.shape) * (2.4 / config["hidden_size"] ** 0.5 if zeros.ndim == 2 else 0.1)
        tensors[name] = (values + (zeros.ndim == 1)).astype(np.float32)
    write_file(directory / "model.safetensors", tensors)
    return directory


def bits(*ids: int) -> bytes:
    """A mask of these ids."""
    return id_mask(ids, max(ids) + 1).tobytes()
