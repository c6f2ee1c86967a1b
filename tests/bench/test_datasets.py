from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.datasets import Sample, arrival_times, load_samples
from bench.options import add_load_options, build_load, encode_request

DEMO = Path(__file__).parents[2] / "fdserve" / "demo" / "checkpoint"


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_load_options(parser)
    return parser.parse_args(arguments)


def samples(*arguments: str, seed: int = 0, as_text: bool = False) -> list[Sample]:
    return load_samples(options(*arguments), random.Random(seed), as_text=as_text)


def test_random_prompts_are_of_the_lengths_asked() -> None:
    exact = samples("--random-input-len", "20", "--random-output-len", "7", "--vocab-size", "50", "--num-prompts", "9")
    assert [(len(sample.prompt), sample.output_len) for sample in exact] == [(20, 7)] * 9
    assert all(isinstance(token, int) and 10 <= token < 50 for sample in exact for token in sample.prompt)
    varied = samples("--random-input-len", "100", "--random-range-ratio", "0.5", "--num-prompts", "400")
    lengths = {len(sample.prompt) for sample in varied}
    assert (min(lengths), max(lengths)) == (50, 150)


def test_seeds_repeat_prompts() -> None:
    assert samples(seed=1) == samples(seed=1)
    assert samples(seed=1) != samples(seed=2)


def test_shared_prefixes() -> None:
    same = samples("--random-prefix-len", "8", "--random-input-len", "4", "--num-prompts", "5")
    assert len({tuple(sample.prompt[:8]) for sample in same}) == 1
    assert len({tuple(sample.prompt) for sample in same}) == 5
    arguments = ["--dataset", "prefix-repetition", "--num-prompts", "12", "--prefix-repetition-num-prefixes", "3"]
    several = samples(*arguments, "--prefix-repetition-prefix-len", "6", "--prefix-repetition-suffix-len", "2")
    prefixes = [tuple(sample.prompt[:6]) for sample in several]
    assert sorted(prefixes.count(prefix) for prefix in set(prefixes)) == [4, 4, 4]
    assert {(len(sample.prompt), sample.output_len) for sample in several} == {(8, 128)}


def test_prompts_as_text() -> None:
    arguments = ["--num-prompts", "2", "--random-input-len", "30"]
    for sample in samples(*arguments, as_text=True):
        assert isinstance(sample.prompt, str)
        assert len(sample.prompt.split()) == 30
    for sample in samples(*arguments, "--tokenizer", str(DEMO), "--vocab-size", "1500"):
        assert isinstance(sample.prompt, str)


def test_prompts_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    lines = [{"prompt": "one", "output_tokens": 3}, {"messages": messages}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    arguments = ["--dataset-name", "custom", "--dataset-path", str(path)]
    read = samples(*arguments, "--num-prompts", "3", "--custom-output-len", "9")
    assert read == [Sample("one", 3), Sample(messages, 9), Sample("one", 3)]
    path.write_text('{"prompt": "one"}\n{"text": 1}\n')
    with pytest.raises(ValueError, match="line 2"):
        samples(*arguments)


@pytest.mark.parametrize("arguments", [["--dataset", "jsonl"], ["--random-range-ratio", "1"], ["--vocab-size", "10"]])
def test_options_that_do_not_go_together(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="--"):
        samples(*arguments)


def test_a_wrong_endpoint_is_told() -> None:
    with pytest.raises(ValueError, match="must end in"):
        build_load(options("--endpoint", "/v1/embeddings"))


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_arrivals_keep_the_rate_and_the_burstiness(burstiness: float) -> None:
    times = arrival_times(20_000, 50.0, burstiness, random.Random(3))
    assert times is not None
    gaps = np.diff(times)
    assert times[-1] == pytest.approx(400.0)
    # A gamma distribution of shape k has a coefficient of variation of 1/sqrt(k).
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)
    assert arrival_times(3, float("inf"), 1.0, random.Random(3)) is None


def sent(*arguments: str, prompt: Any = "hi", base_url: str = "http://host:1/base") -> tuple[str, dict[str, Any]]:
    head, _, body = encode_request(base_url, options(*arguments), "m", Sample(prompt, 5)).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}" in head.decode()
    return head.decode(), json.loads(body)


def test_requests_carry_the_options() -> None:
    extra = [
        "--ignore-eos",
        "--api-key",
        "k",
        "--header",
        "X-A=b=c",
        "--extra-body",
        '{"top_p": 0.5, "temperature": 1}',
    ]
    head, body = sent(*extra)
    assert head.startswith("POST /base/v1/completions HTTP/1.1\r\nHost: host:1\r\n")
    assert "Authorization: Bearer k" in head
    assert "X-A: b=c" in head
    assert body == {
        "model": "m", "prompt": "hi", "max_tokens": 5, "ignore_eos": True, "top_p": 0.5, "temperature": 1,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    _, body = sent("--endpoint", "/v1/chat/completions")
    assert body["messages"] == [{"role": "user", "content": "hi"}]
    assert "prompt" not in body
