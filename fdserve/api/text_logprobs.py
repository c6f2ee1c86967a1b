"""The logprobs of an answer's text alone, without those of thoughts, tags and calls."""

from __future__ import annotations

from fdserve.api.logprobs import Entries, token_logprobs
from fdserve.protocol.chat import TokenLogprob
from fdserve.server.server import Server
from fdserve.text.detokenizer import token_text


class TextLogprobs:
    """Finds the tokens that a text is made of among all tokens of its choice.

    `thinking` and `continued` are those of the choice: see `TextStream`.
    """

    def __init__(self, server: Server, *, thinking: bool, continued: bool) -> None:
        self._tokenizer = server.tokenizer
        self._format = server.reasoning
        self._thinking = thinking
        self._begun = continued  # there was more than white space
        self._waiting: list[TokenLogprob] = []
        self._rest = b""  # of the last token taken: its text comes later

    def push(self, entries: Entries) -> None:
        """Take the entries of tokens, in order."""
        shown = [entry for entry in entries if self._is_answer(entry[0])]
        self._waiting += token_logprobs(self._tokenizer, shown)

    def _is_answer(self, token_id: int) -> bool:
        format = self._format
        if format is None:
            return True
        if self._thinking:
            self._thinking = token_id != format.think_end
            return False
        if token_id == format.think_start and not self._begun:
            self._thinking = self._begun = True
            return False
        self._begun = self._begun or not token_text(self._tokenizer, token_id)[0].isspace()
        return token_id not in (format.response_start, format.response_end)

    def take(self, text: str) -> list[TokenLogprob]:
        """The tokens of this text, which follows the one before it. Tokens before them that are no part of it go."""
        data = text.encode("utf-8", "replace")
        taken = []
        used = 0
        shared = min(len(self._rest), len(data))
        if data[:shared] == self._rest[:shared]:
            data, self._rest = data[shared:], self._rest[shared:]
        while data and used < len(self._waiting):
            entry = self._waiting[used]
            token = bytes(entry.bytes)
            used += 1
            if token and data.startswith(token):
                data = data[len(token) :]
                taken.append(entry)
            elif token.startswith(data):
                data, self._rest = b"", token[len(data) :]
                taken.append(entry)
        del self._waiting[:used]
        return taken
