"""Rows to sample, as the sampler and its reference take them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fdserve import ops
from fdserve.ops import sampling_reference as reference
from tests.ops.arrays import Float, ints, tensor


@dataclass
class Row:
    """What one row asks for; every default is "off"."""

    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    top_k: int = 0
    seed: int = 0
    position: int = 0
    forced: int = -1
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    bias: dict[int, float] = field(default_factory=dict)
    allowed: list[int] | None = None
    mode: int = 0

    @property
    def floats(self) -> list[float]:
        return [self.temperature, self.top_p, self.min_p, self.repetition, self.presence, self.frequency]


def arguments(rows: list[Row]) -> list[npt.NDArray[Any]]:
    """The arrays of `sample` after the logits."""
    histories = [row.prompt + row.output for row in rows]
    return [
        np.array([row.floats for row in rows], np.float32).reshape(-1, 6),
        np.array([[row.top_k, row.seed, row.position, row.forced] for row in rows], np.int64).reshape(-1, 4),
        np.array([token for each in histories for token in each], np.int32),
        np.cumsum([0, *map(len, histories)]).astype(np.int32),
        np.array([len(row.prompt) for row in rows], np.int32),
        np.array([token for row in rows for token in row.bias], np.int32),
        np.array([value for row in rows for value in row.bias.values()], np.float32),
        np.cumsum([0, *(len(row.bias) for row in rows)]).astype(np.int32),
    ]


def options(rows: list[Row], vocab: int) -> dict[str, npt.NDArray[Any]]:
    """The optional arrays of `sample`; those that no row needs are left out."""
    given: dict[str, npt.NDArray[Any]] = {}
    masked = [row for row in rows if row.allowed is not None]
    if masked:
        bits = np.zeros((len(masked), -(-vocab // 32) * 32), np.uint8)
        for number, row in enumerate(masked):
            bits[number, row.allowed] = 1
        given["masks"] = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
        numbers = np.cumsum([row.allowed is not None for row in rows]) - 1
        given["mask_rows"] = np.where([row.allowed is not None for row in rows], numbers, -1).astype(np.int32)
    if any(row.mode for row in rows):
        given["logprob_modes"] = np.array([row.mode for row in rows], np.int32)
    return given


def sample(logits: Float, rows: list[Row], *, vocab: int | None = None, top: int = 0) -> list[npt.NDArray[Any]]:
    kept = tensor(logits, "float32")
    size = vocab or logits.shape[1]
    args = [ints(each, each.dtype.name) for each in arguments(rows)]
    extra = {name: ints(each, each.dtype.name) for name, each in options(rows, size).items()}
    out = ops.sample(kept, *args, vocab_size=size, num_top=top, **extra)
    assert (kept.numpy().view(np.uint32) == logits.view(np.uint32)).all(), "the logits were modified"
    return [each.numpy() for each in out]


def expect(logits: Float, rows: list[Row], *, vocab: int | None = None, top: int = 0) -> Any:
    size = vocab or logits.shape[1]
    return reference.sample(logits, *arguments(rows), vocab_size=size, num_top=top, **options(rows, size))


def random_logits(rng: np.random.Generator, rows: int, vocab: int) -> Float:
    """Rows from nearly flat to peaked; some of them coarse, so that they are full of ties."""
    spread = rng.choice([0.001, 0.3, 1, 3, 6], (rows, 1))
    grain = rng.choice([1e-6, 1e-6, 0.5], (rows, 1))
    return np.asarray(np.round(rng.standard_normal((rows, vocab)) * spread / grain) * grain, np.float32)


def random_row(rng: np.random.Generator, vocab: int) -> Row:
    """A row with any mix of features, each as often off as on."""

    def maybe(value: Any, off: Any) -> Any:
        return value if rng.random() < 0.5 else off

    penalised = rng.random() < 0.5
    tokens = [int(each) for each in rng.integers(0, min(vocab, 50), 40)] if penalised else []
    cut = int(rng.integers(0, 41))
    return Row(
        temperature=maybe(float(rng.uniform(0.2, 2)), 0.0 if rng.random() < 0.3 else 1.0),
        top_p=maybe(float(rng.uniform(0.01, 0.99)), 1.0),
        min_p=maybe(float(rng.uniform(0.001, 0.5)), 0.0),
        repetition=maybe(float(rng.uniform(0.5, 2)), 1.0),
        presence=maybe(float(rng.uniform(-2, 2)), 0.0),
        frequency=maybe(float(rng.uniform(-2, 2)), 0.0),
        top_k=maybe(int(rng.integers(1, rng.choice([20, 400, vocab + 1]) + 1)), 0),
        seed=int(rng.integers(0, 2**60)),
        position=int(rng.integers(0, 2**20)),
        prompt=tokens[:cut],
        output=tokens[cut:],
        bias=maybe({int(each): float(rng.normal() * 5) for each in rng.integers(0, vocab, 5)}, {}),
        allowed=maybe(rng.permutation(vocab)[: int(rng.choice([1, 30, vocab // 2, vocab]))].tolist(), None),
        mode=int(rng.integers(-1, 4)),
    )
