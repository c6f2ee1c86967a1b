from __future__ import annotations

from dataclasses import dataclass
from functools import cache as cache_results
from typing import Any

import numpy as np
import pytest

from fdserve import ops
from fdserve.ops import reference
from tests.ops.arrays import Float, assert_close, ints, normal, tensor, values

THETA = 10000.0


@dataclass
class Model:
    """Head counts and a cache of `num_blocks` blocks, in the kernel's layout and in the reference's."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    num_blocks: int
    dtype: str
    cache: str = ""

    def __post_init__(self) -> None:
        shape = (self.num_blocks, self.kv_heads, self.block_size, self.head_dim)
        self.k, self.v = ops.new_kv_cache(*shape, self.cache or self.dtype)
        plain = (self.num_blocks, self.block_size, self.kv_heads, self.head_dim)
        self.plain_k, self.plain_v = np.zeros(plain, np.float32), np.zeros(plain, np.float32)

    @property
    def width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def run(self, qkv: list[Float], contexts: list[int], tables: list[list[int]]) -> list[Float]:
        """One call over sequences with these new rows; the answers, split again."""
        args = self.arguments(qkv, contexts, tables)
        sizes = {"num_heads": self.heads, "num_kv_heads": self.kv_heads, "head_dim": self.head_dim}
        rows, rope, padded, starts, lens = args
        out = ops.attention(
            tensor(rows, self.dtype), self.k, self.v, tensor(rope, "float32"), ints(padded), ints(starts), ints(lens),
            block_size=self.block_size, **sizes,
        )  # fmt: skip
        return np.split(values(out), starts[1:-1])

    def expect(self, qkv: list[Float], contexts: list[int], tables: list[list[int]]) -> list[Float]:
        """What the reference answers."""
        rows, rope, padded, starts, lens = self.arguments(qkv, contexts, tables)
        out = reference.attention(
            rows, self.plain_k, self.plain_v, rope, padded, starts, lens,
            num_heads=self.heads, num_kv_heads=self.kv_heads, head_dim=self.head_dim, block_size=self.block_size,
            dtype=self.dtype,
        )  # fmt: skip
        return np.split(out, starts[1:-1])

    def arguments(self, qkv: list[Float], contexts: list[int], tables: list[list[int]]) -> tuple[Any, ...]:
        positions = np.concatenate([np.arange(c, c + len(rows)) for rows, c in zip(qkv, contexts, strict=True)])
        padded = np.full((len(tables), max(len(table) for table in tables)), -1, np.int32)
        for row, table in enumerate(tables):
            padded[row, : len(table)] = table
        starts = np.cumsum([0, *(len(rows) for rows in qkv)])
        rope = reference.rope_table(positions, self.head_dim, THETA)
        return np.concatenate(qkv), rope, padded, starts, np.array(contexts)

    def scattered(self, rng: np.random.Generator, *lengths: int) -> list[list[int]]:
        """A block table for each sequence, the blocks in random order."""
        order = list(rng.permutation(self.num_blocks))
        return [[int(order.pop()) for _ in range(-(-length // self.block_size))] for length in lengths]


@pytest.fixture(params=["", "int8"])
def cache(request: pytest.FixtureRequest) -> str:
    """What the caches hold: the compute dtype, or bytes."""
    name: str = request.param
    return name


SIZES = [(16, 2, 128, 64), (4, 4, 16, 16), (5, 1, 24, 48), (20, 4, 64, 32), (2, 1, 256, 128), (3, 3, 2, 16)]


@dataclass
class MixedStep:
    """A call of `test_mixed_batches`, and what the reference answers."""

    qkv: list[Float]
    contexts: list[int]
    expected: list[Float]


@cache_results
def mixed_steps(dtype: str, sizes: tuple[int, int, int, int]) -> tuple[list[list[int]], list[MixedStep]]:
    """The block tables and the steps: once for all instruction sets, because the reference is slow."""
    heads, kv_heads, head_dim, block_size = sizes
    rng = np.random.default_rng(head_dim)
    model = Model(heads, kv_heads, head_dim, block_size, 4096 // block_size, dtype)
    lengths = np.array([1, 7, 200, 65, 650, 16])
    tables = model.scattered(rng, *(int(length) + 40 for length in lengths))
    contexts = [0] * len(lengths)
    steps = []
    for news in (lengths, [1] * 6, [30, 1, 0, 1, 2, 1]):
        qkv = [normal(rng, int(new), model.width, dtype=dtype) for new in news]
        steps.append(MixedStep(qkv, contexts, model.expect(qkv, contexts, tables)))
        contexts = [context + int(new) for context, new in zip(contexts, news, strict=True)]
    return tables, steps


@pytest.mark.parametrize("sizes", SIZES)
def test_mixed_batches(dtype: str, cache: str, sizes: tuple[int, int, int, int]) -> None:
    """Chunks of a prefill, decodes and a sequence without new tokens, in one call after another."""
    tables, steps = mixed_steps(dtype, sizes)
    heads, kv_heads, head_dim, block_size = sizes
    model = Model(heads, kv_heads, head_dim, block_size, 4096 // block_size, dtype, cache)
    for step in steps:
        for actual, expected in zip(model.run(step.qkv, step.contexts, tables), step.expected, strict=True):
            # Weights of a bfloat16 softmax are rounded before they meet the values.
            bound = 0.05 if cache else 0.03 if dtype == "bfloat16" else 2e-5
            assert np.abs(actual - expected).max(initial=0) < bound


def test_a_short_context_is_exact(dtype: str) -> None:
    """One key: the answer is its value, whatever the scores."""
    rng = np.random.default_rng(0)
    model = Model(4, 2, 32, 16, 4, dtype)
    qkv = normal(rng, 1, model.width, dtype=dtype)
    (actual,) = model.run([qkv], [0], [[3]])
    assert (actual.reshape(2, 2, 32) == qkv[0, 6 * 32 :].reshape(2, 1, 32)).all()


@pytest.mark.parametrize("chunk", [1, 7, 64, 333])
def test_chunking_changes_no_bit(dtype: str, cache: str, chunk: int) -> None:
    rng = np.random.default_rng(7)
    rows = normal(rng, 700, 6 * 64, dtype=dtype)
    whole_model, model = (Model(4, 1, 64, 16, 64, dtype, cache) for _ in range(2))
    tables = model.scattered(rng, 700)
    (whole,) = whole_model.run([rows], [0], tables)
    if chunk == 1:  # decode the last stretch only: a call a token is slow
        model.run([rows[:600]], [0], tables)
    for first in range(600 if chunk == 1 else 0, 700, chunk):
        (part,) = model.run([rows[first : first + chunk]], [first], tables)
        assert (part == whole[first : first + chunk]).all()


@pytest.mark.parametrize("length", [40, 1300])
def test_company_blocks_and_threads_change_no_bit(dtype: str, cache: str, length: int) -> None:
    """A sequence alone on one thread, and among others, in other blocks of another size, on three."""
    rng = np.random.default_rng(8)
    alone = Model(8, 2, 64, 16, 128, dtype, cache)
    crowd = Model(8, 2, 64, 64, 128, dtype, cache)
    rows = normal(rng, length + 5, alone.width, dtype=dtype)
    others = [normal(rng, n, alone.width, dtype=dtype) for n in (3, 90, 1)]
    ops.set_num_threads(1)
    table = alone.scattered(rng, length + 5)
    expected = [*alone.run([rows[:length]], [0], table), *alone.run([rows[length:]], [length], table)]
    ops.set_num_threads(3)
    tables = crowd.scattered(rng, 3, 90, length + 5, 1)
    first = crowd.run([*others[:2], rows[:length], others[2]], [0, 0, 0, 0], tables)
    second = crowd.run([others[0][:1], others[1][:1], rows[length:], others[2]], [2, 89, length, 0], tables)
    assert (first[2] == expected[0]).all()
    assert (second[2] == expected[1]).all()


def test_long_contexts_decode(dtype: str) -> None:
    rng = np.random.default_rng(9)
    model = Model(4, 1, 64, 64, 80, dtype)
    tables = model.scattered(rng, 4000, 1000)
    history = [normal(rng, 3999, model.width, dtype=dtype), normal(rng, 999, model.width, dtype=dtype)]
    model.run(history, [0, 0], tables)
    new = [normal(rng, 1, model.width, dtype=dtype) for _ in range(2)]
    actual = model.run(new, [3999, 999], tables)
    for length, rows, answer, table in zip((4000, 1000), history, actual, tables, strict=True):
        reference_model = Model(4, 1, 64, 64, 80, dtype)
        last = new[0] if length == 4000 else new[1]
        # Only the last query is asked of the reference: the history enters as keys and values.
        keys = reference.apply_rope(
            np.concatenate([rows, last])[:, 256:320].reshape(-1, 1, 64),
            reference.rope_table(np.arange(length), 64, THETA),
        )
        for position in range(length - 1):
            block = table[position // 64]
            reference_model.plain_k[block, position % 64] = reference.rounded(keys[position], dtype)
            reference_model.plain_v[block, position % 64] = rows[position, 320:].reshape(1, 64)
        (expected,) = reference_model.expect([last], [length - 1], [table])
        assert np.abs(answer - expected).max() < (0.01 if dtype == "bfloat16" else 2e-5)


def test_long_rows_are_shared_out_among_threads(dtype: str, cache: str) -> None:
    """A long decode, a short one and a chunk, whose parts different threads compute, as on one thread."""
    contexts, news = [1500, 20, 700], [1, 1, 30]
    answers = []
    for threads in (1, 2, 3):
        rng = np.random.default_rng(13)
        model = Model(8, 2, 64, 16, 160, dtype, cache)
        tables = model.scattered(rng, *(context + 40 for context in contexts))
        model.run([normal(rng, context, model.width, dtype=dtype) for context in contexts], [0, 0, 0], tables)
        rows = [normal(rng, new, model.width, dtype=dtype) for new in news]
        ops.set_num_threads(threads)
        answers.append(model.run(rows, contexts, tables))
        for row, context, table, answer in zip(rows, contexts, tables, answers[0], strict=True):
            assert (model.run([row], [context], [table])[0] == answer).all()
    for others in answers[1:]:
        assert all((left == right).all() for left, right in zip(others, answers[0], strict=True))


def test_a_sequence_may_read_what_another_of_the_call_writes(dtype: str, cache: str) -> None:
    rng = np.random.default_rng(10)
    model, separate = (Model(4, 2, 32, 16, 16, dtype, cache) for _ in range(2))
    prefix, tail = normal(rng, 32, model.width, dtype=dtype), normal(rng, 5, model.width, dtype=dtype)
    (before,) = separate.run([prefix], [0], [[4, 2]])
    (after,) = separate.run([tail], [32], [[4, 2, 9]])
    for order in (1, -1):
        calls = [([prefix], [0], [4, 2, 3]), ([tail], [32], [4, 2, 9])][::order]
        rows, contexts, tables = zip(*calls, strict=True)
        got = model.run([each[0] for each in rows], [each[0] for each in contexts], list(tables))[::order]
        assert (got[0] == before).all()
        assert (got[1] == after).all()


def test_stale_nans_in_a_block_do_no_harm(dtype: str, cache: str) -> None:
    """A block that a broken sequence filled is reused: positions not yet written must not count."""
    rng = np.random.default_rng(11)
    model, clean = (Model(6, 2, 64, 64, 2, dtype, cache) for _ in range(2))
    model.run([np.full((64, model.width), np.nan, np.float32)], [0], [[1]])
    for length in (1, 2, 17):
        rows = normal(rng, length, model.width, dtype=dtype)
        assert (model.run([rows], [0], [[1]])[0] == clean.run([rows], [0], [[1]])[0]).all()


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_broken_token_shows_and_harms_no_other_sequence(dtype: str, cache: str, broken: float) -> None:
    """A token's query is its own; its key and value are those of every later one of its sequence."""
    rng = np.random.default_rng(12)
    rows = [normal(rng, 40, 6 * 64, dtype=dtype) for _ in range(2)]
    for columns, seen_by in ((slice(0, 64), slice(21, 22)), (slice(5 * 64, None), slice(21, 40))):
        model, clean = (Model(4, 1, 64, 16, 8, dtype, cache) for _ in range(2))
        tables = model.scattered(rng, 40, 40)
        spoilt = rows[0].copy()
        spoilt[21, columns] = broken
        actual, expected = model.run([spoilt, rows[1]], [0, 0], tables), clean.run(rows, [0, 0], tables)
        assert not np.isfinite(actual[0][seen_by, :64]).any()
        assert (actual[1] == expected[1]).all()
    # The last of these had a broken value: what is before it in other blocks has nothing to do with it.
    assert (actual[0][:16] == expected[0][:16]).all()


