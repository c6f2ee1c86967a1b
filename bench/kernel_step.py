"""Whole decode steps of a rank, from the plan to the tokens, beside reading the weights and the products alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import paddle

from bench.floors import Case
from bench.machine import fastest, memory_reads
from bench.random_checkpoint import write_checkpoint
from fdserve import ops
from fdserve.executor.wire import Load, Masks, NewRow, Plan, SamplingParams
from fdserve.models.config import ModelConfig
from fdserve.models.footprint import WEIGHT_BYTES, weight_bytes
from fdserve.ops.weights import PackedWeight
from fdserve.worker.runner import Runner

ROWS = (1, 4, 16)
CONTEXT, BLOCK = 256, 64


def step_cases(
    *, names: Sequence[str], rows: Sequence[int] = ROWS, shape: str = "0.3B", budget: float
) -> Iterator[Case]:
    """Of each format and number of rows a step, and of a dense model its linear layers called alone, one by one.

    Both are set against reading as many bytes as the step's weights have: rows are all alike, so that of a mixture of
    experts they go to the same ones. Steps, products and reads take turns. The rate of the second is the part of the
    step's time that its products take.
    """
    with TemporaryDirectory() as name:
        directory = Path(name)
        write_checkpoint(shape, "torch", directory)
        for each in names:
            yield from _format_cases(directory, each, rows, budget)


def _format_cases(directory: Path, name: str, rows: Sequence[int], budget: float) -> Iterator[Case]:
    runner = Runner(_load(directory, name, max(rows)), lambda what, done, total: None)
    weights = [] if runner.config.moe else _weights(runner)
    with memory_reads(ops.num_threads(), _bytes_of_step(runner.config, runner.format)) as reads:
        for count in rows:
            calls: dict[str, Callable[[], Any]] = {"step": Decodes(runner, count).step, **reads}
            if weights:
                calls["products"] = partial(_multiply, _inputs(weights, count), weights)
            times = fastest(calls, budget=budget)
            read, step = min(times[kind] for kind in reads), times["step"]
            case = f"{count} rows after {CONTEXT} tokens"
            yield Case(f"step {name}", case, step, count / step, "tokens/s", of_memory=read / step)
            if weights:
                products = times["products"]
                share = 100 * products / step
                yield Case("  its products alone", case, products, share, "% of step", of_memory=read / products)


def _bytes_of_step(config: ModelConfig, name: str) -> int:
    """What the matrices take, the experts left out that no row goes to."""
    size = weight_bytes(config, 1, name)
    if config.moe is None:
        return size
    layers = sum(config.layer_is_moe(layer) for layer in range(config.num_layers))
    expert = 3 * config.hidden_size * config.moe.intermediate_size * WEIGHT_BYTES[name]
    return size - int((config.moe.num_experts - config.moe.top_k) * layers * expert)


def _inputs(weights: Sequence[PackedWeight], rows: int) -> dict[int, Any]:
    return {k: paddle.ones([rows, k], weights[0].dtype) for k in {weight.in_features for weight in weights}}


def _load(directory: Path, name: str, rows: int) -> Load:
    dtype = name if name == "float32" else ops.compute_dtype()
    return Load(
        directory=str(directory),
        device="cpu",
        rank=0,
        world_size=1,
        dtype=dtype,
        quantization="none" if name == dtype else name,
        block_size=BLOCK,
        num_blocks=max(2, rows * (CONTEXT // BLOCK + 1)),
        kv_cache_bytes=0,
        host_cache_bytes=0,
        max_num_seqs=rows,
        max_model_len=CONTEXT + BLOCK,
        num_threads=0,  # as they are set
        parent=os.getpid(),
    )


class Decodes:
    """Steps that each decode `count` rows, after CONTEXT tokens and at most a block more."""

    def __init__(self, runner: Runner, count: int) -> None:
        self._runner = runner
        self._count = count
        self._number = 0
        self._left = 0  # steps until the rows are full

    def step(self) -> None:
        """The next one; those that follow each other have a token more of context."""
        new_rows = [] if self._left else [self._row(row) for row in range(self._count)]
        self._left = self._left - 1 if self._left else BLOCK - 2
        self._number += 1
        plan = Plan(self._number, new_rows, [], list(range(self._count)), [1] * self._count)
        result = self._runner.step(plan, _no_masks)
        assert len(result.token_ids) == 4 * self._count

    def _row(self, row: int) -> NewRow:
        """Enter a row anew, as if all of its tokens but one were computed."""
        width = CONTEXT // BLOCK + 1
        return NewRow(
            row=row,
            token_ids=np.arange(3, CONTEXT + 4, dtype=np.int32).tobytes(),
            num_prompt=CONTEXT + 1,
            num_computed=CONTEXT,
            blocks=tuple(range(row * width, (row + 1) * width)),
            params=SamplingParams(max_tokens=BLOCK, seed=0, temperature=0.0),
        )


def _no_masks() -> Masks:
    raise AssertionError("no row is masked")


def _weights(runner: Runner) -> list[PackedWeight]:
    """Weights in the shapes and formats of the model's, in the order in which a step reads them."""
    config = runner.config
    pack = partial(ops.pack_weight, dtype=runner.dtype, in_out=False)
    heads = config.num_heads * config.head_dim
    qkv = heads + 2 * config.num_kv_heads * config.head_dim
    layer = [(config.hidden_size, qkv), (heads, config.hidden_size)]
    layer += [(config.hidden_size, 2 * config.intermediate_size), (config.intermediate_size, config.hidden_size)]
    sources = {(k, n): np.full((n, k), 0x3F80, np.uint16) for k, n in layer}
    weights = [pack(sources[shape], quantization=runner.format) for _ in range(config.num_layers) for shape in layer]
    head = np.full((config.vocab_size, config.hidden_size), 0x3F80, np.uint16)
    return [*weights, pack(head, quantization="wint8" if runner.format == "w8a8" else runner.format)]


def _multiply(inputs: dict[int, Any], weights: Sequence[PackedWeight]) -> None:
    *layers, head = weights
    for weight in layers:
        ops.linear(inputs[weight.in_features], weight)
    ops.linear(inputs[head.in_features], head, out_dtype="float32")
