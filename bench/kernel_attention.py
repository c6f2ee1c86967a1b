"""Attention over the paged cache in ERNIE-4.5-0.3B's shape: decodes against memory, prefills against oneDNN."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import paddle

from bench.floors import Case, Floors
from bench.machine import CACHE_BYTES, seconds
from fdserve import ops
from fdserve.ops.reference import rope_table

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 16, 2, 128, 64
DECODES = [
    (batch, context)
    for batch in (1, 4, 16, 64)
    for context in (512, 2048, 8192, 32768)
    if batch * context <= 1 << 19  # half a gigabyte of keys and values
]
"""(sequences, tokens that each has in the cache)"""
PREFILLS = [(256, 0), (512, 0), (2048, 0), (512, 2048), (512, 32768)]
"""(new tokens, tokens in the cache)"""
MOST_COPIES = 256


class AttentionCalls:
    """Calls with `batch` sequences of `news` tokens after `context`; each reads another part of a cache that was
    written, so that keys and values come from memory."""

    def __init__(self, batch: int, news: int, context: int, dtype: str, kv_dtype: str) -> None:
        self.kv_bytes = batch * (context + news) * ops.kv_bytes_per_token(KV_HEADS, HEAD_DIM, kv_dtype)
        blocks = -(-(context + news) // BLOCK_SIZE)
        self.copies = min(MOST_COPIES, max(1, CACHE_BYTES // self.kv_bytes))
        self._caches = ops.new_kv_cache(self.copies * batch * blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM, kv_dtype)
        for cache in self._caches:
            cache.fill_(0.5 if kv_dtype == dtype else 0)
        ids = np.arange(self.copies * batch * blocks, dtype=np.int32).reshape(self.copies, batch, blocks)
        self._tables = [paddle.to_tensor(table) for table in ids]
        positions = np.tile(np.arange(context, context + news), batch)
        self._qkv = paddle.randn([batch * news, (HEADS + 2 * KV_HEADS) * HEAD_DIM]).astype(dtype)
        self._rope = paddle.to_tensor(rope_table(positions, HEAD_DIM, 5e5))
        self._starts = paddle.to_tensor((np.arange(batch + 1) * news).astype(np.int32))
        self._lens = paddle.to_tensor(np.full(batch, context, np.int32))

    def run(self) -> None:
        """Each part once."""
        for table in self._tables:
            ops.attention(
                self._qkv, *self._caches, self._rope, table, self._starts, self._lens,
                num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, block_size=BLOCK_SIZE,
            )  # fmt: skip


def attention_cases(
    floors: Floors,
    *,
    dtypes: Sequence[str],
    decodes: Sequence[tuple[int, int]] = tuple(DECODES),
    prefills: Sequence[tuple[int, int]] = tuple(PREFILLS),
) -> Iterator[Case]:
    """Decodes by the bytes of keys and values a second, prefills by operations a second; with a cache of bytes, too."""
    for dtype in dtypes:
        kinds = ((f"attention {dtype}", dtype), ("  cache of int8", "int8"))
        for (batch, context), (kernel, kv_dtype) in product(decodes, kinds):
            calls = AttentionCalls(batch, 1, context, dtype, kv_dtype)
            took = _seconds(calls.run, floors) / calls.copies
            moved = calls.kv_bytes / took
            case = f"decode of {batch} after {context}"
            yield Case(kernel, case, took, moved / 1e9, "GB/s", of_memory=moved / floors.bandwidth)
        for (news, context), (kernel, kv_dtype) in product(prefills, kinds):
            calls = AttentionCalls(1, news, context, dtype, kv_dtype)
            took = _seconds(calls.run, floors) / calls.copies
            flops = 4 * HEADS * HEAD_DIM * (news * context + news * (news + 1) / 2) / took
            peak = floors.peak if dtype == ops.compute_dtype() else None
            case = f"prefill of {news} after {context}"
            ratio = flops / peak if peak else None
            yield Case(kernel, case, took, flops / 1e9, "GFLOP/s", of_onednn=ratio)


def _seconds(call: Callable[[], Any], floors: Floors) -> float:
    return seconds(call, budget=floors.budget)
