"""Lost ranks and killed servers: some rounds of what `python -m tests.e2e.chaos` does for longer."""

from __future__ import annotations

import os

import pytest

from tests.e2e.chaos import Chaos

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "2"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_whatever_is_killed_the_server_recovers_and_leaves_nothing(ranks: int) -> None:
    with Chaos(ranks, seed=ranks) as chaos:
        report = chaos.run(ROUNDS)
        chaos.kill_the_server()
    assert report.lost > 0
