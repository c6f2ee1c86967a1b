"""From the answers of a run to its figures: rates, percentiles, goodput."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bench.answers import Answer

LATENCIES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token after the first",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}
PERCENTILES = (90.0, 99.0)
SHOWN_ERRORS = 5

Figures = dict[str, Any]


def percentile(values: Sequence[float], percent: float) -> float:
    """Interpolated linearly, as NumPy does it; `values` ascending and not empty."""
    place = (len(values) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def latencies(answers: Sequence[Answer]) -> dict[str, list[float]]:
    """All values of each latency, in milliseconds: one a request, but one a gap for "itl"."""
    return {
        "ttft": [1e3 * answer.ttft for answer in answers],
        "tpot": [1e3 * answer.tpot for answer in answers if answer.tpot is not None],
        "itl": [1e3 * gap for answer in answers for gap in answer.itls],
        "e2el": [1e3 * answer.e2el for answer in answers],
    }


def summarize(
    answers: Sequence[Answer],
    *,
    metrics: Sequence[str] = tuple(LATENCIES),
    percentiles: Sequence[float] = PERCENTILES,
    goodput: dict[str, float] | None = None,
) -> Figures:
    """The figures of a run, under the names that `vllm bench serve` gives them. Times in ms, `duration` in seconds.

    The duration is from the first request sent to the last event received. Failed requests count as such and in
    nothing else.
    """
    good = [answer for answer in answers if not answer.error]
    ends = [answer.sent + answer.e2el for answer in good]
    duration = max(ends) - min(answer.sent for answer in answers) if good else 0.0
    inputs, outputs = sum(a.input_len for a in good), sum(a.output_len for a in good)
    chunks = sum(answer.chunks for answer in good)
    rate = 1 / duration if duration > 0 else 0.0
    figures: Figures = {
        "duration": duration,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) * rate,
        "output_throughput": outputs * rate,
        "total_token_throughput": (inputs + outputs) * rate,
        "total_chunks": chunks,
        "tokens_per_chunk": outputs / chunks if chunks else 0.0,
        "max_concurrent_requests": most_at_once(good),
    }
    if goodput:
        figures["request_goodput"] = sum(meets(answer, goodput) for answer in good) * rate
    for name, values in latencies(good).items():
        if name in metrics and values:
            figures |= spread(name, values, percentiles)
    errors = Counter(answer.error for answer in answers if answer.error)
    figures["errors"] = [{"message": message, "count": count} for message, count in errors.most_common()]
    return figures


def spread(name: str, values: Sequence[float], percentiles: Sequence[float]) -> Figures:
    """Mean, median, standard deviation and percentiles of a latency in ms."""
    ascending = sorted(values)
    figures = {
        f"mean_{name}_ms": statistics.fmean(ascending),
        f"median_{name}_ms": percentile(ascending, 50),
        f"std_{name}_ms": statistics.pstdev(ascending),
    }
    return figures | {f"p{percent:g}_{name}_ms": percentile(ascending, percent) for percent in percentiles}


def most_at_once(answers: Sequence[Answer]) -> int:
    """The most requests that were under way at one time."""
    changes = sorted([(a.sent, 1) for a in answers] + [(a.sent + a.e2el, -1) for a in answers])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def meets(answer: Answer, goodput: dict[str, float]) -> bool:
    """Whether a request kept every limit, in ms; one of a single token keeps any TPOT."""
    own = {"ttft": answer.ttft, "tpot": answer.tpot or 0.0, "e2el": answer.e2el}
    return all(1e3 * own[name] <= limit for name, limit in goodput.items())


def lines(figures: Figures) -> list[str]:
    """The figures as text, a line each."""
    shown = [
        ("Successful requests", f"{figures['completed']}"),
        ("Failed requests", f"{figures['failed']}"),
        ("Duration (s)", f"{figures['duration']:.2f}"),
        ("Input tokens", f"{figures['total_input_tokens']}"),
        ("Generated tokens", f"{figures['total_output_tokens']}"),
        ("Most requests at once", f"{figures['max_concurrent_requests']}"),
        ("Requests/s", f"{figures['request_throughput']:.2f}"),
        ("Output tokens/s", f"{figures['output_throughput']:.2f}"),
        ("Input and output tokens/s", f"{figures['total_token_throughput']:.2f}"),
        ("Tokens a chunk", f"{figures['tokens_per_chunk']:.3f}"),
    ]
    if "request_goodput" in figures:
        shown.append(("Requests/s within the limits", f"{figures['request_goodput']:.2f}"))
    text = [f"{name:<40}{value:>12}" for name, value in shown]
    for name, title in LATENCIES.items():
        keys = [key for key in figures if key.endswith(f"_{name}_ms")]
        if keys:
            text.append(f"-- {title} (ms)")
            for key in keys:
                word = key.partition("_")[0]
                text.append(f"{word.upper() if word.startswith('p') else word.capitalize():<40}{figures[key]:>12.2f}")
    return text + error_lines(figures["errors"])


def error_lines(errors: Sequence[dict[str, Any]]) -> list[str]:
    """The commonest errors of a run, with how often they came."""
    if not errors:
        return []
    text = ["-- Failures"] + [f"{error['count']} x {error['message']}" for error in errors[:SHOWN_ERRORS]]
    return text + ([f"and {len(errors) - SHOWN_ERRORS} other messages"] if len(errors) > SHOWN_ERRORS else [])
