"""Speed of the CPU kernels against this machine's own limits: `python -m bench.kernels [linear attention sample]`.

A product of few rows is bounded by reading the weights once, one of many rows by the rate of multiply-adds. Every
figure is the best of its repeats (what else a machine does only slows it); the weights of a case rotate through
copies that together exceed the caches.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import paddle

from fdserve import ops
from fdserve.ops.reference import rope_table

SHAPES = [(1024, 2560), (2048, 1024), (1024, 6144), (3072, 1024), (1024, 103424)]
ROWS = [1, 4, 16, 64, 256, 1024]
CACHE_BYTES = 256 << 20


def seconds(call: Callable[[], Any], *, budget: float = 0.4) -> float:
    """The shortest time of a call, after one to warm up."""
    call()
    times: list[float] = []
    until = time.perf_counter() + budget
    while len(times) < 5 or time.perf_counter() < until:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def read_bandwidth() -> float:
    """Bytes a second at which as many threads as the ops use read memory together, by NumPy's reductions."""
    threads = ops.num_threads()
    parts = np.ones((threads, CACHE_BYTES // 8), np.uint64)
    with ThreadPoolExecutor(threads) as pool:
        return parts.nbytes / seconds(lambda: list(pool.map(np.bitwise_or.reduce, parts)), budget=1)


def bench_linear() -> None:
    bandwidth = read_bandwidth()
    print(f"reading memory: {bandwidth / 1e9:.1f} GB/s, {ops.num_threads()} threads")
    print(f"{'dtype':9} {'K':>5} {'N':>7} {'rows':>5} {'us':>9} {'GFLOP/s':>8} {'GB/s':>6} {'of memory':>9}")
    for dtype in dict.fromkeys([ops.compute_dtype(), "float32"]):
        for k, n in SHAPES:
            source = np.full((n, k), 0x3C00, np.uint16)
            size = n * k * (2 if dtype == "bfloat16" else 4)
            copies = [ops.pack_weight(source, dtype=dtype, in_out=False) for _ in range(max(1, CACHE_BYTES // size))]
            for rows in ROWS:
                x = paddle.ones([rows, k], dtype)
                took = seconds(lambda x=x, w=copies: [ops.linear(x, each) for each in w]) / len(copies)
                rate, moved = 2 * rows * k * n / took / 1e9, size / took
                print(
                    f"{dtype:9} {k:5} {n:7} {rows:5} {took * 1e6:9.1f} {rate:8.1f} {moved / 1e9:6.1f} "
                    f"{moved / bandwidth:9.0%}"
                )


def attention_call(news: int, contexts: list[int], dtype: str) -> Callable[[], Any]:
    """A call of ERNIE-4.5-0.3B's shape: 16 heads, 2 key/value heads of 128."""
    heads, kv_heads, size, block = 16, 2, 128, 64
    blocks = [-(-(context + news) // block) for context in contexts]
    k, v = ops.new_kv_cache(sum(blocks), kv_heads, block, size, dtype)
    tables = np.zeros((len(contexts), max(blocks)), np.int32)
    for row, count in enumerate(blocks):
        tables[row, :count] = sum(blocks[:row]) + np.arange(count)
    positions = np.concatenate([np.arange(context, context + news) for context in contexts])
    qkv = paddle.randn([len(positions), (heads + 2 * kv_heads) * size]).astype(dtype)
    rope = paddle.to_tensor(rope_table(positions, size, 5e5))
    starts = paddle.to_tensor((np.arange(len(contexts) + 1) * news).astype(np.int32))
    table, lens = paddle.to_tensor(tables), paddle.to_tensor(np.array(contexts, np.int32))
    return lambda: ops.attention(
        qkv, k, v, rope, table, starts, lens, num_heads=heads, num_kv_heads=kv_heads, head_dim=size, block_size=block
    )


def bench_attention() -> None:
    print(f"{'dtype':9} {'case':>24} {'us':>9} {'GFLOP/s':>8} {'GB/s':>6}")
    for dtype in dict.fromkeys([ops.compute_dtype(), "float32"]):
        for news, contexts in [
            (1, [128]), (1, [4096]), (1, [1024] * 16), (1, [32768]), (512, [0]), (2048, [0]), (256, [4096]),
        ]:  # fmt: skip
            took = seconds(attention_call(news, contexts, dtype))
            pairs = sum(news * context + news * (news + 1) / 2 for context in contexts)
            cache = sum(context + news for context in contexts) * ops.kv_bytes_per_token(2, 128, dtype)
            case = f"{len(contexts)} x {news} after {contexts[0]}"
            flops = 4 * pairs * 16 * 128
            print(f"{dtype:9} {case:>24} {took * 1e6:9.1f} {flops / took / 1e9:8.1f} {cache / took / 1e9:6.1f}")


def bench_sample() -> None:
    vocab, rows = 103424, 8
    print(f"{'case':>28} {'us a row':>9}")
    for spread in (2.0, 4.0):
        logits = paddle.randn([rows, vocab]) * spread
        for name, floats, top_k, top in [
            ("greedy", [0, 1, 0, 1, 0, 0], 0, 0),
            ("greedy, 5 logprobs", [0, 1, 0, 1, 0, 0], 0, 5),
            ("temperature 0.8", [0.8, 1, 0, 1, 0, 0], 0, 0),
            ("temperature 0.8, top_p 0.8", [0.8, 0.8, 0, 1, 0, 0], 0, 0),
            ("top_k 50, top_p 0.8", [0.8, 0.8, 0, 1, 0, 0], 50, 0),
            ("min_p 0.05", [0.8, 1, 0.05, 1, 0, 0], 0, 0),
        ]:
            empty, zeros = paddle.zeros([0], "int32"), paddle.zeros([rows + 1], "int32")
            args = (
                paddle.to_tensor(np.array([floats] * rows, np.float32)),
                paddle.to_tensor(np.array([[top_k, 1, row, -1] for row in range(rows)])),
                empty, zeros, zeros[:rows], empty, paddle.zeros([0], "float32"), zeros,
            )  # fmt: skip
            took = seconds(
                lambda logits=logits, args=args, top=top: ops.sample(logits, *args, vocab_size=vocab, num_top=top)
            )
            print(f"{name + f' (spread {spread:g})':>40} {took / rows * 1e6:9.1f}")


def main() -> None:
    benches = {"linear": bench_linear, "attention": bench_attention, "sample": bench_sample}
    for name in sys.argv[1:] or benches:
        benches[name]()


if __name__ == "__main__":
    main()
