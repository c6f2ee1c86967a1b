"""Finding and loading the compiled kernels."""

from __future__ import annotations

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

ISAS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
"""Instruction sets the kernels are compiled for, weakest first."""


KERNELS_MISSING = "fdserve's kernels are not compiled for this Python: run `pip install '.[cpu]'` in a checkout."


class KernelsMissing(RuntimeError):
    """The compiled library is not there."""


def kernels_path() -> Path | None:
    """Where the library compiled for this interpreter is, or None. Imports no paddle."""
    path = Path(__file__).with_name("_kernels" + EXTENSION_SUFFIXES[0])
    return path if path.exists() else None


class _Library:
    """`run(op, *inputs, *attributes)` calls a custom op; `c` holds the plain C functions, which the CPU alone has."""

    def __init__(self, path: Path, *, gpu: bool) -> None:
        self.gpu = gpu
        import paddle
        from paddle.utils.cpp_extension.extension_utils import load_op_meta_info_and_register_op

        load_op_meta_info_and_register_op(str(path))
        # Straight to Paddle's entry: the Python wrappers it generates cost several microseconds a call.
        self.run: Any = paddle._C_ops._run_custom_op
        self.c = ctypes.CDLL(str(path))
        if not gpu:
            self.c.fdserve_keep_freed_memory()


_library: _Library | None = None


def library() -> _Library:
    """The library, loaded at the first call.

    Raises:
        KernelsMissing: it was never built.
    """
    global _library
    if _library is None:
        path = kernels_path()
        if path is None:
            raise KernelsMissing(KERNELS_MISSING)
        _library = _Library(path, gpu=False)
    return _library


def use_gpu(path: Path | None = None) -> None:
    """Compute on the GPU that is Paddle's current device, in this process from now on; before any other call.

    `path` is another library than the one that kernels/cuda/build.py makes.

    Raises:
        KernelsMissing: it was never built.
        RuntimeError: the CPU's kernels are in use already.
    """
    global _library
    path = path or Path(__file__).with_name("_kernels_cuda.so")
    if not path.exists():
        raise KernelsMissing(
            "fdserve's CUDA kernels are not compiled: run `python kernels/cuda/build.py` in the checkout that fdserve "
            "is installed from (see docs/gpu.md), or give --device cpu."
        )
    if _library is not None:
        raise RuntimeError("the kernels of another device are in use already")
    _library = _Library(path, gpu=True)


def on_gpu() -> bool:
    """Whether `use_gpu` was called."""
    return _library is not None and _library.gpu


def run(op: str, *args: Any) -> Any:
    """Call the custom op `fdserve_<op>` with its inputs, then its attributes; returns the list of its outputs."""
    return (_library or library()).run("fdserve_" + op, *args)


def compute_dtype() -> str:
    """The dtype to compute in: "bfloat16" on a GPU or a CPU with AVX512-BF16, otherwise "float32"."""
    if on_gpu():
        return "bfloat16"
    return "bfloat16" if library().c.fdserve_isa() >= ISAS.index("avx512bf16") else "float32"


def set_num_threads(count: int) -> None:
    """Compute with `count` threads (the calling one included) from now on. Results do not depend on it."""
    if count < 1:
        raise ValueError(f"the number of threads must be at least 1, not {count}")
    library().c.fdserve_set_num_threads(count)


def num_threads() -> int:
    """How many threads an op may use; at first as many as the process may run on cores."""
    return int(library().c.fdserve_num_threads())


def force_isa(isa: str | None) -> None:
    """Use at most this instruction set (see `ISAS`), or all the CPU has (None). For tests.

    Raises:
        ValueError: the CPU lacks it.
    """
    level = len(ISAS) - 1 if isa is None else ISAS.index(isa)
    if library().c.fdserve_force_isa(level) < level and isa is not None:
        raise ValueError(f"this CPU has no {isa}")
