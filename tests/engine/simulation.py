"""A simulated rank for scheduler tests: it knows what every slot of the KV cache holds, and checks every plan."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from fdserve.engine.request import Request, SamplingParams
from fdserve.engine.results import Sampled
from fdserve.engine.scheduler import Scheduler
from fdserve.executor.wire import Plan, StepResult


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
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, seed=0, eos_token_ids=eos)
    return Request(id=name, prompt=prompt, params=params, priority=priority, cache_salt=salt)


@dataclass
class Row:
    tokens: list[int]
    num_computed: int
    blocks: list[int]


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

    def execute(self, plan: Plan) -> Sampled:
        assert sum(plan.num_tokens) <= self.scheduler.max_num_batched_tokens
        assert len(plan.rows) == len(set(plan.rows)) > 0
        self._take_changes(plan)
        for row, count in zip(plan.rows, plan.num_tokens, strict=True):
            assert count > 0
            self._write(self.rows[row], count)
        sampled = array("i")
        for row in plan.rows:
            state = self.rows[row]
            self._check_context(state)
            if state.num_computed == len(state.tokens):
                token = next_token(tuple(state.tokens))
                state.tokens.append(token)
                sampled.append(token)
        self.steps += 1
        self.computed_tokens += sum(plan.num_tokens)
        return Sampled(StepResult(plan.step, sampled.tobytes()))

    def _take_changes(self, plan: Plan) -> None:
        for new in plan.new_rows:
            self.rows[new.row] = Row(list(array("i", new.token_ids)), new.num_computed, list(new.blocks))
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
    while True:
        tokens.append(next_token(tuple(tokens)))
        generated = len(tokens) - len(request.prompt)
        if tokens[-1] in request.params.eos_token_ids or generated >= request.params.max_tokens:
            break
        if len(tokens) >= max_model_len:
            break
    return tokens[len(request.prompt) :]
