"""How many values a JSON body holds, told from its text: each becomes an object, and meanwhile all others wait."""

from __future__ import annotations

from fdserve.errors import PayloadTooLarge

MAX_VALUES = 1 << 18
"""Strings, lists and objects. Numbers are not counted: lists of token ids may well have millions, and cost little."""

_DULL = bytes(set(range(256)) - set(b'[{"'))


def check_values(body: bytes) -> None:
    """Raise PayloadTooLarge for a body of more than MAX_VALUES values. What is no JSON may pass, or not."""
    if len(body) <= MAX_VALUES or _lists_and_objects(body) + body.count(b'"') // 2 <= MAX_VALUES:
        return
    # Perhaps only its texts have so many brackets and quotes.
    marks = body.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _DULL)
    strings = marks.count(b'"') // 2
    if strings > MAX_VALUES or strings + sum(map(_lists_and_objects, marks.split(b'"')[::2])) > MAX_VALUES:
        raise PayloadTooLarge(f"The request body has more than {MAX_VALUES} strings, lists and objects.")


def _lists_and_objects(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")
