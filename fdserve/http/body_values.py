"""How many values a JSON body holds, told from its text: each becomes an object, and meanwhile all others wait."""

from __future__ import annotations

from fdserve.errors import PayloadTooLarge

MAX_VALUES = 1 << 18
"""Strings, lists and objects."""
MAX_NUMBERS = 1 << 20
"""All values, numbers among them: lists of token ids may well have many, and cost little each."""


_DULL = bytes(set(range(256)) - set(b'[{",'))


def check_values(body: bytes) -> None:
    """Raise PayloadTooLarge for a body of more values than that. What is no JSON may pass, or not."""
    if len(body) <= MAX_VALUES:
        return
    marks = body.translate(None, _DULL)
    if _excess([marks], marks.count(b'"') // 2) is None:
        return
    # Perhaps only its texts have so many brackets, quotes and commas.
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = body.translate(None, _DULL)
    strings = marks.count(b'"') // 2
    outside = marks.split(b'"')[::2] if strings <= MAX_VALUES else []
    if (excess := _excess(outside, strings)) is not None:
        raise PayloadTooLarge(f"The request body has more than {excess}.")


def _excess(outside: list[bytes], strings: int) -> str | None:
    """Of what there is too much, given the text outside of the strings."""
    if strings + sum(text.count(b"[") + text.count(b"{") for text in outside) > MAX_VALUES:
        return f"{MAX_VALUES} strings, lists and objects"
    if sum(text.count(b",") for text in outside) >= MAX_NUMBERS:
        return f"{MAX_NUMBERS} values"
    return None
