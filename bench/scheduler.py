"""`python -m bench scheduler`: what a step costs before and after the ranks compute: planning and batch assembly.

    python -m bench scheduler --running 256 --waiting 0 10000

Plans and updates go through the real scheduler, and plans through real frames into the rows of a worker; no model
runs. Each part is set against the least that Python or NumPy need to make what it makes, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import describe
from fdserve.engine.request import Request, SamplingParams, TokenDelta
from fdserve.engine.results import Sampled
from fdserve.engine.scheduler import Scheduler
from fdserve.executor.wire import HEADER, Plan, StepResult, decode_to_rank, encode_frame
from fdserve.worker.batch import assemble
from fdserve.worker.rows import Rows

BLOCK_SIZE, VOCAB_SIZE = 64, 103424
OUTPUT_LEN = 100_000
"""Nobody ends while it is measured."""


@dataclass(frozen=True)
class Part:
    """The median time of a part of a step, and of the least that makes the same; both in seconds."""

    part: str
    waiting: int
    seconds: float
    p99: float
    floor: float

    def __str__(self) -> str:
        times = f"{1e6 * self.seconds:9.1f} us {1e6 * self.p99:9.1f} us {1e6 * self.floor:9.1f} us"
        return f"{self.part:28} {self.waiting:8} {times} {self.floor / self.seconds:9.0%}"


HEADING = f"{'part':28} {'waiting':>8} {'median':>12} {'p99':>12} {'floor':>12} {'of floor':>9}"


class Loaded:
    """A scheduler with so many sequences that decode, and others behind them that find no row."""

    def __init__(self, running: int, waiting: int, context: int, generator: random.Random) -> None:
        length = context + 4096
        self.rows = Rows(running, length, BLOCK_SIZE, VOCAB_SIZE)
        self.scheduler = Scheduler(
            num_blocks=running * (-(-length // BLOCK_SIZE) + 1),
            block_size=BLOCK_SIZE,
            max_num_seqs=running,
            max_num_batched_tokens=max(2048, running),
            max_model_len=length,
        )
        for number in range(running + waiting):
            # Those that wait have prompts, too, but the same one: a step must not look at them.
            prompt = generator.choices(range(10, 1000), k=context) if number < running else [10] * 16
            params = SamplingParams(max_tokens=OUTPUT_LEN, seed=number)
            self.scheduler.add(Request(id=str(number), prompt=prompt, params=params))
        while any(sequence.remaining > 1 for sequence in self.scheduler.running) or not self.scheduler.running:
            self.step()

    def step(self) -> dict[str, float]:
        """One step; the seconds of each of its parts."""
        began = time.perf_counter()
        plan = self.scheduler.schedule()
        planned = time.perf_counter()
        assert plan is not None
        frame = encode_frame(plan)
        encoded = time.perf_counter()
        received = decode_to_rank(frame[HEADER.size :])
        assert isinstance(received, Plan)
        decoded = time.perf_counter()
        self.rows.take_changes(received)
        batch = assemble(self.rows, received)
        assembled = time.perf_counter()
        tokens = np.full(len(batch.sample_rows), 7, np.int32)
        self.rows.append(batch.sample_rows, tokens)
        result = Sampled(StepResult(plan.step, tokens.tobytes()))
        sampled = time.perf_counter()
        self.scheduler.update(result)
        return {
            "schedule": planned - began,
            "encode the plan": encoded - planned,
            "decode the plan": decoded - encoded,
            "assemble the batch": assembled - decoded,
            "update": time.perf_counter() - sampled,
        }


def floors(running: int, context: int) -> dict[str, float]:
    """The least that makes what each part makes, for `running` rows, in seconds."""
    numbers = list(range(running))
    token_ids = array("i", numbers)
    tables = np.zeros((running, -(-(context + 4096) // BLOCK_SIZE)), np.int32)
    ids, width = np.arange(running, dtype=np.int32), context // BLOCK_SIZE
    plan = Plan(1, [], [], numbers, [1] * running)
    frame = encode_frame(plan)[HEADER.size :]

    def plan_lists() -> Any:
        rows, counts = [], []
        for number in numbers:
            rows.append(number)
            counts.append(1)
        return Plan(1, [], [], rows, counts)

    def deltas() -> Any:
        return [(number, TokenDelta([token])) for number, token in zip(numbers, token_ids, strict=True)]

    def gather() -> Any:
        return np.array(numbers, np.int32), tables[ids, :width]

    calls: dict[str, Callable[[], Any]] = {
        "schedule": plan_lists,
        "update": deltas,
        "encode the plan": lambda: encode_frame(plan),
        "decode the plan": lambda: decode_to_rank(frame),
        "assemble the batch": gather,
    }
    return {name: statistics.median(timed(call) for _ in range(200)) for name, call in calls.items()}


def timed(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(running: int, waiting: int, context: int, steps: int) -> list[Part]:
    """The parts of `steps` steps."""
    loaded = Loaded(running, waiting, context, random.Random(0))
    spent = [loaded.step() for _ in range(steps)]
    least = floors(running, context)
    parts = []
    for name in ("schedule", "update", "encode the plan", "decode the plan", "assemble the batch"):
        values = np.array([step[name] for step in spent])
        parts.append(Part(name, waiting, float(np.median(values)), float(np.percentile(values, 99)), least[name]))
    both = np.array([step["schedule"] + step["update"] for step in spent])
    floor = least["schedule"] + least["update"]
    return [Part("schedule + update", waiting, float(np.median(both)), float(np.percentile(both, 99)), floor), *parts]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench scheduler", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--running", type=int, default=256, help="sequences that decode")
    parser.add_argument("--waiting", type=int, nargs="+", default=[0, 10_000], help="requests that find no row")
    parser.add_argument("--context", type=int, default=512, help="tokens of each at first")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(argv)
    if not 0 < options.steps < 4000:
        parser.error("--steps must be between 1 and 3999")
    print(describe(), f"{options.running} sequences decode after {options.context} tokens", HEADING, sep="\n")
    measured = []
    for waiting in options.waiting:
        for part in measure(options.running, waiting, options.context, options.steps):
            print(part, flush=True)
            measured.append(asdict(part))
    if options.json:
        options.json.write_text(json.dumps({"machine": describe(), "running": options.running, "parts": measured}))
    return 0
