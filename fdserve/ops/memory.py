"""Memory of the system in huge pages, where it has any: a decode reads weights and keys from end to end, and looking up
the place of every small page takes a good part of its time."""

from __future__ import annotations

import mmap
from contextlib import suppress

CHUNK_BYTES = 64 << 20
ALIGNMENT = 64


def mapped(size: int) -> memoryview:
    """Zeros that take no memory until they are touched. Raises MemoryError where the system grants none."""
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"the system has no {size} bytes of memory to give") from error
    with suppress(OSError, AttributeError):  # a kernel, or a Python, without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


class Arena:
    """Memory in pieces that follow each other: by itself a matrix of a megabyte or two would not fill a huge page."""

    def __init__(self) -> None:
        self._left = memoryview(b"")

    def take(self, size: int) -> memoryview:
        """So many bytes of their own, at a multiple of ALIGNMENT. They live as long as someone looks at their chunk."""
        if size > CHUNK_BYTES:
            return mapped(size)
        whole = -(-size // ALIGNMENT) * ALIGNMENT
        if whole > len(self._left):
            self._left = mapped(CHUNK_BYTES)
        piece, self._left = self._left[:size], self._left[whole:]
        return piece
