"""Which guesses at next tokens are worth computing.

A step takes about as long as reading the weights, and some more for each token that it computes; so a guess is cheap
beside few sequences and dear beside many. One more token in a step of B sequences pays if its chance to be right is
above B / (B + F), where F is how many tokens cost as much as the part of a step that does not depend on them: then
tokens per second rise. (`CAUTION` asks for some more.) F is learnt from the steps, and the chance from how a sequence's
latest guesses turned out.
"""

from __future__ import annotations

from fdserve.config import SpeculativeConfig
from fdserve.engine.ngram import Ngrams
from fdserve.engine.results import Sampled
from fdserve.engine.sequence import Sequence
from fdserve.executor.wire import Plan

MAX_DRAFTED = 64
"""Guesses computed in one step, of all sequences together."""
INDEX_TOKENS = 2048
"""Tokens taken into a sequence's index in one step: about a millisecond."""
CAUTION = 1.75
"""By what factor the odds that a guess is right must exceed those at which nothing is gained: a chance is estimated
from few tokens, and the luckiest estimates are taken."""
FIRST_FIXED_TOKENS = 16.0
MEMORY = 0.98
"""What a step counts, against the one after it."""


class StepCost:
    """Steps take fixed + slope * tokens: fitted by least squares, the latest steps weighing most."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self.fixed_tokens = FIRST_FIXED_TOKENS
        """How many tokens cost as much as the fixed part."""

    def note(self, tokens: int, seconds: float) -> None:
        """Take in a step of so many tokens, all of them sampled after."""
        self._weight = self._weight * MEMORY + 1
        self._x = self._x * MEMORY + tokens
        self._y = self._y * MEMORY + seconds
        self._xx = self._xx * MEMORY + tokens * tokens
        self._xy = self._xy * MEMORY + tokens * seconds
        spread = self._weight * self._xx - self._x * self._x
        if spread < self._weight * self._weight:
            return  # steps of about one size tell nothing about others
        slope = (self._weight * self._xy - self._x * self._y) / spread
        fixed = (self._y - slope * self._x) / self._weight
        # Within bounds, for single steps are disturbed by whatever else the machine does.
        self.fixed_tokens = min(max(fixed / slope, 4.0), 256.0) if slope > 0 else 256.0


class Speculation:
    """Makes the drafts of decodes: one for the whole engine."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._config = config
        self.cost = StepCost()

    def note_step(self, plan: Plan, sampled: Sampled) -> None:
        """Learn from what a step took, if it computed decodes alone, with or without guesses."""
        tokens = sum(plan.num_tokens)
        if tokens - sum(len(draft) for _, draft in plan.drafts) == len(sampled.counts or sampled.token_ids):
            self.cost.note(tokens, sampled.seconds)

    def draft(self, sequence: Sequence, most: int, decodes: int) -> list[int]:
        """Up to `most` guesses at the next tokens of a sequence, as many as pay in a step of so many decodes."""
        config = self._config
        if sequence.ngrams is None:
            sequence.ngrams = Ngrams(
                sequence.tokens, sequence.num_prompt, config.prompt_lookup_min, config.prompt_lookup_max
            )
        ngrams = sequence.ngrams
        if not ngrams.take(INDEX_TOKENS):
            return []
        needed = CAUTION * decodes / (CAUTION * decodes + self.cost.fixed_tokens)
        most = min(most, config.num_speculative_tokens)
        count, chance = 0, ngrams.rate
        while count < most and chance > needed:
            count += 1
            chance *= ngrams.rate
        return ngrams.guess(count) if count else []
