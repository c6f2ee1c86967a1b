"""What every kernel must give, on any device: float64 references over random inputs, odd shapes and empty rows."""

from __future__ import annotations

import ctypes

import numpy as np

from tests.cuda.harness import DTYPES, Array, Buffer, Device, rounded, to_bits, to_floats

Generator = np.random.Generator
EPS = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # half a step at 1


def code(dtype: str) -> ctypes.c_int:
    """The launchers' number of a dtype."""
    return ctypes.c_int(DTYPES.index(dtype))


def agree(right: Array, actual: Array, expected: Array, what: str) -> None:
    """`right` is true everywhere. If not, the error says how much is wrong, where, and by how far: who has a GPU for
    minutes must find the mistake by it.
    """
    if right.all():
        return
    places = np.argwhere(~right)
    first, last = (tuple(place.tolist()) for place in (places[0], places[-1]))
    with np.errstate(invalid="ignore"):
        apart = np.abs(actual[~right].astype(np.float64) - expected[~right])
    nans = int(np.isnan(apart).sum())
    farthest = "" if nans == len(apart) else f", at most {np.nanmax(apart):.3g} apart"
    raise AssertionError(
        f"{what}: {len(places)} of {right.size} wrong, from {first} ({actual[first]} for {expected[first]}) to {last} "
        f"({actual[last]} for {expected[last]}){farthest}, {nans} with a NaN"
    )


def close(actual: Array, expected: Array, tolerance: float) -> None:
    """Equal but for `tolerance`, relative to the numbers' size where that is above 1."""
    assert actual.shape == expected.shape
    error = np.abs(actual.astype(np.float64) - expected) / np.maximum(1.0, np.abs(expected))
    agree(error <= tolerance, actual, expected, f"not within {tolerance:.3g}")


def same_bits(actual: Array, expected: Array, dtype: str, what: str) -> None:
    """Equal 16-bit numbers."""
    agree(actual == expected, to_floats(actual, dtype), to_floats(expected, dtype), what)


