"""A closed-loop load on /v1/completions: so many clients, each sending its next request when its last is answered.

    python -m bench.load --base-url http://127.0.0.1:8188 --concurrency 8 --input-len 256 --output-len 64

Prompts are random token ids, different in every run unless a seed is given, so that no prefix is cached. Every
request is greedy, streamed, and goes on to its last token (ignore_eos). Times are seen from the client: TTFT from
sending the request to the first token, ITL between two events with tokens. Works against any server that takes token
ids as the prompt and says how many tokens it generated.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import random
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Answer:
    """One request, in seconds and tokens."""

    first_token: float
    gaps: list[float]
    tokens: int


@dataclass(frozen=True)
class Report:
    """A run; times in seconds."""

    requests: int
    concurrency: int
    seconds: float
    output_tokens_per_second: float
    median_ttft: float
    p99_ttft: float
    median_itl: float
    p99_itl: float


def ask(base_url: str, prompt: list[int], output_len: int) -> Answer:
    """Send one request and read its stream to the end. Raises RuntimeError if it fails."""
    address = urlsplit(base_url)
    assert address.hostname is not None
    body = {"model": "default", "prompt": prompt, "max_tokens": output_len, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    connection = http.client.HTTPConnection(address.hostname, address.port or 80, timeout=TIMEOUT_SECONDS)
    try:
        began = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {response.read().decode(errors='replace')}")
        times, tokens = [], 0
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if event["choices"]:
                times.append(now)
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    finally:
        connection.close()
    return Answer(times[0] - began, [b - a for a, b in itertools.pairwise(times)], tokens)


def run(
    base_url: str,
    *,
    concurrency: int,
    input_len: int,
    output_len: int,
    num_prompts: int,
    seed: int,
    vocab_size: int,
) -> Report:
    """Send `num_prompts` requests, `concurrency` at a time."""
    generator = random.Random(seed)
    prompts = [[generator.randrange(10, vocab_size) for _ in range(input_len)] for _ in range(num_prompts)]
    began = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(lambda prompt: ask(base_url, prompt, output_len), prompts))
    seconds = time.perf_counter() - began
    first = sorted(answer.first_token for answer in answers)
    gaps = sorted(gap for answer in answers for gap in answer.gaps) or [0.0]
    return Report(
        requests=num_prompts,
        concurrency=concurrency,
        seconds=seconds,
        output_tokens_per_second=sum(answer.tokens for answer in answers) / seconds,
        median_ttft=statistics.median(first),
        p99_ttft=first[int(0.99 * (len(first) - 1))],
        median_itl=statistics.median(gaps),
        p99_itl=gaps[int(0.99 * (len(gaps) - 1))],
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8188")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--vocab-size", type=int, default=100_000, help="prompts are of ids below this")
    parser.add_argument("--seed", type=int, default=time.time_ns())
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(argv)
    report = run(
        args.base_url,
        concurrency=args.concurrency,
        input_len=args.input_len,
        output_len=args.output_len,
        num_prompts=args.num_prompts,
        seed=args.seed,
        vocab_size=args.vocab_size,
    )
    if args.json:
        json.dump(asdict(report), sys.stdout)
        print()
        return
    print(
        f"{args.input_len} in, {args.output_len} out, {report.concurrency} at a time, {report.requests} requests: "
        f"{report.output_tokens_per_second:.1f} tokens/s; TTFT median {1e3 * report.median_ttft:.0f} ms, "
        f"p99 {1e3 * report.p99_ttft:.0f} ms; ITL median {1e3 * report.median_itl:.1f} ms, "
        f"p99 {1e3 * report.p99_itl:.1f} ms"
    )


if __name__ == "__main__":
    main()
