"""The runner: a rank's shard of the model, its KV cache and its rows, stepped by plans."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fdserve import ops
from fdserve.errors import StartupError
from fdserve.executor.wire import Load, Masks, Plan, Ready, StepResult
from fdserve.models.config import ModelConfig, read_config
from fdserve.models.layers import ForwardBatch
from fdserve.models.loader import load_model, weight_format
from fdserve.models.parallel import identity
from fdserve.worker.batch import Batch, accept, assemble
from fdserve.worker.collectives import Collectives
from fdserve.worker.device import check_formats, select_device
from fdserve.worker.graphs import DecodeGraphs, record_cuda_graph
from fdserve.worker.group import gpu_number
from fdserve.worker.memory import cache_blocks, check_weights
from fdserve.worker.prompt import PromptLogprobs, prompt_logprobs
from fdserve.worker.rows import Ints, Rows
from fdserve.worker.sampler import Sampled, Sampler

if TYPE_CHECKING:
    from paddle import Tensor

Progress = Callable[[str, int, int], None]


class Runner:
    """Loads on creation, `step` by `step` afterwards. Raises StartupError if the checkpoint or memory does not do."""

    def __init__(self, load: Load, progress: Progress) -> None:
        directory = Path(load.directory)
        self.config = read_config(directory)
        select_device(load.device, gpu_number())
        self.dtype = _resolve_dtype(load.dtype, self.config)
        kv_dtype = _resolve_kv_dtype(load.kv_cache_dtype, self.dtype)
        if ops.on_gpu():
            check_formats(self.dtype, load.quantization, kv_dtype)
        elif load.num_threads > 0:
            ops.set_num_threads(load.num_threads)
        quantization = None if load.quantization == "none" else load.quantization
        self.format = format = weight_format(directory, self.config, self.dtype, quantization)
        check_weights(load, self.config, format)
        collectives = Collectives(load) if load.world_size > 1 else None
        self._sample_op = collectives.sample if collectives else ops.sample
        self.model = load_model(
            directory,
            self.config,
            rank=load.rank,
            world_size=load.world_size,
            dtype=self.dtype,
            quantization=quantization,
            all_reduce=collectives.all_reduce if collectives else identity,
            shared=collectives.shared if collectives else None,
            progress=lambda done, total: progress("weights", done, total),
        )
        bytes_per_block = self.model.kv_bytes_per_block(load.block_size, kv_dtype)
        num_blocks = cache_blocks(load, self.config, format, bytes_per_block)
        if collectives:
            num_blocks = collectives.least(num_blocks)
        self.ready = Ready(num_blocks, kv_dtype, num_blocks * bytes_per_block)
        max_model_len = min(load.max_model_len or self.config.max_position_embeddings, num_blocks * load.block_size)
        recorded = ops.on_gpu() and collectives is None
        self._graphs: DecodeGraphs | None = None
        try:
            self.caches = self.model.new_caches(num_blocks + recorded, load.block_size, kv_dtype)  # one to spare
            if recorded:
                sizes = {"max_num_seqs": load.max_num_seqs, "max_model_len": max_model_len, "spare_block": num_blocks}
                self._graphs = DecodeGraphs(self.model, self.caches, record=record_cuda_graph, **sizes)
        except MemoryError as error:
            raise StartupError(f"No KV cache of {num_blocks} blocks fits the memory: {error}.") from error
        self.rows = Rows(load.max_num_seqs, max_model_len, load.block_size, self.config.vocab_size)
        self._sampler = Sampler(self.rows, self.config.vocab_size, self._sample_op)

    def step(self, plan: Plan, receive_masks: Callable[[], Masks]) -> StepResult:
        """Execute one plan. `receive_masks` is called before sampling if the plan has masked rows, for every frame."""
        started = time.perf_counter()
        waited = 0.0
        self.rows.take_changes(plan)
        batch = assemble(self.rows, plan)
        logits, prompt = self._forward(batch)
        masks: dict[int, bytes] = {}
        if plan.masked_rows:
            waiting = time.perf_counter()
            more = True
            while more:
                received = receive_masks()
                masks.update(zip(received.rows, received.masks, strict=True))
                more = received.more
            waited = time.perf_counter() - waiting
        sampled = self._sample(batch, logits, masks) if logits is not None else None
        return _result(plan.step, sampled, prompt, time.perf_counter() - started - waited)

    def _forward(self, batch: Batch) -> tuple[Tensor | None, PromptLogprobs | None]:
        """The logits of what samples, and what a prompt asks for; None where there is nothing of it."""
        logits = None if self._graphs is None else self._graphs.logits(batch)
        if logits is not None:
            return logits, None
        count = len(batch.sample_rows)
        if not len(batch.prompt_indices):
            logits = self.model.forward(self._forward_batch(batch, batch.sample_indices), self.caches)
            return logits if count else None, None
        wanted = np.concatenate([batch.sample_indices, batch.prompt_indices])
        hidden = self.model.hidden(self._forward_batch(batch, wanted), self.caches)
        return self.model.logits(hidden[:count]) if count else None, self._prompt_logprobs(batch, hidden[count:])

    def _forward_batch(self, batch: Batch, wanted: Ints) -> ForwardBatch:
        rope = self.model.rope_table(batch.positions)
        return ForwardBatch(batch.token_ids, rope, batch.query_starts, batch.context_lens, batch.block_tables, wanted)

    def _sample(self, batch: Batch, logits: Tensor, masks: dict[int, bytes]) -> Sampled:
        sampled = self._sampler.sample(batch.sample_rows, batch.sample_lens, logits, masks)
        if batch.sample_counts is None:
            self.rows.append(batch.sample_rows, sampled.token_ids)
            return sampled
        return sampled.select(*accept(self.rows, batch, batch.sample_counts, sampled.token_ids))

    def _prompt_logprobs(self, batch: Batch, hidden: Tensor) -> PromptLogprobs:
        targets, num_top = batch.prompt_targets, batch.prompt_num_top
        return prompt_logprobs(hidden, self.model.logits, targets, num_top, self.config.vocab_size, self._sample_op)


def _result(step: int, sampled: Sampled | None, prompt: PromptLogprobs | None, seconds: float) -> StepResult:
    parts: dict[str, Any] = {}
    if sampled is not None and sampled.counts is not None:
        parts["counts"] = sampled.counts.tobytes()
    if sampled is not None and sampled.logprobs is not None:
        assert sampled.top_ids is not None
        assert sampled.top_logprobs is not None
        parts |= {
            "num_top": sampled.top_ids.shape[1],
            "logprobs": sampled.logprobs.tobytes(),
            "top_ids": sampled.top_ids.tobytes(),
            "top_logprobs": sampled.top_logprobs.tobytes(),
        }
    if prompt is not None:
        parts |= {
            "prompt_num_top": prompt.top_ids.shape[1],
            "prompt_logprobs": prompt.logprobs.tobytes(),
            "prompt_top_ids": prompt.top_ids.tobytes(),
            "prompt_top_logprobs": prompt.top_logprobs.tobytes(),
        }
    return StepResult(step, sampled.token_ids.tobytes() if sampled else b"", seconds=seconds, **parts)


def _resolve_dtype(asked: str, config: ModelConfig) -> str:
    if asked == "auto":
        return "float32" if config.dtype == "float32" else ops.compute_dtype()
    if asked == "float16" and not ops.on_gpu():
        raise StartupError("--dtype float16 needs a GPU; use float32, bfloat16 or auto here.")
    if asked == "bfloat16" and ops.compute_dtype() != "bfloat16":
        raise StartupError("--dtype bfloat16 needs a processor with AVX512-BF16; use float32 or auto here.")
    return asked


def _resolve_kv_dtype(asked: str, dtype: str) -> str:
    if asked == "bfloat16" and dtype != asked:
        raise StartupError(f"--kv-cache-dtype bfloat16 needs computation in bfloat16, and here it is in {dtype}.")
    return dtype if asked == "auto" else asked
