"""The KV cache's bookkeeping: a pool of fixed-size, reference-counted, content-addressed blocks.

A block holds the keys and values of `block_size` consecutive tokens of a sequence. A full block's content is named by
a hash chained over the hash of the block before it, the block's token ids and a salt, so that equal names mean equal
prefixes. A freed block keeps its content and its name until it is taken for something else, least recently freed
first. Nothing here touches the tensors: the ranks hold those.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

BlockHash = bytes


def extend_hashes(hashes: list[BlockHash], tokens: Sequence[int], block_size: int, salt: str) -> None:
    """Append to `hashes` the hash of every full block of `tokens` that it lacks. O(new blocks)."""
    for start in range(len(hashes) * block_size, len(tokens) - block_size + 1, block_size):
        parent = hashes[-1] if hashes else blake2b(salt.encode(), digest_size=16, person=b"fdserve").digest()
        block = array("i", tokens[start : start + block_size])
        hashes.append(blake2b(parent + block.tobytes(), digest_size=16).digest())


class BlockPool:
    """Blocks 0 … num_blocks-1. Every operation costs O(blocks touched)."""

    def __init__(self, num_blocks: int, *, enable_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.enable_caching = enable_caching
        self._references = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._block_of: dict[BlockHash, int] = {}
        # Unreferenced blocks in the order in which they are taken: those without content first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that nobody references, those that still hold cached content included."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks whose content can be found by its hash, in use or not."""
        return len(self._block_of)

    def match_prefix(self, hashes: Iterable[BlockHash]) -> list[int]:
        """The blocks of the longest cached prefix. They are not locked: `acquire` them before anything else."""
        blocks: list[int] = []
        for name in hashes:
            block = self._block_of.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_without(self, blocks: Iterable[int]) -> int:
        """How many blocks stay free once `blocks` are acquired."""
        return len(self._free) - sum(1 for block in blocks if self._references[block] == 0)

    def acquire(self, blocks: Iterable[int]) -> None:
        """Take a reference on blocks that `match_prefix` found."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each and no content, or None (and no change) if too few are free."""
        if count > len(self._free):
            return None
        blocks = []
        for _ in range(count):
            block, _none = self._free.popitem(last=False)
            name = self._hash_of[block]
            if name is not None:
                del self._block_of[name]
                self._hash_of[block] = None
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def register(self, block: int, name: BlockHash) -> None:
        """Make a referenced, full block findable. Of two blocks with the same content the first keeps the name."""
        if self.enable_caching and self._hash_of[block] is None and name not in self._block_of:
            self._hash_of[block] = name
            self._block_of[name] = block

    def free(self, blocks: Sequence[int]) -> None:
        """Give up one reference on each of a sequence's blocks.

        Its last blocks are reused before its first: a prefix is worth more than what follows it.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the counts agree with `tables`, the block tables of all live sequences."""
        expected: Counter[int] = Counter()
        for table in tables:
            if len(set(table)) != len(table):
                raise AssertionError(f"a sequence holds a block twice: {table}")
            expected.update(table)
        for block, references in enumerate(self._references):
            if references != expected[block]:
                raise AssertionError(f"block {block} has {references} references, {expected[block]} holders")
            if (references == 0) != (block in self._free):
                raise AssertionError(f"block {block} with {references} references is on the wrong list")
        for name, block in self._block_of.items():
            if self._hash_of[block] != name:
                raise AssertionError(f"block {block} is found under a name that it does not have")
        if len(self._block_of) != sum(name is not None for name in self._hash_of):
            raise AssertionError("a block has a name under which it is not found")
