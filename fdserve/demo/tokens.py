"""The demo's tokenizer: how it is trained, and how training and evaluation turn text into ids.

SentencePiece BPE with byte fallback, single digits, no normalisation and no dummy prefix, so that every text comes
back exactly. Control pieces are found in the text first and the rest goes to SentencePiece, as ERNIE's tokenizer does.
"""

from __future__ import annotations

import io
import re
import string
from collections.abc import Iterable

import sentencepiece

from fdserve.demo.data import CONTROL_PIECES, EOS, MARKUP_PIECES

_SPECIAL = re.compile("(" + "|".join(re.escape(piece) for piece in (*CONTROL_PIECES, EOS)) + ")")
_MARKUP = re.compile("|".join(re.escape(piece) for piece in (*CONTROL_PIECES, *MARKUP_PIECES, EOS)))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """The serialised SentencePiece model of the texts. Ids 0, 1, 2 are <unk>, <s>, </s>; there is no pad piece."""
    lines = (line for text in texts for part in _MARKUP.split(text) for line in part.split("\n") if line.strip())
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=0.999,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        control_symbols=list(CONTROL_PIECES),
        user_defined_symbols=list(MARKUP_PIECES),
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


class Encoder:
    """Text to ids and back, with the control pieces recognised by name."""

    def __init__(self, model: bytes) -> None:
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.ids = {piece: int(self._pieces.piece_to_id(piece)) for piece in (*CONTROL_PIECES, *MARKUP_PIECES, EOS)}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in _SPECIAL.split(text):
            if part in self.ids and part not in MARKUP_PIECES:
                ids.append(self.ids[part])
            elif part:
                ids.extend(self._pieces.encode(part))
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of the ids; control pieces are left out."""
        return str(self._pieces.decode(ids))
