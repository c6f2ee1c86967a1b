"""The ranks' sampler: what every rank gives is what the whole logits give, bit for bit."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fdserve.ops.collectives import vocabulary_starts
from fdserve.ops.sampling import NO_LOGPROBS
from fdserve.ops.sampling_gathered import MAX_RANKS, UNSETTLED
from tests.cuda.checks import agree
from tests.cuda.harness import Array, Buffer, Device
from tests.cuda.sampling import RESULTS, CSample, Inputs, random_inputs, run

Generator = np.random.Generator
STEPS = {"offer": "offered", "weigh": "weighed", "settle": "settled"}


class CRanks(ctypes.Structure):
    """FdserveRanks of launchers.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("offered", "weighed", "settled", "workspace")),
        *((name, ctypes.c_int) for name in ("rank", "ranks")),
        ("starts", ctypes.c_int * (MAX_RANKS + 1)),
    ]


class CSizes(ctypes.Structure):
    """FdserveSampleSizes of launchers.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("workspace", "offered", "weighed", "settled")]


class Rank:
    """One rank's call, step by step."""

    def __init__(self, device: Device, inputs: Inputs, starts: list[int], rank: int, stride: int) -> None:
        self._device, self._rows = device, len(inputs.arrays["logits"])
        part = inputs.arrays["logits"][:, starts[rank] : starts[rank + 1]]
        logits = np.full((self._rows, max(part.shape[1], stride)), np.nan, np.float32)
        logits[:, : part.shape[1]] = part
        arrays = inputs.arrays | {"logits": logits}
        self._buffers = [device.put(array) for array in arrays.values()]
        shapes = [(self._rows, *([inputs.num_top] if top else [])) for top in (False, True)]
        self.outputs = [device.empty(shape, dtype) for shape in shapes for dtype in (np.int32, np.float32)]
        pointers = [buffer.pointer for buffer in (*self._buffers, *self.outputs)]
        words = arrays["masks"].shape[1]
        self._call = CSample(*pointers, self._rows, logits.shape[1], inputs.vocab_size, words, inputs.num_top, 0)
        self._ranks = CRanks(None, None, None, None, rank, len(starts) - 1)
        self._ranks.starts[: len(starts)] = starts
        self._sizes = CSizes()
        device.library.fdserve_cuda_sample_sizes(*self._structures, ctypes.byref(self._sizes))
        self._workspace = device.empty((self._sizes.workspace,), np.uint8)
        self._ranks.workspace = self._workspace.pointer
        self._gathered: list[Buffer] = []

    @property
    def _structures(self) -> tuple[Any, Any]:
        return ctypes.byref(self._call), ctypes.byref(self._ranks)

    def launch(self, name: str, *out: Buffer) -> None:
        """Run a step's kernels."""
        self._device.call(f"fdserve_cuda_sample_{name}", *self._structures, *out)

    def step(self, name: str, size: str) -> Array:
        """What the rank writes for the others."""
        out = self.room(size)
        self.launch(name, out)
        return self._device.get(out)

    def room(self, size: str) -> Buffer:
        """For what the rank writes."""
        return self._device.empty((self._rows, getattr(self._sizes, size)), np.uint8)

    def take(self, size: str, everyone: Array) -> None:
        """What all have written."""
        self._gathered.append(self._device.put(everyone))
        setattr(self._ranks, size, self._gathered[-1].pointer)

    def finish(self) -> list[Array]:
        """tokens, logprobs, top_ids, top_logprobs."""
        self.launch("finish")
        for buffer in (*self._buffers, *self._gathered, self._workspace):
            self._device.get(buffer)
        return [self._device.get(output) for output in self.outputs]


def gathered(
    device: Device, inputs: Inputs, world_size: int, stride: int = 0, steps: Mapping[str, str] = STEPS
) -> list[Rank]:
    """The ranks before their last step. They take turns."""
    starts = vocabulary_starts(inputs.vocab_size, world_size)
    ranks = [Rank(device, inputs, starts, rank, stride) for rank in range(world_size)]
    for name, size in steps.items():
        everyone = np.stack([rank.step(name, size) for rank in ranks])
        for rank in ranks:
            rank.take(size, everyone)
    return ranks


def kernels_of_one(device: Device, inputs: Inputs, world_size: int) -> Callable[[], None]:
    """What runs all kernels of the first rank, everything being gathered already."""
    rank = gathered(device, inputs, world_size)[0]
    rooms = {name: rank.room(size) for name, size in STEPS.items()}

    def run_all() -> None:
        for name, room in rooms.items():
            rank.launch(name, room)
        rank.launch("finish")

    return run_all


