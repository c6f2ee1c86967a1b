"""The options of a load: the names and meanings of `vllm bench serve`, as far as they go."""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from typing import Any

from bench.client import Address
from bench.datasets import Sample, arrival_times, load_samples
from bench.figures import LATENCIES

GOODPUT = ("ttft", "tpot", "e2el")


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """What is sent, how fast, and what is counted."""
    request = parser.add_argument_group("requests")
    request.add_argument("--endpoint", default="/v1/completions", help="a path that ends in /completions (chat too)")
    request.add_argument("--model", help="default: the first that the server lists")
    request.add_argument("--ignore-eos", action="store_true", help="have every answer go on to its last token")
    request.add_argument("--temperature", type=float, default=0.0)
    request.add_argument("--extra-body", type=json.loads, default={}, metavar="JSON", help="further request fields")
    request.add_argument("--header", action="append", default=[], metavar="KEY=VALUE")
    request.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: OPENAI_API_KEY")
    request.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="without a byte: failed")

    load = parser.add_argument_group("load")
    load.add_argument("--num-prompts", type=_count, default=100, metavar="N")
    load.add_argument("--request-rate", type=_positive, default=float("inf"), metavar="PER_SECOND", help="default: inf")
    load.add_argument("--burstiness", type=_positive, default=1.0, help="1: Poisson; less: bursts; more: regular")
    load.add_argument("--max-concurrency", type=_count, metavar="N", help="requests under way at most; default: all")
    load.add_argument("--num-warmups", type=int, default=0, metavar="N", help="requests before those that count")
    load.add_argument("--seed", type=int, help="default: another in every run, so that no prompt is cached")

    data = parser.add_argument_group("dataset")
    names = ("random", "prefix-repetition", "jsonl")
    data.add_argument("--dataset-name", "--dataset", type=_dataset, choices=names, default="random")
    data.add_argument("--dataset-path", metavar="FILE", help="of jsonl: prompt or messages, and output_tokens, a line")
    data.add_argument("--tokenizer", metavar="DIR", help="checkpoint: prompts are sent as the text of their ids")
    data.add_argument("--vocab-size", type=_count, default=30_000, metavar="N", help="prompts are of ids below this")
    for name, default in (("input-len", 1024), ("output-len", 128), ("prefix-len", 0)):
        data.add_argument(f"--random-{name}", type=int, default=default, metavar="TOKENS")
    data.add_argument("--random-range-ratio", type=float, default=0.0, metavar="R", help="lengths of ±R; 0 ≤ R < 1")
    for name, default in (("prefix-len", 256), ("suffix-len", 256), ("num-prefixes", 10), ("output-len", 128)):
        data.add_argument(f"--prefix-repetition-{name}", type=_count, default=default, metavar="N")
    data.add_argument(
        "--jsonl-output-len", "--custom-output-len", type=_count, default=256, metavar="TOKENS", help="unless in a line"
    )

    shown = parser.add_argument_group("figures")
    shown.add_argument("--percentile-metrics", type=_latencies, default=list(LATENCIES), metavar="ttft,tpot,itl,e2el")
    shown.add_argument("--metric-percentiles", type=_percentiles, default=[90.0, 99.0], metavar="90,99")
    shown.add_argument(
        "--goodput", nargs="+", type=_limit, default=[], metavar="ttft:MS", help="also tpot:MS and e2el:MS"
    )


def add_saving_options(parser: argparse.ArgumentParser) -> None:
    """Where the result goes as JSON."""
    saving = parser.add_argument_group("saving")
    saving.add_argument("--save-result", action="store_true", help="write the figures to a JSON file")
    saving.add_argument("--save-detailed", action="store_true", help="with every request's own figures and text")
    saving.add_argument("--result-dir", default=".", metavar="DIR")
    saving.add_argument("--result-filename", metavar="FILE", help="implies --save-result")
    saving.add_argument("--label", help="what plots call the server")
    saving.add_argument("--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="to keep with the figures")


def base_url(options: argparse.Namespace) -> str:
    """Of --base-url, or of --host and --port; without a path of /v1, which is the endpoint's."""
    url: str = options.base_url or f"http://{options.host}:{options.port}"
    return clean_url(url)


def clean_url(url: str) -> str:
    """A base URL without /v1 at its end. ValueError if it is no URL."""
    Address(url)
    url = url if "://" in url else f"http://{url}"
    return url.rstrip("/").removesuffix("/v1")


def build_load(options: argparse.Namespace) -> tuple[list[Sample], list[float] | None, list[Sample]]:
    """The samples, when each is to be sent, and the samples to warm up with. Chooses a seed where none was given."""
    if not options.endpoint.endswith("/completions"):
        raise ValueError(f"--endpoint {options.endpoint}: it must end in /completions or /chat/completions")
    if options.seed is None:
        options.seed = time.time_ns()
    generator = random.Random(options.seed)
    as_text = options.endpoint.endswith("/chat/completions")
    samples = load_samples(options, generator, as_text=as_text)
    arrivals = arrival_times(len(samples), options.request_rate, options.burstiness, generator)
    warmups = argparse.Namespace(**{**vars(options), "num_prompts": options.num_warmups})
    return samples, arrivals, load_samples(warmups, generator, as_text=as_text)


def headers_of(options: argparse.Namespace) -> dict[str, str]:
    """Of every request. ValueError if a --header is garbled."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    return headers | pairs(options.header, "--header")


def pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    """KEY=VALUE texts as a dictionary. ValueError if one is garbled."""
    for text in texts:
        if "=" not in text:
            raise ValueError(f"{option} {text}: expected KEY=VALUE")
    return dict(text.split("=", 1) for text in texts)


def encode_request(base_url: str, options: argparse.Namespace, model: str, sample: Sample) -> bytes:
    """The whole HTTP request for a sample."""
    address = Address(base_url)
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": sample.output_len,
        "temperature": options.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.endpoint.endswith("/chat/completions"):
        messages = [{"role": "user", "content": sample.prompt}] if isinstance(sample.prompt, str) else sample.prompt
        body["messages"] = messages
    else:
        body["prompt"] = sample.prompt
    if options.ignore_eos:
        body["ignore_eos"] = True
    content = json.dumps(body | options.extra_body, ensure_ascii=False).encode()
    headers = {"Host": address.netloc, "Content-Type": "application/json", "Content-Length": str(len(content))}
    lines = [f"{name}: {value}\r\n" for name, value in (headers | headers_of(options)).items()]
    return f"POST {address.path}{options.endpoint} HTTP/1.1\r\n{''.join(lines)}\r\n".encode() + content


# -- types of options -------------------------------------------------------------------------------------------------


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: an integer of at least 1 is due")
    return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: a number of more than 0 is due")
    return value


def _dataset(text: str) -> str:
    return {"custom": "jsonl", "prefix_repetition": "prefix-repetition"}.get(text, text)


def _latencies(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(LATENCIES):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose of {', '.join(LATENCIES)}")
    return names


def _percentiles(text: str) -> list[float]:
    percents = [float(part) for part in text.split(",")]
    if not all(0 <= percent <= 100 for percent in percents):
        raise argparse.ArgumentTypeError(f"{text}: percentiles are from 0 to 100")
    return percents


def _limit(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    if name not in GOODPUT:
        raise argparse.ArgumentTypeError(f"{text}: expected {', '.join(f'{each}:MS' for each in GOODPUT)}")
    return name, float(limit)
