"""Which bodies are taken for JSON, by what their headers say."""

from __future__ import annotations

from collections.abc import Mapping

from fdserve.errors import UnsupportedMediaType

# The last two are what curl -d and fetch() send by themselves: nobody chose them, and the body tells what it is.
_TAKEN = frozenset({"", "application/json", "text/json", "application/x-www-form-urlencoded", "text/plain"})


def check_media_type(headers: Mapping[str, str]) -> None:
    """Raise UnsupportedMediaType for a body that says it is something other than plain JSON."""
    given = headers.get("content-type", "")
    media_type = given.partition(";")[0].strip().lower()
    if media_type not in _TAKEN and not media_type.endswith("+json"):
        raise UnsupportedMediaType(f"The body must be application/json, not {media_type[:200]!r}.")
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedMediaType(f"The content-encoding {encoding[:200]!r} cannot be read: send the body plain.")
