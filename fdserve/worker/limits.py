"""What limits one row's choice of tokens beyond the numbers of its sampling parameters."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fdserve.executor.wire import SamplingParams

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

NO_FORCED_ID = -1


class Limits:
    """Biases, bans, allowed and forced ids. All follow from the output so far: they hold across a preemption."""

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        self._params = params
        self._vocab_size = vocab_size
        self._ids: Ints = np.array([token for token, _ in params.logit_bias], np.int32)
        self._values: Floats = np.array([bias for _, bias in params.logit_bias], np.float32)
        self._allowed = read_mask(params.allowed_ids, vocab_size) if params.allowed_ids else None
        self._not_banned = ~read_mask(params.banned_ids, vocab_size) if params.banned_ids else None
        self._not_ending = ~id_mask(params.ending_ids, vocab_size) if params.min_tokens > 0 else None
        # The last ids of bad words, by the ids before them, by the last of those: thousands may be alike in both.
        self._endings_of: dict[int, dict[tuple[int, ...], list[int]]] = {}
        for word in params.bad_words:
            self._endings_of.setdefault(word[-2], {}).setdefault(word[:-1], []).append(word[-1])
        self._longest = max(map(len, params.bad_words), default=0)

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        """Whether a row with these parameters has any."""
        return bool(
            params.logit_bias
            or params.bad_words
            or params.allowed_ids
            or params.banned_ids
            or params.thinking_budget is not None
            or (params.min_tokens > 0 and params.ending_ids)
        )

    def biases(self, output: Ints, mask: Ints | None) -> tuple[Ints, Floats]:
        """Ids and what is added to their logits after `output`; `mask` is what the row is limited to besides.

        Ending ids are banned until `min_tokens` are out, unless the mask has no others.
        """
        bans = self._word_bans(output)
        if self._bans_endings(len(output), mask):
            bans += self._params.ending_ids
        if not bans:
            return self._ids, self._values
        values = np.concatenate([self._values, np.full(len(bans), -np.inf, np.float32)])
        return np.concatenate([self._ids, np.array(bans, np.int32)]), values

    def _word_bans(self, output: Ints) -> list[int]:
        endings = self._endings_of.get(int(output[-1])) if len(output) else None
        if endings is None:
            return []
        latest = tuple(output[-self._longest :].tolist())
        return [token for before, tokens in endings.items() if latest[-len(before) :] == before for token in tokens]

    def _bans_endings(self, num_generated: int, mask: Ints | None) -> bool:
        if self._not_ending is None or num_generated >= self._params.min_tokens:
            return False
        return mask is None or bool((mask & self._not_ending).any())

    def mask(self, constraint: Ints | None) -> Ints | None:
        """The ids that both the parameters and a constraint's mask allow, or None for all; banned ones among them."""
        return both(self._allowed, constraint)

    def without_banned(self, mask: Ints | None) -> Ints | None:
        """What is left of a mask's ids, or of all, without those that are banned."""
        return both(self._not_banned, mask)

    def forced_id(self, output: Ints) -> int:
        """The id that a thinking budget dictates after `output`, or -1: see `SamplingParams.thinking_budget`."""
        budget, forced = self._params.thinking_budget, self._params.think_end_ids
        if budget is None or not budget <= len(output) < budget + len(forced):
            return NO_FORCED_ID
        if self._params.think_end_id in output[:budget]:
            return NO_FORCED_ID
        return forced[len(output) - budget]


def both(one: Ints | None, other: Ints | None) -> Ints | None:
    """The ids in both masks; None stands for the mask of all."""
    if one is None or other is None:
        return one if other is None else other
    return one & other


def leaves_one(mask: Ints) -> bool:
    """Whether a mask allows one id and no other."""
    words = mask[mask != 0]
    return len(words) == 1 and (int(words[0]) & 0xFFFFFFFF).bit_count() == 1


def mask_width(vocab_size: int) -> int:
    """Words of a mask."""
    return -(-vocab_size // 32)


def id_mask(ids: tuple[int, ...], vocab_size: int) -> Ints:
    """The mask int32 [mask_width] of these ids; those outside the vocabulary are left out."""
    bits = np.zeros(mask_width(vocab_size) * 32, np.uint8)
    known = np.array(ids, np.int64)
    bits[known[(known >= 0) & (known < vocab_size)]] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def read_mask(mask: bytes, vocab_size: int) -> Ints:
    """A constraint's mask as words; what it lacks of the vocabulary is not allowed."""
    size = 4 * mask_width(vocab_size)
    return np.frombuffer(mask[:size].ljust(size, b"\0"), np.int32)
