"""What a JSON schema may cost to compile: bounds on what llguidance's own limits do not bound."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from fdserve.errors import InvalidRequest

MAX_MULTIPLE = 100_000
"""`multipleOf` becomes an automaton with as many states; several that hold together, one with their common multiple."""
MAX_PATTERNS = 10
"""Patterns that one string has to match together are intersected in time exponential in their number."""

MAX_STEPS = 1_000_000
"""Values looked at in all. References into what is nested have it walked through once for each of them."""

_MAPS = ("properties", "patternProperties")
_LISTS = ("prefixItems", "items")
_ONE = ("items", "additionalItems", "additionalProperties", "unevaluatedProperties", "contains", "propertyNames")


def check_cost(schema: object) -> None:
    """Raise InvalidRequest, without a param, for a schema that would take too long to compile."""
    steps = _Steps()
    try:
        _check_multiples(schema, steps)
        together = _Patterns(schema, steps).together(schema)
    except RecursionError:
        raise InvalidRequest("the schema is nested too deeply") from None
    if together > MAX_PATTERNS:
        raise InvalidRequest(f"more than {MAX_PATTERNS} patterns may have to match together")


class _Steps:
    """What checking one schema has taken."""

    def __init__(self) -> None:
        self._left = MAX_STEPS

    def take(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise InvalidRequest("the schema has too many references into each other")

    def values_of(self, schema: object, key: str) -> Iterator[Any]:
        """The values of this key, at any depth."""
        pending = [schema]
        while pending:
            self.take()
            value = pending.pop()
            if isinstance(value, Mapping):
                if key in value:
                    yield value[key]
                pending.extend(value.values())
            elif isinstance(value, (list, tuple)):
                pending.extend(value)


def _check_multiples(schema: object, steps: _Steps) -> None:
    values = [Decimal(str(value)) for value in steps.values_of(schema, "multipleOf") if _is_number(value)]
    values = [value for value in values if value.is_finite() and value > 0]
    if any(abs(value.adjusted()) > 12 for value in values):
        raise InvalidRequest("multipleOf has a value that is too large or too small")
    digits = max((-int(value.as_tuple().exponent) for value in values), default=0)
    common = 1
    for value in values:
        common = math.lcm(common, int(value.scaleb(max(digits, 0))))
        if common > MAX_MULTIPLE:  # at once: of all of them it would have as many digits as they have together
            raise InvalidRequest(f"multipleOf: the values' least common multiple is more than {MAX_MULTIPLE} steps")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _Patterns:
    """How many patterns may come to hold for one string: an upper bound."""

    def __init__(self, root: object, steps: _Steps) -> None:
        self._root = root
        self._steps = steps
        self._all = sum(1 for _ in steps.values_of(root, "pattern"))
        self._known: dict[int, int] = {}  # by the identity of what a reference leads to
        self._count_references()

    def _count_references(self) -> None:
        """Fill `_known`, what is referred to first; a schema inside itself describes another value and counts 0."""
        seen: set[int] = set()
        path: list[tuple[object, Iterator[Any]]] = [(None, self._steps.values_of(self._root, "$ref"))]
        while path:
            target, references = path[-1]
            for reference in references:
                node = self._resolve(reference)
                if isinstance(node, Mapping) and id(node) not in seen:
                    seen.add(id(node))
                    path.append((node, self._steps.values_of(node, "$ref")))
                    break
            else:
                path.pop()
                self._known[id(target)] = self.together(target)

    def together(self, schema: object) -> int:
        """Of any one value that the schema, or a schema inside it, describes."""
        self._steps.take()
        if not isinstance(schema, Mapping):
            return 0
        own = int("pattern" in schema)
        all_of = sum(map(self.together, _items(schema, "allOf")))
        any_of = max(map(self.together, (*_items(schema, "anyOf"), *_items(schema, "oneOf"))), default=0)
        inside = max(map(self.together, _inside(schema)), default=0)
        referred = 0
        if "$ref" in schema:
            node = self._resolve(schema["$ref"])
            referred = self._all if node is None else self._known.get(id(node), 0)
        return own + all_of + any_of + inside + referred

    def _resolve(self, reference: object) -> object:
        """What a JSON pointer leads to; None for other kinds of references."""
        node = self._root
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            return None
        for part in reference[2:].split("/") if reference != "#" else ():
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(node, Mapping):
                node = node.get(key)
            elif isinstance(node, (list, tuple)) and key.isdecimal() and int(key) < len(node):
                node = node[int(key)]
            else:
                return None
        return node


def _items(schema: Mapping[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return list(value) if isinstance(value, (list, tuple)) else []


def _inside(schema: Mapping[str, Any]) -> Iterator[Any]:
    for key in _MAPS:
        if isinstance(value := schema.get(key), Mapping):
            yield from value.values()
    for key in _LISTS:
        yield from _items(schema, key)
    yield from (schema[key] for key in _ONE if key in schema)
