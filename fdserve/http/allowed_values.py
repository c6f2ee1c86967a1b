"""Which values a field of a body takes, for the client that sent another one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from msgspec import inspect

_STEP = re.compile(r"\[[^]]*\]|[^.[]+")


def allowed_values(kind: Any, path: str) -> list[str | int]:
    """The values of the enumeration at msgspec's `path`, without the root, in a body of type `kind`.

    Empty where there is none. The tag that tells the members of a union apart is one.
    """
    types = list(_members(_described(kind)))
    tags: list[str | int | None] = []
    for step in _STEP.findall(path):
        tags = [info.tag for info in types if isinstance(info, inspect.StructType) and info.tag_field == step]
        types = [member for info in types for inner in _inner(info, step) for member in _members(inner)]
    literals = [value for info in types if isinstance(info, inspect.LiteralType) for value in info.values]
    return list(dict.fromkeys(value for value in (*tags, *literals) if value is not None))


@lru_cache(maxsize=32)
def _described(kind: Any) -> inspect.Type:
    return inspect.type_info(kind)


def _members(info: inspect.Type) -> Iterator[inspect.Type]:
    if isinstance(info, inspect.Metadata):
        yield from _members(info.type)
    elif isinstance(info, inspect.UnionType):
        for member in info.types:
            yield from _members(member)
    else:
        yield info


def _inner(info: inspect.Type, step: str) -> Iterator[inspect.Type]:
    """What a step of a path, a field's name or an index, leads to."""
    if isinstance(info, inspect.StructType):
        yield from (field.type for field in info.fields if field.encode_name == step)
    elif isinstance(info, inspect.ListType) and step.startswith("["):
        yield info.item_type
    elif isinstance(info, inspect.DictType) and step.startswith("["):
        yield info.value_type
