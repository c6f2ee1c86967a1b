"""What attention and rope must give, on any device: float64 references over random sequences."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.cuda.checks import EPS, Generator, close, code, same_bits
from tests.cuda.harness import Array, Buffer, Device, rounded, to_bits, to_floats

MULTIPROCESSORS = (0, 1, 100000)  # how widely parts of the keys are shared out among blocks: not, a little, all


class CPaged(ctypes.Structure):
    """FdservePaged of launchers.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("block_tables", "query_starts", "context_lens")),
        *((name, ctypes.c_int) for name in ("sequences", "table_width", "block_size", "kv_heads")),
    ]


@dataclass(frozen=True)
class Shape:
    """Of an attention: the step's tokens and the tokens before them, of each sequence."""

    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16


class Step:
    """A step over a paged cache whose unused places hold NaNs."""

    def __init__(self, device: Device, rng: Generator, dtype: str, shape: Shape) -> None:
        self.device, self.dtype, self.shape = device, dtype, shape
        ends = [a + b for a, b in zip(shape.lengths, shape.contexts, strict=True)]
        size, sequences = shape.block_size, len(ends)
        self.longest = max(ends)
        width = -(-self.longest // size) + 1
        blocks = rng.permutation(sequences * width + 2)[: sequences * width].reshape(sequences, width)
        self.tables: npt.NDArray[np.int32] = blocks.astype(np.int32)
        cache = (sequences * width + 2, shape.kv_heads, size, shape.head_dim)
        self.keys, self.values = (np.full(cache, np.nan, np.float32) for _ in range(2))
        for sequence, end in enumerate(ends):
            places = np.arange(end)
            at = self.tables[sequence, places // size], slice(None), places % size
            for tensor in (self.keys, self.values):
                tensor[at] = rounded(rng.normal(size=(end, shape.kv_heads, shape.head_dim)), dtype)
        self.caches = [device.put(to_bits(tensor, dtype)) for tensor in (self.keys, self.values)]
        self.tokens = sum(shape.lengths)
        self.queries = rounded(rng.normal(size=(self.tokens, shape.heads, shape.head_dim)), dtype)

    def paged(self, lengths: Array, contexts: Array, tables: Array) -> tuple[Any, list[Buffer]]:
        """The structure and what it points at."""
        starts = np.concatenate([[0], np.cumsum(lengths)])
        buffers = [self.device.put(np.ascontiguousarray(each, np.int32)) for each in (tables, starts, contexts)]
        pointers = [buffer.pointer for buffer in buffers]
        shape = self.shape
        return CPaged(*pointers, len(lengths), tables.shape[1], shape.block_size, shape.kv_heads), buffers

    def attend(self, queries: Array, lengths: Array, contexts: Array, tables: Array, multiprocessors: int) -> Array:
        """The bits of the result on a device of so many multiprocessors; with none, no keys are shared out."""
        device, shape = self.device, self.shape
        paged, kept = self.paged(lengths, contexts, tables)
        tokens, longest, most = int(lengths.sum()), int((lengths + contexts).max()), int(lengths.max())
        out = device.empty((tokens, shape.heads, shape.head_dim), np.uint16)
        sizes = (len(lengths), tokens, most, longest, shape.heads, shape.kv_heads, shape.head_dim)
        number = ctypes.c_int(multiprocessors)
        size = device.workspace("fdserve_cuda_attention", *map(ctypes.c_int64, sizes), number)
        workspace = device.empty((size // 4,), np.float32) if size else None
        device.call(
            "fdserve_cuda_attention", device.put(to_bits(queries, self.dtype)), *self.caches, ctypes.byref(paged),
            tokens, most, longest, shape.heads, shape.head_dim, shape.head_dim**-0.5, code(self.dtype), out, workspace,
            number,
        )  # fmt: skip
        result = device.get(out)
        if workspace is not None:
            device.get(workspace)
        del kept
        return result

    def expected(self) -> Array:
        """In float64."""
        shape, results, token = self.shape, [], 0
        for sequence, (length, context) in enumerate(zip(shape.lengths, shape.contexts, strict=True)):
            places = np.arange(length + context)
            blocks, slots = self.tables[sequence, places // shape.block_size], places % shape.block_size
            keys, values = (each[blocks, :, slots].astype(np.float64) for each in (self.keys, self.values))
            for position in range(context, context + length):
                for head in range(shape.heads):
                    group = head // (shape.heads // shape.kv_heads)
                    scores = keys[: position + 1, group] @ self.queries[token, head] * shape.head_dim**-0.5
                    weights = np.exp(scores - scores.max())
                    results.append(weights @ values[: position + 1, group] / weights.sum())
                token += 1
        return np.array(results).reshape(self.queries.shape)


def attend(device: Device, rng: Generator, dtype: str, shape: Shape) -> None:
    """Right, and the same bits whole, shared out, and token by token."""
    step = Step(device, rng, dtype, shape)
    lengths, contexts = np.array(shape.lengths), np.array(shape.contexts)
    whole, *shared = (step.attend(step.queries, lengths, contexts, step.tables, number) for number in MULTIPROCESSORS)
    close(to_floats(whole, dtype), step.expected(), 4 * EPS[dtype])
    for each in shared:
        same_bits(each, whole, dtype, "sharing keys out changes bits")
    ends = np.cumsum(lengths)
    for sequence in np.flatnonzero(lengths > 1):
        last = ends[sequence] - 1
        context = contexts[sequence] + lengths[sequence] - 1
        alone = step.attend(
            step.queries[last : last + 1], np.array([1]), np.array([context]), step.tables[sequence : sequence + 1],
            MULTIPROCESSORS[sequence % 3],
        )  # fmt: skip
        same_bits(alone[0], whole[last], dtype, f"a decode of sequence {sequence} has other bits than its prefill")


def rope_and_store(device: Device, rng: Generator, dtype: str, shape: Shape) -> None:
    step = Step(device, rng, dtype, shape)
    lengths, contexts = np.array(shape.lengths), np.array(shape.contexts)
    paged, kept = step.paged(lengths, contexts, step.tables)
    heads, head_dim = shape.heads + 2 * shape.kv_heads, shape.head_dim
    qkv = rounded(rng.normal(size=(step.tokens, heads, head_dim)), dtype)
    angles = rng.uniform(0, 6, size=(step.tokens, head_dim // 2))
    rope = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    queries = device.empty((step.tokens, shape.heads, head_dim), np.uint16)
    caches = [device.empty(step.keys.shape, np.uint16) for _ in range(2)]
    device.call(
        "fdserve_cuda_rope_and_store", device.put(to_bits(qkv, dtype)), device.put(rope), ctypes.byref(paged),
        step.tokens, shape.heads, head_dim, code(dtype), queries, *caches,
    )  # fmt: skip
    cosines, sines = rope[:, None, : head_dim // 2], rope[:, None, head_dim // 2 :]
    x, y = qkv[:, : -shape.kv_heads, ::2], qkv[:, : -shape.kv_heads, 1::2]
    rotated = np.stack([x * cosines - y * sines, x * sines + y * cosines], axis=-1).reshape(step.tokens, -1, head_dim)
    close(to_floats(device.get(queries), dtype), rotated[:, : shape.heads], EPS[dtype])
    positions = np.concatenate([np.arange(c, c + n) for n, c in zip(lengths, contexts, strict=True)]).astype(int)
    sequences = np.repeat(np.arange(len(lengths)), lengths)
    at = step.tables[sequences, positions // shape.block_size], positions % shape.block_size
    for cache, expected in zip(caches, (rotated[:, shape.heads :], qkv[:, -shape.kv_heads :]), strict=True):
        bits = device.get(cache)
        close(to_floats(bits[at[0], :, at[1]], dtype), expected, EPS[dtype])
        untouched = np.ones((bits.shape[0], shape.block_size), bool)
        untouched[at] = False
        assert (bits.transpose(0, 2, 1, 3)[untouched] == 0xFFFF).all(), "a write to another place of the cache"
    del kept
