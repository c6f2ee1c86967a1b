"""What operators call the formats of reasoning and of tool calls: the names of other servers' parsers."""

from __future__ import annotations

from collections.abc import Mapping

from fdserve.errors import StartupError


def format_named(what: str, name: str, formats: Mapping[str, str]) -> str | None:
    """The format that a parser's name stands for, of these by their names; None for "none".

    Case does not count, nor hyphens for underscores. Raises StartupError for an unknown name.
    """
    if name.lower() == "none":
        return None
    format = formats.get(name.lower().replace("-", "_"))
    if format is None:
        known = ", ".join([*formats, "none"])
        raise StartupError(f"unknown {what} parser {name!r}: choose one of {known}")
    return format
