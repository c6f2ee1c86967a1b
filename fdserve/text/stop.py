"""Stop strings, matched in the text as it streams (Aho and Corasick's automaton, 1975)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class StopTable:
    """The automaton of some stop strings, for any number of texts: long ones take a while to make.

    States are the prefixes of the stop strings; state 0 is the empty one. A state's `depth` is its length, its `match`
    the longest stop string that it ends with.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._next: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.match: list[str | None] = [None]
        self._build([stop for stop in stops if stop])

    @property
    def empty(self) -> bool:
        """Whether there are no stop strings."""
        return len(self._next) == 1

    def _build(self, stops: list[str]) -> None:
        for stop in stops:
            state = 0
            for char in stop:
                if char not in self._next[state]:
                    self._next[state][char] = len(self._next)
                    self._next.append({})
                    self.depth.append(self.depth[state] + 1)
                    self.match.append(None)
                state = self._next[state][char]
            self.match[state] = stop
        self._fallback = [0] * len(self._next)  # the longest proper suffix that is a state too
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self._next[state].items():
                self._fallback[child] = self.step(self._fallback[state], char)
                self.match[child] = self.match[child] or self.match[self._fallback[child]]
                queue.append(child)

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        while char not in self._next[state]:
            if state == 0:
                return 0
            state = self._fallback[state]
        return self._next[state][char]


class StopStrings:
    """Passes text on until a stop string is complete.

    The first stop string to be complete ends the text; of several that end with the same character, the
    longest. What could still become a stop string is held back, and no more than that. Every character
    costs the same, however many stop strings there are and however long.
    """

    def __init__(self, table: StopTable, include_in_output: bool = False) -> None:
        self._table = table
        self._include = include_in_output
        self._state = 0
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """Take more text; return the text to pass on and the stop string, if one is now complete.

        A stop string that becomes complete while not `armed` is text like any other.
        With `include_in_output` the text passed on ends with the stop string, else just before it.
        After a match nothing is taken or passed on any more.
        """
        table = self._table
        if self.matched is not None or table.empty:
            return ("" if self.matched is not None else text), None
        state = self._state
        pending = self._held + text
        for at, char in enumerate(text, len(self._held) + 1):
            state = table.step(state, char)
            if armed and (stop := table.match[state]) is not None:
                self.matched, self._held = stop, ""
                return pending[: at if self._include else at - len(stop)], stop
        self._state = state
        certain = len(pending) - table.depth[state]
        self._held = pending[certain:]
        return pending[:certain], None

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held, self._state = self._held, "", 0
        return held
