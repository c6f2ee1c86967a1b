"""`python -m tests.cuda.run`: the CUDA kernels' checks and timings, on a machine with a GPU and torch.

It needs no Paddle, and no nvcc either if it is given a library that `--build` has made on another machine. Kernels are
checked and timed in other processes, so that one that fails, hangs or ends its process says nothing of another; nothing
stops before all have been tried, or the time is up. It ends with status 1 if a check failed, and prints the timings as
a Markdown table for bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tests.cuda.cases import groups
from tests.cuda.outcomes import Outcome, do_all, run_all
from tests.cuda.report import HEADER, Figure, Limits

CHECKERS = 8  # processes of checks at a time: most of their time goes into references
LIMITS = "the limits"
TIMED = ("attention", "sampler", "rows", "experts", "quantized", "sampler of ranks")
CHECKING = 0.6  # of the time, so that some is left for timings


def main() -> int:
    """The exit status."""
    arguments = _arguments()
    if arguments.job:
        _do(arguments)
        return 0
    if arguments.build:
        from tests.cuda.build import build

        build(arguments.build, arguments.architecture)
        return 0
    # Of each process's references: threads that wait for each other's processors would take most of the time.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // CHECKERS)))
    started = time.monotonic()
    deadline = started + arguments.seconds
    with tempfile.TemporaryDirectory() as directory:
        library = arguments.library or Path(directory) / "launchers.so"
        jobs = partial(_command, library)
        device = run_all(jobs("device", ""), deadline=deadline)[-1]
        if device.error is not None:
            print(f"no device: {device.error}")
            return 2
        print(device.result["told"], flush=True)
        if arguments.library is None and not _build(library, device.result["architecture"]):
            return 2
        only = arguments.only or [*groups(), *TIMED]
        failures = _check(jobs, [group for group in groups() if group in only], started + arguments.seconds * CHECKING)
        timed = [] if arguments.no_timings else [group for group in TIMED if group in only]
        if timed:
            _time(jobs, timed, deadline)
        print(f"\n{failures} checks failed" if failures else "\nall checks passed")
    return int(failures > 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    # A library's name without a folder would be looked for where the system has its own.
    parser.add_argument(
        "--library", type=lambda name: Path(name).resolve(), help="the compiled launchers, instead of compiling them"
    )
    parser.add_argument("--build", type=Path, help="compile the launchers into this file and end; needs no GPU")
    parser.add_argument("--architecture", default="90a", help="what --build compiles for (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=540, help="after which all ends (default: %(default)s)")
    parser.add_argument("--no-timings", action="store_true", help="checks alone")
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="of the groups that the report names")
    parser.add_argument("--job", nargs=3, metavar=("KIND", "GROUP", "FIRST"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _command(library: Path, kind: str, group: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "tests.cuda.run", "--library", str(library), "--job", kind, group]


def _build(library: Path, architecture: str) -> bool:
    """Whether the launchers are compiled."""
    from tests.cuda.build import build

    if shutil.which("nvcc") is None:
        print("no nvcc: give --library a file that --build has made where there is one")
        return False
    started = time.monotonic()
    try:
        build(library, architecture)
    except subprocess.CalledProcessError as problem:
        print(f"a kernel does not compile: {problem}")
        return False
    print(f"compiled for sm_{architecture} in {time.monotonic() - started:.0f} s", flush=True)
    return True


def _check(jobs: Any, chosen: list[str], deadline: float) -> int:
    """How many checks failed, those that were not reached among them. Prints which."""

    def check(group: str) -> int:
        started = time.monotonic()
        outcomes = run_all(jobs("check", group), deadline=deadline, patience=60)
        names = [name for name, _ in groups()[group]]
        outcomes += [Outcome(name, error="not reached") for name in names[len(outcomes) :]]
        failed = [f"\n  FAILED {each.name}: {each.error}" for each in outcomes if each.error is not None]
        passed, took = len(outcomes) - len(failed), time.monotonic() - started
        print(f"{group}: {passed} of {len(outcomes)} checks passed, in {took:.0f} s{''.join(failed)}", flush=True)
        return len(failed)

    with ThreadPoolExecutor(CHECKERS) as pool:
        return sum(pool.map(check, chosen))


def _time(jobs: Any, chosen: list[str], deadline: float) -> None:
    """Print the table, line by line. One process measures all that does not end it: to start one takes many seconds."""
    limits: Limits | None = None

    def told(outcome: Outcome) -> None:
        nonlocal limits
        if outcome.name == LIMITS and outcome.error is None:
            limits = Limits(**outcome.result)
            print(
                f"\ncopy: {limits.copy / 1e9:.0f} GB/s read and written; bfloat16 matmul: "
                f"{limits.matmul / 1e12:.0f} TFLOP/s\n\n{HEADER}",
                flush=True,
            )
        elif outcome.error is not None:
            print(f"| {outcome.name} | failed: {outcome.error} | | | | |", flush=True)
        elif limits is None:
            print(f"| {outcome.name} | {1e6 * outcome.result['seconds']:.1f} us | | | | |", flush=True)
        else:
            print(Figure.of(outcome.result).row(outcome.name, limits), flush=True)

    run_all(jobs("time", ",".join(chosen)), deadline=deadline, patience=60, told=told)


def _do(arguments: argparse.Namespace) -> None:
    """Be the other process."""
    kind, group, first = arguments.job[0], arguments.job[1], int(arguments.job[2])
    if kind == "check":
        # A kernel's failure is then told by its own launch, not by whatever waits for it. CUDA looks when it starts.
        os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    from tests.cuda import gpu

    if kind == "device":
        do_all([("the device", gpu.described)], first, lambda: True)
        return
    device = gpu.Gpu(ctypes.CDLL(str(arguments.library)))
    if kind == "check":
        do_all([(name, partial(case, device)) for name, case in groups()[group]], first, device.is_usable)
        return
    from tests.cuda import timings

    def figures(measure: Callable[[gpu.Gpu], Figure]) -> Any:
        return measure(device).plain()

    jobs: list[tuple[str, Callable[[], Any]]] = [(LIMITS, lambda: vars(gpu.measured_limits()))]
    for each in group.split(","):
        jobs += [(name, partial(figures, measure)) for name, measure in timings.groups()[each]]
    do_all(jobs, first, device.is_usable)


if __name__ == "__main__":
    sys.exit(main())
