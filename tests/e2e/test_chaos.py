"""Lost ranks and killed servers: some rounds of what `python -m tests.e2e.chaos` does for longer."""

from __future__ import annotations

import os
import signal

import pytest

from tests.e2e.chaos import Chaos
from tests.executor.process_table import is_alive, process_tree, rank_pids
from tests.http.processes import ServerProcess, until

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "1"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_whatever_is_killed_the_server_recovers_and_leaves_nothing(ranks: int) -> None:
    with Chaos(ranks, seed=ranks) as chaos:
        report = chaos.run(ROUNDS)
        chaos.kill_the_server()
    assert report.lost > 0


def test_ranks_end_with_a_worker_of_hypercorn_that_is_killed() -> None:
    settings = {"FDSERVE_TENSOR_PARALLEL_SIZE": "2", "FDSERVE_KV_CACHE_MEMORY": "32M"}
    with ServerProcess("-m", "hypercorn", "fdserve.app:app", "-b", "127.0.0.1:0", "-w", "1", **settings) as server:
        server.listening()
        until(lambda: server.get("/health")[0] == 200)
        (worker,) = [pid for pid in process_tree(server.process.pid) if rank_pids(pid)]
        ranks = rank_pids(worker)
        assert len(ranks) == 2
        os.kill(worker, signal.SIGKILL)
        until(lambda: not any(map(is_alive, ranks)), 5)
        server.stop()
        server.wait()
