"""The scheduler: which sequences compute how many tokens in the next step.

A pure, synchronous data structure: no I/O, no clock, no text, no tensors. One step is

    plan = scheduler.schedule()          # None: nothing to do
    …the ranks execute the plan…
    outputs = scheduler.update(result)

Every running sequence holds a row and blocks for all of its tokens. `schedule` spends one token budget: first on
sequences with one token left to compute (decodes), then on running prefills, then it admits waiting sequences, in the
order of priority and arrival. A sequence enters with blocks for all the tokens it has, so only a decode can run out of
blocks; then the last running sequence is preempted: it gives up its row and blocks, waits at its old place and is
computed again, mostly from the prefix cache.

With speculation, decodes compute guesses at their next tokens, too, out of what the running sequences leave of budget
and blocks; `update` then takes in as many tokens as the ranks found right, and one more.

The next step can be planned while one is in flight, by `schedule_ahead`: then sequences compute tokens that are sampled
but not known yet, and what is computed for one that has ended meanwhile is ignored.

Full blocks are made findable when a plan computes them, before it is executed. That is sound because every plan is
executed, in order, and within a step the ranks write all keys and values before they read any: even a sequence of the
same step may share them. Blocks with tokens that are guessed, or not known yet, get their names once they are known.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections import deque
from dataclasses import dataclass
from itertools import repeat

from fdserve.engine.kv_cache import BlockPool
from fdserve.engine.request import FinishReason, Request, TokenDelta
from fdserve.engine.results import Sampled, broken, take_prompt_logprobs, take_tokens
from fdserve.engine.sequence import Sequence
from fdserve.engine.speculation import MAX_DRAFTED, Speculation
from fdserve.engine.waiting import WaitingQueue
from fdserve.executor.wire import NewRow, Plan

MAX_NEW_ROWS_BYTES = 8 << 20
"""The new rows that one plan carries weigh no more without the last of them: it reaches the ranks in milliseconds."""


def check_capacity(num_blocks: int, block_size: int, max_model_len: int) -> None:
    """Raise ValueError if so many blocks cannot hold the longest sequence."""
    if max_model_len > num_blocks * block_size:
        raise ValueError(f"{num_blocks} blocks of {block_size} cannot hold {max_model_len} tokens")


@dataclass
class SchedulerStats:
    """Totals since the start."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Scheduler:
    """Chooses the work of each step; see the module's docstring.

    `max_model_len` tokens must fit into `num_blocks`, so that a sequence that runs alone always can go on. Without
    chunked prefill a sequence's whole prefill must fit into `max_num_batched_tokens`.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        speculation: Speculation | None = None,
    ) -> None:
        check_capacity(num_blocks, block_size, max_model_len)
        if not enable_chunked_prefill and max_num_batched_tokens < max_model_len:
            raise ValueError("without chunked prefill a step must be able to hold the longest sequence")
        self.block_size = block_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.enable_chunked_prefill = enable_chunked_prefill
        self.speculation = speculation
        self.stats = SchedulerStats()
        self.pool = BlockPool(num_blocks, enable_caching=enable_prefix_caching)
        self.running: list[Sequence] = []
        self.admitted: list[Sequence] = []
        """The sequences that the last plan runs for the first time."""
        self.masked: list[Sequence] = []
        """The sequences of the last plan's `masked_rows`."""
        self._waiting = WaitingQueue()
        self._free_rows = list(range(max_num_seqs))
        self._arrivals = 0
        # Of each plan in flight: the sequences, whether they have no more to compute, whether they sample, and how many
        # logprobs of their prompts come back.
        self._in_flight: deque[list[tuple[Sequence, bool, bool, int]]] = deque()
        self._planned: list[tuple[Sequence, bool, bool, int]] = []  # the same of the last plan
        self.plan = Plan(0, [], [], [], [])
        """The last plan."""

    def add(self, request: Request) -> Sequence:
        """Queue a request. With a token to come its prompt must fit `max_model_len`, and must not be empty."""
        if not 0 < len(request.prompt) <= self.max_model_len - (request.params.max_tokens > 0):
            raise ValueError(f"a prompt of {len(request.prompt)} tokens does not fit {self.max_model_len}")
        self._arrivals += 1
        sequence = Sequence(request, self._arrivals, self.max_model_len)
        self._waiting.push(sequence)
        return sequence

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence, wherever it is, and free its row and blocks at once. Idempotent.

        What a step in flight still computes for it is ignored; its blocks can be given away now, because whoever gets
        them writes them in a later step.
        """
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        if sequence.row >= 0:
            self._release(sequence)
        else:
            self._waiting.note_finished()

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a row and blocks."""
        return len(self._waiting)

    def schedule(self) -> Plan | None:
        """The next step's plan, or None if no sequence can compute anything.

        Call it only when the result of the last plan went through `update`.
        """
        return self._schedule()

    def schedule_ahead(self) -> Plan | None:
        """The plan of the step after the one in flight, whose result is not known yet; None where it must be.

        Speculation must know the last token, and a preemption what the sequence has to compute again.
        """
        if self.speculation is not None or self.pool.num_free < len(self.running):
            return None
        return self._schedule()

    def _schedule(self) -> Plan | None:
        self._planned = []
        self.admitted = []
        self.masked = []
        self.plan = Plan(self.stats.steps + 1, [], [], [], [])
        budget = self.max_num_batched_tokens
        budget, preempted = self._schedule_decodes(budget)
        if self.speculation is not None and not preempted:
            budget = self._schedule_drafts(self.speculation, budget)
        budget = self._schedule_prefills(budget)
        if not preempted:
            self._admit_waiting(budget)
        if not self._planned:
            return None
        self._in_flight.append(self._planned)
        self.stats.steps += 1
        return self.plan

    def update(self, sampled: Sampled) -> list[tuple[Sequence, TokenDelta]]:
        """Take in what the first plan in flight sampled, of each sequence that sampled, in the plan's order.

        Returns a delta for each of them that still lives, for those that have nothing to generate and are done, and for
        those whose prompt's logprobs are no numbers; those that end with it are finished.
        """
        outputs = []
        index = prompt_index = generated = 0
        counts = iter(sampled.counts or repeat(1))
        if self.speculation is not None:
            self.speculation.note_step(self.plan, sampled)
        for sequence, complete, samples, prompt_count in self._in_flight.popleft():
            sequence.expected -= samples
            count = next(counts) if samples else 0
            if prompt_count > 0:
                if not take_prompt_logprobs(sequence, sampled, prompt_index, prompt_count):
                    self.finish(sequence, "error")
                    outputs.append((sequence, broken()))
                prompt_index += prompt_count
            if sequence.finish_reason is None and complete:
                delta = take_tokens(sequence, sampled, index, count)
                taken = len(delta.token_ids)
                generated += taken
                if taken > 1:
                    self._note_accepted(sequence, taken - 1)
                if delta.finish_reason is not None:
                    self.finish(sequence, delta.finish_reason)
                elif len(sequence.tokens) % self.block_size == 0:
                    sequence.name_blocks(self.pool, self.block_size)  # if it was computed before it was known
                outputs.append((sequence, delta))
            index += count
        if index != len(sampled.token_ids):
            raise ValueError(f"a step gave {len(sampled.token_ids)} tokens, and {index} were due")
        self.stats.generated_tokens += generated
        return outputs

    def forget_cache(self, num_blocks: int | None = None) -> None:
        """Start with an empty cache: the ranks' memory is new, and may be of another size. Nothing may be running.

        Raises ValueError if it cannot hold the longest sequence.
        """
        if self.running:
            raise ValueError("sequences are running")
        num_blocks = self.pool.num_blocks if num_blocks is None else num_blocks
        check_capacity(num_blocks, self.block_size, self.max_model_len)
        self._in_flight.clear()
        self.pool = BlockPool(num_blocks, enable_caching=self.pool.enable_caching)

    def check_integrity(self) -> None:
        """Raise AssertionError if a block or a row is lost, or counted wrongly."""
        self.pool.check_integrity(sequence.blocks for sequence in self.running)
        rows = sorted(self._free_rows + [sequence.row for sequence in self.running])
        if rows != list(range(len(rows))):
            raise AssertionError(f"rows are lost or doubled: {rows}")
        self._waiting.check_integrity()

    # -- one step ------------------------------------------------------------------------------------------------

    def _schedule_decodes(self, budget: int) -> tuple[int, bool]:
        """Returns the budget left, and whether a sequence was preempted."""
        preempted = False
        for sequence in self.running.copy():
            if budget == 0:
                break
            if sequence.row < 0 or not sequence.decodes:
                continue  # preempted for a sequence before it, or a prefill
            if sequence.num_computed == len(sequence.blocks) * self.block_size:
                while (blocks := self.pool.allocate(1)) is None:
                    preempted = True
                    victim = self.running[-1]
                    self._preempt(victim)
                    if victim is sequence:
                        break
                if blocks is None:
                    break  # it was the last in order: those after it were preempted for it
                sequence.blocks += blocks
                self.plan.new_blocks.append((sequence.row, blocks[0]))
            self._compute(sequence, 1)
            budget -= 1
        return budget, preempted

    def _schedule_drafts(self, speculation: Speculation, budget: int) -> int:
        """Let the plan's decodes compute guesses, too, where they pay. Returns the budget left."""
        if len(self._planned) > MAX_DRAFTED:
            return budget  # guesses for a few of so many save nothing worth looking for them
        room = min(budget, MAX_DRAFTED)
        for index, (sequence, *_) in enumerate(self._planned):
            # The last token of all is sampled from the last guess at most.
            left = sequence.longest - len(sequence.tokens) - 1
            if sequence.constrained or min(left, room) <= 0:
                continue
            draft = speculation.draft(sequence, min(left, room), len(self._planned))
            del draft[self._room_for(sequence, len(draft)) :]
            if draft:
                self.plan.drafts.append((sequence.row, draft))
                self.plan.num_tokens[index] += len(draft)
                self.stats.drafted_tokens += len(draft)
                budget -= len(draft)
                room -= len(draft)
        return budget

    def _room_for(self, sequence: Sequence, count: int) -> int:
        """How many of `count` tokens more the sequence's blocks hold, after it was given what can be spared."""
        missing = -(-(len(sequence.tokens) + count) // self.block_size) - len(sequence.blocks)
        # As at an admission: this must not cause the next preemption.
        if missing > 0 and self.pool.num_free >= missing + len(self.running):
            blocks = self.pool.allocate(missing)
            assert blocks is not None
            sequence.blocks += blocks
            self.plan.new_blocks.extend((sequence.row, block) for block in blocks)
        return min(count, len(sequence.blocks) * self.block_size - len(sequence.tokens))

    def _schedule_prefills(self, budget: int) -> int:
        """Returns the budget left."""
        if len(self._planned) == len(self.running):
            return budget  # all of them decode: no planned one was preempted, as these are the first in order
        for sequence in self.running:
            if sequence.remaining <= 1 or (sequence.remaining > budget and not self.enable_chunked_prefill):
                continue
            if budget == 0:
                break
            count = min(sequence.remaining, budget)
            self._compute(sequence, count)
            budget -= count
        return budget

    def _admit_waiting(self, budget: int) -> None:
        """Admit in order, never past a sequence that does not fit: no later one can starve it."""
        room = MAX_NEW_ROWS_BYTES
        while budget > 0 and room > 0 and self._free_rows:
            sequence = self._waiting.first()
            if sequence is None or not self._start(sequence, budget):
                return
            self._waiting.pop()
            room -= self.plan.new_rows[-1].weight
            count = min(sequence.remaining, budget)
            self._compute(sequence, count)
            budget -= count

    def _start(self, sequence: Sequence, budget: int) -> bool:
        """Give a waiting sequence a row and blocks for all its tokens; False, and no change, if it must wait."""
        cached = sequence.find_prefix(self.pool, self.block_size)
        num_computed = len(cached) * self.block_size
        if len(sequence.tokens) - num_computed > budget and not self.enable_chunked_prefill:
            return False
        needed = -(-len(sequence.tokens) // self.block_size) - len(cached)
        # Every running sequence may soon want one more block: an admission must not cause the next preemption.
        if self.pool.num_free_without(cached) < needed + len(self.running):
            return False
        self.pool.acquire(cached)
        blocks = self.pool.allocate(needed)
        assert blocks is not None
        sequence.blocks = cached + blocks
        sequence.num_computed = num_computed
        sequence.num_registered = len(cached)
        sequence.row = self._free_rows.pop()
        insort(self.running, sequence)
        if not sequence.started:
            sequence.started = True
            self.admitted.append(sequence)
            sequence.cached_tokens = num_computed
            self.stats.prompt_tokens += sequence.num_prompt
            self.stats.cached_tokens += num_computed
        self.plan.new_rows.append(
            NewRow(
                row=sequence.row,
                token_ids=array("i", sequence.tokens).tobytes(),
                num_prompt=sequence.num_prompt,
                num_computed=num_computed,
                blocks=tuple(sequence.blocks),
                params=sequence.request.params,
                prompt_logprobs=-1
                if sequence.prompt_logprobs is None
                else sequence.request.params.prompt_logprobs or 0,
            )
        )
        return True

    def _compute(self, sequence: Sequence, count: int) -> None:
        """Put `count` tokens of a sequence into the plan, and name the blocks that they fill."""
        plan = self.plan
        plan.rows.append(sequence.row)
        plan.num_tokens.append(count)
        prompt_count = 0
        if sequence.prompt_logprobs is not None:
            last = sequence.num_prompt - 1  # no prompt token follows it
            prompt_count = max(0, min(last, sequence.num_computed + count) - sequence.num_computed)
        computed = sequence.num_computed = sequence.num_computed + count
        complete = computed == len(sequence.tokens) + sequence.expected
        samples = complete and sequence.generates
        if samples:
            sequence.expected += 1
        self._planned.append((sequence, complete, samples, prompt_count))
        if samples and sequence.constrained:
            plan.masked_rows.append(sequence.row)
            self.masked.append(sequence)
        if computed >= (sequence.num_registered + 1) * self.block_size:
            sequence.name_blocks(self.pool, self.block_size)

    def _note_accepted(self, sequence: Sequence, count: int) -> None:
        """So many guesses at a sequence's tokens were right: they are computed, too."""
        self.stats.accepted_tokens += count
        sequence.num_computed += count
        sequence.name_blocks(self.pool, self.block_size)

    # -- rows and blocks ------------------------------------------------------------------------------------------

    def _release(self, sequence: Sequence) -> None:
        self.pool.free(sequence.blocks)
        sequence.blocks = []
        self._free_rows.append(sequence.row)
        sequence.row = -1
        self.running.remove(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.num_computed = 0
        sequence.num_registered = 0
        if sequence.prompt_logprobs is not None:
            sequence.prompt_logprobs = []
        self.stats.preemptions += 1
        self._waiting.push(sequence)
