"""A tokenizer whose vocabulary a test writes down itself."""

from __future__ import annotations

from collections.abc import Iterable


class ListTokenizer:
    """Ids are positions in the list; a text is encoded greedily, the longest token first."""

    def __init__(self, tokens: list[bytes], special: Iterable[bytes] = ()) -> None:
        self.tokens = tokens
        self.vocab_size = len(tokens)
        self.special_ids = frozenset(map(tokens.index, special))
        self.special_tokens: dict[str, str] = {}
        self.eos_token_id: int | None = None
        self.chat_template: str | None = None

    def encode(self, text: str) -> list[int]:
        data, ids = text.encode(), []
        while data:
            token = max(filter(data.startswith, self.tokens), key=len)
            ids.append(self.tokens.index(token))
            data = data[len(token) :]
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_id(self, token: str) -> int | None:
        return self.tokens.index(token.encode()) if token.encode() in self.tokens else None
