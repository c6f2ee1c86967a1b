"""How many values JSON holds, told from its text: each becomes an object, and meanwhile all others wait."""

from __future__ import annotations

from collections.abc import Iterable

from fdserve.errors import PayloadTooLarge

MAX_VALUES = 1 << 18
"""Strings, lists and objects."""
MAX_NUMBERS = 1 << 20
"""All values, numbers among them: lists of token ids may well have many, and cost little each."""


_DULL = bytes(set(range(256)) - set(b'[{",'))


def check_values(*texts: bytes, holder: str = "The request body") -> None:
    """Raise PayloadTooLarge where the texts have more values than that together. What is no JSON may pass, or not."""
    if sum(map(len, texts)) <= MAX_VALUES or _excess(map(_most, texts)) is None:
        return
    # Perhaps only its strings have so many brackets, quotes and commas.
    if (excess := _excess(map(_exactly, texts))) is not None:
        raise PayloadTooLarge(f"{holder} has more than {excess}.")


def _excess(counts: Iterable[tuple[int, int]]) -> str | None:
    """Of what there is too much, given the counts of the texts."""
    objects = commas = 0
    for more_objects, more_commas in counts:
        objects += more_objects
        commas += more_commas
    if objects > MAX_VALUES:
        return f"{MAX_VALUES} strings, lists and objects"
    return f"{MAX_NUMBERS} values" if commas >= MAX_NUMBERS else None


def _most(text: bytes) -> tuple[int, int]:
    """How many strings, lists and objects a text may have at most, and how many commas."""
    marks = text.translate(None, _DULL)
    return marks.count(b'"') // 2 + marks.count(b"[") + marks.count(b"{"), marks.count(b",")


def _exactly(text: bytes) -> tuple[int, int]:
    """How many of them it has, outside of its strings."""
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = text.translate(None, _DULL)
    strings = marks.count(b'"') // 2
    if strings > MAX_VALUES:
        return strings, 0
    outside = b"".join(marks.split(b'"')[::2])
    return strings + outside.count(b"[") + outside.count(b"{"), outside.count(b",")
