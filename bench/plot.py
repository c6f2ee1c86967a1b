"""`python -m bench plot`: pictures of saved results, as SVG, PNG or PDF by the file's ending.

    python -m bench plot curves rates/*.json --out curves.svg
    python -m bench plot timeline run.json --out timeline.png

`curves` takes results of `serve` or `compare` at several loads and draws the latencies over the throughput, a line a
label. `timeline` takes one result saved with --save-detailed and draws each request's wait, prefill and tokens, and
below them how many tokens came when. Needs matplotlib: pip install 'fdserve[bench]'.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]
STEP_GAP_SECONDS = 0.001
"""Tokens that reach the client closer together than this are of one step."""


def read_results(paths: Sequence[Path]) -> list[Result]:
    """All results in the files. Raises ValueError if one holds none."""
    results: list[Result] = []
    for path in paths:
        content = json.loads(path.read_text())
        for result in content if isinstance(content, list) else [content]:
            if not isinstance(result, dict) or "output_throughput" not in result:
                raise ValueError(f"{path} holds no result of `python -m bench serve` or `compare`")
            results.append(result)
    return results


def load_of(result: Result) -> tuple[float, float]:
    """What orders a server's results along its curve."""
    return float(result["request_rate"]), float(result["max_concurrency"] or "inf")


def curve_points(results: Sequence[Result], figure: str) -> dict[str, list[tuple[float, float]]]:
    """For each label (output tokens/s, a latency) at each load, ascending; medians where a load was run repeatedly."""
    runs: dict[str, dict[tuple[float, float], list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        if figure in result:
            runs[result.get("label") or result["base_url"]][load_of(result)].append(result)
    return {
        label: [
            (statistics.median(r["output_throughput"] for r in each), statistics.median(r[figure] for r in each))
            for _, each in sorted(loads.items())
        ]
        for label, loads in runs.items()
    }


def draw_curves(results: Sequence[Result], figure: Figure) -> None:
    """Median and p99 of TTFT and ITL over the throughput."""
    for axes, name in zip(figure.subplots(1, 2), ("ttft", "itl"), strict=True):
        for percent, style in (("median", "-"), ("p99", ":")):
            for number, (label, points) in enumerate(curve_points(results, f"{percent}_{name}_ms").items()):
                axes.plot(
                    *zip(*points, strict=True), style, marker="o", ms=4, color=f"C{number}", label=f"{label} {percent}"
                )
        axes.set(xlabel="output tokens/s", ylabel=f"{name.upper()} (ms)", xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")


def token_times(result: Result) -> list[list[float]]:
    """For each request that succeeded, when its chunks came, in seconds after the run's start; by start."""
    if "itls" not in result:
        raise ValueError("the result was saved without --save-detailed")
    fields = zip(result["start_times"], result["ttfts"], result["itls"], result["request_errors"], strict=True)
    requests = sorted((start, ttft, itls) for start, ttft, itls, error in fields if not error)
    return [[start, *accumulate(itls, initial=start + ttft)] for start, ttft, itls in requests]


def steps(times: Sequence[Sequence[float]]) -> list[tuple[float, int]]:
    """(when its first token came, how many came) for each step, told by the gaps between tokens."""
    found: list[tuple[float, int]] = []
    last = -1.0
    for time in sorted(time for request in times for time in request[1:]):
        if time - last > STEP_GAP_SECONDS or not found:
            found.append((time, 1))
        else:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        last = time
    return found


def draw_timeline(result: Result, figure: Figure) -> None:
    """A row a request: grey until its first token, then a tick a chunk. Below: tokens of each step."""
    times = token_times(result)
    rows, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for row, (start, *chunks) in enumerate(times):
        rows.barh(row, chunks[0] - start, left=start, height=0.8, color="0.8")
        rows.barh(row, chunks[-1] - chunks[0], left=chunks[0], height=0.3, color="C0", alpha=0.3)
    rows.eventplot([chunks for _, *chunks in times], lineoffsets=range(len(times)), linelengths=0.6, linewidths=0.5)
    rows.set(ylabel="request")
    rows.invert_yaxis()
    found = steps(times)
    below.vlines([at for at, _ in found], 0, [count for _, count in found], linewidth=0.8)
    below.set(xlabel="seconds", ylabel="chunks at once", ylim=(0, None))
    below.grid(alpha=0.3)


def main(argv: list[str] | None = None) -> int:
    """1 if a file or matplotlib is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m bench plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("curves", "timeline"))
    parser.add_argument("results", nargs="+", type=Path, help="JSON files")
    parser.add_argument("--out", type=Path, required=True, help="such as curves.svg")
    parser.add_argument("--title", default="")
    options = parser.parse_args(argv)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("plots need matplotlib: pip install 'fdserve[bench]', or matplotlib alone", file=sys.stderr)
        return 1
    try:
        results = read_results(options.results)
        figure = Figure(figsize=(11, 4.5) if options.kind == "curves" else (11, 7), layout="constrained")
        figure.suptitle(options.title)
        if options.kind == "curves":
            draw_curves(results, figure)
        elif len(results) == 1:
            draw_timeline(results[0], figure)
        else:
            raise ValueError("a timeline is of one result")
        figure.savefig(options.out, dpi=150)
    except (ValueError, OSError) as error:
        print(f"bench plot: {error}", file=sys.stderr)
        return 1
    print(options.out)
    return 0
