"""Finding the tokens that are spelled out in a text, for tokenizers that do not do so themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator


class TokenSplitter:
    """Splits a text on whole tokens: the leftmost first, the longest of those that begin there.

    Only positions that hold some token's first character are looked at, each once per token length, so
    thousands of tokens (a vision vocabulary has them) cost no more than a few.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        self._tokens = frozenset(token for token in tokens if token)
        lengths: dict[str, set[int]] = {}
        for token in self._tokens:
            lengths.setdefault(token[0], set()).add(len(token))
        self._lengths = {first: sorted(sizes, reverse=True) for first, sizes in lengths.items()}
        self._first = re.compile("[" + re.escape("".join(self._lengths)) + "]") if lengths else None

    def split(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yield (part, whether it is a token); the parts make up the text and none is empty."""
        start = 0
        for match in self._first.finditer(text) if self._first else ():
            at = match.start()
            if at < start:
                continue
            for length in self._lengths[text[at]]:
                if (token := text[at : at + length]) in self._tokens:
                    if at > start:
                        yield text[start:at], False
                    yield token, True
                    start = at + len(token)
                    break
        if start < len(text):
            yield text[start:], False
