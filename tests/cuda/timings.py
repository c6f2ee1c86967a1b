"""How long the CUDA kernels take, beside the floors and beside torch on the same data."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from tests.cuda.attention import CPaged
from tests.cuda.checks import CMoe
from tests.cuda.gpu import Gpu, seconds
from tests.cuda.report import Figure, Work
from tests.cuda.sampling import CSample, random_inputs
from tests.cuda.sampling_ranks import kernels_of_one

BF16 = ctypes.c_int(0)
GROUP = 64
Measure = tuple[str, Callable[[Gpu], Figure]]


def groups() -> dict[str, list[Measure]]:
    """Every figure, by kernel, those with goals first."""
    decodes = ((64, 4096), (1, 4096), (8, 4096), (64, 512), (1, 131072), (256, 2048))
    prefills = ((4, 2048), (1, 16384), (1, 2048))
    return {
        "rows": [
            *(
                (f"rms_norm + residual [{tokens}, {hidden}]", partial(rms_norm, tokens, hidden))
                for tokens, hidden in ((8192, 8192), (8192, 2560), (64, 8192))
            ),
            ("swiglu [8192, 12288]", swiglu),
            *((f"sum of {ranks} ranks, [512, 8192]", partial(sum_ranks, ranks)) for ranks in (2, 8)),
        ],
        "attention": [
            *((f"decode attention, {n} x {context} tokens", partial(decode, n, context)) for n, context in decodes),
            ("decode attention, 64 x 4096 tokens, 16 heads of 2", partial(decode, 64, 4096, heads=(16, 2))),
            *((f"prefill attention, {n} x {context} tokens", partial(prefill, n, context)) for n, context in prefills),
            ("prefill attention, 4 x 2048 tokens, 16 heads of 2", partial(prefill, 4, 2048, heads=(16, 2))),
            ("attention, 64 decodes of 4096 beside a chunk of 512", mixed),
        ],
        "sampler": [
            (f"sample, {rows} rows, {name}, top 20", partial(sample, rows, temperature, top_p))
            for rows in (256, 64, 1)
            for name, temperature, top_p in (("greedy", 0.0, 1.0), ("temperature", 1.0, 1.0), ("top_p 0.8", 1.0, 0.8))
        ],
        "sampler of ranks": [
            (f"sample on one of 8 ranks, {rows} rows, top_p 0.8, top 20", partial(sample_on_a_rank, rows))
            for rows in (1, 64, 256)
        ],
        "quantized": [
            (f"wint{bits} linear, {tokens} rows, 8192 to 10240", partial(quantized, bits, tokens))
            for bits in (8, 4)
            for tokens in (1, 16, 256, 2048)
        ],
        "experts": [
            (f"experts of the 21B shape, {tokens} tokens", partial(experts, tokens)) for tokens in (1, 8, 64, 512, 4096)
        ],
    }


def pointer(tensor: Any) -> ctypes.c_void_p:
    """A torch tensor's address."""
    return ctypes.c_void_p(tensor.data_ptr())


def bf16(*shape: int) -> Any:
    """Random numbers on the device."""
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def by_torch(work: Callable[[], object]) -> float | None:
    """Seconds of torch's own kernel; None where it has none that takes this."""
    try:
        return seconds(work)
    except Exception:  # whatever it lacks, our own figure is to be told
        return None


def rms_norm(tokens: int, hidden: int, gpu: Gpu) -> Figure:
    x, residual, weight = bf16(tokens, hidden), bf16(tokens, hidden), bf16(hidden)
    out, total = torch.empty_like(x), torch.empty_like(x)
    arguments = pointer(x), pointer(residual), pointer(weight), 1e-5, tokens, hidden, BF16, pointer(out), pointer(total)
    took = seconds(lambda: gpu.call("fdserve_cuda_rms_norm", *arguments))
    beside = by_torch(lambda: torch.nn.functional.rms_norm(x + residual, weight.shape, weight, 1e-5))
    goal = 0.85 if tokens > 64 else 0
    return Figure(took, Work(4 * x.numel() * 2), goal, beside)


