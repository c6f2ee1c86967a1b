"""How long the CUDA kernels take, beside the floors and beside torch on the same data."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.cuda.checks import CMoe, CPaged
from tests.cuda.gpu import Gpu, seconds
from tests.cuda.sampling import CSample, random_inputs
from tests.cuda.sampling_ranks import kernels_of_one

BF16 = ctypes.c_int(0)


@dataclass(frozen=True)
class Figure:
    """One line of the report: seconds, those that nothing can beat, and those of torch where it has such a kernel."""

    name: str
    seconds: float
    floor: float
    torch: float | None = None

    def row(self) -> str:
        """As a row of a Markdown table."""
        beside = "" if self.torch is None else f"{self.torch / self.seconds:.2f}x"
        share = f"{100 * self.floor / self.seconds:.0f} %"
        return f"| {self.name} | {1e6 * self.seconds:.1f} us | {share} | {beside} |"


HEADER = "| kernel | time | of the floor's rate | torch takes |\n|---|---|---|---|"


def pointer(tensor: Any) -> ctypes.c_void_p:
    """A torch tensor's address."""
    return ctypes.c_void_p(tensor.data_ptr())


def bf16(*shape: int) -> Any:
    """Random numbers on the device."""
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def rows(gpu: Gpu, copy: float) -> Iterator[Figure]:
    """RMSNorm and SwiGLU."""
    for tokens, hidden in ((64, 8192), (8192, 8192), (8192, 2560)):
        x, residual, weight = bf16(tokens, hidden), bf16(tokens, hidden), bf16(hidden)
        out, total = torch.empty_like(x), torch.empty_like(x)

        def run(x: Any = x, residual: Any = residual, weight: Any = weight, out: Any = out, total: Any = total) -> None:
            gpu.call(
                "fdserve_cuda_rms_norm", pointer(x), pointer(residual), pointer(weight), 1e-5, *x.shape, BF16,
                pointer(out), pointer(total),
            )  # fmt: skip

        def by_torch(x: Any = x, residual: Any = residual, weight: Any = weight) -> Any:
            return torch.nn.functional.rms_norm(x + residual, weight.shape, weight, 1e-5)

        floor = 4 * x.numel() * 2 / copy
        yield Figure(f"rms_norm + residual [{tokens}, {hidden}]", seconds(run), floor, seconds(by_torch))
    gate_up = bf16(8192, 2 * 12288)
    out = bf16(8192, 12288)
    took = seconds(lambda: gpu.call("fdserve_cuda_swiglu", pointer(gate_up), *out.shape, BF16, pointer(out)))
    yield Figure("swiglu [8192, 12288]", took, 3 * out.numel() * 2 / copy)
    for ranks in (2, 8):
        parts, total = bf16(ranks, 512, 8192), bf16(512, 8192)
        arguments = pointer(parts), ctypes.c_int(ranks), total.numel(), BF16, pointer(total)
        took = seconds(lambda arguments=arguments: gpu.call("fdserve_cuda_sum_ranks", *arguments))  # type: ignore[misc]
        yield Figure(f"sum of {ranks} ranks, [512, 8192]", took, (ranks + 1) * total.numel() * 2 / copy)


