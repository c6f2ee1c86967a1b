"""A conversation as chat templates expect it."""

from __future__ import annotations

from typing import Any

import msgspec

from fdserve.errors import InvalidRequest
from fdserve.protocol.chat import ChatMessage


def template_message(message: ChatMessage, index: int) -> dict[str, Any]:
    """The message as templates expect it: the text of its parts joined, no absent fields."""
    result: dict[str, Any] = {
        name: value for name, value in msgspec.structs.asdict(message).items() if value is not None
    }
    # Templates of the family know no developer: the role is OpenAI's newer word for the same thing.
    if message.role == "developer":
        result["role"] = "system"
    if isinstance(message.content, list):
        for at, part in enumerate(message.content):
            if part.type != "text" or part.text is None:
                raise InvalidRequest(
                    f"Content of type {part.type[:200]!r} cannot be used: this model takes text only."
                    if part.type != "text"
                    else "A text part needs its text.",
                    param=f"messages[{index}].content[{at}]",
                )
        result["content"] = "".join(part.text or "" for part in message.content)
    else:
        result["content"] = message.content or ""
    return result
