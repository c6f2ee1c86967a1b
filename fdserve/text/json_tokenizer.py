"""The tokenizer.json backend, on Hugging Face's `tokenizers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from fdserve.errors import StartupError
from fdserve.text.length import check_length
from fdserve.text.pieces import decoder_kinds, spelling_of_decoder, well_formed
from fdserve.text.tokenizer_config import TEXT_TAGS, TokenizerConfig


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _TokenizerFile(msgspec.Struct):
    decoder: dict[str, Any] | None = None
    added_tokens: list[_AddedToken] = []


class JsonTokenizer:
    """See `Tokenizer`. The file's decoder says how its pieces spell bytes.

    Raises StartupError when the file cannot be read, or when its decoder is neither byte-level nor in
    SentencePiece's manner.
    """

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        try:
            source = path.read_bytes()
            file = msgspec.json.decode(source, type=_TokenizerFile)
            self._tokenizer = tokenizers.Tokenizer.from_buffer(source)
        except Exception as error:  # `tokenizers` raises bare Exceptions
            raise StartupError(f"cannot read {path}: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._bytes = _bytes_table(vocabulary, self.vocab_size, file, path)
        control = config.control_tokens() | {token.content for token in file.added_tokens if token.special}
        ids = map(vocabulary.get, control - TEXT_TAGS)
        self.special_ids = frozenset(token_id for token_id in ids if token_id is not None)
        self.special_tokens = config.special_tokens
        self.eos_token_id = vocabulary.get(config.special_tokens.get("eos_token", ""))
        self.chat_template = config.chat_template

    def encode(self, text: str) -> list[int]:
        encodings = self._tokenizer.encode_batch_fast([well_formed(text)], add_special_tokens=False)
        check_length(len(encodings[0]))
        return encodings[0].ids

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)


def _bytes_table(vocabulary: dict[str, int], size: int, file: _TokenizerFile, path: Path) -> list[bytes]:
    spelling = spelling_of_decoder(file.decoder)
    if spelling is None:
        named = ", ".join(sorted(decoder_kinds(file.decoder))) or "none"
        raise StartupError(f"{path} has the decoder {named}: ByteLevel, ByteFallback or Metaspace is needed")
    table = [b""] * size
    for piece, token_id in vocabulary.items():
        table[token_id] = spelling(piece)
    for token in file.added_tokens:
        table[token.id] = token.content.encode("utf-8", "replace")
    return table