class Sequences:
    """`count` sequences of `context` tokens in a paged cache, of which the last `tokens` are the step's."""

    def __init__(self, count: int, context: int, tokens: int, heads: int, kv_heads: int, head_dim: int) -> None:
        size, width = 64, -(-context // 64)
        self.tokens, self.longest = count * tokens, context
        self.shape = (heads, kv_heads, head_dim)
        self.tables = torch.randperm(count * width, device="cuda", dtype=torch.int32).reshape(count, width)
        self.starts = torch.arange(0, (count + 1) * tokens, tokens, device="cuda", dtype=torch.int32)
        self.contexts = torch.full((count,), context - tokens, device="cuda", dtype=torch.int32)
        self.keys, self.values = (bf16(count * width, kv_heads, size, head_dim) for _ in range(2))
        self.queries = bf16(self.tokens, heads, head_dim)
        self.out = torch.empty_like(self.queries)
        self.paged = CPaged(
            *map(torch.Tensor.data_ptr, (self.tables, self.starts, self.contexts)), count, width, size, kv_heads
        )
        self.step_tokens = tokens

    def run(self, gpu: Gpu) -> float:
        """Seconds of the attention."""
        heads, kv_heads, head_dim = self.shape
        sizes = (len(self.tables), self.tokens, self.step_tokens, self.longest, heads, kv_heads, head_dim)
        wanted = gpu.library.fdserve_cuda_attention_workspace(
            *map(ctypes.c_int64, sizes), ctypes.c_int(gpu.multiprocessors)
        )
        workspace = torch.empty(wanted, dtype=torch.uint8, device="cuda")
        room = pointer(workspace) if wanted else None
        return seconds(
            lambda: gpu.call(
                "fdserve_cuda_attention",
                pointer(self.queries),
                pointer(self.keys),
                pointer(self.values),
                ctypes.byref(self.paged),
                self.tokens,
                self.step_tokens,
                self.longest,
                heads,
                head_dim,
                head_dim**-0.5,
                BF16,
                pointer(self.out),
                room,
                ctypes.c_int(gpu.multiprocessors),
            )
        )


def by_sdpa(count: int, context: int, tokens: int, heads: int, kv_heads: int, head_dim: int) -> float:
    """Seconds of torch's attention over dense tensors of the same sizes."""
    q = bf16(count, heads, tokens, head_dim)
    k, v = (bf16(count, kv_heads, context, head_dim) for _ in range(2))
    causal = tokens == context
    return seconds(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True))


def attention(gpu: Gpu, copy: float, matmul: float) -> Iterator[Figure]:
    """Decode against the bytes of keys and values, prefill against the products' FLOPs."""
    heads, kv_heads, head_dim = 64, 8, 128
    for count, context in ((1, 4096), (8, 4096), (64, 512), (64, 4096), (1, 131072), (256, 2048)):
        took = Sequences(count, context, 1, heads, kv_heads, head_dim).run(gpu)
        # A copy reads and writes: only half of its bytes are read.
        floor = count * context * kv_heads * head_dim * 4 / copy
        beside = by_sdpa(count, context, 1, heads, kv_heads, head_dim)
        yield Figure(f"decode attention, {count} x {context} tokens", took, floor, beside)
    for count, context in ((1, 2048), (4, 2048), (1, 16384)):
        took = Sequences(count, context, context, heads, kv_heads, head_dim).run(gpu)
        floor = 2 * count * heads * head_dim * context * (context + 1) / matmul
        beside = by_sdpa(count, context, context, heads, kv_heads, head_dim)
        yield Figure(f"prefill attention, {count} x {context} tokens", took, floor, beside)


def sampler(gpu: Gpu, copy: float) -> Iterator[Figure]:
    """Greedy and sampled rows with the 20 likeliest tokens' log-probabilities."""
    vocab, top = 103424, 20
    for rows in (1, 64, 256):
        logits = torch.randn(rows, vocab, device="cuda") * 3
        for name, temperature, top_p in (("greedy", 0.0, 1.0), ("temperature", 1.0, 1.0), ("top_p 0.8", 1.0, 0.8)):
            params = [temperature, top_p, 0.0, 1.0, 0.0, 0.0]
            floats = torch.tensor([params] * rows, device="cuda")
            ints = torch.tensor([[0, row, 7, -1] for row in range(rows)], device="cuda")
            zeros = torch.zeros(rows + 1, dtype=torch.int32, device="cuda")
            outputs = [
                torch.empty(rows, dtype=torch.int32, device="cuda"),
                torch.empty(rows, device="cuda"),
                torch.empty(rows, top, dtype=torch.int32, device="cuda"),
                torch.empty(rows, top, device="cuda"),
            ]
            tensors = (logits, floats, ints, zeros, zeros, zeros, zeros, zeros.float(), zeros)
            addresses = [tensor.data_ptr() for tensor in tensors] + [None] * 3 + [each.data_ptr() for each in outputs]
            call = CSample(*addresses, rows, vocab, vocab, 0, top)
            size = gpu.library.fdserve_cuda_sample_workspace(ctypes.byref(call))
            workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
            took = seconds(
                lambda call=call, workspace=workspace: gpu.call(  # type: ignore[misc]
                    "fdserve_cuda_sample", ctypes.byref(call), pointer(workspace)
                )
            )
            beside = seconds(lambda logits=logits: torch.topk(torch.log_softmax(logits, -1), top))  # type: ignore[misc]
            # A copy reads and writes: only half of its bytes are read.
            yield Figure(f"sample, {rows} rows, {name}, top 20", took, logits.numel() * 8 / copy, beside)