def test_no_tokens(dtype: str) -> None:
    model = Model(2, 1, 16, 16, 2, dtype)
    empty = np.zeros((0, model.width), np.float32)
    sizes = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "block_size": 16}
    rope = tensor(np.zeros((0, 16), np.float32), "float32")
    for sequences in (0, 2):
        tables, lens = ints(np.zeros((sequences, 1))), ints(np.zeros(sequences))
        out = ops.attention(
            tensor(empty, dtype), model.k, model.v, rope, tables, ints(np.zeros(sequences + 1)), lens, **sizes
        )
        assert out.shape == [0, 32]


@pytest.mark.parametrize(
    ("tables", "contexts", "message"),
    [([[2]], [0], "out of range"), ([[-1]], [0], "out of range"), ([[0]], [16], "too short"), ([[0]], [-1], "context")],
)
def test_wild_indices_are_refused(tables: list[list[int]], contexts: list[int], message: str) -> None:
    model = Model(2, 1, 16, 16, 2, "float32")
    with pytest.raises(ValueError, match=message):
        model.run([np.zeros((1, model.width), np.float32)], contexts, tables)


def test_a_cache_of_bytes_is_off_by_rounding_alone(dtype: str) -> None:
    rng = np.random.default_rng(14)
    model, exact = Model(8, 2, 128, 64, 8, dtype, "int8"), Model(8, 2, 128, 64, 8, dtype)
    rows = [normal(rng, 400, model.width, dtype=dtype)]
    error = model.run(rows, [0], [list(range(7))])[0] - exact.run(rows, [0], [list(range(7))])[0]
    spread = exact.expect(rows, [0], [list(range(7))])[0].std()
    assert np.sqrt(np.square(error).mean()) < 0.02 * spread


