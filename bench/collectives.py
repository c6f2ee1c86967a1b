"""What ranks of one host exchange: the all-reduce in shared memory against Gloo's, and sampling, in one run.

python -m bench.collectives --ranks 2
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

SHAPES = [(1, 1024), (32, 1024), (256, 1024)]
VOCAB = 103424
SLOT_BYTES = 4 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    ranks = parser.parse_args().ranks
    from fdserve.ops.collectives import shared_bytes

    memory = os.memfd_create("bench")
    os.ftruncate(memory, shared_bytes(ranks, SLOT_BYTES))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", "from bench.collectives import rank; rank()"],
            pass_fds=[memory],
            env={
                **os.environ,
                **gloo_variables(rank, ranks, port),
                "BENCH_MEMORY": str(memory),
                "OMP_NUM_THREADS": "1",
            },
            stderr=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]
    sys.exit(max(process.wait() for process in processes))


def gloo_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What Paddle's launcher would set."""
    endpoints = [f"127.0.0.1:{port + 1 + each}" for each in range(ranks)]
    return {
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_TRAINERS_NUM": str(ranks),
        "PADDLE_MASTER": f"127.0.0.1:{port}",
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
        "PADDLE_DISTRI_BACKEND": "gloo",
    }


def rank() -> None:
    """One rank's part; rank 0 prints."""
    import paddle

    from fdserve import ops

    number, ranks = int(os.environ["PADDLE_TRAINER_ID"]), int(os.environ["PADDLE_TRAINERS_NUM"])
    paddle.distributed.init_parallel_env()
    ops.set_num_threads(1)
    shared = ops.SharedMemory(int(os.environ["BENCH_MEMORY"]), slot_bytes=SLOT_BYTES, rank=number, world_size=ranks)
    say = print if number == 0 else lambda *_, **__: None
    say("| all-reduce, float32 | shared memory | Gloo |\n|---|---|---|")
    for shape in SHAPES:
        x = paddle.ones(shape)
        op = median(lambda x=x: shared.all_reduce(x))
        gloo = median(lambda x=x: paddle.distributed.all_reduce(x))
        say(f"| {list(shape)} | {op:.0f} µs | {gloo:.0f} µs |", flush=True)
    say(f"\n| sampling from [32, {VOCAB}] | {ranks} ranks | one rank with {ranks} threads |\n|---|---|---|")
    starts = ops.vocabulary_starts(VOCAB, ranks)
    for name, spread, settings in [
        ("greedy", 3.0, {"temperature": 0.0}),
        ("temperature 1", 3.0, {}),
        ("top_p 0.9, peaked", 8.0, {"top_p": 0.9}),
        ("top_p 0.9, flat", 0.1, {"top_p": 0.9}),
        ("greedy with 20 logprobs", 3.0, {"temperature": 0.0, "num_top": 20}),
    ]:
        logits = np.random.default_rng(1).normal(size=(32, VOCAB)).astype(np.float32) * spread
        part = paddle.to_tensor(np.ascontiguousarray(logits[:, starts[number] : starts[number + 1]]))
        together = median(sampler(part, shared, **settings), 30)
        alone = 0.0
        if number == 0:
            ops.set_num_threads(ranks)
            alone = median(sampler(paddle.to_tensor(logits), None, **settings), 30)
            ops.set_num_threads(1)
        shared.all_reduce(paddle.zeros([1]))  # the others wait here, asleep
        say(f"| {name} | {together / 1000:.2f} ms | {alone / 1000:.2f} ms |", flush=True)


def sampler(
    logits: object, shared: object, temperature: float = 1.0, top_p: float = 1.0, num_top: int = -1
) -> Callable[[], object]:
    """A call that samples every row."""
    import paddle

    from fdserve import ops

    floats = np.tile(np.array([temperature, top_p, 0, 1, 0, 0], np.float32), (32, 1))
    ints = np.array([[0, seed, 0, -1] for seed in range(32)], np.int64)
    none, offsets = paddle.zeros([0], "int32"), paddle.zeros([33], "int32")
    arguments = [paddle.to_tensor(floats), paddle.to_tensor(ints), none, offsets, offsets[:32], none]
    arguments += [paddle.zeros([0], "float32"), offsets]
    modes = paddle.full([32], -1 if num_top < 0 else 0, "int32")
    options = {"vocab_size": VOCAB, "num_top": max(num_top, 0), "logprob_modes": modes, "shared": shared}
    return lambda: ops.sample(logits, *arguments, **options)


def median(call: Callable[[], object], count: int = 300) -> float:
    """Microseconds of a call, the ranks beginning together."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return float(np.median(times)) * 1e6


if __name__ == "__main__":
    main()
