"""What a kernel is set against, and the measurement that comes of it."""

from __future__ import annotations

from dataclasses import dataclass

from bench.machine import read_bandwidth, seconds
from bench.onednn import OneDNN, Unavailable
from fdserve import ops

PEAK_ROWS, PEAK_K, PEAK_N = 1024, 1024, 6144


@dataclass(frozen=True)
class Floors:
    """What this machine can do, by other people's code."""

    bandwidth: float
    """Bytes read a second, by all threads together."""
    onednn: OneDNN | None
    peak: float | None
    """Floating-point operations a second of oneDNN's product in the compute dtype; None where it was not measured."""
    budget: float
    """Seconds that a case may take for each of its calls."""


@dataclass(frozen=True)
class Case:
    """One measurement. Ratios are shares of a floor's speed; None where it was not measured or says nothing."""

    kernel: str
    case: str
    seconds: float
    rate: float
    unit: str
    of_memory: float | None = None
    of_onednn: float | None = None

    def __str__(self) -> str:
        memory, onednn = (f"{ratio:.0%}" if ratio is not None else "-" for ratio in (self.of_memory, self.of_onednn))
        time, rate = f"{1e6 * self.seconds:.1f} us", f"{self.rate:.1f} {self.unit}"
        return f"{self.kernel:22} {self.case:34} {time:>13} {rate:>16} {memory:>10} {onednn:>10}"


HEADING = f"{'kernel':22} {'case':34} {'time':>13} {'rate':>16} {'of memory':>10} {'of oneDNN':>10}"


def measure_floors(budget: float) -> tuple[Floors, list[str]]:
    """The floors, and lines that tell them."""
    bandwidth = read_bandwidth(ops.num_threads(), budget=2 * budget)
    lines = [f"reading memory: {bandwidth / 1e9:.1f} GB/s with {ops.num_threads()} threads"]
    try:
        onednn = OneDNN(ops.num_threads())
        with onednn.linear(PEAK_ROWS, PEAK_K, PEAK_N, ops.compute_dtype(), 4) as calls:
            took = seconds(lambda: [call() for call in calls], budget=2 * budget) / len(calls)
    except Unavailable as error:
        return Floors(bandwidth, None, None, budget), [*lines, f"oneDNN: not measured ({error})"]
    peak = 2 * PEAK_ROWS * PEAK_K * PEAK_N / took
    lines.append(f"oneDNN's {ops.compute_dtype()} product of {PEAK_ROWS} rows: {peak / 1e9:.0f} GFLOP/s")
    return Floors(bandwidth, onednn, peak, budget), lines
