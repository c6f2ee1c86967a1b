"""When a step is nearly over: as long as steps are alike, each takes about what the one before it took."""

from __future__ import annotations

import math

MOST = 0.75
"""The part of a step after which the next one is planned. Later, a step that is quicker than the one before it ends too
soon; earlier, requests that come meanwhile wait for one step more."""
SHORT_SECONDS = 0.001
"""A step that takes no longer ends before the next one is planned."""


class Pace:
    """What the last step took."""

    def __init__(self) -> None:
        self._tokens = 0
        self._seconds = 0.0

    def note(self, tokens: int, seconds: float) -> None:
        """Take in a step that computed so many tokens."""
        self._tokens, self._seconds = tokens, seconds

    def most_of(self, tokens: int) -> float:
        """Seconds after which a step of so many tokens is nearly over; infinite where that cannot be told."""
        return MOST * self._seconds if tokens == self._tokens and self._seconds > SHORT_SECONDS else math.inf
