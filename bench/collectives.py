"""What ranks of one host exchange: the all-reduce in shared memory against Gloo's, and sampling, in one run.

python -m bench.collectives --ranks 2
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from paddle import Tensor

    from fdserve import ops

SHAPES = [(1, 1024), (32, 1024), (256, 1024)]
VOCAB = 103424
SLOT_BYTES = 4 << 20
SAMPLERS: dict[str, tuple[float, dict[str, float]]] = {
    "greedy": (2, {"temperature": 0.0}),
    "greedy with 20 logprobs": (2, {"temperature": 0.0, "num_top": 20}),
    "temperature 1": (2, {}),
    "top_p 0.8, nearly flat": (0.1, {"top_p": 0.8}),
    "top_p 0.95, nearly flat": (0.1, {"top_p": 0.95}),
    "top_p 0.8, spread": (2, {"top_p": 0.8}),
    "top_p 0.95, spread": (2, {"top_p": 0.95}),
    "top_p 0.8, peaked": (8, {"top_p": 0.8}),
    "top_p 0.95, peaked": (8, {"top_p": 0.95}),
    "top_p 0.8, spread, 5 logprobs": (2, {"top_p": 0.8, "num_top": 5}),
    "top_p 0.8, top_k 50, spread": (2, {"top_p": 0.8, "top_k": 50}),
    "min_p 0.05, spread": (2, {"min_p": 0.05}),
}
"""The deviation of the logits, and what `sampler` takes"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], help="that are sampled at once")
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--turns", type=int, default=15, help="of the ranks and of one rank, each in turn")
    options = parser.parse_args(arguments)
    from fdserve.ops.collectives import shared_bytes

    ranks: int = options.ranks
    memory = os.memfd_create("bench")
    os.ftruncate(memory, shared_bytes(ranks, SLOT_BYTES))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    settings = json.dumps({"memory": memory, "rows": options.rows, "vocab": options.vocab, "turns": options.turns})
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", "from bench.collectives import rank; rank()"],
            pass_fds=[memory],
            env={**os.environ, **gloo_variables(rank, ranks, port), "BENCH_RANK": settings, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]
    os.close(memory)
    return max(process.wait() for process in processes)


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
    settings = json.loads(os.environ["BENCH_RANK"])
    paddle.distributed.init_parallel_env()
    ops.set_num_threads(1)
    shared = ops.SharedMemory(settings["memory"], slot_bytes=SLOT_BYTES, rank=number, world_size=ranks)
    say: Callable[[str], None] = partial(print, flush=True) if number == 0 else lambda line: None
    say("| all-reduce, float32 | shared memory | Gloo |\n|---|---|---|")
    for shape in SHAPES:
        x = paddle.ones(shape)
        op = median(partial(shared.all_reduce, x))
        gloo = median(partial(paddle.distributed.all_reduce, x))
        say(f"| {list(shape)} | {op:.0f} µs | {gloo:.0f} µs |")
    say(f"\n| sampling | rows | {ranks} ranks | one rank with {ranks} threads | ratio |\n|---|---|---|---|---|")
    for name, (spread, asked) in SAMPLERS.items():
        for rows in settings["rows"]:
            together, alone = sampling_times(
                shared, number, ranks, rows, settings["vocab"], settings["turns"], spread, asked
            )
            ratio = together / (alone or 1)
            say(f"| {name} | {rows} | {together / 1000:.2f} ms | {alone / 1000:.2f} ms | {ratio:.2f} |")


def sampling_times(
    shared: ops.SharedMemory,
    number: int,
    ranks: int,
    rows: int,
    vocab: int,
    turns: int,
    spread: float,
    asked: dict[str, float],
) -> tuple[float, float]:
    """Median microseconds of a call by all ranks, and by rank 0 alone (0 on the others), which take turns."""
    import paddle

    from fdserve import ops

    logits = np.random.default_rng(1).normal(size=(rows, vocab)).astype(np.float32) * spread
    starts = ops.vocabulary_starts(vocab, ranks)
    part = paddle.to_tensor(np.ascontiguousarray(logits[:, starts[number] : starts[number + 1]]))
    joint = sampler(part, vocab, shared, **asked)
    alone = sampler(paddle.to_tensor(logits), vocab, None, **asked)
    times: list[list[float]] = [[], []]
    for _ in range(turns):
        # Whoever waits for rank 0 does it asleep; all are awake again when they begin.
        for _ in range(3):
            shared.all_reduce(paddle.zeros([1]))
        for _ in range(3):
            joint()
        times[0].append(median(joint, 1))
        if number == 0:
            ops.set_num_threads(ranks)
            for _ in range(3):  # until its threads have found a core each
                alone()
            times[1].append(median(alone, 1))
            ops.set_num_threads(1)
            time.sleep(0.001)  # until the other threads sleep
    return float(np.median(times[0])), float(np.median(times[1] or [0.0]))


def sampler(
    logits: Tensor,
    vocab: int,
    shared: ops.SharedMemory | None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    top_k: float = 0,
    num_top: float = -1,
) -> Callable[[], object]:
    """A call that samples every row; without logprobs if `num_top` is negative."""
    import paddle

    from fdserve import ops

    rows = logits.shape[0]
    floats = np.tile(np.array([temperature, top_p, min_p, 1, 0, 0], np.float32), (rows, 1))
    ints = np.array([[top_k, seed, 0, -1] for seed in range(rows)], np.int64)
    none, offsets = paddle.zeros([0], "int32"), paddle.zeros([rows + 1], "int32")
    arguments = [paddle.to_tensor(floats), paddle.to_tensor(ints), none, offsets, offsets[:rows], none]
    arguments += [paddle.zeros([0], "float32"), offsets]
    modes = paddle.full([rows], -1 if num_top < 0 else 0, "int32")
    top = max(int(num_top), 0)
    return lambda: ops.sample(logits, *arguments, vocab_size=vocab, num_top=top, logprob_modes=modes, shared=shared)


def median(call: Callable[[], object], count: int = 300) -> float:
    """Microseconds of a call, the ranks beginning together."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return float(np.median(times)) * 1e6


if __name__ == "__main__":
    sys.exit(main())