def rms_norm(device: Device, rng: Generator, dtype: str, tokens: int, hidden: int, *, residual: bool) -> None:
    x, other = (rounded(rng.normal(size=(tokens, hidden)), dtype) for _ in range(2))
    weight = rounded(rng.normal(size=hidden), dtype)
    out, total = (device.empty((tokens, hidden), np.uint16) for _ in range(2))
    inputs = [device.put(to_bits(values, dtype)) for values in (x, other, weight)]
    device.call(
        "fdserve_cuda_rms_norm", inputs[0], inputs[1] if residual else None, inputs[2], 1e-5, tokens, hidden,
        code(dtype), out, total if residual else None,
    )  # fmt: skip
    expected = rounded(x + other, dtype) if residual else x
    if residual:
        close(to_floats(device.get(total), dtype), expected, 0)
    scale = 1 / np.sqrt((expected.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-5)
    close(to_floats(device.get(out), dtype), expected * scale * weight, 3 * EPS[dtype])
    for buffer in inputs:
        device.get(buffer)


def swiglu(device: Device, rng: Generator, dtype: str, tokens: int, inner: int) -> None:
    x = rounded(rng.normal(size=(tokens, 2 * inner)) * 3, dtype)
    out = device.empty((tokens, inner), np.uint16)
    device.call("fdserve_cuda_swiglu", device.put(to_bits(x, dtype)), tokens, inner, code(dtype), out)
    gate, up = x[:, :inner].astype(np.float64), x[:, inner:]
    close(to_floats(device.get(out), dtype), gate / (1 + np.exp(-gate)) * up, 2 * EPS[dtype])


def sum_ranks(device: Device, rng: Generator, dtype: str, ranks: int, size: int) -> None:
    """To the bit: float32 sums in the order of ranks, rounded once."""
    parts = rounded(rng.normal(size=(ranks, size)) * rng.choice([1, 100], size=(ranks, 1)), dtype)
    out = device.empty((size,), np.uint16)
    device.call(
        "fdserve_cuda_sum_ranks", device.put(to_bits(parts, dtype)), ctypes.c_int(ranks), size, code(dtype), out
    )
    total = np.zeros(size, np.float32)
    for part in parts:
        total += part
    close(to_floats(device.get(out), dtype), rounded(total, dtype), 0)


class CMoe(ctypes.Structure):
    """FdserveMoe of launchers.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "gate", "correction_bias", "up_gate", "down")),
        *((name, ctypes.c_void_p) for name in ("up_gate_scales", "down_scales", "shared", "out")),
        *((name, ctypes.c_int64) for name in ("tokens", "hidden", "inner", "experts", "top_k")),
        *((name, ctypes.c_int) for name in ("bits", "group")),
        ("norm_min", ctypes.c_float),
    ]


GROUP = 64


def quantized(rng: Generator, shape: tuple[int, ...], bits: int) -> tuple[Array, Array, Array]:
    """Integers as they are stored, their scales, and what they stand for."""
    high = 1 << bits - 1
    integers = rng.integers(-high, high, size=shape)
    scales = rng.uniform(0.5, 1.5, size=(*shape[:-1], shape[-1] // GROUP)) / high / np.sqrt(shape[-1])
    scales = scales.astype(np.float32)
    stored = integers.astype(np.int8)
    if bits == 4:
        stored = ((integers[..., ::2] + 8) | (integers[..., 1::2] + 8) << 4).astype(np.uint8)
    return stored, scales, integers * np.repeat(scales.astype(np.float64), GROUP, axis=-1)


def moe(
    device: Device,
    rng: Generator,
    dtype: str,
    tokens: int,
    hidden: int,
    inner: int,
    experts: int,
    top_k: int,
    bits: int = 16,
) -> None:
    """Right, and a token alone has the same bits."""
    x = rounded(rng.normal(size=(tokens, hidden)), dtype)
    gate = (rng.normal(size=(experts, hidden)) / np.sqrt(hidden) * 3).astype(np.float32)
    bias = rng.normal(size=experts).astype(np.float32) * 0.1
    shapes = (experts, 2 * inner, hidden), (experts, hidden, inner)
    if bits == 16:
        up_gate, down = (rounded(rng.normal(size=shape) / np.sqrt(shape[-1]), dtype) for shape in shapes)
        weights = [device.put(to_bits(each, dtype)) for each in (up_gate, down)]
        scales: list[Buffer] = []
    else:
        parts = [quantized(rng, shape, bits) for shape in shapes]
        weights, scales = ([device.put(part[at]) for part in parts] for at in (0, 1))
        up_gate, down = (part[2] for part in parts)
    shared = rounded(rng.normal(size=(tokens, hidden)), dtype)
    routing = [device.put(gate), device.put(bias)]

    def run(rows: slice) -> Array:
        count = len(x[rows])
        inputs = [device.put(to_bits(each[rows], dtype)) for each in (x, shared)]
        out = device.empty((count, hidden), np.uint16)
        pointers: list[ctypes.c_void_p | None] = [buffer.pointer for buffer in (inputs[0], *routing, *weights)]
        pointers += [buffer.pointer for buffer in scales] or [None, None]
        pointers += [inputs[1].pointer, out.pointer]
        call = CMoe(*pointers, count, hidden, inner, experts, top_k, bits, GROUP, 1e-12)
        size = device.workspace("fdserve_cuda_moe", ctypes.byref(call))
        workspace = device.empty((max(size, 1),), np.uint8)
        device.call("fdserve_cuda_moe", ctypes.byref(call), code(dtype), workspace)
        device.get(workspace)
        return device.get(out)

    together = run(slice(None))
    scores = x.astype(np.float64) @ gate.T
    p = np.exp(scores - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    expected = shared.astype(np.float64)
    for token in range(tokens):
        chosen = np.argsort(-(p[token] + bias), kind="stable")[:top_k]
        for expert in chosen:
            both = rounded(x[token].astype(np.float64) @ up_gate[expert].T, dtype).astype(np.float64)
            hidden_row = rounded(both[:inner] / (1 + np.exp(-both[:inner])) * both[inner:], dtype)
            weight = rounded(np.array(p[token, expert] / p[token, chosen].sum()), dtype)
            expected[token] += weight * (hidden_row @ down[expert].astype(np.float64).T)
    close(to_floats(together, dtype), expected, 6 * EPS[dtype])
    if tokens > 1:
        same_bits(run(slice(1, 2))[0], together[1], dtype, "other tokens change a token's bits")


def quant_linear(
    device: Device, rng: Generator, dtype: str, bits: int, tokens: int, depth: int, columns: int, *, to_float: bool
) -> None:
    """Right, and a row alone has the same bits."""
    x = rounded(rng.normal(size=(tokens, depth)), dtype)
    stored, scales, values = quantized(rng, (columns, depth), bits)
    weight, scale = device.put(stored), device.put(scales)

    def run(rows: slice) -> Array:
        count = len(x[rows])
        out = device.empty((count, columns), np.float32 if to_float else np.uint16)
        device.call(
            "fdserve_cuda_quant_linear", device.put(to_bits(x[rows], dtype)), count, weight, scale, ctypes.c_int(bits),
            ctypes.c_int(GROUP), depth, columns, code(dtype), ctypes.c_int(to_float), out,
        )  # fmt: skip
        return device.get(out)

    together = run(slice(None))
    expected = x.astype(np.float64) @ values.T
    if to_float:
        close(together, expected, 1e-4)
    else:
        close(to_floats(together, dtype), expected, 2 * EPS[dtype])
    alone = run(slice(0, 1))
    agree(alone == together[:1], alone, together[:1], "other rows change a row's bits")
