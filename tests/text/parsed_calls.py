"""What a tool call parser gives for a text, in one piece or in any others."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from fdserve.text.tools import ToolCallDelta, ToolFormat
from fdserve.text.tools_parser import ToolCallParser

HERMES = ToolFormat("hermes")


@dataclass
class Seen:
    """What the events come to: the content, and every call's name and arguments."""

    content: str = ""
    calls: list[list[str]] = field(default_factory=list)
    complete: int = 0


def gather(events: list[str | ToolCallDelta]) -> Seen:
    """Checks the order of the deltas on the way."""
    seen = Seen()
    ids = set()
    for event in events:
        if isinstance(event, str):
            assert event
            seen.content += event
        elif event.id is not None:
            assert re.fullmatch("call_[0-9a-f]{24}", event.id)
            assert event.id not in ids
            ids.add(event.id)
            assert event.name
            assert (event.index, event.arguments) == (len(seen.calls), "")
            seen.calls.append([event.name, ""])
        else:
            assert event.name is None
            assert event.index == len(seen.calls) - 1
            assert event.arguments
            seen.calls[-1][1] += event.arguments
    return seen


def parse(pieces: list[str]) -> Seen:
    parser = ToolCallParser(HERMES)
    events = [event for piece in pieces for event in parser.push(piece)]
    seen = gather(events + parser.flush())
    seen.complete = parser.complete_calls
    return seen


def parse_anyhow(text: str, cuts: Iterable[int] | None = None) -> Seen:
    """The text in one piece, after it has been split everywhere, and at each of the cuts, with the same outcome.

    Without cuts at each place.
    """
    whole = parse([text])
    assert parse(list(text)) == whole
    for cut in range(1, len(text)) if cuts is None else cuts:
        assert parse([text[:cut], text[cut:]]) == whole
    return whole
