from __future__ import annotations

import math

import pytest

from fdserve.engine.pace import LEAD_SECONDS, MOST, SHORT_SECONDS, Pace


def test_a_step_like_the_last_one_takes_as_long() -> None:
    pace = Pace()
    assert pace.most_of(0) == math.inf
    pace.note(32, 0.02)
    assert pace.most_of(32) == pytest.approx(MOST * 0.02)
    assert pace.most_of(31) == math.inf
    pace.note(32, 0.5)
    assert pace.most_of(32) == pytest.approx(0.5 - LEAD_SECONDS)


def test_nothing_is_planned_ahead_of_a_short_step() -> None:
    pace = Pace()
    pace.note(1, SHORT_SECONDS)
    assert pace.most_of(1) == math.inf
