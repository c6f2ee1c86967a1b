"""The sampler's check: random rows under every parameter, against fdserve.ops.sampling_reference."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from fdserve.ops import sampling_reference as reference
from fdserve.ops.sampling import NO_LOGPROBS, TEMPERATURE_SCALED, TOP_P_NORMALIZED
from tests.cuda.checks import agree
from tests.cuda.harness import Array, Device

RESULTS = ("tokens", "logprobs", "top ids", "top logprobs")
Generator = np.random.Generator
_POINTERS = (
    *("logits", "float_params", "int_params", "history", "history_offsets", "prompt_lens"),
    *("bias_ids", "bias_values", "bias_offsets", "masks", "mask_rows", "logprob_modes"),
    *("tokens", "logprobs", "top_ids", "top_logprobs"),
)
_SIZES = ("rows", "stride", "vocab_size", "mask_words", "num_top", "first_id")


class CSample(ctypes.Structure):
    """FdserveSample of launchers.h."""

    _fields_ = [*((name, ctypes.c_void_p) for name in _POINTERS), *((name, ctypes.c_int64) for name in _SIZES)]


@dataclass(frozen=True)
class Inputs:
    """Of one call, by the names of the reference's arguments."""

    arrays: dict[str, Array]
    vocab_size: int
    num_top: int


