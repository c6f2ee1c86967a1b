"""A tokenizer's vocabulary in the form that masks are computed over."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import llguidance
import numpy as np
import numpy.typing as npt

from fdserve.text.tokenizer import Tokenizer
from fdserve.text.tokenizer_config import TEXT_TAGS

Bits = npt.NDArray[np.uint8]


class GrammarVocabulary:
    """The tokens of a model, for grammars. Made once: it takes 0.3 s for a hundred thousand tokens.

    Masks have `mask_bytes` bytes: a bit an id of the model, which may have more ids than its tokenizer, in whole
    uint32 words. Special tokens and tags are no part of any text: a grammar that wants one names it, and their
    spelling inside a text is written with other tokens. So a string can hold "</think>" and end nothing.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Collection[int], vocab_size: int) -> None:
        known = min(tokenizer.vocab_size, vocab_size)
        self.mask_bytes = (vocab_size + 31) // 32 * 4
        self.eos_token_ids = frozenset(i for i in eos_token_ids if 0 <= i < vocab_size)
        # What begins with 0xFF is in no UTF-8, and would read as the name of a special token.
        tokens = [_unless_marked(tokenizer.token_bytes(i)) for i in range(known)]
        self.tokens = tokens + [b""] * (vocab_size - known)
        tags = {tag: tokenizer.token_id(tag) for tag in sorted(TEXT_TAGS)}
        self.tags = {tag: token_id for tag, token_id in tags.items() if token_id is not None and token_id < known}
        special = {i for i in tokenizer.special_ids if i < known} | self.eos_token_ids | set(self.tags.values())
        eos = sorted(self.eos_token_ids)
        source = _Source(self.tokens, sorted(special), eos[0] if eos else None)
        wrapper = llguidance.TokenizerWrapper(source)
        self.tokenizer = llguidance.LLTokenizer(wrapper, eos_token=eos if len(eos) > 1 else None)
        self.usable = self.bits(i for i in range(vocab_size) if self.tokens[i] or i in self.eos_token_ids)
        self.not_ending = (self.usable & ~self.bits(self.eos_token_ids)).tobytes()
        # newlines[n]: the tokens that are n + 1 newlines
        runs = (b"\n", b"\n\n", b"\n\n\n")
        self.newlines = [frozenset(i for i, token in enumerate(self.tokens) if token == run) for run in runs]
        self._encode = tokenizer.encode

    def bits(self, token_ids: Iterable[int]) -> Bits:
        """The mask that allows these ids and no others."""
        mask = np.zeros(self.mask_bytes * 8, np.uint8)
        mask[list(token_ids)] = 1
        return np.packbits(mask, bitorder="little")

    def canonical(self, text: bytes) -> int | None:
        """The token that a model would begin this text with; None when no token fits."""
        for token_id in self._encode(text.decode())[:1]:
            if token_id < len(self.tokens) and self.tokens[token_id] and text.startswith(self.tokens[token_id]):
                return token_id
        return next((i for i, token in enumerate(self.tokens) if token == text[:1]), None)


class _Source:
    """What llguidance.TokenizerWrapper reads. It is never asked to encode: see `NO_FORCING` in grammar_rules."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special_token_ids: list[int], eos_token_id: int | None) -> None:
        self.tokens = tokens
        self.special_token_ids = special_token_ids
        self.eos_token_id = eos_token_id

    def __call__(self, text: bytes) -> list[int]:
        return []


def _unless_marked(token: bytes) -> bytes:
    return b"" if token.startswith(b"\xff") else token
