"""What one render of a template may use: CPU time, bytes, and what each operation on values makes of them.

An operation is either constant, or linear in its values, or has its bound worked out here before it begins. Whatever
is none of these a template does not have: see the lists of filters and methods.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Sequence, Sized, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any

from jinja2.exceptions import SecurityError

MAX_VALUE_BYTES = 32 << 20
MAX_TOTAL_BYTES = 512 << 20
MAX_CPU_SECONDS = 2.0
MAX_INT_BITS = 8192
MAX_PAIRS = 1 << 28
"""Of characters that one operation compares."""

FILTERS = frozenset(
    {"abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "format"}
    | {"groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject"}
    | {"rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "sum", "title"}
    | {"trim", "unique", "upper"}
)
METHODS = frozenset(
    {"capitalize", "casefold", "copy", "count", "endswith", "find", "format", "get", "index", "isalnum", "isalpha"}
    | {"isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "items", "join"}
    | {"keys", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex"}
    | {"rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper"}
    | {"values"}
)

_CONTAINERS = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView)
_CHAR = 4  # bytes of a character at most
_OBJECT = 100  # of a short string, and of its place in a list
_PRINTED = 16  # bytes of a container's text for each of its own: it is escaped
_NUMBER = 500  # of a number's text, by "%.99f"
_LINE_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
# These compare the text with all of the second one, at each place.
_PAIRING = frozenset({"lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip", "trim"})
_OF_TEXT = frozenset({"capitalize", "e", "escape", "lower", "replace", "safe", "string", "title", "trim", "upper"})
"""Filters that take the text of what is none."""
# The fields that are taken in a format: plain ones, with widths of two digits at most.
_FIELDS = {
    "%": re.compile(r"%(?:%|(?:\(\w*\))?[-+ #0]?\d{0,2}(?:\.\d{1,2})?[a-zA-Z])"),
    "format": re.compile(r"\{\{|\}\}|\{\w*(?::(?:[^{}]?[<>=^])?[-+ ]?#?0?\d{0,2}[,_]?(?:\.\d{1,2})?[a-zA-Z%]?)?\}"),
}


class Meter:
    """What one render has used. Sizes are in bytes, as `sys.getsizeof` counts them."""

    def __init__(self) -> None:
        self._deadline = time.thread_time() + MAX_CPU_SECONDS
        self._left = MAX_TOTAL_BYTES
        self._steps = 0
        # id -> (the value, kept alive so that its id stays its own; its size written out in full)
        self._sizes: dict[int, tuple[object, int]] = {}

    def tick(self, size: int = 0) -> None:
        """Count a step, and `size` bytes made by it."""
        self._left -= size
        if self._left < 0:
            raise SecurityError("the template makes too much text")
        if time.thread_time() > self._deadline:
            raise SecurityError("the template takes too long")

    def step(self) -> None:
        """Count one of many steps, each a matter of microseconds: reading the clock would take as long."""
        self._steps += 1
        if self._steps % 64 == 0:
            self.tick()

    def admit(self, value: Any) -> Any:
        """Count a value that an operation made, and return it; a lazy one is counted as it is read."""
        if isinstance(value, Iterator):
            return self.stream(value)
        if isinstance(value, _CONTAINERS):
            self.tick()
            size = self._full_size(value)
        else:
            size = sys.getsizeof(value)
            self.tick(size)
        if isinstance(value, int):
            self._check_bits(value.bit_length())
        self._check_bound(size)
        return value

    def stream(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yield the values, each admitted."""
        for value in values:
            yield self.admit(value)

    def joined(self, parts: Iterable[str]) -> str:
        """The parts as one value, each counted as it comes."""
        kept: list[str] = []
        size = 0
        for part in self.stream(parts):
            size += len(part) * _CHAR
            self._check_bound(size)
            kept.append(part)
        return "".join(kept)

    def _full_size(self, value: object) -> int:
        """The size written out: a value inside a list twice counts twice, but is walked only once."""
        if known := self._sizes.get(id(value)):
            return known[1]
        size = sys.getsizeof(value)
        self.tick(size)
        if isinstance(value, dict):
            size += sum(map(self._full_size, value)) + sum(map(self._full_size, value.values()))
        elif isinstance(value, _CONTAINERS):
            size += sum(map(self._full_size, value))
        self._sizes[id(value)] = (value, size)
        return size

    def check(self, name: str, values: Sequence[Any]) -> None:
        """Refuse an operator, filter or method on these values, the subject first, that would make or take too much.

        The filter `format` counts as the operator "%", and `join` has what it joins as its subject.
        """
        subject, *others = values
        if name in _OF_TEXT and not isinstance(subject, str):
            self._check_bound(self._printed(subject))
            subject = str(subject)
        if name == "**":
            if all(isinstance(value, int) for value in values):
                self._check_bits(subject.bit_length() * abs(others[0]))
        elif name == "*":
            if not all(isinstance(value, (int, float)) for value in values):
                self._check_bound(prod(map(self._factor, values)))
        elif name == "+":
            self._check_bound(sum(map(self._size, values)))
        elif name == "~":
            self._check_bound(sum(map(self._printed, values)))
        elif name == "round":
            self._check_bits(max((abs(value) for value in others if isinstance(value, int)), default=0))
        elif name == "sum":
            if any(isinstance(value, _CONTAINERS) for value in others):
                raise SecurityError("the template sums what is not numbers")
        elif name == "join" and not isinstance(subject, str):
            items = sum(map(self._printed, subject)) if isinstance(subject, _CONTAINERS) else 0
            self._check_bound(items + _length(subject) * sum(map(self._size, others)))
        elif isinstance(subject, str):
            self._check_bound(self._from_text(name, subject, others))

    def _from_text(self, name: str, text: str, others: Sequence[Any]) -> int:
        """What is made of a text, in bytes at most."""
        size = len(text) * _CHAR
        texts = [value for value in others if isinstance(value, str)]
        if name in _PAIRING and len(text) * max(map(len, texts), default=1) > MAX_PAIRS:
            raise SecurityError("the template takes too long")
        if name in _FIELDS:
            if any(mark in _FIELDS[name].sub("", text) for mark in ("%" if name == "%" else "{}")):
                raise SecurityError("the template formats with more than plain fields")
            fields = text.count("%" if name == "%" else "{")
            return size + fields * (sum(map(self._printed, others)) + _NUMBER)
        if name == "replace" and len(others) > 1:
            old, new = others[:2]
            return size + (len(text) // (len(old) or 1 if isinstance(old, str) else 1) + 1) * self._printed(new)
        if name in ("split", "rsplit"):
            parts = text.count(texts[0]) if texts and texts[0] else len(text) // 2
            limits = [value for value in others if isinstance(value, int) and value >= 0]
            return size + (min([parts, *limits]) + 1) * _OBJECT
        if name in ("splitlines", "indent"):
            width = max(map(self._factor, others), default=4) * _CHAR if name == "indent" else 0
            return size + (1 + sum(map(text.count, _LINE_BREAKS))) * (_OBJECT + width)
        if name in ("groupby", "join", "list", "sort", "title"):  # a character, or a word, at a time
            return len(text) * (_OBJECT + sum(map(len, texts)) * _CHAR)
        return size * 6 if name in ("e", "escape") else size

    def _size(self, value: object) -> int:
        if isinstance(value, str):
            return len(value) * _CHAR
        return self._full_size(value) if isinstance(value, _CONTAINERS) else sys.getsizeof(value)

    def _printed(self, value: object) -> int:
        """The size of the value as text."""
        if isinstance(value, _CONTAINERS):
            return self._full_size(value) * _PRINTED
        return self._size(value) if isinstance(value, str) else _NUMBER + sys.getsizeof(value) * _PRINTED

    def _factor(self, value: object) -> int:
        """What a value is to a product: a number is worth itself."""
        return abs(value) if isinstance(value, int) else self._size(value)

    def _check_bits(self, bits: int) -> None:
        if bits > MAX_INT_BITS:
            raise SecurityError("the template makes too large a number")

    def _check_bound(self, size: int) -> None:
        if size > MAX_VALUE_BYTES:
            raise SecurityError("the template makes too large a value")


def _length(value: object) -> int:
    return len(value) if isinstance(value, Sized) else 1


_meter: ContextVar[Meter] = ContextVar("_meter")


@contextmanager
def metered() -> Iterator[None]:
    """Compiling and rendering happen inside: everything is counted on one new meter."""
    token = _meter.set(Meter())
    try:
        yield
    finally:
        _meter.reset(token)


def current_meter() -> Meter:
    """The meter of the render in progress."""
    return _meter.get()
