"""How the two common vocabularies spell bytes, and the bytes of one piece under each."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Spelling = Callable[[str], bytes]  # from a piece of the vocabulary to its bytes

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


def sentencepiece_bytes(piece: str) -> bytes:
    """The bytes of a SentencePiece piece: "▁" is a space, "<0xNN>" is that byte."""
    if match := _BYTE_PIECE.match(piece):
        return bytes([int(match[1], 16)])
    return piece.replace("▁", " ").encode("utf-8", "replace")


def byte_level_bytes(piece: str) -> bytes:
    """The bytes of a byte-level piece, in which every byte is written as one printable character."""
    try:
        return bytes(map(_BYTE_OF.__getitem__, piece))
    except KeyError:  # not written in that alphabet: it stands for itself
        return piece.encode("utf-8", "replace")


def word_piece_bytes(piece: str) -> bytes:
    """The bytes of a WordPiece piece: "##" continues a word, any other piece begins one after a space."""
    text = piece[2:] if piece.startswith("##") else " " + piece
    return text.encode("utf-8", "replace")


def spelling_of_decoder(decoder: dict[str, Any] | None) -> Spelling | None:
    """How a vocabulary spells bytes, by the "decoder" of its tokenizer.json; None for kinds not known here."""
    kinds = decoder_kinds(decoder)
    if "ByteLevel" in kinds:
        return byte_level_bytes
    if kinds & {"Metaspace", "ByteFallback"}:
        return sentencepiece_bytes
    return None


def decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    """The types named in a decoder, which may be a sequence of others."""
    if decoder is None:
        return set()
    if decoder.get("type") == "Sequence":
        return set().union(*map(decoder_kinds, decoder.get("decoders", ())))
    return {str(decoder.get("type"))}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others follow from U+0100."""
    alphabet = {}
    others = 0x100
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF:
            alphabet[chr(byte)] = byte
        else:
            alphabet[chr(others)] = byte
            others += 1
    return alphabet


_BYTE_OF = _byte_alphabet()


def well_formed(text: str) -> str:
    """The text with lone surrogates, which no tokenizer accepts, replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
