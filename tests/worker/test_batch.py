from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdserve.executor.wire import NewRow, Plan, SamplingParams
from fdserve.worker.batch import accept, assemble
from fdserve.worker.rows import Rows


def new_row(row: int, tokens: list[int], *, computed: int = 0, blocks: tuple[int, ...] = (), prompt: int = 0) -> NewRow:
    return NewRow(
        row=row,
        token_ids=np.array(tokens, np.int32).tobytes(),
        num_prompt=prompt or len(tokens),
        num_computed=computed,
        blocks=blocks,
        params=SamplingParams(max_tokens=10, seed=row),
    )


def test_a_prefill_chunk_and_a_decode_share_a_batch() -> None:
    rows = Rows(4, 64, block_size=4, vocab_size=100)
    first = Plan(1, [new_row(2, [10, 11, 12, 13, 14, 15], computed=4, blocks=(7, 8))], [], [2], [2])
    rows.take_changes(first)
    batch = assemble(rows, first)
    assert batch.token_ids.tolist() == [14, 15]
    assert batch.positions.tolist() == [4, 5]
    assert batch.sample_rows.tolist() == [2]
    rows.append(batch.sample_rows, np.array([99], np.int32))

    second = Plan(2, [new_row(0, list(range(20, 40)), blocks=(1, 2, 3, 4, 5))], [(2, 9)], [2, 0], [1, 7])
    rows.take_changes(second)
    batch = assemble(rows, second)
    assert batch.token_ids.tolist() == [99, 20, 21, 22, 23, 24, 25, 26]
    assert batch.positions.tolist() == [6, 0, 1, 2, 3, 4, 5, 6]
    assert batch.query_starts.tolist() == [0, 1, 8]
    assert batch.context_lens.tolist() == [6, 0]
    assert batch.block_tables.tolist() == [[7, 8], [1, 2]]
    assert batch.sample_indices.tolist() == [0]
    assert batch.sample_rows.tolist() == [2]
    assert rows.num_blocks[2] == 3


def test_drafts_are_computed_and_kept_as_far_as_they_are_right() -> None:
    rows = Rows(4, 64, block_size=4, vocab_size=100)
    news = [new_row(0, [5, 6, 7], computed=2, blocks=(1, 2)), new_row(1, [8], blocks=(3,))]
    news += [new_row(3, [1, 2], computed=1, blocks=(4, 5)), new_row(2, [3] * 6, blocks=(6, 7))]
    drafts = [(0, [70, 71, 72]), (3, [80, 81])]
    plan = Plan(1, news, [], [0, 1, 3, 2], [4, 1, 3, 2], drafts=drafts)
    rows.take_changes(plan)
    batch = assemble(rows, plan)
    assert batch.token_ids.tolist() == [7, 70, 71, 72, 8, 2, 80, 81, 3, 3]
    assert batch.positions.tolist() == [2, 3, 4, 5, 0, 1, 2, 3, 0, 1]
    assert batch.sample_rows.tolist() == [0, 0, 0, 0, 1, 3, 3, 3]
    assert batch.sample_indices.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert batch.sample_lens.tolist() == [3, 4, 5, 6, 1, 2, 3, 4]
    assert batch.sample_counts is not None
    assert batch.sample_counts.tolist() == [4, 1, 3]

    sampled = np.array([70, 71, 99, 98, 50, 80, 81, 82], np.int32)
    kept, counts = accept(rows, batch, batch.sample_counts, sampled)
    assert sampled[kept].tolist() == [70, 71, 99, 50, 80, 81, 82]
    assert counts.tolist() == [3, 1, 3]
    assert rows.num_tokens.tolist() == [6, 2, 6, 5]
    assert rows.num_computed.tolist() == [5, 1, 2, 4]
    assert rows.tokens[0, :6].tolist() == [5, 6, 7, 70, 71, 99]
    assert rows.tokens[3, :5].tolist() == [1, 2, 80, 81, 82]

    after = Plan(2, [], [], [0, 1, 3], [1, 1, 1])
    rows.take_changes(after)
    batch = assemble(rows, after)
    assert batch.token_ids.tolist() == [99, 50, 82]
    assert batch.sample_counts is None
    assert batch.sample_lens.tolist() == [6, 2, 5]


def test_a_sample_that_is_none_ends_what_is_kept() -> None:
    rows = Rows(1, 64, block_size=4, vocab_size=100)
    plan = Plan(1, [new_row(0, [5], blocks=(1,))], [], [0], [3], drafts=[(0, [0, 0])])
    rows.take_changes(plan)
    batch = assemble(rows, plan)
    assert batch.sample_counts is not None
    kept, counts = accept(rows, batch, batch.sample_counts, np.array([0, -1, 0], np.int32))
    assert (kept.tolist(), counts.tolist()) == ([True, True, False], [2])


