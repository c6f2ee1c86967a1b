from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fdserve.text.detokenizer import Detokenizer, decode, token_text
from fdserve.text.tokenizer import Tokenizer

from .vocabulary import ListTokenizer

# Every byte as a token, some longer pieces (whole, partial and impossible UTF-8), and one special token.
PIECES = [bytes([byte]) for byte in range(256)]
PIECES += [b" hello", "😀".encode(), "😀".encode()[:3], "é".encode()[1:] + b"x", b"\xed\xa0\x80", b"</s>"]
BYTES = ListTokenizer(PIECES, special=[b"</s>"])
EOS = len(PIECES) - 1
PUSHES = st.lists(st.lists(st.integers(-1, len(PIECES)), max_size=6), max_size=8)


@given(pushes=PUSHES, skip=st.booleans())
def test_joined_output_is_the_decoded_bytes(pushes: list[list[int]], skip: bool) -> None:
    detokenizer = Detokenizer(BYTES, skip_special_tokens=skip)
    text = "".join(map(detokenizer.push, pushes)) + detokenizer.flush()
    ids = [token for push in pushes for token in push if not (skip and token == EOS)]
    assert text == b"".join(map(BYTES.token_bytes, ids)).decode("utf-8", "replace")


@given(text=st.text(max_size=20))
def test_no_half_character_ever_comes_out(text: str) -> None:
    detokenizer = Detokenizer(BYTES)
    pieces = [detokenizer.push([byte]) for byte in text.encode()]
    assert "".join(pieces) == text
    assert all(len(piece) <= 1 for piece in pieces)
    assert detokenizer.flush() == ""


def test_unfinished_character_is_replaced_not_lost() -> None:
    detokenizer = Detokenizer(BYTES)
    assert detokenizer.push("a😀".encode()[:3]) == "a"
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push(b"b") == "b"  # nothing is left over


def test_leading_space_stays() -> None:
    assert decode(BYTES, [256, 256]) == " hello hello"


def test_special_tokens() -> None:
    assert decode(BYTES, [65, EOS, 66]) == "AB"
    assert decode(BYTES, [65, EOS, 66], skip_special_tokens=False) == "A</s>B"


def test_real_tokenizers(tokenizer: Tokenizer) -> None:
    text = " The 世界 😀\n\n  end"
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push([token]) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_and_bytes_of_a_token(ernie: Tokenizer) -> None:
    assert token_text(ernie, ernie.token_id("▁world") or -1) == (" world", list(b" world"))
    assert token_text(ernie, ernie.token_id("<0xF0>") or -1) == ("\ufffd", [0xF0])
    assert token_text(ernie, 2) == ("</s>", list(b"</s>"))
    assert token_text(ernie, 10**6) == ("", [])
