from __future__ import annotations

import numpy as np
import pytest

from bench.answers import Answer
from bench.figures import lines, percentile, summarize


def answer(sent: float, ttft: float, itls: list[float], output_len: int = 0) -> Answer:
    tokens = output_len or len(itls) + 1
    return Answer(0, sent, ttft=ttft, itls=itls, e2el=ttft + sum(itls), input_len=10, output_len=tokens)


FAILED = Answer(1, 0.0, error="HTTP 429: full")


@pytest.mark.parametrize("percent", [0, 12.5, 50, 90, 99, 100])
def test_percentiles_are_numpys(percent: float) -> None:
    values = sorted(np.random.default_rng(0).random(17).tolist())
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    assert percentile([3.0], percent) == 3.0


def test_rates_latencies_and_goodput() -> None:
    answers = [answer(0.0, 1.0, [0.5, 0.5], output_len=5), FAILED, answer(1.0, 2.0, [1.0])]
    figures = summarize(answers, percentiles=[90.0], goodput={"ttft": 1500.0, "tpot": 300.0})
    assert (figures["completed"], figures["failed"], figures["duration"]) == (2, 1, 4.0)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (20, 7)
    assert figures["output_throughput"] == pytest.approx(7 / 4)
    assert figures["total_token_throughput"] == pytest.approx(27 / 4)
    assert figures["request_goodput"] == pytest.approx(1 / 4)
    assert figures["tokens_per_chunk"] == pytest.approx(7 / 5)
    assert figures["max_concurrent_requests"] == 2
    assert figures["median_ttft_ms"] == pytest.approx(1500)
    assert figures["mean_tpot_ms"] == pytest.approx((250 + 1000) / 2)
    assert figures["p90_itl_ms"] == pytest.approx(900)
    assert figures["median_e2el_ms"] == pytest.approx(2500)
    assert "p99_itl_ms" not in figures
    text = "\n".join(lines(figures))
    assert "1 x HTTP 429: full" in text
    assert "P90" in text


def test_only_the_latencies_asked_for() -> None:
    figures = summarize([answer(0.0, 1.0, [])], metrics=["ttft", "tpot"])
    assert figures["p99_ttft_ms"] == pytest.approx(1000)
    # One token has no time per further token.
    assert not [key for key in figures if "tpot" in key or "itl" in key or "e2el" in key]


def test_a_run_that_failed_whole() -> None:
    figures = summarize([FAILED] * 3)
    assert (figures["completed"], figures["failed"], figures["output_throughput"]) == (0, 3, 0.0)
    assert "3 x HTTP 429: full" in lines(figures)