def swiglu(gpu: Gpu) -> Figure:
    gate_up, out = bf16(8192, 2 * 12288), bf16(8192, 12288)
    took = seconds(lambda: gpu.call("fdserve_cuda_swiglu", pointer(gate_up), *out.shape, BF16, pointer(out)))
    return Figure(took, Work(3 * out.numel() * 2))


def sum_ranks(ranks: int, gpu: Gpu) -> Figure:
    parts, total = bf16(ranks, 512, 8192), bf16(512, 8192)
    arguments = pointer(parts), ctypes.c_int(ranks), total.numel(), BF16, pointer(total)
    took = seconds(lambda: gpu.call("fdserve_cuda_sum_ranks", *arguments))
    return Figure(took, Work((ranks + 1) * total.numel() * 2))


HEADS, KV_HEADS, HEAD_DIM = 64, 8, 128


class Sequences:
    """Sequences in a paged cache, of so many tokens of the step after so many others; heads, and those of the cache."""

    def __init__(self, lengths: list[int], contexts: list[int], heads: tuple[int, int] = (HEADS, KV_HEADS)) -> None:
        self.lengths, self.contexts, (self.heads, self.kv_heads) = lengths, contexts, heads
        self.longest = max(n + c for n, c in zip(lengths, contexts, strict=True))
        count, size, width = len(lengths), 64, -(-self.longest // 64)
        self.tables = torch.randperm(count * width, device="cuda").int().reshape(count, width)
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        self.starts, self.before = torch.from_numpy(starts).cuda(), torch.tensor(contexts, dtype=torch.int32).cuda()
        self.keys, self.values = (bf16(count * width, self.kv_heads, size, HEAD_DIM) for _ in range(2))
        self.queries = bf16(sum(lengths), self.heads, HEAD_DIM)
        self.out = torch.empty_like(self.queries)
        addresses = map(torch.Tensor.data_ptr, (self.tables, self.starts, self.before))
        self.paged = CPaged(*addresses, count, width, size, self.kv_heads)

    def run(self, gpu: Gpu) -> float:
        """Seconds of the attention."""
        tokens, most = sum(self.lengths), max(self.lengths)
        sizes = (len(self.lengths), tokens, most, self.longest, self.heads, self.kv_heads, HEAD_DIM)
        processors = ctypes.c_int(gpu.multiprocessors)
        wanted = gpu.workspace("fdserve_cuda_attention", *map(ctypes.c_int64, sizes), processors)
        workspace = torch.empty(wanted, dtype=torch.uint8, device="cuda")
        arguments = (
            *map(pointer, (self.queries, self.keys, self.values)), ctypes.byref(self.paged), tokens, most, self.longest,
            self.heads, HEAD_DIM, HEAD_DIM**-0.5, BF16, pointer(self.out), pointer(workspace) if wanted else None,
            processors,
        )  # fmt: skip
        return seconds(lambda: gpu.call("fdserve_cuda_attention", *arguments))

    def work(self) -> Work:
        """Keys and values read once, and the products of the pairs that see each other."""
        pairs = sum(n * c + n * (n + 1) / 2 for n, c in zip(self.lengths, self.contexts, strict=True))
        keys = sum(self.lengths) + sum(self.contexts)
        return Work(keys * self.kv_heads * HEAD_DIM * 4, 4 * pairs * self.heads * HEAD_DIM)


def by_sdpa(count: int, context: int, tokens: int, heads: tuple[int, int]) -> float | None:
    """Seconds of torch's attention over dense tensors of the same sizes."""
    q = bf16(count, heads[0], tokens, HEAD_DIM)
    k, v = (bf16(count, heads[1], context, HEAD_DIM) for _ in range(2))
    attend = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=tokens > 1, enable_gqa=True)
    return by_torch(lambda: attend(q, k, v))


def decode(count: int, context: int, gpu: Gpu, heads: tuple[int, int] = (HEADS, KV_HEADS)) -> Figure:
    sequences = Sequences([1] * count, [context - 1] * count, heads)
    took, work = sequences.run(gpu), sequences.work()
    goal = 0.85 if (count, context) == (64, 4096) else 0
    return Figure(took, work, goal, by_sdpa(count, context, 1, heads))