def test_a_row_that_is_taken_again_starts_anew() -> None:
    rows = Rows(2, 64, block_size=4, vocab_size=100)
    for tokens in ([1, 2, 3, 4, 5, 6, 7], [8, 9]):
        plan = Plan(1, [new_row(0, tokens, blocks=(3,) * (len(tokens) // 4 + 1))], [], [0], [len(tokens)])
        rows.take_changes(plan)
        batch = assemble(rows, plan)
        assert batch.token_ids.tolist() == tokens
        assert rows.num_blocks[0] == len(tokens) // 4 + 1


def test_a_row_that_generates_nothing_does_not_sample() -> None:
    rows = Rows(2, 64, block_size=4, vocab_size=100)
    new = NewRow(0, np.array([5, 6], np.int32).tobytes(), 2, 0, (1,), SamplingParams(max_tokens=0, seed=0))
    plan = Plan(1, [new], [], [0], [2])
    rows.take_changes(plan)
    assert assemble(rows, plan).sample_rows.tolist() == []


@pytest.mark.parametrize("chunks", [[6, 1], [7], [1] * 7, [3, 2, 2]])
def test_chunks_report_every_prompt_token_but_the_first(chunks: list[int]) -> None:
    rows = Rows(2, 64, block_size=4, vocab_size=100)
    tokens = np.array([10, 11, 12, 13, 14, 15, 16], np.int32)  # the last was generated before a preemption
    params = SamplingParams(max_tokens=9, seed=0, prompt_logprobs=3)
    news = [NewRow(1, tokens.tobytes(), 6, 0, (1, 2), params, 3), new_row(0, [7, 8, 9], blocks=(3,))]
    before: list[int] = []
    after: list[int] = []
    for number, count in enumerate(chunks):
        others = [0] if number == 0 else []
        plan = Plan(1, news if number == 0 else [], [], [*others, 1], [3] * len(others) + [count])
        rows.take_changes(plan)
        batch = assemble(rows, plan)
        before += batch.token_ids[batch.prompt_indices].tolist()
        after += batch.prompt_targets.tolist()
        assert batch.prompt_num_top == 3
    assert (before, after) == ([10, 11, 12, 13, 14], [11, 12, 13, 14, 15])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_chunks_cover_every_token_once(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    rows = Rows(8, 64, block_size=16, vocab_size=100)
    new = [new_row(r, [100 * r + i for i in range(n)], blocks=(0, 1, 2)) for r, n in enumerate(lengths)]
    seen: dict[int, list[int]] = {row: [] for row in range(len(lengths))}
    sampled: list[int] = []
    plan = Plan(1, new, [], [], [])
    while any(len(seen[row]) < length for row, length in enumerate(lengths)):
        left = [row for row, length in enumerate(lengths) if len(seen[row]) < length]
        counts = [data.draw(st.integers(1, lengths[row] - len(seen[row]))) for row in left]
        plan = Plan(1, plan.new_rows if not sampled and not any(seen.values()) else [], [], left, counts)
        rows.take_changes(plan)
        batch = assemble(rows, plan)
        for index, row in enumerate(left):
            part = slice(batch.query_starts[index], batch.query_starts[index + 1])
            assert batch.positions[part].tolist() == [len(seen[row]) + i for i in range(counts[index])]
            seen[row] += batch.token_ids[part].tolist()
        sampled += batch.sample_rows.tolist()
    assert seen == {row: [100 * row + i for i in range(n)] for row, n in enumerate(lengths)}
    assert sorted(sampled) == list(range(len(lengths)))


def test_a_batch_of_256_decodes_is_assembled_fast() -> None:
    rows = Rows(256, 131072, block_size=64, vocab_size=100)
    new = [new_row(row, [1] * 500, computed=499, blocks=tuple(range(8))) for row in range(256)]
    plan = Plan(1, new, [], list(range(256)), [1] * 256)
    rows.take_changes(plan)
    decode = Plan(2, [], [], plan.rows, plan.num_tokens)
    times = []
    for _ in range(50):
        rows.num_computed[:] = 499
        started = time.perf_counter()
        rows.take_changes(decode)
        assemble(rows, decode)
        times.append(time.perf_counter() - started)
    assert sorted(times)[len(times) // 2] < 1e-3  # some 100 µs on an idle machine


@pytest.mark.parametrize("sampled", [-1, 7])
def test_a_sampled_token_is_appended(sampled: int) -> None:
    rows = Rows(2, 64, block_size=4, vocab_size=100)
    rows.take_changes(Plan(1, [new_row(1, [5, 6])], [], [], []))
    rows.append(np.array([1], np.int32), np.array([sampled], np.int32))
    assert rows.tokens[1, :3].tolist() == [5, 6, max(sampled, 0)]
    assert rows.num_tokens[1] == 3
