"""`python -m bench soak`: a mixed load for a long time, and whether the server's memory grows under it.

    python -m fdserve --port 8188 --num-gpu-blocks-override 128 --enable-logprob &
    python -m bench soak --port 8188 --pid $! --duration 3600

The load mixes streams and whole answers, several choices, stop strings, logprobs, tools, JSON schemas and requests that
are refused; a quarter of the streams are left early. The resident memory of the process and of all that descend from it
is sampled; after --settle seconds a line is laid through each. A cache that is not full yet looks like growth: give the
server a small one.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.machine import describe
from bench.memory import MemoryLog, Trace, growth
from bench.options import base_url
from bench.soak_load import KINDS, draw, exchange

MAX_UNDER_WAY = 16
KIB_PER_MINUTE = 60 / 1024


class Load:
    """Random requests, in threads of their own; `outcomes` are (kind, what became of it). A context manager, which
    waits for those under way."""

    def __init__(self, url: str, seed: int) -> None:
        self.outcomes: list[tuple[str, str]] = []
        self._url = url
        self._generator = random.Random(seed)
        self._pool = ThreadPoolExecutor(MAX_UNDER_WAY)
        self._free = threading.Semaphore(MAX_UNDER_WAY)

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def pause(self, rate: float) -> float:
        """Seconds until the next request, at `rate` a second on average."""
        return self._generator.expovariate(rate)

    def send(self) -> None:
        """Begin one more request, unless MAX_UNDER_WAY are not answered yet."""
        if self._free.acquire(blocking=False):
            self._pool.submit(self._request, *draw(self._generator))

    def _request(self, kind: str, fields: dict[str, object], leave: bool) -> None:
        try:
            status = exchange(self._url, KINDS[kind][0], fields, leave=leave)
            outcome = "left" if leave and status == 200 else str(status)
        except (OSError, ValueError, http.client.HTTPException) as error:
            outcome = f"{type(error).__name__}: {error}"
        self.outcomes.append((kind, outcome))
        self._free.release()

    def failures(self) -> dict[str, int]:
        """What went otherwise than it should, and how often."""
        return {
            f"{kind}: {outcome}": count
            for (kind, outcome), count in sorted(Counter(self.outcomes).items())
            if outcome not in (("400",) if kind == "refused" else ("200", "left"))
        }


def soak(load: Load, log: MemoryLog, *, duration: float, rate: float, every: float) -> None:
    """Load the server for `duration` seconds, sampling memory `every` so many. OSError once the server has ended."""
    began = shown = now = time.monotonic()
    due, sample = now + load.pause(rate), now + every
    while now < began + duration:
        time.sleep(max(0.0, min(due, sample) - now))
        now = time.monotonic()
        if now >= due:
            load.send()
            due = now + load.pause(rate)
        if now >= sample:
            log.sample()
            sample = now + every
        if now - shown >= 60:
            shown = now
            sizes = ", ".join(f"{trace.pid}: {trace.resident[-1] >> 10} KiB" for trace in log.traces.values())
            print(f"{now - began:.0f} s, {len(load.outcomes)} requests; {sizes}", file=sys.stderr, flush=True)


def trace_line(trace: Trace, settle: float, end: float) -> str:
    """A process' memory at the start, after `settle` seconds and at the end, and its slope in between."""
    after = [index for index, at in enumerate(trace.times) if at >= settle]
    ended = " (ended early)" if trace.times[-1] < end else ""
    if not after:
        return f"{trace.pid:>8} ended before it had settled: {trace.command}"
    sizes = [trace.resident[index] >> 10 for index in (0, after[0], -1)]
    line = growth([trace.times[index] for index in after], [trace.resident[index] for index in after])
    slope = f"{'?':>20}"
    if line is not None:
        slope = f"{line.slope * KIB_PER_MINUTE:>+10.2f} ± {line.confidence * KIB_PER_MINUTE:<7.2f}"
    return f"{trace.pid:>8}{sizes[0]:>12}{sizes[1]:>12}{sizes[2]:>12}  {slope}  {trace.command}{ended}"


def main(argv: list[str] | None = None) -> int:
    """1 if a request failed or a process ended."""
    parser = argparse.ArgumentParser(
        prog="python -m bench soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", help="such as http://127.0.0.1:8188; instead of --host and --port")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8188)
    parser.add_argument("--pid", type=int, required=True, help="of the server; its children are found")
    parser.add_argument("--duration", type=float, default=3600.0, metavar="SECONDS")
    parser.add_argument("--settle", type=float, default=300.0, metavar="SECONDS", help="before growth counts")
    parser.add_argument("--request-rate", type=float, default=2.0, metavar="PER_SECOND")
    parser.add_argument("--sample-every", type=float, default=5.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there, too")
    options = parser.parse_args(argv)
    url = base_url(options)
    try:
        log = MemoryLog(options.pid)
        with Load(url, options.seed) as load:
            soak(load, log, duration=options.duration, rate=options.request_rate, every=options.sample_every)
    except OSError as error:
        print(f"bench soak: the server's process {options.pid}: {error}", file=sys.stderr)
        return 1
    end = max(trace.times[-1] for trace in log.traces.values())
    print(describe(), f"{len(load.outcomes)} requests in {end:.0f} s", sep="\n")
    print(f"{'resident':>8}{'first KiB':>12}{'settled':>12}{'last':>12}  {'KiB/min (95 %)':>20}  process")
    for trace in log.traces.values():
        print(trace_line(trace, options.settle, end))
    failures = load.failures()
    for what, count in failures.items():
        print(f"{count} x {what}")
    if options.json:
        kinds = {f"{kind}: {outcome}": count for (kind, outcome), count in Counter(load.outcomes).items()}
        content = {"machine": describe(), "requests": kinds, "traces": [vars(trace) for trace in log.traces.values()]}
        options.json.write_text(json.dumps(content))
    return 1 if failures or any(trace.times[-1] < end for trace in log.traces.values()) else 0
