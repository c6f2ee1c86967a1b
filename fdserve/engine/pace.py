"""When a step is nearly over: as long as steps are alike, each takes about what the one before it took."""

from __future__ import annotations

import math

MOST = 0.75
"""The part of a step after which the next one is planned. Later, a step that is quicker than the one before it ends too
soon; earlier, requests that come meanwhile wait for one step more."""
LEAD_SECONDS = 0.01
"""How long before the end of a step the next one is planned at most: that is time enough."""
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
        if tokens != self._tokens or self._seconds <= SHORT_SECONDS:
            return math.inf
        return max(MOST * self._seconds, self._seconds - LEAD_SECONDS)
