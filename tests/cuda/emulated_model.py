"""`python -m tests.cuda.emulated_model LIBRARY [CHECKPOINT DTYPE QUANTIZATION OUT]...`: models on emulated CUDA ops.

A process of its own, because the CPU's ops have the same names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from fdserve import ops
from fdserve.models.config import read_config
from fdserve.models.loader import load_model
from fdserve.worker import device, graphs
from tests.models.stepping import Chunk, Stepper

# Two sequences: a prefill, a chunked one beside it, decodes together, one more prefill beside decodes.
STEPS = [
    [Chunk(0, [3, 9, 4, 1, 5, 9, 2, 6])],
    [Chunk(0, [5]), Chunk(1, list(range(1, 30)))],
    [Chunk(1, [7, 7, 7]), Chunk(0, [11])],
    [Chunk(0, [1]), Chunk(1, [2]), Chunk(2, [30] * 18)],
]


def logits_of(checkpoint: Path, dtype: str, quantization: str | None = None, **ranks: Any) -> np.ndarray[Any, Any]:
    """The logits of every token of STEPS; of a rank its part."""
    model = load_model(checkpoint, read_config(checkpoint), dtype=dtype, quantization=quantization, **ranks)
    stepper = Stepper(model)
    return np.concatenate([stepper.step(step) for step in STEPS])


def emulate(library: Path) -> None:
    """Compute with the emulated ops in this process, as on a GPU."""
    ops.use_gpu(library)
    paddle.matmul = _matmul_in_float32
    paddle.gather = _gather_of_any_type
    graphs.record_cuda_graph = _run_again
    device.free_gpu_bytes = _a_gigabyte


def _matmul_in_float32(x: Any, y: Any, transpose_y: bool = False) -> Any:
    """Paddle has no 16-bit product on a CPU."""
    return _matmul(x.cast("float32"), y.cast("float32"), transpose_y=transpose_y).cast(x.dtype)


def _gather_of_any_type(x: Any, index: Any) -> Any:
    """Paddle gathers no float16 on a CPU."""
    return _gather(x.view("int16"), index).view("float16") if x.dtype == paddle.float16 else _gather(x, index)


def _run_again(work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """In place of a CUDA graph."""
    result = work()
    return result, lambda: paddle.assign(work(), result)


def _a_gigabyte(cuda: Any = None) -> int:
    return 1 << 30


_matmul, _gather = paddle.matmul, paddle.gather


def write(checkpoint: Path, dtype: str, quantization: str | None, out: Path) -> None:
    """The logits, and the greedy tokens that the sampler takes from them."""
    logits = logits_of(checkpoint, dtype, quantization)
    rows, vocab = logits.shape
    zeros = paddle.zeros([rows + 1], "int32")
    empty, floats = paddle.zeros([0], "int32"), np.tile(np.array([0, 1, 0, 1, 0, 0], np.float32), (rows, 1))
    ints = np.tile(np.array([0, 1, 0, -1], np.int64), (rows, 1))
    tokens, logprobs, top_ids, _ = ops.sample(
        paddle.to_tensor(logits), paddle.to_tensor(floats), paddle.to_tensor(ints), empty, zeros, zeros[:-1], empty,
        empty.cast("float32"), zeros, vocab_size=vocab, num_top=3,
    )  # fmt: skip
    np.savez(out, logits=logits, tokens=tokens.numpy(), logprobs=logprobs.numpy(), top_ids=top_ids.numpy())


def main() -> None:
    """One model after the other."""
    library, *models = sys.argv[1:]
    emulate(Path(library))
    for checkpoint, dtype, quantization, out in zip(*[iter(models)] * 4, strict=True):
        # An emulator that aborts says less.
        print(f"{checkpoint}: {dtype}, {quantization}", file=sys.stderr, flush=True)
        write(Path(checkpoint), dtype, None if quantization == "none" else quantization, Path(out))


if __name__ == "__main__":
    main()
