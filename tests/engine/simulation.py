"""A simulated rank for scheduler tests: it knows what every slot of the KV cache holds, and checks every plan."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

from fdserve.engine.request import Constraint, Request, SamplingParams
from fdserve.engine.results import Sampled
from fdserve.engine.scheduler import Scheduler
from fdserve.executor.wire import Masks, Plan, StepResult

PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=40)
"""Prompts that often begin alike."""


def next_token(tokens: tuple[int, ...]) -> int:
    """The simulated model: a function of the whole sequence."""
    return hash(tokens) % 997


def make_request(
    prompt: list[int],
    *,
    max_tokens: int = 8,
    name: str = "r",
    priority: int = 0,
    salt: str = "",
    eos: tuple[int, ...] = (),
    prompt_logprobs: int | None = None,
    constraint: Constraint | None = None,
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, seed=0, eos_token_ids=eos, prompt_logprobs=prompt_logprobs)
    return Request(id=name, prompt=prompt, params=params, priority=priority, cache_salt=salt, constraint=constraint)


def prompt_logprob(tokens: Sequence[int]) -> float:
    """The simulated logprob of the last of these tokens of a prompt."""
    return float(next_token(tuple(tokens)))


def bits(ids: Iterable[int]) -> bytes:
    """A mask of the simulated model's 997 ids."""
    return sum(1 << token for token in set(ids)).to_bytes(128, "little")


def allowed_ids(mask: bytes) -> list[int]:
    """The ids of a mask."""
    return [token for token in range(8 * len(mask)) if mask[token // 8] >> token % 8 & 1]


@dataclass
class Row:
    tokens: list[int]
    num_computed: int
    blocks: list[int]
    num_prompt: int
    generates: bool
    prompt_top: int


@dataclass
class SimulatedRank:
    """Executes plans as the real ranks do: writes every slot first, then reads the whole context through the blocks.

    A slot holds the tuple of all tokens up to its position: reading a context slot by slot proves that it is the
    sequence's own prefix, whoever computed it.
    """

    scheduler: Scheduler
    rows: dict[int, Row] = field(default_factory=dict)
    slots: dict[int, tuple[int, ...]] = field(default_factory=dict)
    steps: int = 0
    computed_tokens: int = 0

    def execute(self, plan: Plan, masks: Masks | None = None) -> Sampled:
        return Sampled(self.result(plan, masks))

    def result(self, plan: Plan, masks: Masks | None = None) -> StepResult:
        assert (masks is not None) == bool(plan.masked_rows)
        assert masks is None or set(masks.rows) <= set(plan.masked_rows)
        allowed = dict(zip(masks.rows, masks.masks, strict=True)) if masks else {}
        assert sum(plan.num_tokens) <= self.scheduler.max_num_batched_tokens
        assert len(plan.rows) == len(set(plan.rows)) > 0
        self._take_changes(plan)
        drafts = dict(plan.drafts)
        for row, draft in drafts.items():
            assert self.rows[row].num_computed == len(self.rows[row].tokens) - 1
            self.rows[row].tokens += draft
        for row, count in zip(plan.rows, plan.num_tokens, strict=True):
            assert count > 0
            self._write(self.rows[row], count)
        sampled = array("i")
        counts = array("i")
        prompt = array("f")
        for row, count in zip(plan.rows, plan.num_tokens, strict=True):
            state = self.rows[row]
            self._check_context(state)
            if state.prompt_top >= 0:
                first = state.num_computed - count
                ends = range(first + 2, min(state.num_computed + 1, state.num_prompt) + 1)
                prompt.extend(prompt_logprob(state.tokens[:end]) for end in ends)
            if state.num_computed == len(state.tokens) and state.generates:
                new = self._sample(state, drafts.get(row, []), allowed.get(row))
                sampled.extend(new)
                counts.append(len(new))
        self.steps += 1
        self.computed_tokens += sum(plan.num_tokens)
        tops = [0] * (len(prompt) * 3)
        return StepResult(
            plan.step,
            sampled.tobytes(),
            prompt_num_top=3,
            prompt_logprobs=prompt.tobytes(),
            prompt_top_ids=array("i", tops).tobytes(),
            prompt_top_logprobs=array("f", tops).tobytes(),
            counts=counts.tobytes() if drafts else b"",
        )

    def _sample(self, state: Row, draft: list[int], mask: bytes | None) -> list[int]:
        """Check the draft at the end of the row's tokens, and leave what holds of it and one token more."""
        del state.tokens[len(state.tokens) - len(draft) :]
        new: list[int] = []
        while new == draft[: len(new)] and len(new) <= len(draft):
            token = next_token(tuple(state.tokens))
            if mask is not None:
                ids = allowed_ids(mask)
                token = ids[token % len(ids)]
            state.tokens.append(token)
            new.append(token)
        state.num_computed = len(state.tokens) - 1
        return new

    def _take_changes(self, plan: Plan) -> None:
        for new in plan.new_rows:
            self.rows[new.row] = Row(
                list(array("i", new.token_ids)),
                new.num_computed,
                list(new.blocks),
                new.num_prompt,
                new.params.max_tokens > 0,
                new.prompt_logprobs,
            )
        for row, block in plan.new_blocks:
            self.rows[row].blocks.append(block)

    def _slot(self, state: Row, position: int) -> int:
        size = self.scheduler.block_size
        return state.blocks[position // size] * size + position % size

    def _write(self, state: Row, count: int) -> None:
        end = state.num_computed + count
        assert end <= len(state.tokens)
        for position in range(state.num_computed, end):
            self.slots[self._slot(state, position)] = tuple(state.tokens[: position + 1])
        state.num_computed = end

    def _check_context(self, state: Row) -> None:
        for position in range(state.num_computed):
            assert self.slots[self._slot(state, position)] == tuple(state.tokens[: position + 1])


def expected_output(request: Request, max_model_len: int) -> list[int]:
    """What a request generates on its own."""
    tokens = list(request.prompt)
    while request.params.max_tokens > 0:
        tokens.append(next_token(tuple(tokens)))
        generated = len(tokens) - len(request.prompt)
        if tokens[-1] in request.params.eos_token_ids or generated >= request.params.max_tokens:
            break
        if len(tokens) >= max_model_len:
            break
    return tokens[len(request.prompt) :]


def make_scheduler(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    seqs: int = 8,
    budget: int = 32,
    model_len: int = 64,
    prefix_caching: bool = True,
    chunked_prefill: bool = True,
) -> Scheduler:
    return Scheduler(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=model_len,
        enable_prefix_caching=prefix_caching,
        enable_chunked_prefill=chunked_prefill,
    )


def run(scheduler: Scheduler, rank: SimulatedRank, *, max_steps: int = 2000) -> dict[str, list[int]]:
    """Run until nothing is left; every invariant holds after every step."""
    outputs: dict[str, list[int]] = {}
    for _ in range(max_steps):
        plan = scheduler.schedule()
        scheduler.check_integrity()
        if plan is None:
            assert scheduler.num_waiting == 0
            assert not scheduler.running
            return outputs
        assert len(scheduler.running) <= 8
        for sequence, delta in scheduler.update(rank.execute(plan)):
            outputs.setdefault(sequence.request.id, []).extend(delta.token_ids)
        scheduler.check_integrity()
    raise AssertionError("the scheduler does not come to an end")
