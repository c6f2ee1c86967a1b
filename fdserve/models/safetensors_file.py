"""One .safetensors file: its header parsed and checked here, its tensors mapped and never copied.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the header's length, little-endian; the
header, a JSON object {name: {dtype, shape, data_offsets: [begin, end]}} with an optional "__metadata__"; then
the data, to which the offsets are relative. Nothing in it can run code.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fdserve.errors import StartupError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
LONG_GAP = 64 << 10  # bytes; shorter ones the system reads anyway, where it reads what follows a page
ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
# Paddle keeps bfloat16 as uint16 and may tag it so: both are bfloat16 bits.
READABLE: dict[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "U16": np.dtype("<u2"), "F32": np.dtype("<f4")}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its file's header describes it; `begin` and `end` are bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


class SafetensorsFile:
    """A mapped file and the `tensors` its header lists."""

    def __init__(self, path: Path) -> None:
        """Read the header. Raises StartupError, naming the file and the tensor, if any of it is untrue."""
        self.path = path
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                if size < 8:
                    raise StartupError(f"{path} is truncated: it has only {size} bytes.")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise StartupError(f"{path} cannot be read: {error.strerror}.") from error
        try:
            self.tensors = _read_header(path, self._map)
        except StartupError:
            self._map.close()
            raise

    def read(self, name: str) -> npt.NDArray[Any]:
        """The tensor as a view of the mapping: float32, or uint16 that holds bfloat16 bits.

        Copied only where the file does not align it. Raises StartupError for any other dtype.
        """
        info = self.tensors[name]
        dtype = READABLE.get(info.dtype)
        if dtype is None:
            raise StartupError(f"{info.file}: tensor {name} is {info.dtype}; only BF16 and F32 weights are supported.")
        count = math.prod(info.shape)
        flat: npt.NDArray[Any] = np.frombuffer(self._map, dtype=dtype, count=count, offset=info.begin)
        return np.require(flat, requirements="A").reshape(info.shape)

    def read_ahead(self, name: str, rows: slice, columns: slice) -> int:
        """Have the system begin to read these rows and columns of a matrix; how many bytes that are.

        What lies between the columns of two rows comes with them unless it is long.
        """
        ranges = list(_ranges(self.tensors[name], rows, columns))
        for begin, end in ranges:
            self._advise("MADV_WILLNEED", begin, end)
        return sum(end - begin for begin, end in ranges)

    def release(self, name: str) -> None:
        """Let the system take back the memory that reading this tensor brought in (it stays readable)."""
        info = self.tensors[name]
        self._advise("MADV_DONTNEED", info.begin, info.end)

    def _advise(self, advice: str, begin: int, end: int) -> None:
        page = begin - begin % mmap.PAGESIZE
        if end > begin and hasattr(mmap, advice):
            with contextlib.suppress(OSError):  # it is only advice
                self._map.madvise(getattr(mmap, advice), page, end - page)

    def close(self) -> None:
        """Drop the mapping; one that a view still uses goes with its last view."""
        with contextlib.suppress(BufferError):
            self._map.close()


def _ranges(info: TensorInfo, rows: slice, columns: slice) -> Iterator[tuple[int, int]]:
    """Where these rows and columns of a matrix are in the file, the gaps between rows left out if they are long."""
    item = ITEM_BITS[info.dtype] // 8
    width = info.shape[1] * item
    first, last, _ = columns.indices(info.shape[1])
    begins = [info.begin + row * width + first * item for row in range(*rows.indices(info.shape[0]))]
    length = (last - first) * item
    if begins and width - length < LONG_GAP:
        yield begins[0], begins[-1] + length
    else:
        for begin in begins:
            yield begin, begin + length


def _read_header(path: Path, data: mmap.mmap) -> dict[str, TensorInfo]:
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise StartupError(f"{path} is not a safetensors file: its header would be {length} bytes long.")
    if 8 + length > len(data):
        raise StartupError(f"{path} is truncated: its header is {length} bytes long and the file only {len(data)}.")
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_unique_names)
    except (ValueError, RecursionError) as error:
        raise StartupError(f"{path} has a garbled header: {error}.") from error
    if not isinstance(header, dict):
        raise StartupError(f"{path} has a garbled header: it must be a JSON object.")
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _tensor_info(path, name, entry, start) for name, entry in header.items()}
    _check_ranges(path, tensors, len(data))
    return tensors


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _tensor_info(path: Path, name: str, entry: object, start: int) -> TensorInfo:
    fields = entry if isinstance(entry, dict) else {}
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise StartupError(f"{path} has a garbled header: the entry of tensor {name} is malformed.")
    bits = ITEM_BITS.get(dtype)
    if bits is None:
        raise StartupError(f"{path}: tensor {name} has the unknown dtype {dtype!r}.")
    begin, end = offsets
    if begin > end or (end - begin) * 8 != math.prod(shape) * bits:
        raise StartupError(
            f"{path} has a garbled header: tensor {name}, {dtype} of shape {shape}, "
            f"does not fit its data offsets {offsets}."
        )
    return TensorInfo(dtype, tuple(shape), path, start + begin, start + end)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in value
    )


def _check_ranges(path: Path, tensors: dict[str, TensorInfo], size: int) -> None:
    previous = ""
    reached = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.end > size:
            raise StartupError(f"{path} is truncated: tensor {name} ends at byte {info.end} and the file at {size}.")
        if info.begin < reached:
            raise StartupError(f"{path} has a garbled header: tensors {previous} and {name} overlap.")
        previous, reached = name, info.end
