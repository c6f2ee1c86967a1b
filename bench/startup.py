"""`python -m bench startup`: from the start of the process to a /health of 200, by phases, and the memory then.

    python -m bench startup --model /tmp/random-0.3b --runs 5 -- --max-num-seqs 64

What follows -- goes to `python -m fdserve`. The floor, measured in the same run: importing Paddle in a bare Python, and
reading the weights once at the bandwidth of memory; the weights are in the page cache, as they were read before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.machine import describe, read_bandwidth
from bench.server_process import ServerProcess, free_port

DEMO = Path(__file__).parent.parent / "fdserve" / "demo" / "checkpoint"
PHASES = {
    "the API process listens": " listens on ",
    "a rank's Python runs": "loading paddle",
    "the rank imported paddle": "loading weights",
    "the weights are loaded": "KV cache: ",
}
"""What is reached, and what the log says then."""
SECOND = "{:8.2f} s"


def start_once(model: Path, extra: list[str]) -> dict[str, Any]:
    """Seconds after the start at which each phase was reached, "ready" the last; and memory then."""
    port = free_port()
    with ServerProcess(["-m", "fdserve", "--model", str(model), "--port", str(port), *extra], port) as server:
        ready = server.wait_healthy()
        phases = {}
        for name, mark in PHASES.items():
            times = [at for at, line in server.lines if mark in line]
            if times:
                # What was logged since the last look at the log has the time of the next.
                phases[name] = min(times[0], ready) - server.began
        return {"phases": {**phases, "ready": ready - server.began}, "memory": server.memory()}


def import_seconds() -> float:
    """How long a bare Python takes to import Paddle, its own start included."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", "import paddle"], check=True, capture_output=True)
    return time.perf_counter() - began


def weight_bytes(model: Path) -> int:
    """Read all weights, so that they are in the page cache; how many bytes they are."""
    size = 0
    for path in model.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while data := file.read(1 << 22):
                size += len(data)
    return size


def main(argv: list[str] | None = None) -> int:
    """1 if the server does not start."""
    parser = argparse.ArgumentParser(
        prog="python -m bench startup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEMO, metavar="DIR", help="default: the bundled demo model")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("arguments", nargs="*", help="of the server, after --")
    options = parser.parse_args(argv)
    size = weight_bytes(options.model)
    starts, imports = [], []
    try:
        for _ in range(options.runs):
            starts.append(start_once(options.model, options.arguments))
            imports.append(import_seconds())
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    reading = size / read_bandwidth(len(os.sched_getaffinity(0)))
    print(describe(), f"{options.model}: {size / 1e6:.0f} MB of weights; medians of {options.runs} starts", sep="\n")
    for name in starts[0]["phases"]:
        print(f"{name:32}", SECOND.format(statistics.median(start["phases"][name] for start in starts)))
    ready = statistics.median(start["phases"]["ready"] for start in starts)
    floor = statistics.median(imports) + reading
    print(f"{'floor: import paddle':32}", SECOND.format(statistics.median(imports)))
    print(f"{'floor: reading the weights':32}", SECOND.format(reading))
    print(f"{'ready / floor':32} {ready / floor:8.2f}")
    for name in starts[0]["memory"]:
        print(f"{name:32} {statistics.median(start['memory'][name] for start in starts) / 1e6:8.0f} MB")
    if options.json:
        content = {"machine": describe(), "imports": imports, "reading": reading, "starts": starts}
        options.json.write_text(json.dumps(content))
    return 0
