"""The operators the models are made of: one function an op over paddle tensors, computed by `kernels/`.

"D" is the compute dtype, bfloat16 or float32 (float16 on a GPU): every D argument of a call has the same one. Tensors
must be dense and on the CPU, or after `use_gpu` on the GPU; a wrong shape or dtype raises ValueError. T (tokens), R
(rows) and S (sequences) may be 0.

Every output row is bit-identical whatever other rows are in the call, however a prefill is cut into chunks
and whatever the number of threads. A call releases the interpreter's lock while it computes.

Importing this package imports neither paddle nor the compiled library: the first call does, and raises
`KernelsMissing` when the library was never built. `fdserve.ops.reference` has the same functions in NumPy.
"""

from __future__ import annotations

from fdserve.ops.collectives import SharedMemory, sampling_slot_bytes, vocabulary_starts
from fdserve.ops.decoder import Block, Decoder
from fdserve.ops.experts import Experts, moe
from fdserve.ops.gathering import Gathering
from fdserve.ops.layers import add_rms_norm, embedding, linear, rms_norm, swiglu
from fdserve.ops.library import (
    KernelsMissing,
    compute_dtype,
    kernels_path,
    num_threads,
    on_gpu,
    set_num_threads,
    use_gpu,
)
from fdserve.ops.paged_attention import attention, kv_bytes_per_token, kv_cache_shape, new_kv_cache
from fdserve.ops.sampling import sample
from fdserve.ops.tensors import HeldTensor, own_place, send, to_tensor
from fdserve.ops.weights import PackedExperts, PackedWeight, as_float32, pack_experts, pack_weight

__all__ = [
    "Block",
    "Decoder",
    "Experts",
    "Gathering",
    "HeldTensor",
    "KernelsMissing",
    "PackedExperts",
    "PackedWeight",
    "SharedMemory",
    "add_rms_norm",
    "as_float32",
    "attention",
    "compute_dtype",
    "embedding",
    "kernels_path",
    "kv_bytes_per_token",
    "kv_cache_shape",
    "linear",
    "moe",
    "new_kv_cache",
    "num_threads",
    "on_gpu",
    "own_place",
    "pack_experts",
    "pack_weight",
    "rms_norm",
    "sample",
    "sampling_slot_bytes",
    "send",
    "set_num_threads",
    "swiglu",
    "to_tensor",
    "use_gpu",
    "vocabulary_starts",
]
