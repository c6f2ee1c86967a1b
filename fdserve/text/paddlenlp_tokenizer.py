"""PaddleNLP's AutoTokenizer, for the directories that only it can read.

It is an optional extra and takes seconds to import, so it is imported when the first such directory is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fdserve.errors import StartupError
from fdserve.text.length import check_length
from fdserve.text.pieces import (
    Spelling,
    byte_level_bytes,
    sentencepiece_bytes,
    spelling_of_decoder,
    well_formed,
    word_piece_bytes,
)
from fdserve.text.splitter import TokenSplitter
from fdserve.text.tokenizer_config import TEXT_TAGS, TokenizerConfig

# PaddleNLP's byte-level tokenizers take time quadratic in the length of a run of letters, of signs or of
# space, so longer runs are cut.
_LONG_RUN = re.compile(r"\w{256}(?=\w)|\s{256}(?=\s)|[^\w\s]{256}(?=[^\w\s])")


class PaddleNLPTokenizer:
    """See `Tokenizer`. Raises StartupError when PaddleNLP is missing or cannot read the directory."""

    def __init__(self, directory: Path, config: TokenizerConfig) -> None:
        self._tokenizer = tokenizer = _load(directory)
        spelling = _spelling(tokenizer)
        if spelling is None:
            kind = type(tokenizer).__name__
            raise StartupError(f"PaddleNLP reads {directory} as {kind}, which has no byte-exact decoding")
        self._cut = spelling is byte_level_bytes
        self._ids: dict[str, int] = {**tokenizer.get_vocab(), **tokenizer.get_added_vocab()}
        self.vocab_size = max(self._ids.values(), default=-1) + 1
        named = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        self.special_tokens = named | config.special_tokens
        control = config.control_tokens() | set(map(str, tokenizer.all_special_tokens))
        control |= set(self.special_tokens.values())
        added = tokenizer.added_tokens_decoder.values()
        control |= {str(token) for token in added if getattr(token, "special", False)}
        ids = map(self._ids.get, control - TEXT_TAGS)
        self.special_ids = frozenset(token_id for token_id in ids if token_id is not None)
        self._bytes = [b""] * self.vocab_size
        literal = {*tokenizer.get_added_vocab(), *control}
        for piece, token_id in self._ids.items():
            self._bytes[token_id] = piece.encode("utf-8", "replace") if piece in literal else spelling(piece)
        self._splitter = TokenSplitter(literal & self._ids.keys())
        self.eos_token_id = self._ids.get(self.special_tokens.get("eos_token", ""))
        self.chat_template = config.chat_template

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part, is_token in self._splitter.split(well_formed(text)):
            if is_token:
                ids.append(self._ids[part])
                continue
            for run in _short_runs(part) if self._cut else (part,):
                ids.extend(self._tokenizer.convert_tokens_to_ids(self._tokenizer.tokenize(run)))
                check_length(len(ids))
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_id(self, token: str) -> int | None:
        return self._ids.get(token)


def _load(directory: Path) -> Any:
    try:
        from paddlenlp.transformers import AutoTokenizer
        from paddlenlp.transformers.tokenizer_utils_base import PretrainedTokenizerBase
    except ImportError as error:
        raise StartupError(
            f"{directory} needs PaddleNLP to read its tokenizer: pip install 'fdserve[paddlenlp]' ({error})"
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory.resolve()))
    except Exception as error:  # whatever its many tokenizer classes raise
        raise StartupError(f"PaddleNLP cannot read the tokenizer of {directory}: {error}") from None
    if not isinstance(tokenizer, PretrainedTokenizerBase):  # some versions return a bool or a tuple
        raise StartupError(f"PaddleNLP found no tokenizer in {directory}")
    return tokenizer


def _spelling(tokenizer: Any) -> Spelling | None:
    if tokenizer.is_fast:
        return spelling_of_decoder(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    if hasattr(tokenizer, "byte_decoder"):
        return byte_level_bytes
    if hasattr(tokenizer, "sp_model"):
        return sentencepiece_bytes
    return word_piece_bytes if hasattr(tokenizer, "wordpiece_tokenizer") else None


def _short_runs(text: str) -> Iterator[str]:
    start = 0
    for match in _LONG_RUN.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]