def sampler_of_ranks(gpu: Gpu, copy: float) -> Iterator[Figure]:
    """One of eight ranks' kernels, without the gatherings between them."""
    rng = np.random.default_rng(5)
    for rows in (1, 64, 256):
        inputs = random_inputs(rng, rows, 103424, 103424, 20)
        inputs.arrays["float_params"][:] = [1, 0.8, 0, 1, 0, 0]
        inputs.arrays["int_params"][:, ::3] = [0, -1]
        inputs.arrays["mask_rows"][:] = -1
        inputs.arrays["logprob_modes"][:] = 0
        inputs.arrays["bias_offsets"][:] = 0
        took = seconds(kernels_of_one(gpu, inputs, 8))
        # A copy reads and writes: only half of its bytes are read.
        yield Figure(f"sample on one of 8 ranks, {rows} rows, top_p 0.8, top 20", took, rows * 103424 / 8 * 8 / copy)


def quantized(gpu: Gpu, copy: float, matmul: float) -> Iterator[Figure]:
    """Linear layers with integer weights, beside torch's with bfloat16."""
    depth, columns, group = 8192, 10240, 64
    dense = bf16(columns, depth)
    scales = torch.rand(columns, depth // group, device="cuda")
    for bits in (8, 4):
        weight = torch.randint(0, 256, (columns, depth * bits // 8), dtype=torch.uint8, device="cuda")
        for tokens in (1, 16, 256, 2048):
            x, out = bf16(tokens, depth), bf16(tokens, columns)

            def run(x: Any = x, out: Any = out, weight: Any = weight, bits: int = bits) -> None:
                gpu.call(
                    "fdserve_cuda_quant_linear", pointer(x), x.shape[0], pointer(weight), pointer(scales),
                    ctypes.c_int(bits), ctypes.c_int(group), depth, columns, BF16, ctypes.c_int(0), pointer(out),
                )  # fmt: skip

            read = 2 * (weight.numel() + 4 * scales.numel()) / copy
            floor = max(read, 2 * tokens * depth * columns / matmul)
            beside = seconds(lambda x=x: x @ dense.T)  # type: ignore[misc]
            yield Figure(f"wint{bits} linear, {tokens} rows, {depth} to {columns}", seconds(run), floor, beside)


def experts(gpu: Gpu, copy: float, matmul: float) -> Iterator[Figure]:
    """The mixture of experts in the 21B shape."""
    hidden, inner, count, top_k = 2560, 1536, 64, 6
    gate, bias = torch.randn(count, hidden, device="cuda") / 50, torch.zeros(count, device="cuda")
    up_gate, down = bf16(count, 2 * inner, hidden), bf16(count, hidden, inner)
    for tokens in (1, 8, 64, 512, 4096):
        x, out = bf16(tokens, hidden), bf16(tokens, hidden)
        pointers = [tensor.data_ptr() for tensor in (x, gate, bias, up_gate, down)]
        call = CMoe(*pointers, None, None, None, out.data_ptr(), tokens, hidden, inner, count, top_k, 16, 0, 1e-12)
        size = gpu.library.fdserve_cuda_moe_workspace(ctypes.byref(call))
        workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
        took = seconds(
            lambda call=call, workspace=workspace: gpu.call(  # type: ignore[misc]
                "fdserve_cuda_moe", ctypes.byref(call), BF16, pointer(workspace)
            )
        )
        touched = min(count, tokens * top_k)
        floor = max(touched * 3 * inner * hidden * 4 / copy, tokens * top_k * 6 * inner * hidden / matmul)
        yield Figure(f"experts of the 21B shape, {tokens} tokens", took, floor)
