"""What quantization changes: `python -m bench accuracy [--model DIR] [--prompts N] [--tokens N]`.

Logits of every token of some texts, against those of the same checkpoint in bfloat16: the error's root mean square in
parts of the logits' standard deviation, the mean Kullback-Leibler divergence in nats, and how often the likeliest token
is the same. Then greedy continuations: how many of their tokens come before the first that differs. float32 shows what
bfloat16's own rounding amounts to. Texts are conversations of the kind the demo model is trained on; random ids where
the checkpoint is not the demo model.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fdserve.demo.data import documents
from fdserve.models.config import read_config
from fdserve.models.layers import ForwardBatch
from fdserve.models.loader import load_model
from fdserve.text.tokenizer import load_tokenizer

DEMO = Path(__file__).parents[1] / "fdserve/demo/checkpoint"
SEED = 424242  # no text of the training data
BLOCK = 64
SETTINGS = [
    ("float32", None, None),
    ("bfloat16", "wint8", None),
    ("bfloat16", "w8a8", None),
    ("bfloat16", "wint4", None),
    ("bfloat16", None, "int8"),
    ("bfloat16", "wint8", "int8"),
    ("bfloat16", "wint4", "int8"),
]
Floats = npt.NDArray[np.float32]


class Model:
    """A checkpoint under one setting, for one sequence at a time."""

    def __init__(self, directory: Path, dtype: str, quantization: str | None, kv: str | None, longest: int) -> None:
        self._model = load_model(directory, read_config(directory), dtype=dtype, quantization=quantization)
        self._caches = self._model.new_caches(-(-longest // BLOCK), BLOCK, kv)
        self._table = np.arange(-(-longest // BLOCK), dtype=np.int32)[None]

    def logits(self, ids: Sequence[int], context: int = 0, *, last: bool = False) -> Floats:
        """Of every token (or the last) of `ids`, which follow `context` tokens: [T, V]."""
        rows = [len(ids) - 1] if last else range(len(ids))
        batch = ForwardBatch(
            token_ids=_int32(ids),
            rope=self._model.rope_table(np.arange(context, context + len(ids), dtype=np.int32)),
            query_starts=_int32([0, len(ids)]),
            context_lens=_int32([context]),
            block_tables=self._table,
            sample_rows=_int32(rows),
        )
        answer: Floats = self._model.forward(batch, self._caches).numpy()
        return answer

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The `count` tokens that follow."""
        tokens = [int(self.logits(ids, last=True).argmax())]
        while len(tokens) < count:
            tokens.append(int(self.logits(tokens[-1:], len(ids) + len(tokens) - 1).argmax()))
        return tokens


def _int32(values: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.asarray(values, np.int32)


def texts(directory: Path, count: int, longest: int) -> list[list[int]]:
    """Token ids to measure on, at most `longest` each."""
    if directory.resolve() != DEMO.resolve():
        random = np.random.default_rng(0)
        return [random.integers(3, read_config(directory).vocab_size, longest).tolist() for _ in range(count)]
    tokenizer = load_tokenizer(directory)
    documents_of_it = itertools.islice(documents(SEED), count)
    return [tokenizer.encode("".join(piece.text for piece in each))[:longest] for each in documents_of_it]


def log_softmax(x: Floats) -> Floats:
    shifted = x - x.max(axis=1, keepdims=True)
    normalized: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return normalized


def same_beginning(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def compare(directory: Path, prompts: int, tokens: int, longest: int = 160) -> None:
    """Print a row a setting."""
    ids = texts(directory, prompts, longest)
    exact = Model(directory, "bfloat16", None, None, longest + tokens)
    expected = [exact.greedy(each[: len(each) // 2], tokens) for each in ids]
    print(f"{directory.name}: {sum(map(len, ids))} tokens, {prompts} continuations of {tokens}")
    print(f"{'weights':>9} {'kv':>5} {'rms/std':>8} {'KL':>8} {'top-1':>7} {'greedy':>7} {'whole':>6}")
    for dtype, quantization, kv in SETTINGS:
        other = Model(directory, dtype, quantization, kv, longest + tokens)
        errors, spread, divergences, agreements = [], [], [], []
        for each in ids:
            reference, logits = exact.logits(each), other.logits(each)
            errors.append(np.square(logits - reference).mean(axis=1))
            spread.append(reference.var(axis=1))
            p, q = log_softmax(reference), log_softmax(logits)
            divergences.append((np.exp(p) * (p - q)).sum(axis=1))
            agreements.append(reference.argmax(axis=1) == logits.argmax(axis=1))
        alike = [same_beginning(other.greedy(x[: len(x) // 2], tokens), y) for x, y in zip(ids, expected, strict=True)]
        print(
            f"{quantization or dtype:>9} {kv or '':>5} "
            f"{np.sqrt(np.concatenate(errors).mean() / np.concatenate(spread).mean()):8.4f} "
            f"{np.concatenate(divergences).mean():8.5f} {np.concatenate(agreements).mean():7.2%} "
            f"{np.mean(alike) / tokens:7.1%} {np.mean(np.array(alike) == tokens):6.0%}",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the measurement that the options ask for."""
    parser = argparse.ArgumentParser(prog="python -m bench accuracy", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args(argv)
    compare(options.model, options.prompts, options.tokens)


if __name__ == "__main__":
    main()
