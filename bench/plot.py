"""`python -m bench plot`: pictures of saved results, as SVG, PNG or PDF by the file's ending.

    python -m bench plot curves rates/*.json --out curves.svg
    python -m bench plot timeline steps.jsonl run.json --out timeline.png

`curves` takes results of `serve` or `compare` at several loads and draws the latencies over the throughput, a line a
label. `timeline` takes the file that fdserve's setting step_log names, a result of `serve` saved with --save-detailed,
or both. Of the steps it draws the tokens computed, the durations with the gaps between them, and the queue; of the
result each request's wait, prefill and tokens. Needs matplotlib: pip install 'fdserve[bench]'.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.timeline import draw_timeline, read_steps
from fdserve.engine.step_log import StepRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]


def read_results(paths: Sequence[Path]) -> list[Result]:
    """All results in the files. Raises ValueError if one holds none."""
    results: list[Result] = []
    for path in paths:
        try:
            content = json.loads(path.read_text())
        except ValueError:  # a step log, say, is lines of JSON
            content = None
        for result in content if isinstance(content, list) else [content]:
            if not isinstance(result, dict) or "output_throughput" not in result:
                raise ValueError(f"{path} holds no result of `python -m bench serve` or `compare`")
            results.append(result)
    return results


def read_timeline(paths: Sequence[Path]) -> tuple[list[StepRecord] | None, Result | None]:
    """The step log and the result among the files, of which one may be missing. Raises ValueError otherwise."""
    steps: list[StepRecord] | None = None
    result: Result | None = None
    for path in paths:
        try:
            found = read_results([path])
        except ValueError:
            if steps is not None:
                raise ValueError("a timeline is of one step log at most") from None
            steps = read_steps(path)
            continue
        if result is not None or len(found) != 1:
            raise ValueError("a timeline is of one result at most")
        result = found[0]
    return steps, result


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


def main(argv: list[str] | None = None) -> int:
    """1 if a file or matplotlib is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m bench plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("curves", "timeline"))
    parser.add_argument("results", nargs="+", type=Path, help="JSON files, or a step log")
    parser.add_argument("--out", type=Path, required=True, help="such as curves.svg")
    parser.add_argument("--title", default="")
    options = parser.parse_args(argv)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("plots need matplotlib: pip install 'fdserve[bench]', or matplotlib alone", file=sys.stderr)
        return 1
    try:
        figure = Figure(figsize=(11, 4.5) if options.kind == "curves" else (11, 7), layout="constrained")
        figure.suptitle(options.title)
        if options.kind == "curves":
            draw_curves(read_results(options.results), figure)
        else:
            draw_timeline(*read_timeline(options.results), figure)
        figure.savefig(options.out, dpi=150)
    except (ValueError, OSError) as error:
        print(f"bench plot: {error}", file=sys.stderr)
        return 1
    print(options.out)
    return 0
