"""One interface for every tokenizer, and the choice of the backend that reads a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from fdserve.errors import StartupError
from fdserve.text.json_tokenizer import JsonTokenizer
from fdserve.text.sentencepiece_tokenizer import SentencePieceTokenizer
from fdserve.text.tokenizer_config import read_tokenizer_config

BACKENDS = ("auto", "native", "paddlenlp")
SENTENCEPIECE_NAMES = ("tokenizer.model", "spm.model", "ernie_token_100k.model")
# What PaddleNLP's tokenizers keep their vocabularies in.
PADDLENLP_PATTERNS = ("vocab.*", "sentencepiece.bpe.model")


class Tokenizer(Protocol):
    """Text to ids and back, with nothing added and nothing cleaned up.

    vocab_size      ids run over 0..vocab_size-1; there may be gaps
    special_ids     control tokens, which decoded text leaves out; not the tags of `<think>`, `<response>`
                    and `<tool_call>`, which are text
    special_tokens  the text of "bos_token", "eos_token", "cls_token"…, as templates want it
    eos_token_id    the id of special_tokens["eos_token"], or None
    chat_template   the Jinja source that came with the tokenizer, or None
    """

    vocab_size: int
    special_ids: frozenset[int]
    special_tokens: dict[str, str]
    eos_token_id: int | None
    chat_template: str | None

    def encode(self, text: str) -> list[int]:
        """The ids of the text, never with a bos or eos of its own.

        Special and added tokens that are spelled out in the text become their ids. Raises InvalidRequest, without a
        param, for more than `length.MAX_TOKENS`.
        """

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; special and added tokens: their text; no such id: b""."""

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text, or None when it is not one token of the vocabulary."""


def load_tokenizer(directory: Path, backend: str = "auto") -> Tokenizer:
    """Load the tokenizer of a checkpoint directory.

    "native" reads tokenizer.json, else a SentencePiece model; "paddlenlp" leaves it to PaddleNLP; "auto" is
    native where one of these files is there, else PaddleNLP. Raises StartupError.
    """
    if backend not in BACKENDS:
        raise StartupError(f"unknown tokenizer backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if not directory.is_dir():
        raise StartupError(f"no such tokenizer directory: {directory}")
    if backend != "paddlenlp":
        if (path := directory / "tokenizer.json").is_file():
            return JsonTokenizer(path, read_tokenizer_config(directory))
        for name in SENTENCEPIECE_NAMES:
            if (path := directory / name).is_file():
                return SentencePieceTokenizer(path, read_tokenizer_config(directory))
    only_paddlenlp = any(any(directory.glob(pattern)) for pattern in PADDLENLP_PATTERNS)
    if backend == "native" or (backend == "auto" and not only_paddlenlp):
        expected = ", ".join(("tokenizer.json", *SENTENCEPIECE_NAMES))
        raise StartupError(f"no tokenizer in {directory}: expected one of {expected}")
    from fdserve.text.paddlenlp_tokenizer import PaddleNLPTokenizer

    return PaddleNLPTokenizer(directory, read_tokenizer_config(directory))
