"""Ids back to text, as they come: exact to the byte, and never half a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from fdserve.text.tokenizer import Tokenizer

_UTF8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Turns a stream of ids into text.

    All that `push` and the closing `flush` return, joined, is the UTF-8 text of the tokens' bytes, joined,
    with U+FFFD for what is not UTF-8. No space is added or removed. An id outside the vocabulary is empty.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = _UTF8("replace")
        self._unfinished = False  # whether the decoder holds part of a character

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that is certain now; the beginning of an unfinished character stays inside."""
        skipped = self._skipped
        return self._decode(b"".join([self._token_bytes(token) for token in token_ids if token not in skipped]))

    def push_one(self, token_id: int) -> str:
        """`push` for a single id, in less time."""
        return "" if token_id in self._skipped else self._decode(self._token_bytes(token_id))

    def _decode(self, data: bytes) -> str:
        if not self._unfinished:
            # Nearly all tokens are whole characters, and this is the quicker way for them.
            try:
                return data.decode()
            except UnicodeDecodeError:
                pass
        text = self._decoder.decode(data)
        self._unfinished = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """What an unfinished character leaves: U+FFFD. The detokenizer can be used afresh after it."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._unfinished = False
        return text


def decode(tokenizer: Tokenizer, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
    """The text of a whole id list."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens)
    return detokenizer.push(token_ids) + detokenizer.flush()


def token_text(tokenizer: Tokenizer, token_id: int) -> tuple[str, list[int]]:
    """The text of one token by itself and its bytes, as logprobs report them.

    A token that holds part of a character reads U+FFFD; its bytes are the true ones.
    """
    data = tokenizer.token_bytes(token_id)
    return data.decode("utf-8", "replace"), list(data)
