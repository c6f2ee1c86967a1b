"""`python -m bench serve`: load a server that speaks OpenAI's protocol, and report throughput and latencies.

    python -m bench serve --port 8188 --random-input-len 256 --random-output-len 64 --max-concurrency 8 --ignore-eos

Open loop with --request-rate, closed loop with --max-concurrency, or both. Runs in a process of its own, so that it
neither waits for the server nor holds it up; says how much of a core it took itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bench import figures, server_metrics
from bench.answers import Answer, read_answer
from bench.client import Client, Exchange
from bench.options import (
    add_load_options,
    add_saving_options,
    base_url,
    build_load,
    encode_request,
    headers_of,
    pairs,
)
from bench.progress import Progress

KEEP_UNREAD_BYTES = 512 << 20
"""Answers are read after the run, unless more than this waits."""


@dataclass
class Run:
    """A run's answers in the order of the requests, and the result that is shown and saved."""

    answers: list[Answer]
    result: dict[str, Any]


class _Reader:
    """Keeps exchanges that ended, and reads them once the run is over or they take too much memory."""

    def __init__(self, progress: Progress, keep_text: bool) -> None:
        self.answers: list[Answer] = []
        self._progress = progress
        self._keep_text = keep_text
        self._unread: list[Exchange] = []
        self._unread_bytes = 0

    def take(self, exchange: Exchange) -> None:
        self._unread.append(exchange)
        self._unread_bytes += sum(map(len, exchange.parts))
        self._progress.done += 1
        if self._unread_bytes > KEEP_UNREAD_BYTES:
            self.read()

    def read(self) -> None:
        self.answers += [read_answer(exchange, keep_text=self._keep_text) for exchange in self._unread]
        for exchange in self._unread:
            exchange.parts, exchange.times, exchange.request = [], [], b""
        self._unread, self._unread_bytes = [], 0


def run_load(url: str, options: argparse.Namespace, title: str = "") -> Run:
    """Put the load of the options on one server. Raises ValueError for options that do not go together, and OSError if
    the server's name cannot be resolved; a request that fails is counted in the result.
    """
    samples, arrivals, warmups = build_load(options)
    model = options.model or server_metrics.first_model(url, headers_of(options)) or "default"
    with Client(url, timeout=options.timeout) as client:
        if warmups:
            requests = [encode_request(url, options, model, sample) for sample in warmups]
            client.run(requests, max_concurrency=options.max_concurrency)
        requests = [encode_request(url, options, model, sample) for sample in samples]
        progress = Progress(len(requests), title)
        reader = _Reader(progress, options.save_detailed)
        before = server_metrics.read_counters(url)
        # A collection would stop the clock of every stream.
        gc.collect()
        gc.disable()
        cpu = time.process_time()
        try:
            client.run(
                requests,
                arrivals=arrivals,
                max_concurrency=options.max_concurrency,
                on_end=reader.take,
                on_look=progress.show,
            )
            cpu = time.process_time() - cpu
        finally:
            gc.enable()
            progress.close()
    after = server_metrics.read_counters(url)
    reader.read()
    answers = sorted(reader.answers, key=lambda answer: answer.index)
    result = _head(url, options, model) | figures.summarize(
        answers,
        metrics=options.percentile_metrics,
        percentiles=options.metric_percentiles,
        goodput=dict(options.goodput),
    )
    received = sum(answer.received for answer in answers)
    result["client"] = {"cpu_seconds": cpu, "received": received}
    result["server"] = server_metrics.changes(before, after, result["duration"])
    if options.save_detailed:
        result |= _details(answers)
    return Run(answers, result)


def _head(url: str, options: argparse.Namespace, model: str) -> dict[str, Any]:
    rate = options.request_rate
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "base_url": url,
        "endpoint": options.endpoint,
        "model_id": model,
        "label": options.label,
        "dataset_name": options.dataset_name,
        "num_prompts": options.num_prompts,
        "request_rate": "inf" if math.isinf(rate) else rate,
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        "seed": options.seed,
        **pairs(options.metadata, "--metadata"),
    }


def _details(answers: Sequence[Answer]) -> dict[str, Any]:
    """Lists with an entry a request, times in seconds; those that failed have zeros and an error.
    `begin_time` is since 1970, `start_times` are since then."""
    begin = min((answer.sent for answer in answers), default=0.0)
    return {
        "begin_time": time.time() - time.perf_counter() + begin,
        "start_times": [answer.sent - begin for answer in answers],
        "input_lens": [answer.input_len for answer in answers],
        "output_lens": [answer.output_len for answer in answers],
        "ttfts": [answer.ttft for answer in answers],
        "itls": [answer.itls for answer in answers],
        "e2els": [answer.e2el for answer in answers],
        "generated_texts": [answer.text for answer in answers],
        "request_errors": [answer.error for answer in answers],
    }


def lines(result: dict[str, Any]) -> list[str]:
    """A result as text."""
    text = [f"== {result['base_url']}, model {result['model_id']}, seed {result['seed']}", *figures.lines(result)]
    text += server_metrics.lines(result["server"])
    client = result["client"]
    if client["received"] and result["duration"]:
        share = 100 * client["cpu_seconds"] / result["duration"]
        text.append("-- Load generator")
        text.append(f"{'Of one core (%)':<40}{share:>12.1f}")
        text.append(f"{'CPU time a piece received (us)':<40}{1e6 * client['cpu_seconds'] / client['received']:>12.1f}")
    return text


def save(result: dict[str, Any] | list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the result where the options want it, if they do, and say where."""
    if not (options.save_result or options.save_detailed or options.result_filename):
        return
    name = options.result_filename or f"{options.label or 'bench'}-{datetime.now():%Y%m%d-%H%M%S}.json"
    path = Path(options.result_dir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    print(f"written to {path}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """1 if a request failed, 2 if the options are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m bench serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    server = parser.add_argument_group("server")
    server.add_argument("--base-url", help="such as http://127.0.0.1:8188; instead of --host and --port")
    server.add_argument("--host", default="127.0.0.1")
    server.add_argument("--port", type=int, default=8188)
    add_load_options(parser)
    add_saving_options(parser)
    options = parser.parse_args(argv)
    try:
        run = run_load(base_url(options), options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print("\n".join(lines(run.result)))
    save(run.result, options)
    return 1 if run.result["failed"] else 0
