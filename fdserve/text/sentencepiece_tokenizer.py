"""The SentencePiece backend: a .model file and the tokens added beside it."""

from __future__ import annotations

from pathlib import Path

import sentencepiece

from fdserve.errors import StartupError
from fdserve.text.length import check_length
from fdserve.text.pieces import sentencepiece_bytes, well_formed
from fdserve.text.splitter import TokenSplitter
from fdserve.text.tokenizer_config import TEXT_TAGS, TokenizerConfig

LONG_PART = 100_000
"""Characters from which there may be very many tokens."""


class SentencePieceTokenizer:
    """See `Tokenizer`.

    The text is split on added, named special and control tokens; what lies between goes to SentencePiece as
    it is, so every rule of the .model (its dummy prefix, its normalisation) holds for each part.
    Raises StartupError when the model cannot be read.
    """

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        try:
            model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:  # OSError for a missing file, RuntimeError for a bad one
            raise StartupError(f"cannot read {path}: {str(error).strip() or 'not a model'}") from None
        self._model = model
        size = model.get_piece_size()
        pieces = model.id_to_piece(list(range(size)))
        self._ids = {piece: token_id for token_id, piece in enumerate(pieces)} | config.added
        self.vocab_size = max(self._ids.values(), default=-1) + 1
        control = {i for i in range(size) if model.is_control(i) or model.is_unknown(i)}
        self._bytes = [b""] * self.vocab_size
        for token_id, piece in enumerate(pieces):
            literal = token_id in control
            self._bytes[token_id] = piece.encode() if literal else sentencepiece_bytes(piece)
        for token, token_id in config.added.items():
            self._bytes[token_id] = token.encode("utf-8", "replace")
        self.special_tokens = _named_tokens(model) | config.special_tokens
        special = config.control_tokens() | {pieces[i] for i in control} | set(self.special_tokens.values())
        self.special_ids = frozenset(self._ids[token] for token in special - TEXT_TAGS if token in self._ids)
        self._splitter = TokenSplitter(config.added.keys() | (special & self._ids.keys()))
        self.eos_token_id = self._ids.get(self.special_tokens.get("eos_token", ""))
        self.chat_template = config.chat_template

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part, is_token in self._splitter.split(well_formed(text)):
            if is_token:
                ids.append(self._ids[part])
            elif len(part) < LONG_PART:
                ids.extend(self._model.encode(part))
            else:
                # An array is made in no time, so how many ids there are is known before they become objects.
                found = self._model.encode(part, return_type="numpy")
                check_length(len(ids) + len(found))
                ids.extend(found.tolist())
        check_length(len(ids))
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_id(self, token: str) -> int | None:
        return self._ids.get(token)


def _named_tokens(model: sentencepiece.SentencePieceProcessor) -> dict[str, str]:
    """What the model itself calls its bos, eos, unk and pad."""
    ids = {
        "bos_token": model.bos_id(),
        "eos_token": model.eos_id(),
        "unk_token": model.unk_id(),
        "pad_token": model.pad_id(),
    }
    return {name: model.id_to_piece(token_id) for name, token_id in ids.items() if token_id >= 0}
