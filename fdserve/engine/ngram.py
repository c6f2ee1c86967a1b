"""Guessing how a sequence goes on: as it went on after an earlier place where its latest tokens stood, too.

Prompt lookup, or n-gram drafting: answers that quote, edit or repeat what was there are guessed well, others are not.
Guesses cost nothing but their computation, since the ranks check each of them; see `engine/speculation.py` for when
they are worth that.
"""

from __future__ import annotations

from collections.abc import Sequence

CANDIDATES = 8
"""Earlier places that are compared, the latest first."""
FIRST_RATE = 0.5
RATE_WEIGHT = 1 / 8


class Ngrams:
    """The index over one sequence's tokens, and the place where its next token is thought to stand.

    Tokens are taken in once each, at O(1). A guessed place is kept as long as it is right; then the place is taken
    where most of the latest tokens stood before, `longest` of them counting at most and `shortest` at least, the
    latest of equals.
    """

    __slots__ = ("_before", "_latest", "_longest", "_num_prompt", "_place", "_shortest", "_tokens", "rate")

    def __init__(self, tokens: Sequence[int], num_prompt: int, shortest: int, longest: int) -> None:
        """`tokens` is the sequence's own list, which grows."""
        self._tokens = tokens
        self._num_prompt = num_prompt
        self._shortest = shortest
        self._longest = longest
        self._latest: dict[int, int] = {}  # the hash of an n-gram -> the place after its latest occurrence
        self._before: list[int] = []  # of each place: the place after the same hash's occurrence before, or -1
        self._place = -1
        self.rate = FIRST_RATE
        """How often the guess at the next token was right lately, whether or not it was computed."""

    def take(self, most: int) -> bool:
        """Take in up to `most` of the tokens that are new. Returns whether all are taken in."""
        start, size = len(self._before), self._shortest
        end = min(len(self._tokens), start + most)
        for index in range(start, end):
            if index >= self._num_prompt and self._place >= 0:
                self._check(self._tokens[index])
            earlier = -1
            if index + 1 >= size:
                key = hash(tuple(self._tokens[index + 1 - size : index + 1]))
                earlier = self._latest.get(key, -1)
                self._latest[key] = index + 1
            self._before.append(earlier)
            if self._place < 0 and index + 1 >= self._num_prompt:
                self._place = self._find(index)
        return end == len(self._tokens)

    def guess(self, most: int) -> list[int]:
        """The next tokens, all `most` of them where there is a guess, once everything is taken in."""
        if self._place < 0:
            return []
        draft = list(self._tokens[self._place : self._place + most])
        # What repeats right up to the end goes on repeating.
        period = len(self._tokens) - self._place
        while len(draft) < most:
            draft.append(draft[-period])
        return draft

    def _check(self, token: int) -> None:
        """See what became of the guess at this token."""
        right = self._tokens[self._place] == token
        self.rate += (right - self.rate) * RATE_WEIGHT
        self._place = self._place + 1 if right else -1

    def _find(self, index: int) -> int:
        """The place after the best match of the tokens up to `index`, or -1."""
        best, best_length = -1, self._shortest - 1
        place = self._before[index]
        for _ in range(CANDIDATES):
            if place < 0:
                break
            length = self._match_length(place - 1, index)
            if length > best_length:
                best, best_length = place, length
                if length == self._longest:
                    break
            place = self._before[place - 1]
        return best

    def _match_length(self, one: int, other: int) -> int:
        """How many tokens that end at index `one` are those that end at `other`, `longest` at most."""
        tokens = self._tokens
        most = min(self._longest, one + 1)
        length = 0
        while length < most and tokens[one - length] == tokens[other - length]:
            length += 1
        return length
