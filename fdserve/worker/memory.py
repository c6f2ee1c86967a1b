"""What a rank's memory is enough for: first the weights, then the KV cache."""

from __future__ import annotations

import os

from fdserve import ops
from fdserve.errors import StartupError
from fdserve.executor.wire import Load
from fdserve.models.config import ModelConfig
from fdserve.models.footprint import weight_bytes
from fdserve.worker import device


def check_weights(load: Load, config: ModelConfig, format: str) -> None:
    """Raise StartupError if weights in `format` are more than the memory, before minutes are spent on reading them."""
    needed = weight_bytes(config, load.world_size, format)
    available = device.free_gpu_bytes() if ops.on_gpu() else load.host_bytes or needed
    if needed <= available:
        return
    smaller = {name: weight_bytes(config, load.world_size, name) for name in ("wint8", "wint4")}
    fitting = [f"--quantization {name} ({_gigabytes(size)})" for name, size in smaller.items() if size <= available]
    advice = " or ".join([*fitting, "more memory"])
    raise StartupError(
        f"The weights of a rank take {_gigabytes(needed)} in {format}, and it can have {_gigabytes(available)}: "
        f"give {advice}."
    )


def cache_blocks(load: Load, config: ModelConfig, format: str, bytes_per_block: int) -> int:
    """As many as asked for, or as the memory holds, but no more than all rows at full length could use.

    Raises:
        StartupError: too few, or more than the machine's memory.
    """
    longest = load.max_model_len or config.max_position_embeddings
    blocks_per_row = -(-longest // load.block_size)
    room = load.kv_cache_bytes or _room(load, weight_bytes(config, load.world_size, format))
    num_blocks = load.num_blocks or min(room // bytes_per_block, load.max_num_seqs * blocks_per_row)
    if load.max_model_len > num_blocks * load.block_size:
        raise StartupError(
            f"The KV cache holds {num_blocks * load.block_size} tokens, fewer than --max-model-len "
            f"{load.max_model_len}: give it more with --kv-cache-memory, or lower --max-model-len."
        )
    if num_blocks < 2:
        raise StartupError(
            "The KV cache would hold less than two blocks: give it more with --kv-cache-memory or "
            "--num-gpu-blocks-override."
        )
    # The system would grant it layer by layer, and kill the rank once it is written.
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not ops.on_gpu() and num_blocks * bytes_per_block > memory:
        raise StartupError(
            f"A KV cache of {num_blocks * bytes_per_block >> 20} MiB is more than the machine's memory of "
            f"{memory >> 20} MiB: lower --kv-cache-memory or --num-gpu-blocks-override."
        )
    return num_blocks


def _room(load: Load, weights: int) -> int:
    """What the cache may take: of a GPU all that is left, of a host as it is set, but half of what is left at most."""
    if ops.on_gpu():
        return device.free_gpu_bytes()
    if not load.host_bytes:
        return load.host_cache_bytes
    return min(load.host_cache_bytes, max(0, load.host_bytes - weights) // 2)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
