"""`python -m bench compare`: the same load on several servers in turn, run by run, and the ratios of their medians.

    python -m bench compare --base-url A=http://127.0.0.1:8188 --base-url B=http://127.0.0.1:8000 --runs 5 \\
        --random-input-len 256 --random-output-len 64 --num-prompts 64 --max-concurrency 8 --ignore-eos

Whatever disturbs a machine for a while then disturbs all of them. In each run all servers get the same prompts; the
order in which they come changes from run to run. One server at a time is loaded, but an idle one may still hold
memory and cores: a server that spins when it is idle has no place beside others.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

from bench import server_metrics
from bench.figures import error_lines
from bench.options import add_load_options, add_saving_options, clean_url, headers_of
from bench.serve import run_load, save

FIGURES = {
    "output_throughput": "Output tokens/s",
    "request_throughput": "Requests/s",
    "median_ttft_ms": "TTFT, median (ms)",
    "p99_ttft_ms": "TTFT, p99 (ms)",
    "median_tpot_ms": "TPOT, median (ms)",
    "median_itl_ms": "ITL, median (ms)",
    "p99_itl_ms": "ITL, p99 (ms)",
    "median_e2el_ms": "E2EL, median (ms)",
}


def compare(servers: dict[str, str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The results of all runs in the order they were made, each with its server's label."""
    seed, model = options.seed, options.model
    models = {label: model or server_metrics.first_model(url, headers_of(options)) for label, url in servers.items()}
    results = []
    for number in range(options.runs):
        # Without a seed the first server of a run draws one, and the others get the same.
        options.seed = None if seed is None else seed + number
        names = list(servers)
        for label in names[number % len(names) :] + names[: number % len(names)]:
            options.label, options.model = label, models[label]
            results.append(run_load(servers[label], options, f"{label}, run {number + 1} of {options.runs}").result)
    return results


def lines(results: Sequence[dict[str, Any]]) -> list[str]:
    """Every figure's median over the runs for each server, its spread, and the ratio to the first server's."""
    labels = list(dict.fromkeys(sorted(str(result["label"]) for result in results)))
    first = labels[0]
    table = [["", *labels, *(f"{label}/{first}" for label in labels[1:])]]
    for key, title in FIGURES.items():
        values = {
            label: [result[key] for result in results if result["label"] == label and key in result] for label in labels
        }
        if not all(values.values()):
            continue
        medians = {label: statistics.median(each) for label, each in values.items()}
        cells = [f"{medians[label]:.2f} ({min(each):.2f}-{max(each):.2f})" for label, each in values.items()]
        ratios = [f"{medians[label] / medians[first]:.3f}" if medians[first] else "-" for label in labels[1:]]
        table.append([title, *cells, *ratios])
    title_width, *widths = (max(map(len, column)) for column in zip(*table, strict=True))
    text = []
    for title, *cells in table:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        text.append("  ".join([title.ljust(title_width), *padded]))
    for label in labels:
        errors = [error for result in results if result["label"] == label for error in result["errors"]]
        text += [f"{label} {line}" for line in error_lines(errors)]
    return text


def main(argv: list[str] | None = None) -> int:
    """1 if a request failed, 2 if the options are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m bench compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", action="append", required=True, metavar="LABEL=URL", help="two or more")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="of each server")
    add_load_options(parser)
    add_saving_options(parser)
    options = parser.parse_args(argv)
    servers: dict[str, str] = {}
    try:
        for given in options.base_url:
            label, _, url = given.partition("=")
            if not url or label in servers:
                raise ValueError(f"--base-url {given}: expected LABEL=URL, each label once")
            servers[label] = clean_url(url)
        if len(servers) < 2:
            raise ValueError("--base-url: two servers or more are due")
        results = compare(servers, options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print("\n".join(lines(results)))
    save(results, options)
    return 1 if any(result["failed"] for result in results) else 0
