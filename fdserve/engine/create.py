"""Put an engine together from the settings: how many ranks, how large a cache, which limits."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

from fdserve.config import Config
from fdserve.engine.engine import Engine, Ranks
from fdserve.engine.machine import available_cores, available_memory
from fdserve.engine.scheduler import Scheduler
from fdserve.engine.speculation import Speculation
from fdserve.engine.step_log import StepLog
from fdserve.errors import StartupError
from fdserve.executor.cluster import Cluster, check_secret, read_cluster
from fdserve.executor.executor import open_executor
from fdserve.executor.fingerprint import take_fingerprint
from fdserve.executor.remote import RemoteRank, accept_ranks
from fdserve.executor.wire import Load, Loading, Ready
from fdserve.models.config import ModelConfig, check_world_size
from fdserve.ops.collectives import sampling_slot_bytes
from fdserve.ops.library import KERNELS_MISSING, kernels_path

logger = logging.getLogger("fdserve")

MAX_DEFAULT_CACHE_BYTES = 4 << 30
"""On a CPU the cache takes a quarter of the memory that is available unless told otherwise, and no more than this."""

MIN_LOAD_TIMEOUT = 60.0
"""Seconds without progress after which a loading rank is lost, where a step may not take that long."""


def create_engine(config: Config, directory: Path, model: ModelConfig) -> Engine:
    """An engine for the checkpoint in `directory`; `Engine.run` starts it. Raises StartupError for what cannot work."""
    if kernels_path() is None:
        raise StartupError(KERNELS_MISSING)
    cluster = read_cluster(os.environ)
    ranks = _number_of_ranks(config, cluster)
    local_ranks = cluster.local_size if cluster else ranks
    check_world_size(model, ranks)
    if config.max_model_len > model.max_position_embeddings:
        raise StartupError(
            f"--max-model-len {config.max_model_len} is more than the {model.max_position_embeddings} positions "
            "the model has."
        )
    available = available_memory()
    load = Load(
        directory=str(directory.resolve()),
        device=config.device,
        rank=0,
        world_size=ranks,
        dtype=config.dtype,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        block_size=config.block_size,
        num_blocks=config.num_gpu_blocks_override,
        kv_cache_bytes=config.kv_cache_bytes or 0,
        host_cache_bytes=min(available // 4, MAX_DEFAULT_CACHE_BYTES) // local_ranks,
        host_bytes=available // local_ranks,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        num_threads=config.num_threads or max(1, available_cores() // local_ranks),
        parent=os.getpid(),
    )

    # What the ranks exchange at a time: a step's activations, or what sampling asks for.
    activations = 4 * config.max_num_batched_tokens * model.hidden_size
    slot_bytes = max(activations, sampling_slot_bytes(model.vocab_size, ranks))

    timeout = max(config.step_timeout, MIN_LOAD_TIMEOUT)
    accept = _accept(config, cluster, directory, timeout) if cluster else None

    def open_ranks() -> AbstractAsyncContextManager[Ranks]:
        return open_executor(load, LoadingLog(), slot_bytes=slot_bytes, load_timeout=timeout, accept=accept)

    def make_scheduler(ready: Ready) -> Scheduler:
        capacity = ready.num_blocks * config.block_size
        max_model_len = min(config.max_model_len or model.max_position_embeddings, capacity)
        config.check_prefill(max_model_len)
        logger.info(
            "KV cache: %d blocks of %d tokens, %s tokens in %.0f MiB (%s); longest sequence %s tokens",
            ready.num_blocks, config.block_size, f"{capacity:,}", ready.kv_cache_bytes / 2**20, ready.dtype,
            f"{max_model_len:,}",
        )  # fmt: skip
        return Scheduler(
            num_blocks=ready.num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=max_model_len,
            enable_prefix_caching=config.enable_prefix_caching,
            enable_chunked_prefill=config.enable_chunked_prefill,
            speculation=Speculation(config.speculation) if config.speculation else None,
        )

    return Engine(
        open_ranks,
        make_scheduler,
        max_requests=config.max_concurrency,
        step_timeout=config.step_timeout,
        step_log=StepLog(Path(config.step_log)) if config.step_log else None,
    )


def _accept(
    config: Config, cluster: Cluster, directory: Path, timeout: float
) -> Callable[[], Awaitable[list[RemoteRank]]]:
    """What waits for the ranks on other hosts, and lets in those that serve the same."""
    fingerprint = take_fingerprint(
        directory, dtype=config.dtype, quantization=config.quantization, kv_cache_dtype=config.kv_cache_dtype
    )
    return partial(accept_ranks, cluster, config.cluster_secret, fingerprint, timeout)


def _number_of_ranks(config: Config, cluster: Cluster | None) -> int:
    if cluster is None:
        return config.tensor_parallel_size
    check_secret(config.cluster_secret)
    if config.tensor_parallel_size not in (1, cluster.world_size):
        raise StartupError(
            f"--tensor-parallel-size is {config.tensor_parallel_size}, but {cluster.world_size} processes were "
            "launched: a rank is a process."
        )
    return cluster.world_size


class LoadingLog:
    """Logs what the ranks load, and how far they are at most once a second."""

    def __init__(self) -> None:
        self._what = ""
        self._logged = 0.0

    def __call__(self, progress: Loading) -> None:
        now = time.monotonic()
        if progress.what != self._what:
            self._what, self._logged = progress.what, now
            logger.info("loading %s", progress.what)
        elif now - self._logged >= 1.0:
            self._logged = now
            logger.info("loading %s: %d %%", progress.what, 100 * progress.done // max(progress.total, 1))