def test_the_largest_sums_over_a_cache_of_bytes(dtype: str) -> None:
    """Weights all alike, and values all as large as bytes are."""
    model = Model(8, 1, 128, 64, 9, dtype, "int8")
    rows = np.zeros((520, model.width), np.float32)
    rows[:, -model.head_dim :] = np.where(np.arange(model.head_dim) % 3, 2.0, -2.0)
    (answer,) = model.run([rows], [0], [list(range(9))])
    np.testing.assert_allclose(
        answer, np.tile(rows[:, -model.head_dim :], 8), rtol=1e-2 if dtype == "bfloat16" else 1e-5
    )


def test_cache_sizes() -> None:
    k, v = ops.new_kv_cache(3, 2, 32, 20, "int8")
    assert (k.size + v.size) / (3 * 32) == ops.kv_bytes_per_token(2, 20, "int8")
    assert ops.kv_bytes_per_token(2, 128, "int8") == 528
    k, v = ops.new_kv_cache(3, 2, 32, 128, "float32")
    assert 4 * (k.size + v.size) / (3 * 32) == ops.kv_bytes_per_token(2, 128, "float32")
    assert ops.kv_bytes_per_token(2, 128, "bfloat16") == 1024
    with pytest.raises(ValueError, match="multiple of 16"):
        ops.kv_cache_shape(3, 2, 24, 128)


def test_reference_rope_turns_adjacent_pairs() -> None:
    x = normal(np.random.default_rng(12), 3, 2, 8)
    angles = np.arange(3)[:, None] * THETA ** (-np.arange(0, 8, 2) / 8)
    turned = x[..., 0::2] + 1j * x[..., 1::2]
    turned = turned * np.exp(1j * angles)[:, None, :]
    actual = reference.apply_rope(x, reference.rope_table(np.arange(3), 8, THETA))
    assert_close(actual[..., 0::2], turned.real, "float32")
    assert_close(actual[..., 1::2], turned.imag, "float32")


@pytest.mark.parametrize("blocks", [1 << 40, 1 << 62])
def test_a_cache_beyond_the_memory_is_refused(blocks: int) -> None:
    with pytest.raises(MemoryError, match="the system has no"):
        ops.new_kv_cache(blocks, 2, 64, 128, "float32")
