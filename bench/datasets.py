"""What is asked of a server: prompts, how many tokens each is to be answered with, and when each is sent."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

FIRST_ID = 10
"""Lower ids are special in most vocabularies."""
# One token each in nearly every vocabulary.
_WORDS = """
the of and to in is that for on with as at by from this be or an not are but have was all one we can had her more if
will each about how up out them then she many some so these would other into has two like him see time could no make
than first been its who now people my made over did down only way find use may water long little very after called just
where most know get through back much before go good new write our used me man too any day same right look think also
"""
WORDS = _WORDS.split()


@dataclass(frozen=True)
class Sample:
    """A prompt and the most tokens to generate. `prompt` is a text, token ids, or a chat's messages."""

    prompt: str | list[int] | list[dict[str, Any]]
    output_len: int


def load_samples(options: argparse.Namespace, generator: random.Random, *, as_text: bool) -> list[Sample]:
    """The `num_prompts` samples of the chosen dataset; `as_text` where the endpoint takes no token ids.

    Raises ValueError if the options or the file do not give any.
    """
    if options.dataset_name == "jsonl":
        return _from_file(options)
    to_prompt = _writer(options, as_text)
    make = {"random": _random, "prefix-repetition": _prefix_repetition}[options.dataset_name]
    vocabulary = range(FIRST_ID, options.vocab_size)
    if len(vocabulary) == 0:
        raise ValueError(f"--vocab-size must be more than {FIRST_ID}")

    def ids(count: int) -> list[int]:
        return generator.choices(vocabulary, k=count)

    return [Sample(to_prompt(prompt), length) for prompt, length in make(options, generator, ids)]


def _random(
    options: argparse.Namespace, generator: random.Random, ids: Callable[[int], list[int]]
) -> Iterator[tuple[list[int], int]]:
    """All begin with the same `random_prefix_len` tokens; lengths vary uniformly by `random_range_ratio`."""
    ratio = options.random_range_ratio
    if not 0 <= ratio < 1:
        raise ValueError("--random-range-ratio must be at least 0 and less than 1")

    def length(mean: int) -> int:
        return max(1, generator.randint(int(mean * (1 - ratio)), round(mean * (1 + ratio))))

    prefix = ids(options.random_prefix_len)
    for _ in range(options.num_prompts):
        yield prefix + ids(length(options.random_input_len)), length(options.random_output_len)


def _prefix_repetition(
    options: argparse.Namespace, generator: random.Random, ids: Callable[[int], list[int]]
) -> Iterator[tuple[list[int], int]]:
    """A few prefixes, each followed by many suffixes, in random order."""
    prefixes = [ids(options.prefix_repetition_prefix_len) for _ in range(options.prefix_repetition_num_prefixes)]
    prompts = [
        prefixes[index % len(prefixes)] + ids(options.prefix_repetition_suffix_len)
        for index in range(options.num_prompts)
    ]
    generator.shuffle(prompts)
    for prompt in prompts:
        yield prompt, options.prefix_repetition_output_len


def _writer(options: argparse.Namespace, as_text: bool) -> Callable[[list[int]], str | list[int]]:
    if options.tokenizer:
        from fdserve.errors import StartupError
        from fdserve.text.tokenizer import load_tokenizer

        try:
            tokenizer = load_tokenizer(Path(options.tokenizer), "auto")
        except StartupError as error:
            raise ValueError(str(error)) from None
        return lambda ids: b"".join(map(tokenizer.token_bytes, ids)).decode(errors="replace")
    if as_text:
        return lambda ids: " ".join(WORDS[id % len(WORDS)] for id in ids)
    return lambda ids: ids


def _from_file(options: argparse.Namespace) -> list[Sample]:
    if not options.dataset_path:
        raise ValueError("--dataset-name jsonl needs --dataset-path")
    samples = []
    for number, line in enumerate(Path(options.dataset_path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            prompt = fields["prompt"] if "prompt" in fields else fields["messages"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{options.dataset_path}, line {number}: an object with a prompt or messages is due ({error!r})"
            ) from None
        samples.append(Sample(prompt, int(fields.get("output_tokens", options.jsonl_output_len))))
    if not samples:
        raise ValueError(f"{options.dataset_path} has no lines")
    return [samples[index % len(samples)] for index in range(options.num_prompts)]


def arrival_times(count: int, rate: float, burstiness: float, generator: random.Random) -> list[float] | None:
    """When each request is to be sent, in seconds after the start; None for all at once (an infinite rate).

    The gaps follow a gamma distribution of the shape `burstiness`: 1 makes a Poisson process, less makes bursts, more
    makes it regular. They are scaled so that the last request comes at `count / rate`: the rate is what was asked.
    """
    if rate == float("inf"):
        return None
    times = list(accumulate(generator.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(count)))
    scale = count / rate / times[-1]
    return [time * scale for time in times]
