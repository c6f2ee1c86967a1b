"""Attention over a paged key/value cache."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fdserve.ops import gpu
from fdserve.ops.library import on_gpu, run
from fdserve.ops.memory import mapped

if TYPE_CHECKING:
    from paddle import Tensor

BLOCK_MULTIPLE = 16
"""A block holds a multiple of this many tokens."""


def kv_cache_shape(
    num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: str = "float32"
) -> list[int]:
    """The shape of a layer's key cache and of its value cache; the order within a block is opaque.

    An "int8" cache holds bytes: head_dim rounded up to a multiple of 16, and a float32 scale, for each token and head.
    """
    if block_size <= 0 or block_size % BLOCK_MULTIPLE:
        raise ValueError(f"block_size must be a multiple of {BLOCK_MULTIPLE}, not {block_size}")
    return [num_blocks, num_kv_heads, block_size, _elements(head_dim, dtype)]


def _elements(head_dim: int, dtype: str) -> int:
    return -(-head_dim // 16) * 16 + 4 if dtype == "int8" else head_dim


def new_kv_cache(
    num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: str
) -> tuple[Tensor, Tensor]:
    """Zeroed (keys, values) of one layer; `dtype` is D, or "int8" for bytes with a scale for each token and head.

    Takes no memory until it is written: pages come as they are touched. Raises MemoryError where the system grants
    none.
    """
    import paddle

    shape = kv_cache_shape(num_blocks, num_kv_heads, block_size, head_dim, dtype)
    if on_gpu():
        return gpu.new_kv_cache(shape, dtype)
    # A view of int16 as bfloat16, because NumPy has no such dtype.
    storage = np.dtype({"bfloat16": "int16", "float32": "float32", "int8": "uint8"}[dtype])
    view = "uint8" if dtype == "int8" else dtype
    size = math.prod(shape) * storage.itemsize
    keys, values = (
        paddle.from_dlpack(np.frombuffer(mapped(size), storage).reshape(shape)).view(view) for _ in range(2)
    )
    return keys, values


def kv_bytes_per_token(num_kv_heads: int, head_dim: int, dtype: str) -> int:
    """Bytes one token takes in the two caches of one layer."""
    return 2 * num_kv_heads * _elements(head_dim, dtype) * {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1}[dtype]


def attention(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rope: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    max_query_len: int = 0,
    longest: int = 0,
) -> Tensor:
    """Rotate queries and keys, store keys and values, attend causally: any mix of prefill chunks and decodes.

    The keys and values of all new tokens of the call are stored before any query is answered, so a sequence
    may read blocks that another sequence of the same call fills. Softmax in float32, scaled by
    head_dim**-0.5.

    Args:
        qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim] D, columns [all Q | all K | all V]; head_dim even,
        at most 256.
        k_cache, v_cache: one layer's cache from `new_kv_cache`, of D or bytes, changed in place.
        rope: [T, head_dim] float32, the cosines of each token's position in the first half of the columns,
        the sines
            in the second; the pairs rotated are adjacent, (x[2i], x[2i+1]).
        block_tables: int32 [S, B]; position p of sequence s is in slot p % block_size of block
            block_tables[s][p // block_size]. Entries past a sequence's end are not read.
        query_starts: int32 [S + 1]; the new tokens of sequence s are rows query_starts[s] to query_starts[s +
        1].
        context_lens: int32 [S], how many tokens of the sequence were in the cache before.
        max_query_len, longest: the most new tokens of a sequence, and the most tokens of one. Of use on a GPU only,
            whose host has to know them without looking at the tensors.

    Returns:
        [T, num_heads * head_dim] D.
    """
    sizes = (max_query_len, longest) if on_gpu() else ()
    return run(
        "attention",
        qkv, k_cache, v_cache, rope, block_tables, query_starts, context_lens,
        num_heads, num_kv_heads, head_dim, block_size, *sizes,
    )[0]  # fmt: skip
