"""Constraints in the engine's loop over simulated ranks, on both event loops."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdserve.engine.engine import Engine
from fdserve.errors import InternalError, InvalidRequest, RankError, Unavailable
from fdserve.executor.wire import Plan
from tests.engine.fake_ranks import FakeRanks, drain, serving, wait_until
from tests.engine.simulation import bits, expected_output, make_request

pytestmark = pytest.mark.anyio


class Script:
    """Allows the ids of one set after the other; finished after the last. Checks how it is driven."""

    def __init__(self, *sets: set[int] | None, at: Callable[[int], object] = lambda step: None) -> None:
        self.sets = sets
        self.seen: list[int] = []
        self.at = at
        self.threads: set[int] = set()

    @property
    def finished(self) -> bool:
        return len(self.seen) >= len(self.sets)

    def advance(self, token_id: int) -> None:
        self.threads.add(threading.get_ident())
        allowed = self.sets[len(self.seen)]
        assert allowed is None or token_id in allowed
        self.seen.append(token_id)

    def mask(self) -> bytes | None:
        assert not self.finished
        self.at(len(self.seen))
        allowed = self.sets[len(self.seen)]
        return None if allowed is None else bits(allowed)


async def test_a_constraint_decides_every_token_and_the_end() -> None:
    ranks = FakeRanks()
    async with serving(ranks) as engine:
        script = Script({5}, {7, 900}, None, {3})
        free = make_request([2], name="free", max_tokens=12)
        with engine.submit(free) as other, engine.submit(make_request([1], constraint=script)) as generation:
            tokens, last = await drain(generation)
            assert (await drain(other))[0] == expected_output(free, 64)
        assert tokens == script.seen
        assert tokens[0] == 5
        assert tokens[1] in (7, 900)
        assert tokens[3:] == [3]
        assert (last.finish_reason, last.stop_token_id, last.token_ids) == ("stop", None, [3])
        assert threading.get_ident() not in script.threads
        assert engine.stats().running == engine.stats().kv_blocks_used == 0
        # The third set is no set: there is no mask for it, but the ranks are told so.
        assert [len(each.rows) for each in ranks.masks] == [1, 1, 0, 1, 0]


@pytest.mark.parametrize("count", [1, 3, 4])
async def test_many_masks_go_in_several_frames(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("fdserve.engine.engine.MASKS_PER_FRAME", 2)
    ranks = FakeRanks()
    async with serving(ranks) as engine:
        scripts = [Script({index}, {9, 10}) for index in range(count)]
        generations = [engine.submit(make_request([1], constraint=each)) for each in scripts]
        for index, generation in enumerate(generations):
            tokens, last = await drain(generation)
            assert (tokens[0], last.finish_reason) == (index, "stop")
        assert max(len(each.rows) for each in ranks.masks) == count


async def test_without_constraints_there_are_no_masks_and_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdserve.engine.engine.run_turns", None)
    ranks = FakeRanks()
    async with serving(ranks) as engine:
        with engine.submit(make_request([1])) as generation:
            await drain(generation)
    assert ranks.masks == []
    assert all(plan.masked_rows == [] for plan in ranks.plans)


async def test_an_eos_is_not_shown_to_the_constraint_and_a_length_still_may_be_a_stop() -> None:
    async with serving(FakeRanks()) as engine:
        ended, whole, cut = Script({5}, {6}), Script({5}, {6}), Script({5}, {6}, {7})
        for script, request, reason in [
            (ended, make_request([1], constraint=ended, eos=(6,), max_tokens=9), "stop"),
            (whole, make_request([1], constraint=whole, max_tokens=2), "stop"),
            (cut, make_request([1], constraint=cut, max_tokens=2), "length"),
        ]:
            with engine.submit(request) as generation:
                tokens, last = await drain(generation)
            assert tokens == [5, 6]
            assert last.finish_reason == reason
            assert last.stop_token_id == (6 if script is ended else None)
        assert ended.seen == [5]


@pytest.mark.parametrize("where", [0, 2])
@pytest.mark.parametrize("error", [InvalidRequest("too costly", param="guided_json"), KeyError("a defect")])
async def test_a_constraint_that_raises_ends_its_own_request(where: int, error: Exception) -> None:
    def fail(step: int) -> None:
        if step == where:
            raise error

    async with serving(FakeRanks()) as engine:
        good = Script({1}, {2}, {3}, {4})
        bad = Script({1}, {2}, {3}, {4}, at=fail)
        with (
            engine.submit(make_request([1], constraint=bad)) as first,
            engine.submit(make_request([2], constraint=good)) as second,
        ):
            tokens, last = await drain(first)
            assert tokens == [1, 2][:where]
            assert last.finish_reason == "error"
            assert last.error is error if isinstance(error, InvalidRequest) else isinstance(last.error, InternalError)
            tokens, last = await drain(second)
            assert tokens == [1, 2, 3, 4]
            assert last.finish_reason == "stop"
        assert engine.status == "ready"
        assert engine.stats().kv_blocks_used == 0


async def test_constraints_that_hang_hold_up_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdserve.engine.masking.BUDGET_SECONDS", 0.1)
    monkeypatch.setattr("fdserve.engine.masking.HANG_SECONDS", 0.2)
    release = threading.Event()
    hang = [Script({1}, {2}, at=lambda step: release.wait(30)) for _ in range(2)]
    good = Script({1}, {2}, {3})
    free = make_request([9], name="free")
    started = time.monotonic()
    async with serving(FakeRanks()) as engine:
        generations = [engine.submit(make_request([1], constraint=each)) for each in (hang[0], good, hang[1])]
        with engine.submit(free) as other:
            assert (await drain(other))[0] == expected_output(free, 64)
        for generation, script in zip(generations, (hang[0], good, hang[1]), strict=True):
            tokens, last = await drain(generation)
            if script is good:
                assert tokens == [1, 2, 3]
            else:
                assert isinstance(last.error, InvalidRequest)
                assert "took more than 0.1 s" in str(last.error)
        assert engine.stats().kv_blocks_used == 0
    assert time.monotonic() - started < 5
    release.set()


async def test_a_request_that_comes_while_the_last_output_is_checked_is_not_left_waiting() -> None:
    """The engine has nothing left to plan then, and is about to sleep."""
    checking, go_on = threading.Event(), threading.Event()

    class Slow(Script):
        def advance(self, token_id: int) -> None:
            checking.set()
            go_on.wait(5)
            super().advance(token_id)

    async with serving(FakeRanks()) as engine:
        request = make_request([2])
        with engine.submit(make_request([1], constraint=Slow({5}, {6}), max_tokens=1)) as first:
            await wait_until(checking.is_set)
            with engine.submit(request) as second:
                go_on.set()
                with anyio.fail_after(2):
                    assert (await drain(first))[0] == [5]
                    assert (await drain(second))[0] == expected_output(request, 64)


async def test_a_slow_constraint_within_the_limit_only_takes_its_time() -> None:
    slow = Script({1}, {2}, {3}, at=lambda step: time.sleep(0.02))
    async with serving(FakeRanks()) as engine:
        with engine.submit(make_request([1], constraint=slow)) as generation:
            assert (await drain(generation))[0] == [1, 2, 3]


async def test_a_request_may_be_cancelled_while_its_masks_are_computed() -> None:
    computing = threading.Event()

    def wait(step: int) -> None:
        computing.set()
        time.sleep(0.05)

    async with serving(FakeRanks()) as engine:
        script = Script(*[{1}] * 20, at=wait)
        with engine.submit(make_request([1], constraint=script, max_tokens=30)):
            await wait_until(computing.is_set)
        assert engine.stats().kv_blocks_used == 0
        with engine.submit(make_request([2])) as other:
            assert (await drain(other))[1].finish_reason == "length"
        assert engine.stats().rank_restarts == 0


@pytest.mark.usefixtures("quick_restarts")
async def test_ranks_lost_under_constraints_end_what_ran() -> None:
    ranks = FakeRanks()

    def die_once(plan: Plan) -> None:
        if plan.step == 4 and ranks.starts == 1:
            raise RankError("rank 0 was killed by SIGKILL")

    ranks.before_step = die_once
    async with serving(ranks) as engine:
        scripts = [Script(*[{1}] * 10) for _ in range(6)]
        generations = [engine.submit(make_request([i], constraint=each)) for i, each in enumerate(scripts)]
        results = [await drain(generation) for generation in generations]
        assert all(isinstance(last.error, Unavailable) for _, last in results[:4])
        assert [tokens for tokens, _ in results[4:]] == [[1] * 8] * 2


async def test_shutting_down_does_not_wait_for_a_constraint() -> None:
    release = threading.Event()
    started = time.monotonic()
    async with serving(FakeRanks()) as engine:
        script = Script({1}, at=lambda step: release.wait(30))
        generation = engine.submit(make_request([1], constraint=script))
        await anyio.sleep(0.05)
    _, last = await drain(generation)
    assert isinstance(last.error, Unavailable)
    assert time.monotonic() - started < 0.9
    release.set()


REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=20),  # prompt
        st.integers(1, 20),  # max_tokens
        st.none() | st.integers(1, 20),  # length of the script, or no constraint
        st.integers(0, 20),  # cancelled after so many tokens; 20 for never
    ),
    min_size=1,
    max_size=10,
)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@settings(max_examples=40, deadline=None)
@given(requests=REQUESTS, seed=st.integers(0, 1000), ahead=st.booleans())
def test_whatever_runs_together_each_output_follows_its_own_constraint(
    anyio_backend: str, requests: list[tuple[list[int], int, int | None, int]], seed: int, ahead: bool
) -> None:
    """With few blocks, so that sequences are preempted; scripts check that they see their own tokens, once.

    Steps may be planned `ahead`, while another one runs.
    """
    generator = random.Random(seed)

    async def check(engine: Engine, prompt: list[int], count: int, length: int | None, until: int) -> None:
        sets = [generator.choice([None, {generator.randrange(997) for _ in range(3)}]) for _ in range(length or 0)]
        script = Script(*sets) if length is not None else None
        request = make_request(prompt, max_tokens=count, constraint=script)
        tokens: list[int] = []
        with engine.submit(request) as generation:
            last = None
            while last is None and len(tokens) < until:
                for delta in await generation.receive():
                    tokens += delta.token_ids
                    last = delta.finish_reason
        if until < 20 and last is None:
            return
        assert last == ("stop" if length is not None and length <= count else "length")
        assert len(tokens) == min(count, count if length is None else length)
        if script is None:
            assert tokens == expected_output(request, 64)
        else:
            assert script.seen == tokens

    async def main() -> None:
        ranks = FakeRanks()
        ranks.ready = type(ranks.ready)(16, "float32", 0)
        with anyio.fail_after(20):
            async with serving(ranks) as engine:
                async with anyio.create_task_group() as group:
                    for each in requests:
                        group.start_soon(check, engine, *each)
                assert engine.stats().running == engine.stats().waiting == engine.stats().kv_blocks_used == 0
                assert engine.stats().rank_restarts == 0

    with pytest.MonkeyPatch.context() as patch:
        if ahead:
            patch.setattr("fdserve.engine.pace.SHORT_SECONDS", -1.0)
        anyio.run(main, backend=anyio_backend)
