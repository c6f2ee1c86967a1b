"""The rate of oneDNN's matrix product, called through its C interface in the library that Paddle's wheel holds.

Only what a product of packed weights takes: https://uxlfoundation.github.io/oneDNN/v3.6/dev_guide_matmul.html. The
constants are those of oneDNN 3's headers.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

_CPU = 1
_TAG_ANY, _TAG_AB, _TAG_BA = 1, 3, 14
_QUERY_WEIGHTS, _QUERY_SCRATCHPAD = 131, 136
_SRC, _DST, _WEIGHTS = 1, 17, 33
_TYPES = {"bfloat16": (2, np.uint16), "float32": (3, np.float32), "int8": (5, np.int8), "int32": (4, np.int32)}
_IN_ORDER = 1

Call = Callable[[], None]


class Unavailable(RuntimeError):
    """oneDNN cannot be measured here; the message says why."""


class _Argument(ctypes.Structure):
    _fields_ = [("index", ctypes.c_int), ("memory", ctypes.c_void_p)]


class OneDNN:
    """The library, with an engine and a stream, computing with `threads` threads. Raises Unavailable."""

    def __init__(self, threads: int) -> None:
        spec = importlib.util.find_spec("paddle")
        directory = Path(spec.origin).parent / "libs" if spec and spec.origin else None
        if directory is None or not (directory / "libdnnl.so.3").exists():
            raise Unavailable("Paddle's wheel holds no libdnnl.so.3")
        import paddle  # noqa: F401 - loads the libraries that libdnnl needs

        self._c = ctypes.CDLL(str(directory / "libdnnl.so.3"))
        self._openmp = ctypes.CDLL(str(directory / "libiomp5.so"))
        self._threads = threads
        self._engine, self._stream = ctypes.c_void_p(), ctypes.c_void_p()
        self._check("dnnl_engine_create", ctypes.byref(self._engine), _CPU, ctypes.c_size_t(0))
        self._check("dnnl_stream_create", ctypes.byref(self._stream), self._engine, _IN_ORDER)

    def _check(self, name: str, *args: Any) -> None:
        status = getattr(self._c, name)(*args)
        if status:
            raise Unavailable(f"{name} answered {status}")

    def _descriptor(self, shape: tuple[int, int], dtype: str, tag: int) -> ctypes.c_void_p:
        descriptor = ctypes.c_void_p()
        dims = (ctypes.c_int64 * 12)(*shape)
        self._check("dnnl_memory_desc_create_with_tag", ctypes.byref(descriptor), 2, dims, _TYPES[dtype][0], tag)
        return descriptor

    def _memory(self, descriptor: Any, address: int) -> ctypes.c_void_p:
        memory = ctypes.c_void_p()
        handle = ctypes.c_void_p(address)
        self._check("dnnl_memory_create", ctypes.byref(memory), descriptor, self._engine, handle)
        return memory

    def _primitive(self, descriptor: ctypes.c_void_p) -> ctypes.c_void_p:
        primitive = ctypes.c_void_p()
        self._check("dnnl_primitive_create", ctypes.byref(primitive), descriptor)
        return primitive

    def _query(self, primitive_descriptor: ctypes.c_void_p, what: int) -> Any:
        query = self._c.dnnl_primitive_desc_query_md
        query.restype = ctypes.c_void_p
        return ctypes.c_void_p(query(primitive_descriptor, what, 0))

    def _size(self, descriptor: Any) -> int:
        size = self._c.dnnl_memory_desc_get_size
        size.restype = ctypes.c_size_t
        return int(size(descriptor))

    def _execute(self, primitive: ctypes.c_void_p, arguments: list[tuple[int, ctypes.c_void_p]]) -> Call:
        filled = (_Argument * len(arguments))(*[_Argument(index, memory) for index, memory in arguments])
        execute, wait = self._c.dnnl_primitive_execute, self._c.dnnl_stream_wait
        stream, count = self._stream, len(arguments)

        def call() -> None:
            status = execute(primitive, stream, count, filled) or wait(stream)
            if status:
                raise Unavailable(f"oneDNN's product answered {status}")

        return call

    @contextmanager
    def linear(self, rows: int, k: int, n: int, dtype: str, copies: int) -> Iterator[list[Call]]:
        """`copies` calls that each multiply [rows, k] by packed weights [k, n] of their own. Valid inside the block.

        `dtype` "int8" accumulates in int32, the others write their own. Raises Unavailable if oneDNN cannot.
        """
        self._openmp.omp_set_num_threads(self._threads)
        out = "int32" if dtype == "int8" else dtype
        source, target = self._descriptor((rows, k), dtype, _TAG_AB), self._descriptor((rows, n), out, _TAG_AB)
        weights = self._descriptor((k, n), dtype, _TAG_ANY)
        product = ctypes.c_void_p()
        self._check(
            "dnnl_matmul_primitive_desc_create",
            ctypes.byref(product), self._engine, source, weights, None, target, None,
        )  # fmt: skip
        packed = self._query(product, _QUERY_WEIGHTS)
        plain = self._descriptor((k, n), dtype, _TAG_BA)
        reorder = ctypes.c_void_p()
        self._check(
            "dnnl_reorder_primitive_desc_create",
            ctypes.byref(reorder), plain, self._engine, packed, self._engine, None,
        )  # fmt: skip
        # 1.0 in bfloat16 and, being no matter, something in the others.
        fill = 0x3F80 if dtype == "bfloat16" else 1
        x = np.full((rows, k), fill, _TYPES[dtype][1])
        y = np.zeros((rows, n), _TYPES[out][1])
        original = np.full((n, k), fill, _TYPES[dtype][1])
        buffers = [_aligned(self._size(packed)) for _ in range(copies)]
        primitives = [self._primitive(product), self._primitive(reorder)]
        memories = [self._memory(source, x.ctypes.data), self._memory(target, y.ctypes.data)]
        memories.append(self._memory(plain, original.ctypes.data))
        calls = []
        for buffer in buffers:
            memory = self._memory(packed, buffer.ctypes.data)
            memories.append(memory)
            self._execute(primitives[1], [(_SRC, memories[2]), (_DST, memory)])()
            calls.append(self._execute(primitives[0], [(_SRC, memories[0]), (_WEIGHTS, memory), (_DST, memories[1])]))
        try:
            yield calls
        finally:
            for memory in memories:
                self._check("dnnl_memory_destroy", memory)
            for primitive in primitives:
                self._check("dnnl_primitive_destroy", primitive)
            for each in (product, reorder):
                self._check("dnnl_primitive_desc_destroy", each)
            for each in (source, target, weights, plain):
                self._check("dnnl_memory_desc_destroy", each)


def _aligned(size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes at a multiple of 64."""
    raw = np.zeros(size + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size]
