"""The CUDA launchers from Python, by raw pointers: on a GPU, or on the CPU under emulator.h.

Memory that a test hands out is poisoned and has guard bands on both sides, so a kernel that leaves out an element or
writes past the end is caught.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "kernels/cuda"
LAUNCHERS = sorted(SOURCES.glob("*.cu"))
EMULATOR = sorted(HERE.glob("emulator_*.cc"))
GUARD_BYTES = 256
GUARD = 0xA5
POISON = 0xFF  # a NaN in every float type

Array = npt.NDArray[Any]
DTYPES = ("bfloat16", "float16")


def to_bits(x: Array, dtype: str) -> Array:
    """Floats as the 16-bit type's bits, to the nearest, ties to even."""
    if dtype == "float16":
        return x.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def to_floats(bits: Array, dtype: str) -> Array:
    """The other way round, exact."""
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(x: Array, dtype: str) -> Array:
    """The nearest values of the 16-bit type, as float32."""
    return to_floats(to_bits(x, dtype), dtype)


class Buffer:
    """Device memory between its guards; `pointer` is its address."""

    def __init__(self, device: Device, content: Array, *, read_only: bool) -> None:
        self.content = np.ascontiguousarray(content)
        self.read_only = read_only
        bands = np.full(GUARD_BYTES, GUARD, np.uint8)
        self.memory = device.allocate(np.concatenate([bands, self.content.view(np.uint8).ravel(), bands]))
        self.pointer = ctypes.c_void_p(device.address(self.memory) + GUARD_BYTES)


class Device(ABC):
    """Where kernels run."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    @abstractmethod
    def allocate(self, content: Array) -> Any:
        """Memory with these bytes, aligned to 256."""

    @abstractmethod
    def address(self, memory: Any) -> int: ...
    @abstractmethod
    def read(self, memory: Any) -> Array:
        """The bytes, after all kernels."""

    def is_usable(self) -> bool:
        """Whether more kernels can run after one has failed."""
        return True

    def put(self, content: Array) -> Buffer:
        """An input."""
        return Buffer(self, content, read_only=True)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        """An output, poisoned."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return Buffer(self, np.full(size, POISON, np.uint8).view(dtype).reshape(shape), read_only=False)

    def get(self, buffer: Buffer) -> Array:
        """What a buffer holds now. Its guards must be whole, and an input must be what it was."""
        data = self.read(buffer.memory)
        assert (data[:GUARD_BYTES] == GUARD).all(), "a write before the buffer"
        assert (data[-GUARD_BYTES:] == GUARD).all(), "a write past the buffer"
        content = data[GUARD_BYTES:-GUARD_BYTES].view(buffer.content.dtype).reshape(buffer.content.shape)
        if buffer.read_only:
            assert content.tobytes() == buffer.content.tobytes(), "a write into an input"
        return content

    def workspace(self, launcher: str, *arguments: Any) -> int:
        """The bytes that a launcher wants for a call."""
        function = getattr(self.library, f"{launcher}_workspace")
        function.restype = ctypes.c_int64
        return int(function(*arguments))

    def call(self, launcher: str, *arguments: Any) -> None:
        """Run a launcher on the default stream: buffers by their address, ints as int64 unless already of ctypes."""
        converted: list[Any] = []
        for argument in arguments:
            if isinstance(argument, Buffer):
                converted.append(argument.pointer)
            elif isinstance(argument, int):
                converted.append(ctypes.c_int64(argument))
            elif isinstance(argument, float):
                converted.append(ctypes.c_float(argument))
            else:
                converted.append(argument)
        status = getattr(self.library, launcher)(*converted, None)
        assert status == 0, f"{launcher} failed with CUDA error {status}"


class Emulated(Device):
    """The CPU; memory is NumPy's. What a kernel does there is checked: see emulator_memory.cc."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        library.emulator_check_memory()

    def call(self, launcher: str, *arguments: Any) -> None:
        super().call(launcher, *arguments)
        complaint = ctypes.create_string_buffer(1024)
        self.library.emulator_complaint(complaint, ctypes.c_size_t(len(complaint)))
        assert not complaint.value, self._with_places(f"{launcher}: {complaint.value.decode()}")

    def _with_places(self, complaint: str) -> str:
        """The lines of the sources that a complaint names by their code."""
        codes = re.findall(r"(?:code|other) (0x[0-9a-f]+)", complaint)
        command = ["addr2line", "-Cfpie", self.library._name, *codes]
        return complaint + "\n" + subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def allocate(self, content: Array) -> Array:
        whole = np.zeros(len(content) + 256, np.uint8)
        start = -int(whole.ctypes.data) % 256
        memory = whole[start : start + len(content)]
        memory[:] = content
        # Kernels may use what is between the guards, as long as it lives.
        first = ctypes.c_size_t(self.address(memory) + GUARD_BYTES)
        self.library.emulator_lend(first, ctypes.c_size_t(len(memory) - 2 * GUARD_BYTES))
        weakref.finalize(memory, self.library.emulator_take_back, first)
        return memory

    def address(self, memory: Array) -> int:
        return int(memory.ctypes.data)

    def read(self, memory: Array) -> Array:
        return memory.copy()


def compile_emulated(directory: Path, kernels: Sequence[Path] = LAUNCHERS) -> None:
    """The kernels' objects and the emulator's, into a directory.

    Floats do not contract: the sources say what is to be fused. What kernels load and store is instrumented for
    emulator_memory.cc.
    """
    # More optimization takes longer than it saves: most of the time goes from one fiber to the next.
    flags = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
    # An access of 16 bytes stays one.
    instrument = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-fno-tree-sra"]
    kernel = [*instrument, "-DFDSERVE_EMULATED", "-x", "c++"]
    processes = [
        subprocess.Popen(
            ["g++", *flags, *each, f"-I{HERE}", f"-I{SOURCES}", "-c", str(source), "-o", f"{directory / source.stem}.o"]
        )
        for sources, each in ((kernels, kernel), (EMULATOR, ["-O2"]))
        for source in sources
    ]
    for process in processes:
        assert process.wait(240) == 0, process.args


def link_emulated(objects: list[Path], library: Path, *flags: str) -> Path:
    """The objects as a shared library."""
    subprocess.run(["g++", "-shared", "-o", str(library), *map(str, objects), *flags], check=True)
    return library


def has_nvcc() -> bool:
    """Whether the CUDA compiler is there."""
    return shutil.which("nvcc") is not None