def prefill(count: int, context: int, gpu: Gpu, heads: tuple[int, int] = (HEADS, KV_HEADS)) -> Figure:
    sequences = Sequences([context] * count, [0] * count, heads)
    took, work = sequences.run(gpu), sequences.work()
    return Figure(took, work, 0.55, by_sdpa(count, context, context, heads))


def mixed(gpu: Gpu) -> Figure:
    sequences = Sequences([1] * 64 + [512], [4095] * 64 + [1536])
    return Figure(sequences.run(gpu), sequences.work())


def sample(rows: int, temperature: float, top_p: float, gpu: Gpu) -> Figure:
    """With the 20 likeliest tokens' log-probabilities."""
    vocab, top = 103424, 20
    logits = torch.randn(rows, vocab, device="cuda") * 3
    floats = torch.tensor([[temperature, top_p, 0.0, 1.0, 0.0, 0.0]] * rows, device="cuda")
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
    size = gpu.workspace("fdserve_cuda_sample", ctypes.byref(call))
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    took = seconds(lambda: gpu.call("fdserve_cuda_sample", ctypes.byref(call), pointer(workspace)))
    beside = by_torch(lambda: torch.topk(torch.log_softmax(logits, -1), top))
    goal = 1 / 1.3 if rows == 256 and temperature == 0 else 0
    return Figure(took, Work(logits.numel() * 4), goal, beside)


def sample_on_a_rank(rows: int, gpu: Gpu) -> Figure:
    """One of eight ranks' kernels, without the gatherings between them."""
    inputs = random_inputs(np.random.default_rng(5), rows, 103424, 103424, 20)
    inputs.arrays["float_params"][:] = [1, 0.8, 0, 1, 0, 0]
    inputs.arrays["int_params"][:, ::3] = [0, -1]
    inputs.arrays["mask_rows"][:] = -1
    inputs.arrays["logprob_modes"][:] = 0
    inputs.arrays["bias_offsets"][:] = 0
    took = seconds(kernels_of_one(gpu, inputs, 8))
    return Figure(took, Work(rows * 103424 / 8 * 4))


def quantized(bits: int, tokens: int, gpu: Gpu) -> Figure:
    """A linear layer with integer weights, beside torch's with bfloat16."""
    depth, columns = 8192, 10240
    dense, scales = bf16(columns, depth), torch.rand(columns, depth // GROUP, device="cuda")
    weight = torch.randint(0, 256, (columns, depth * bits // 8), dtype=torch.uint8, device="cuda")
    x, out = bf16(tokens, depth), bf16(tokens, columns)
    arguments = (
        pointer(x), tokens, pointer(weight), pointer(scales), ctypes.c_int(bits), ctypes.c_int(GROUP), depth, columns,
        BF16, ctypes.c_int(0), pointer(out),
    )  # fmt: skip
    took = seconds(lambda: gpu.call("fdserve_cuda_quant_linear", *arguments))
    moved = weight.numel() + 4 * scales.numel() + 2 * (x.numel() + out.numel())
    beside = by_torch(lambda: x @ dense.T)
    work = Work(moved, 2 * tokens * depth * columns)
    return Figure(took, work, 0, beside)


def experts(tokens: int, gpu: Gpu) -> Figure:
    """The mixture of experts in the 21B shape."""
    hidden, inner, count, top_k = 2560, 1536, 64, 6
    gate, bias = torch.randn(count, hidden, device="cuda") / 50, torch.zeros(count, device="cuda")
    up_gate, down = bf16(count, 2 * inner, hidden), bf16(count, hidden, inner)
    x, out = bf16(tokens, hidden), bf16(tokens, hidden)
    pointers = [tensor.data_ptr() for tensor in (x, gate, bias, up_gate, down)]
    call = CMoe(*pointers, None, None, None, out.data_ptr(), tokens, hidden, inner, count, top_k, 16, 0, 1e-12)
    size = gpu.workspace("fdserve_cuda_moe", ctypes.byref(call))
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    took = seconds(lambda: gpu.call("fdserve_cuda_moe", ctypes.byref(call), BF16, pointer(workspace)))
    # As many experts as random choices touch.
    touched = count * (1 - (1 - top_k / count) ** tokens)
    work = Work(touched * 3 * inner * hidden * 2, tokens * top_k * 6 * inner * hidden)
    return Figure(took, work)