def random_inputs(rng: Generator, rows: int, stride: int, vocab_size: int, num_top: int) -> Inputs:
    """Rows of every kind: flat and peaked, greedy and not, with ties, broken, penalized, biased, masked, forced."""
    logits = (rng.normal(size=(rows, stride)) * rng.choice([0.0, 0.01, 1, 8], size=(rows, 1))).astype(np.float32)
    ties = rng.random(rows) < 0.3
    logits[ties] = np.round(logits[ties])
    logits[:, vocab_size:] = 99  # never looked at
    if rows > 3:
        logits[3, vocab_size // 2] = np.nan
    floats = np.empty((rows, 6), np.float32)
    floats[:, 0] = rng.choice([0, 0.7, 1, 3], size=rows)
    floats[:, 1] = rng.choice([1, 0.3, 0.9, 0.999, 1e-5], size=rows)
    floats[:, 2] = rng.choice([0, 0, 0.05, 0.9], size=rows)
    floats[:, 3] = rng.choice([1, 1, 1.3, 0.8], size=rows)
    floats[:, 4:] = rng.choice([0, 0, 0.5, -1], size=(rows, 2))
    ints = np.empty((rows, 4), np.int64)
    ints[:, 0] = rng.choice([0, 0, 1, 5, 1000, vocab_size], size=rows)
    ints[:, 1] = rng.integers(0, 2**63 - 1, size=rows)
    ints[:, 2] = rng.integers(0, 10000, size=rows)
    ints[:, 3] = np.where(rng.random(rows) < 0.1, rng.integers(0, vocab_size, size=rows), -1)
    lengths = rng.choice([0, 1, 40, 300], size=rows)
    biases = rng.choice([0, 0, 1, 50], size=rows)
    # Ids of one row's biases differ: the order in which equal ones are added is nobody's.
    bias_ids = [rng.choice(vocab_size, size=min(count, vocab_size), replace=False) for count in biases]
    words = -(-vocab_size // 32)
    masks = rng.integers(-(2**31), 2**31, size=(3, words)).astype(np.int32)
    masks[2] = 0
    return Inputs(
        {
            "logits": logits,
            "float_params": floats,
            "int_params": ints,
            "history": rng.integers(0, vocab_size, size=lengths.sum()).astype(np.int32),
            "history_offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            "prompt_lens": (lengths // 2).astype(np.int32),
            "bias_ids": np.concatenate([np.zeros(0), *bias_ids]).astype(np.int32),
            "bias_values": rng.choice([-np.inf, 5, -3], size=sum(map(len, bias_ids))).astype(np.float32),
            "bias_offsets": np.concatenate([[0], np.cumsum([len(ids) for ids in bias_ids])]).astype(np.int32),
            "masks": masks,
            "mask_rows": rng.choice([-1, -1, 0, 1, 2], size=rows).astype(np.int32),
            "logprob_modes": rng.choice(
                [NO_LOGPROBS, 0, TEMPERATURE_SCALED, TOP_P_NORMALIZED, TEMPERATURE_SCALED | TOP_P_NORMALIZED], size=rows
            ).astype(np.int32),
        },
        vocab_size,
        num_top,
    )


def run(device: Device, inputs: Inputs) -> list[Array]:
    """tokens, logprobs, top_ids, top_logprobs."""
    arrays, rows = inputs.arrays, len(inputs.arrays["logits"])
    buffers = [device.put(array) for array in arrays.values()]
    outputs = [
        device.empty((rows, *([inputs.num_top] if top else [])), dtype)
        for top in (False, True)
        for dtype in (np.int32, np.float32)
    ]
    stride, words = arrays["logits"].shape[1], arrays["masks"].shape[1]
    pointers = [buffer.pointer for buffer in (*buffers, *outputs)]
    call = CSample(*pointers, rows, stride, inputs.vocab_size, words, inputs.num_top, 0)
    size = device.workspace("fdserve_cuda_sample", ctypes.byref(call))
    workspace = device.empty((max(size, 1),), np.uint8)
    device.call("fdserve_cuda_sample", ctypes.byref(call), workspace)
    for buffer in (*buffers, workspace):
        device.get(buffer)
    return [device.get(output) for output in outputs]


def one_row(inputs: Inputs, row: int) -> Inputs:
    """The inputs of a call with this row alone."""
    arrays: dict[str, Any] = dict(inputs.arrays)
    for name in ("logits", "float_params", "int_params", "prompt_lens", "mask_rows", "logprob_modes"):
        arrays[name] = arrays[name][row : row + 1]
    for names in (("history",), ("bias_ids", "bias_values")):
        offsets = inputs.arrays["history_offsets" if names == ("history",) else "bias_offsets"]
        start, end = offsets[row], offsets[row + 1]
        for name in names:
            arrays[name] = arrays[name][start:end]
        arrays["history_offsets" if names == ("history",) else "bias_offsets"] = np.array([0, end - start], np.int32)
    return Inputs(arrays, inputs.vocab_size, inputs.num_top)


def may_be_drawn(inputs: Inputs, row: int, token: int) -> bool:
    """Whether rounding excuses another token than the reference's: the random number lies on the border of both."""
    arrays = inputs.arrays
    raw = arrays["logits"][row, : inputs.vocab_size]
    biases = slice(*arrays["bias_offsets"][row : row + 2])
    past = arrays["history"][slice(*arrays["history_offsets"][row : row + 2])]
    changed = reference.processed_logits(
        raw,
        arrays["float_params"][row],
        past,
        int(arrays["prompt_lens"][row]),
        arrays["bias_ids"][biases],
        arrays["bias_values"][biases],
    )
    if (mask := arrays["mask_rows"][row]) >= 0:
        changed[~reference.allowed(arrays["masks"][mask], inputs.vocab_size)] = -np.inf
    top_k, seed, position, _ = (int(value) for value in arrays["int_params"][row])
    ids, probabilities = reference.candidates(changed, arrays["float_params"][row], top_k)
    number = reference.uniform(seed, position)
    upto = np.cumsum(probabilities)
    at = np.searchsorted(ids, token)
    # A cut at a rounding border may let in one candidate more or less, which moves all borders a little.
    below = upto[at - 1] if at > 0 else 0.0
    return bool(below - 1e-4 <= number <= (upto[at] if at < len(ids) else 1.0) + 1e-4)


def sample(device: Device, rng: Generator, rows: int, stride: int, vocab_size: int, num_top: int) -> None:
    """Right, and a row alone has the same bits."""
    inputs = random_inputs(rng, rows, stride, vocab_size, num_top)
    actual = run(device, inputs)
    expected = reference.sample(**inputs.arrays, vocab_size=vocab_size, num_top=num_top)
    tokens, logprobs, top_ids, top_logprobs = actual
    for row in np.flatnonzero(tokens != expected[0]).tolist():
        assert min(tokens[row], expected[0][row]) >= 0, f"row {row}: token {tokens[row]} for {expected[0][row]}"
        assert may_be_drawn(inputs, row, int(tokens[row])), f"row {row}: token {tokens[row]} for {expected[0][row]}"
    near = np.isclose(logprobs, expected[1], atol=2e-4, rtol=2e-5, equal_nan=True)
    agree(near | (tokens != expected[0]), logprobs, expected[1], "log-probabilities")
    agree(top_ids == expected[2], top_ids, expected[2], "top ids")
    # At the border of a top_p set rounding may leave one candidate more or less.
    infinite = np.isneginf(top_logprobs) != np.isneginf(expected[3])
    assert infinite.sum() <= rows // 8, f"{infinite.sum()} candidates more or less"
    near = np.isclose(top_logprobs, expected[3], atol=2e-3, rtol=2e-5, equal_nan=True)
    agree(near | infinite, top_logprobs, expected[3], "top log-probabilities")
    row = int(rng.integers(rows))
    alone = run(device, one_row(inputs, row))
    for name, a, b in zip(RESULTS, alone, actual, strict=True):
        equal = (a[0] == b[row]) | ((a[0] != a[0]) & (b[row] != b[row]))
        agree(np.atleast_1d(equal), np.atleast_1d(a[0]), np.atleast_1d(b[row]), f"{name} of row {row} alone differ")
