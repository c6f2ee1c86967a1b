"""`python -m bench.null_server PACE OPTIONS…`: fdserve with ranks that answer every plan at once, without a model.

Everything else is the real thing: launcher, hypercorn, application, tokenizer, engine and scheduler. The options are
those of `python -m fdserve`; --num-gpu-blocks-override must size the cache that nobody has.

With the PACE "each" a step waits until every stream has sent what the last one gave it, so that each token is an event
of its own, as it is with a model. With "any" it does not: what the streams are too slow for goes out several tokens
an event.
"""

from __future__ import annotations

import sys
from array import array
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from anyio import wait_all_tasks_blocked
from anyio.lowlevel import checkpoint

import fdserve.engine.create
from fdserve.config import Config
from fdserve.executor.wire import Load, Plan, Ready, StepResult
from fdserve.launcher import main
from fdserve.server.server import Server, build

PACE = "each"
WORDS = array("i", [10])
"""The ids that are sampled in turn, one a step; `build_null` puts those of words here."""


class NullRanks:
    """The face of `Executor`. Counts each row's tokens, as a rank must to know who samples, and does nothing else."""

    def __init__(self, load: Load) -> None:
        self.ready = Ready(load.num_blocks, "null", 0)
        self._missing = [0] * load.max_num_seqs
        """How many tokens of each row are not computed yet."""
        self._results: deque[StepResult] = deque()

    async def send(self, plan: Plan) -> None:
        """Take a step; its result is there at once."""
        missing = self._missing
        for new in plan.new_rows:
            missing[new.row] = len(new.token_ids) // 4 - new.num_computed
        sampled = 0
        for row, count in zip(plan.rows, plan.num_tokens, strict=True):
            missing[row] -= count
            if not missing[row]:
                missing[row] = 1
                sampled += 1
        token = WORDS[plan.step % len(WORDS)]
        self._results.append(StepResult(plan.step, array("i", [token] * sampled).tobytes(), seconds=1e-6))

    async def receive(self) -> StepResult:
        """The next plan's result."""
        await (wait_all_tasks_blocked() if PACE == "each" else checkpoint())
        return self._results.popleft()

    async def check(self) -> None:
        """It never ends."""


@asynccontextmanager
async def open_null_ranks(load: Load, *_: object, **__: object) -> AsyncIterator[NullRanks]:
    """In place of `open_executor`."""
    yield NullRanks(load)


async def build_null(config: Config) -> Server:
    """A server whose engine opens null ranks."""
    replaced: Any = fdserve.engine.create
    replaced.open_executor = open_null_ranks
    server = await build(config)
    tokens = {id: server.tokenizer.token_bytes(id) for id in range(server.tokenizer.vocab_size)}
    words = [id for id, text in tokens.items() if len(text) > 2 and text.strip().isalpha() and text.isascii()]
    WORDS[:] = array("i", words or [10])
    return server


if __name__ == "__main__":
    PACE, *arguments = sys.argv[1:]
    sys.exit(main(arguments, build=build_null))
