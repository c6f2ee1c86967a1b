"""Where a rank computes: the CPU, or a GPU of its own."""

from __future__ import annotations

from typing import Any

import paddle

from fdserve import ops
from fdserve.errors import StartupError
from fdserve.ops import KernelsMissing

RESERVED_SHARE = 0.1
"""Of a GPU's memory, what weights and cache leave to activations, recorded steps, and Paddle itself."""


def select_device(asked: str, number: int) -> None:
    """Have Paddle and the operators compute on the CPU ("cpu"), on GPU `number` ("gpu"), or on that GPU if there is any
    ("auto"). Before any other use of them. Raises StartupError.
    """
    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    if asked == "cpu" or (asked == "auto" and gpus == 0):
        paddle.set_device("cpu")
        return
    if not paddle.is_compiled_with_cuda():
        raise StartupError("--device gpu needs Paddle's GPU build: see docs/gpu.md.")
    if gpus == 0:
        raise StartupError(
            "--device gpu finds no GPU: look whether nvidia-smi does, and what CUDA_VISIBLE_DEVICES says, or give "
            "--device cpu."
        )
    if gpus <= number:
        raise StartupError(
            f"--device {asked} finds {gpus} GPUs, and a rank needs number {number} for itself: give a smaller "
            "--tensor-parallel-size, or --device cpu."
        )
    paddle.set_device(f"gpu:{number}")
    _use_gpu()


def _use_gpu() -> None:
    try:
        ops.use_gpu()
        # The least of them tells whether they are compiled for this kind of GPU.
        ops.swiglu(paddle.zeros([1, 16], "bfloat16"))
    except KernelsMissing as error:
        raise StartupError(str(error)) from None
    except (OSError, RuntimeError) as error:
        major, minor = paddle.device.cuda.get_device_capability()
        raise StartupError(
            f"fdserve's CUDA kernels do not run on this GPU, of compute capability {major}.{minor}: compile them for "
            f"it, and against the Paddle that is installed (see docs/gpu.md). {' '.join(str(error).split())}"
        ) from error


def check_formats(dtype: str, quantization: str, kv_dtype: str) -> None:
    """Raise StartupError for formats that the kernels of a GPU do not have."""
    if dtype not in ("bfloat16", "float16"):
        raise StartupError(
            f"A GPU computes in bfloat16 or float16, not in {dtype}: give --device cpu, or --dtype bfloat16."
        )
    if kv_dtype != dtype:
        raise StartupError(f"A GPU keeps keys and values in what it computes in, {dtype}, not in {kv_dtype}.")
    if quantization not in ("none", "wint8", "wint4"):
        raise StartupError(f"A GPU has no kernels for --quantization {quantization}: it has them for wint8 and wint4.")


def free_gpu_bytes(cuda: Any = paddle.cuda) -> int:
    """What weights and KV cache can have of the current GPU: of what nobody on that GPU has yet, all but
    `RESERVED_SHARE` of the whole.
    """
    cuda.empty_cache()
    free, total = cuda.mem_get_info()
    return max(0, int(free - total * RESERVED_SHARE))
