"""How many tokens one text may have."""

from __future__ import annotations

from fdserve.errors import InvalidRequest

MAX_TOKENS = 1 << 20
"""More than any model takes. To make a list of ids, to look it through and to give it up holds up all threads."""


def check_length(tokens: int, param: str | None = None) -> None:
    """Raise InvalidRequest for more tokens than one text may have."""
    if tokens > MAX_TOKENS:
        message = f"There are {tokens} tokens; a request may ask about {MAX_TOKENS} at most."
        raise InvalidRequest(message, param=param)