def expect_that_of_one(
    device: Device, inputs: Inputs, world_size: int, stride: int = 0, steps: Mapping[str, str] = STEPS
) -> Array:
    """Which rows the candidates settle: those are equal to the bit, on every rank."""
    whole = replace(inputs, arrays=inputs.arrays | {"logits": inputs.arrays["logits"][:, : inputs.vocab_size]})
    alone = run(device, whole)
    results = [rank.finish() for rank in gathered(device, whole, world_size, stride, steps)]
    settled: Array = results[0][0] != UNSETTLED
    for each in results:
        agree((each[0] != UNSETTLED) == settled, each[0], results[0][0], "ranks settle other rows")
        for name, ours, theirs in zip(RESULTS, each, alone, strict=True):
            equal = ours.view(np.int32) == theirs.view(np.int32)
            unsettled = ~settled if equal.ndim == 1 else ~settled[:, None]
            agree(equal | unsettled, ours, theirs, f"{name} differ from those of one rank")
    return settled


def sample_ranks(device: Device, rng: Generator, world_size: int, rows: int, vocab_size: int, num_top: int) -> None:
    """Random rows of every kind."""
    inputs = random_inputs(rng, rows, vocab_size, vocab_size, num_top)
    settled = expect_that_of_one(device, inputs, world_size, stride=int(rng.integers(2)) * (vocab_size + 3))
    arrays = inputs.arrays
    temperature, top_p, min_p = arrays["float_params"][:, :3].T
    top_k, forced = arrays["int_params"][:, 0], arrays["int_params"][:, 3]
    cut = (arrays["logprob_modes"] >= 2) & (top_p < 1)
    decided = (temperature == 0) | (forced >= 0) | ((top_k <= 0) & (top_p >= 1) & (min_p <= 0)) | (top_k == 1)
    assert settled[decided & ~cut].all(), "a row that needs no candidates, or few, is not settled"
    assert (~settled)[cut & ~np.isnan(arrays["logits"]).any(axis=1)].all()


def greedy(device: Device, rng: Generator, world_size: int, rows: int, vocab_size: int) -> None:
    """Rows of every kind after one gathering: it settles those that are greedy, or forced, and tell no logprobs."""
    inputs = random_inputs(rng, rows, vocab_size, vocab_size, 3)
    temperature, forced = inputs.arrays["float_params"][:, 0], inputs.arrays["int_params"][:, 3]
    temperature[: rows - rows // 4] = 0
    inputs.arrays["logprob_modes"][rows // 4 :] = NO_LOGPROBS
    settled = expect_that_of_one(device, inputs, world_size, steps={"offer": STEPS["offer"]})
    told = inputs.arrays["logprob_modes"] != NO_LOGPROBS
    assert settled[~told & ((temperature == 0) | (forced >= 0))].all()
    broken = np.isnan(inputs.arrays["logits"]).any(axis=1)
    assert not settled[told & ~broken].any()


def draws(device: Device, rng: Generator, world_size: int, rows: int) -> None:
    """Nuclei that the candidates hold and nuclei that they do not, and every other cut, at many random numbers."""
    vocab_size = 8192
    inputs = random_inputs(rng, rows, vocab_size, vocab_size, 3)
    floats, ints = inputs.arrays["float_params"], inputs.arrays["int_params"]
    spread = np.array([8.0, 4.0, 1.0, 0.0])[np.arange(rows) % 4]
    inputs.arrays["logits"][:] = (rng.standard_normal((rows, vocab_size)) * spread[:, None]).astype(np.float32)
    floats[:] = [1, 1, 0, 1, 0, 0]
    floats[:, 1] = rng.choice([0.2, 0.5, 0.9, 1], size=rows)
    floats[:, 2] = rng.choice([0, 0, 0.02, 0.3], size=rows)
    ints[:, 0] = rng.choice([0, 0, 7, 128, 129], size=rows)
    ints[:, 3] = -1
    inputs.arrays["mask_rows"][:] = -1
    inputs.arrays["logprob_modes"][:] = 0
    settled = expect_that_of_one(device, inputs, world_size)
    peaked = (spread == 8) & (floats[:, 1] < 1) & (ints[:, 0] <= 128)
    assert settled[peaked].all(), "a small nucleus is not settled"
    unbiased = np.diff(inputs.arrays["bias_offsets"]) == 0
    wide = (spread == 0) & (floats[:, 2] > 0) & (ints[:, 0] == 0) & unbiased
    assert not settled[wide].any()
