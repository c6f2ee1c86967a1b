from __future__ import annotations

import mmap

import numpy as np
import pytest

from fdserve.ops.memory import ALIGNMENT, CHUNK_BYTES, Arena, mapped


def address(memory: memoryview) -> int:
    return np.frombuffer(memory, np.uint8).ctypes.data


def test_mapped_memory_is_zeros_that_can_be_written() -> None:
    memory = mapped(10_000)
    assert len(memory) == 10_000
    assert not np.frombuffer(memory, np.uint8).any()
    memory[9_999] = 7


def test_more_memory_than_there_is_is_refused() -> None:
    with pytest.raises(MemoryError, match="the system has no"):
        mapped(1 << 60)


def test_pieces_follow_each_other_and_do_not_overlap() -> None:
    arena = Arena()
    pieces = [arena.take(size) for size in (1, 100, ALIGNMENT, 5000)]
    assert [len(piece) for piece in pieces] == [1, 100, ALIGNMENT, 5000]
    begins = [address(piece) for piece in pieces]
    assert [begin - begins[0] for begin in begins] == [0, ALIGNMENT, 3 * ALIGNMENT, 4 * ALIGNMENT]
    assert begins[0] % mmap.PAGESIZE == 0


def test_what_fits_no_chunk_has_a_mapping_of_its_own_and_leaves_the_chunk_to_others() -> None:
    arena = Arena()
    before = arena.take(1000)
    assert len(arena.take(CHUNK_BYTES + 1)) == CHUNK_BYTES + 1
    assert address(arena.take(1)) == address(before) + 16 * ALIGNMENT


def test_a_chunk_lives_as_long_as_a_piece_of_it() -> None:
    arena = Arena()
    kept = np.frombuffer(arena.take(1000), np.uint8)
    kept[:] = 5
    for _ in range(3):
        arena.take(CHUNK_BYTES)
    assert (kept == 5).all()
