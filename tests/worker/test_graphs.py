"""Recorded decode steps: filled up, replayed on other inputs, the same bits as computed afresh."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from fdserve import ops
from fdserve.models.config import read_config
from fdserve.models.layers import BatchTensors, KvCaches
from fdserve.models.loader import load_model
from fdserve.worker.batch import Batch
from fdserve.worker.graphs import DecodeGraphs, record_cuda_graph
from tests.e2e.engines import random_checkpoint
from tests.models.checkpoints import DENSE
from tests.models.stepping import BLOCK_SIZE, BLOCKS_PER_SEQUENCE, Chunk, Stepper

NOTHING = np.zeros(0, np.int32)


class Recorder:
    """Replays by running the work again, as a graph does with the inputs' memory; counts both."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.recorded += 1
        result = work()

        def replay() -> None:
            self.replayed += 1
            paddle.assign(work(), result)

        return result, replay


def decode(stepper: Stepper, tokens: dict[int, int]) -> Batch:
    """A step of one token for each of these sequences."""
    sequences = list(tokens)
    count = len(sequences)
    positions = np.array([stepper.lengths[sequence] for sequence in sequences], np.int32)
    width = -(-int(positions.max() + 1) // BLOCK_SIZE)
    return Batch(
        token_ids=np.array(list(tokens.values()), np.int32),
        positions=positions,
        query_starts=np.arange(count + 1, dtype=np.int32),
        context_lens=positions,
        block_tables=stepper.tables[sequences, :width],
        sample_indices=np.arange(count, dtype=np.int32),
        sample_rows=np.arange(count, dtype=np.int32),
        sample_lens=positions + 1,
        sample_counts=None,
        prompt_indices=NOTHING,
        prompt_targets=NOTHING,
        prompt_num_top=0,
    )


@pytest.fixture
def stepper(tmp_path: Path) -> Stepper:
    """Sequences that have begun, and one block more than they use."""
    checkpoint = random_checkpoint(tmp_path / "model", DENSE)
    model = load_model(checkpoint, read_config(checkpoint), dtype="float32")
    stepper = Stepper(model)
    stepper.caches = model.new_caches(4 * BLOCKS_PER_SEQUENCE + 1, BLOCK_SIZE, "float32")
    for sequence in range(3):
        stepper.step([Chunk(sequence, range(1, 5 + 7 * sequence))])
    return stepper


def test_replays_give_what_a_step_gives(stepper: Stepper) -> None:
    recorder = Recorder()
    longest = BLOCK_SIZE * BLOCKS_PER_SEQUENCE
    graphs = DecodeGraphs(
        stepper.model,
        stepper.caches,
        max_num_seqs=3,
        max_model_len=longest,
        spare_block=4 * BLOCKS_PER_SEQUENCE,
        record=recorder,
    )
    for tokens in ({0: 3, 1: 4, 2: 5}, {2: 7}, {0: 9, 2: 1, 1: 30}, {1: 8, 0: 2}):
        logits = graphs.logits(decode(stepper, tokens))
        assert logits is not None
        # The same step once more: it writes the same keys and values to the same places.
        expected = stepper.step([Chunk(sequence, [token]) for sequence, token in tokens.items()])
        assert (logits.numpy() == expected).all()
    # Sizes 1, 2 and 4 beforehand; every step is a replay.
    assert (recorder.recorded, recorder.replayed) == (3, 4)


def test_other_steps_are_left_to_others(stepper: Stepper) -> None:
    sizes = {"max_num_seqs": 2, "max_model_len": 64, "spare_block": 4 * BLOCKS_PER_SEQUENCE}
    graphs = DecodeGraphs(stepper.model, stepper.caches, record=Recorder(), **sizes)
    one = decode(stepper, {0: 3})
    two_tokens = {**vars(one), "token_ids": np.array([3, 4], np.int32)}
    nothing_sampled = {**vars(one), "sample_rows": NOTHING}
    asks_for_prompt = {**vars(one), "prompt_indices": np.zeros(1, np.int32)}
    for fields in (two_tokens, nothing_sampled, asks_for_prompt):
        assert graphs.logits(Batch(**fields)) is None
    assert graphs.logits(decode(stepper, {0: 3, 1: 4, 2: 5})) is None, "larger than any recorded"
    assert graphs.logits(one) is not None


def test_a_step_is_one_copy_to_where_the_inputs_are(stepper: Stepper, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: list[BatchTensors] = []
    copies: list[paddle.Tensor] = []
    forward, send = stepper.model.forward_tensors, ops.send

    def noted_forward(batch: BatchTensors, caches: KvCaches) -> paddle.Tensor:
        inputs.append(batch)
        return forward(batch, caches)

    def noted_send(values: paddle.Tensor, to: paddle.Tensor) -> None:
        copies.append(to)
        send(values, to)

    monkeypatch.setattr(stepper.model, "forward_tensors", noted_forward)
    monkeypatch.setattr(ops, "send", noted_send)
    sizes = {"max_num_seqs": 2, "max_model_len": 65, "spare_block": 4 * BLOCKS_PER_SEQUENCE}
    graphs = DecodeGraphs(stepper.model, stepper.caches, record=Recorder(), **sizes)
    held = inputs[-1]
    monkeypatch.setattr(ops, "to_tensor", None)
    for token in (3, 4):
        graphs.logits(decode(stepper, {0: token, 2: 5}))
        assert held.token_ids.tolist() == [token, 5]
        assert held.context_lens.tolist() == [stepper.lengths[0], stepper.lengths[2]]
    (address,) = {copy.data_ptr() for copy in copies}
    assert len(copies) == 2
    for part in (held.token_ids, held.context_lens, held.block_tables, held.rope):
        assert address <= part.data_ptr() < address + 4 * copies[0].size
        assert part.data_ptr() % 16 == 0


class FakeGraph:
    """Notes what is done to it."""

    made: list[FakeGraph] = []  # noqa: RUF012
    broken = False

    def __init__(self, place: object) -> None:
        self.place, self.done = place, ["begun"]
        self.made.append(self)

    def capture_begin(self) -> None:
        self.done.append("capturing")

    def capture_end(self) -> None:
        self.done.append("captured")
        if self.broken:
            raise OSError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        self.done.append("replayed")


def test_a_cuda_graph_is_ended_on_the_rank_s_own_gpu_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paddle.device.cuda.graphs.CUDAGraph", FakeGraph)
    monkeypatch.setattr(paddle, "CUDAPlace", lambda number: f"GPU {number}")
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:3")
    monkeypatch.setattr(paddle.device, "synchronize", lambda: None)
    # Kept for the process, by whichever test asked first.
    monkeypatch.setattr(ops, "own_place", ops.own_place.__wrapped__)
    calls: list[int] = []

    def work() -> int:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("not to be captured")
        return len(calls)

    result, replay = record_cuda_graph(work)
    replay()
    assert result == 2
    monkeypatch.setattr(FakeGraph, "broken", True)
    with pytest.raises(RuntimeError, match="not to be captured"):
        record_cuda_graph(work)
    assert [graph.place for graph in FakeGraph.made] == ["GPU 3"] * 2
    assert [graph.done[-1] for graph in FakeGraph.made] == ["replayed", "captured"]
