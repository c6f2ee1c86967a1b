"""Running a model step by step the way a worker does, and several ranks of one in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import paddle

from fdserve.models.config import read_config
from fdserve.models.ernie4_5 import Ernie4_5
from fdserve.models.layers import ForwardBatch, Ints
from fdserve.models.loader import load_model

BLOCK_SIZE = 16
BLOCKS_PER_SEQUENCE = 12


class Chunk(NamedTuple):
    """The next tokens of a sequence; `sequence` numbers it, from 0."""

    sequence: int
    tokens: Sequence[int]


class Stepper:
    """A model and the caches of up to `sequences` sequences, whose blocks are scattered over the pool."""

    def __init__(self, model: Ernie4_5, sequences: int = 4) -> None:
        self.model = model
        self.caches = model.new_caches(sequences * BLOCKS_PER_SEQUENCE, BLOCK_SIZE)
        blocks = np.random.default_rng(1).permutation(sequences * BLOCKS_PER_SEQUENCE)
        self.tables = blocks.reshape(sequences, BLOCKS_PER_SEQUENCE).astype(np.int32)
        self.lengths = [0] * sequences

    def step(self, chunks: Sequence[Chunk], rows: Sequence[int] | None = None) -> npt.NDArray[np.float32]:
        """The logits [R, V] of these rows of the step's tokens (None: all), after computing the chunks."""
        counts = [len(chunk.tokens) for chunk in chunks]
        contexts = [self.lengths[chunk.sequence] for chunk in chunks]
        positions = [np.arange(start, start + count) for start, count in zip(contexts, counts, strict=True)]
        batch = ForwardBatch(
            token_ids=int32([token for chunk in chunks for token in chunk.tokens]),
            rope=self.model.rope_table(np.concatenate(positions).astype(np.int32)),
            query_starts=int32(np.cumsum([0, *counts])),
            context_lens=int32(contexts),
            block_tables=int32(self.tables[[chunk.sequence for chunk in chunks]]),
            sample_rows=int32(range(sum(counts)) if rows is None else rows),
        )
        for chunk, count in zip(chunks, counts, strict=True):
            self.lengths[chunk.sequence] += count
        logits: npt.NDArray[np.float32] = self.model.forward(batch, self.caches).numpy()
        return logits

    def greedy(self, sequence: int, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` tokens that follow the prompt."""
        last = self.step([Chunk(sequence, prompt)], [len(prompt) - 1])
        tokens = [int(last.argmax())]
        while len(tokens) < count:
            tokens.append(int(self.step([Chunk(sequence, tokens[-1:])]).argmax()))
        return tokens


def int32(values: Any) -> Ints:
    return np.asarray(values, np.int32)


def load(directory: Path, dtype: str, **options: Any) -> Ernie4_5:
    return load_model(directory, read_config(directory), dtype=dtype, **options)


class LocalGroup:
    """Ranks that are threads of this process and take turns: one computes while the others wait in a collective."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._turn = threading.Condition()
        self._given: dict[int, Any] = {}
        self._joint: Any = None
        self._round = 0

    def collective(self, rank: int, join: Callable[[list[Any]], Any]) -> Callable[[Any], Any]:
        """What rank number `rank` calls with its tensor to get `join` of everyone's."""

        def call(tensor: Any) -> Any:
            self._given[rank] = tensor
            if len(self._given) == self.world_size:
                self._joint = join([self._given[other] for other in range(self.world_size)])
                self._given.clear()
                self._round += 1
                self._turn.notify_all()
            else:
                now = self._round
                if not self._turn.wait_for(lambda: self._round > now, timeout=60):
                    raise TimeoutError("another rank never came")
            return self._joint

        return call

    def run(self, rank_main: Callable[[dict[str, Any]], Any]) -> list[Any]:
        """What `rank_main(load_model's keyword arguments)` returns on each rank."""
        results: dict[int, Any] = {}

        def main(rank: int) -> None:
            with self._turn:
                results[rank] = rank_main(
                    {
                        "rank": rank,
                        "world_size": self.world_size,
                        "all_reduce": self.collective(rank, paddle.add_n),
                    }
                )

        threads = [threading.Thread(target=main, args=(rank,)) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        return [results[rank] for rank in range(self.world_size)]
