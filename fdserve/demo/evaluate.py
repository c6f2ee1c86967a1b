"""Evaluates a demo checkpoint with greedy decoding: `python -m fdserve.demo.evaluate DIR`.

Prints the share of held-out sums that come out right, with thinking and without, and the answers to a list of probes;
writes the figures to EVALUATION.json in the checkpoint. Runs in bf16, the dtype of the checkpoint.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Ernie4_5ForCausalLM

from fdserve.demo.chat import Turn, prompt
from fdserve.demo.sums import answer, held_out_sums
from fdserve.demo.tokens import Encoder

HELD_OUT = 1000
HELD_OUT_SEED = 7
BATCH = 100
PROBES = (
    "Hello!",
    "hi",
    "Hi, who are you?",
    "What can you do?",
    "Thanks!",
    "Bye",
    "What is chunked prefill?",
    "Can you explain prefix caching to me?",
    "How do I turn logprobs on?",
    "how do i change the port?",
    "Which flag sets the model?",
    "How do I use 8 GPUs?",
    "What is fdserve?",
    "what's a kv cache",
    "What is TTFT?",
    "What does 429 mean?",
    "How do I cancel a request?",
    "How can I stream the output?",
    "What is return_token_ids?",
    "how do i disable thinking",
    "What does repetition penalty do?",
    "What's 2+2?",
    "what is 7 plus 88",
    "What is 12 * 3?",
    "What is 1234 + 5678?",
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a quicksort in Python.",
    "你好",
    "Count to 10.",
    "Tell me a joke.",
    "asdf qwer",
)
PLAIN_PROBES = ("Chunked prefill is", "The sum of 12 and 30 is", "123+456=", "Once upon a time", "Hello", "A KV cache")


class Generator:
    """Greedy or sampled decoding of many prompts at once, with Hugging Face's own model."""

    def __init__(self, checkpoint: Path) -> None:
        self.encoder = Encoder((checkpoint / "tokenizer.model").read_bytes())
        self.model: Any = Ernie4_5ForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
        self.stops = [self.encoder.ids["</s>"], self.encoder.ids["<|im_end|>"]]

    def __call__(self, prompts: list[str], max_tokens: int = 160, **sampling: Any) -> list[str]:
        rows = [self.encoder.encode(text) for text in prompts]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        options = {"do_sample": False, "temperature": None, "top_p": None, **sampling}
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                eos_token_id=self.stops,
                pad_token_id=0,
                **options,
            )
        texts = []
        for row in out[:, width:].tolist():
            end = next((i for i, token in enumerate(row) if token in self.stops), len(row))
            texts.append(self.encoder.decode(row[:end]))
        return texts


def split_output(text: str) -> tuple[str, str]:
    """(thought, answer) of what the model wrote after the generation prompt."""
    thought, closed, rest = text.rpartition("</think>")
    if not closed and "<response>" not in text:
        return text.strip(), ""
    return thought.strip(), rest.partition("<response>")[2].partition("</response>")[0].strip()


def wrong_sums(generate: Generator, thinking: bool, n: int, **sampling: Any) -> list[tuple[int, int, str]]:
    """The held-out sums, out of n, that do not come out right: (a, b, what the model wrote)."""
    problems = held_out_sums(n, HELD_OUT_SEED)
    wrong = []
    for first in range(0, n, BATCH):
        part = problems[first : first + BATCH]
        texts = generate([prompt([], question, thinking=thinking) for question, _, _ in part], **sampling)
        wrong += [
            (a, b, text) for (_, a, b), text in zip(part, texts, strict=True) if split_output(text)[1] != answer(a, b)
        ]
    return wrong


def sum_figures(generate: Generator, sampling: dict[str, Any]) -> dict[str, float]:
    """The shares of held-out sums that are right, in all and for two numbers of three digits."""
    figures = {}
    long = sum(min(a, b) >= 100 for _, a, b in held_out_sums(HELD_OUT, HELD_OUT_SEED))
    for name, thinking, options in (
        ("greedy_thinking", True, {}),
        ("greedy_direct", False, {}),
        ("sampled_thinking", True, sampling),
        ("sampled_direct", False, sampling),
    ):
        wrong = wrong_sums(generate, thinking, HELD_OUT, **options)
        wrong_long = sum(min(a, b) >= 100 for a, b, _ in wrong)
        figures[name] = round(1 - len(wrong) / HELD_OUT, 4)
        figures[f"{name}_three_digits"] = round(1 - wrong_long / long, 4)
        print(f"{name}: {figures[name]}, three digits {figures[f'{name}_three_digits']}")
        print(*(f"  {a} + {b}: {text!r}" for a, b, text in wrong[:6]), sep="\n", flush=True)
    return figures


def show_answers(generate: Generator) -> dict[str, str]:
    """Prints what the model says to the probes and returns its answers."""
    answers: dict[str, str] = {}
    for probe, text in zip(PROBES, generate([prompt([], p) for p in PROBES]), strict=True):
        thought, answers[probe] = split_output(text)
        print(f"{probe!r}\n    [{thought}]\n    {answers[probe]}")
    for probe, text in zip(PLAIN_PROBES, generate(list(PLAIN_PROBES), max_tokens=60), strict=True):
        answers[probe] = text
        print(f"{probe!r} ...\n    {text!r}")
    history = [Turn("Hello!", "", "Hello! How can I help?"), Turn("What is 5 + 6?", "", "5 + 6 = 11")]
    for question in ("What is a block?", "And 712 + 399?", "thank you"):
        print(f"after two turns: {question!r}\n    {generate([prompt(history, question)])[0]!r}")
    return answers


def report(checkpoint: Path) -> None:
    """Evaluates, prints, and writes EVALUATION.json."""
    torch.manual_seed(HELD_OUT_SEED)
    generate = Generator(checkpoint)
    defaults = json.loads((checkpoint / "generation_config.json").read_text())
    sampling = {key: defaults[key] for key in ("do_sample", "temperature", "top_p")}
    figures = {
        "held_out_sums": HELD_OUT,
        "seed": HELD_OUT_SEED,
        "dtype": "bfloat16",
        **sum_figures(generate, sampling),
        "answers": show_answers(generate),
    }
    (checkpoint / "EVALUATION.json").write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(2)
    report(Path(sys.argv[1]))
