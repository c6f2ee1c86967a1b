"""`python -m bench frontend`: how fast one API process streams when the ranks answer at once, against bare hypercorn.

    python -m bench frontend --streams 64 256 --runs 3

The servers run in processes of their own, and are loaded in turn: fdserve with ranks that compute nothing, and
hypercorn sending the very bytes of one of fdserve's answers, an event a call. The ranks let every stream send a token
before they give it the next; with "free" ranks, which do not wait, slow streams send several tokens an event. Tokens a
second are what clients see; processor time a token tells the same with less regard to what else the machine does. What
the application alone spends on a token is measured by calling it without a socket.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import figures
from bench.answers import Answer, read_answer
from bench.client import Client
from bench.datasets import Sample
from bench.machine import describe
from bench.options import add_load_options, encode_request
from bench.response import parse_response
from bench.server_process import ROOT, ServerProcess, free_port

PROMPT = "Say something."


@dataclass(frozen=True)
class Measurement:
    """A run: what came, and what the server's process and this one spent on it."""

    server: str
    streams: int
    tokens_per_second: float
    tokens_per_chunk: float
    median_ttft_ms: float
    server_us_per_token: float
    client_us_per_chunk: float


def encoded(url: str, endpoint: str, tokens: int) -> bytes:
    """The request that every stream sends."""
    parser = argparse.ArgumentParser()
    add_load_options(parser)
    options = parser.parse_args(["--endpoint", endpoint, "--ignore-eos"])
    return encode_request(url, options, "default", Sample(PROMPT, tokens))


def record(url: str, request: bytes) -> bytes:
    """The events of one whole answer. RuntimeError if there is none."""
    with Client(url) as client:
        (exchange,) = client.run([request])
    answer = read_answer(exchange)
    if answer.error:
        raise RuntimeError(answer.error)
    return parse_response(b"".join(exchange.parts)).body


def measure(name: str, server: ServerProcess, request: bytes, streams: int, requests: int) -> Measurement:
    """Load one server. RuntimeError if a request fails."""
    spent = server.cpu_seconds()
    with Client(server.url) as client:
        client_spent = time.process_time()
        exchanges = client.run([request] * requests, max_concurrency=streams)
        client_spent = time.process_time() - client_spent
    spent = server.cpu_seconds() - spent
    answers: Sequence[Answer] = [read_answer(exchange) for exchange in exchanges]
    found = figures.summarize(answers)
    if found["failed"]:
        raise RuntimeError("\n".join(figures.error_lines(found["errors"])))
    return Measurement(
        server=name,
        streams=streams,
        tokens_per_second=found["output_throughput"],
        tokens_per_chunk=found["tokens_per_chunk"],
        median_ttft_ms=found["median_ttft_ms"],
        server_us_per_token=1e6 * spent / found["total_output_tokens"],
        client_us_per_chunk=1e6 * client_spent / sum(answer.received for answer in answers),
    )


SERVERS = ("fdserve", "fdserve, free", "hypercorn")
HEADING = f"{'streams':>7} {'server':14} {'tokens/s':>10} {'tokens/chunk':>12} {'TTFT ms':>9} {'us/token':>9}"


def summary(runs: Sequence[Measurement]) -> list[str]:
    """Medians of the runs with one number of streams, and fdserve's ratios to hypercorn."""
    text = []
    medians: dict[str, tuple[float, float]] = {}
    for name in SERVERS:
        own = [run for run in runs if run.server == name]
        rate, per_chunk, ttft, cost = (
            statistics.median(getattr(run, field) for run in own)
            for field in ("tokens_per_second", "tokens_per_chunk", "median_ttft_ms", "server_us_per_token")
        )
        medians[name] = rate, cost
        text.append(f"{runs[0].streams:7} {name:14} {rate:10.0f} {per_chunk:12.2f} {ttft:9.1f} {cost:9.1f}")
    speed = medians["fdserve"][0] / medians["hypercorn"][0]
    cost = medians["hypercorn"][1] / medians["fdserve"][1]
    client = statistics.median(run.client_us_per_chunk for run in runs)
    text.append(f"{'':7} fdserve at {speed:.0%} of hypercorn's speed; by processor time a token {cost:.0%}")
    text.append(
        f"{'':7} the load generator took {client:.1f} us a piece received: its ceiling is {1e6 / client:.0f} a second"
    )
    return text


def application_cost(streams: int, tokens: int, runs: int) -> list[float]:
    """Microseconds a token of each run without sockets, in a process of its own. RuntimeError if that fails."""
    command = [sys.executable, "-m", "bench.token_cost", str(streams), str(tokens), str(runs)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if process.returncode:
        raise RuntimeError(process.stderr)
    costs: list[float] = json.loads(process.stdout.splitlines()[-1])
    return costs


@contextmanager
def servers(most: int, tokens: int, endpoint: str) -> Iterator[tuple[dict[str, ServerProcess], bytes]]:
    """The servers for up to `most` streams of `tokens` tokens, and the request for each of them."""
    options = ["--log-level", "warning", "--max-num-seqs", str(most), "--max-concurrency", str(2 * most)]
    options += ["--num-gpu-blocks-override", str(most * (tokens // 64 + 4))]
    options += ["--max-num-batched-tokens", str(max(2048, most))]
    with ExitStack() as stack:

        def start(*arguments: str, port: int) -> ServerProcess:
            server = stack.enter_context(ServerProcess(["-m", *arguments], port))
            server.wait_healthy()
            return server

        started = {}
        for name, pace in (("fdserve", "each"), ("fdserve, free", "any")):
            port = free_port()
            started[name] = start("bench.null_server", pace, "--port", str(port), *options, port=port)
        request = encoded(started["fdserve"].url, endpoint, tokens)
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "events"
        file.write_bytes(record(started["fdserve"].url, request))
        port = free_port()
        started["hypercorn"] = start("bench.raw_server", str(port), str(file), port=port)
        yield started, request


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench frontend", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256], metavar="N", help="at the same time")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--rounds", type=int, default=2, help="requests of each stream in a run, one after the other")
    parser.add_argument("--runs", type=int, default=3, help="of each server")
    parser.add_argument("--endpoint", default="/v1/chat/completions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(argv)
    print(describe(), f"answers of {options.tokens} tokens", HEADING, sep="\n", flush=True)
    measured: list[Measurement] = []
    without_sockets: dict[int, list[float]] = {}
    with servers(max(options.streams), options.tokens, options.endpoint) as (started, request):
        for streams in options.streams:
            runs = [
                measure(name, server, request, streams, streams * options.rounds)
                for _ in range(options.runs)
                for name, server in started.items()
            ]
            print(*summary(runs), sep="\n", flush=True)
            measured += runs
    for streams in options.streams:
        costs = without_sockets[streams] = application_cost(streams, options.tokens, 3 * options.runs)
        print(f"{streams:7} without sockets, us/token: median {statistics.median(costs):.1f}, least {min(costs):.1f}")
    if options.json:
        found = {"machine": describe(), "runs": [asdict(run) for run in measured], "without_sockets": without_sockets}
        options.json.write_text(json.dumps(found))
    return 0
