from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fdserve.engine.kv_cache import BlockPool, extend_hashes


def hashes_of(tokens: list[int], salt: str = "", block_size: int = 4) -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, tokens, block_size, salt)
    return hashes


def test_hashes_name_the_whole_prefix_and_the_salt() -> None:
    tokens = list(range(12))
    assert len(hashes_of(tokens)) == 3
    assert hashes_of(tokens[:11]) == hashes_of(tokens)[:2]
    assert hashes_of([*tokens[:4], 99, *tokens[5:]])[0] == hashes_of(tokens)[0]
    assert hashes_of([*tokens[:4], 99, *tokens[5:]])[2] != hashes_of(tokens)[2]
    assert set(hashes_of(tokens, "a")).isdisjoint(hashes_of(tokens, "b"))


def test_hashes_are_extended_not_made_anew() -> None:
    tokens = list(range(12))
    hashes = hashes_of(tokens[:4])
    extend_hashes(hashes, tokens, 4, "ignored: the chain has begun")
    assert hashes == hashes_of(tokens)


def test_freed_content_is_found_until_its_block_is_taken() -> None:
    pool = BlockPool(4)
    names = hashes_of(list(range(12)))
    blocks = pool.allocate(3)
    assert blocks is not None
    for block, name in zip(blocks, names, strict=True):
        pool.register(block, name)
    pool.free(blocks)
    assert pool.match_prefix(names) == blocks
    # The block without content goes first, then the end of the prefix.
    assert pool.allocate(2) == [({0, 1, 2, 3} - set(blocks)).pop(), blocks[2]]
    assert pool.match_prefix(names) == blocks[:2]


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(2)
    assert pool.allocate(3) is None
    assert pool.num_free == 2


def test_equal_content_keeps_its_first_block() -> None:
    pool = BlockPool(2)
    (name,) = hashes_of([1, 2, 3, 4])
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.register(blocks[0], name)
    pool.register(blocks[1], name)
    assert pool.match_prefix([name]) == [blocks[0]]
    assert pool.num_cached == 1


def test_integrity_check_sees_a_leak() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.check_integrity([blocks])
    with pytest.raises(AssertionError, match="1 references, 0 holders"):
        pool.check_integrity([])


class PoolMachine(RuleBasedStateMachine):
    """Random sequences come and go; the pool must agree with a plain record of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.tables: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    @rule(length=st.integers(1, 24), family=st.integers(0, 2))
    def start(self, length: int, family: int) -> None:
        names = hashes_of([family] * length)
        cached = self.pool.match_prefix(names)
        assert [self.content[block] for block in cached] == names[: len(cached)]
        needed = -(-length // 4) - len(cached)
        before = self.pool.num_free
        self.pool.acquire(cached)
        blocks = self.pool.allocate(needed)
        if blocks is None:
            self.pool.free(cached)
            assert self.pool.num_free == before
            return
        for index in range(len(cached), len(names)):
            block = blocks[index - len(cached)]
            self.pool.register(block, names[index])
            self.content[block] = names[index]
        self.tables.append(cached + blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.free(self.tables.pop(index))

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check_integrity(self.tables)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase
