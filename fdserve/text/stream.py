"""One choice's ids to what its client sees: thoughts, answer, tool calls, stop strings."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from fdserve.text.detokenizer import Detokenizer
from fdserve.text.reasoning import ReasoningFormat, ReasoningSplitter
from fdserve.text.stop import StopStrings, StopTable
from fdserve.text.tokenizer import Tokenizer
from fdserve.text.tools import ToolCallDelta, ToolFormat
from fdserve.text.tools_parser import ToolCallParser

NO_STOPS = StopTable()

Part = str | ToolCallDelta
"""Of an answer: a text, or what is new of a call."""


def joined(parts: Sequence[Part]) -> list[Part]:
    """The parts in their order, those that go on with the one before them as one with it; none is empty."""
    if len(parts) < 2:  # nearly always
        return [part for part in parts if part]
    result: list[Part] = []
    for _, group in groupby(parts, _call_of):
        own = list(group)
        text = "".join([part if isinstance(part, str) else part.arguments for part in own])
        if not isinstance(own[0], str):
            result.append(replace(own[0], arguments=text))
        elif text:
            result.append(text)
    return result


def content_of(parts: Iterable[Part]) -> str:
    """All text among the parts."""
    return "".join([part for part in parts if isinstance(part, str)])


def calls_of(parts: Iterable[Part]) -> list[ToolCallDelta]:
    """All that the parts tell of calls."""
    return [part for part in parts if not isinstance(part, str)]


def _call_of(part: Part) -> int:
    return -1 if isinstance(part, str) else part.index


class TextDelta(NamedTuple):
    """What is new of one choice: thoughts, then the `parts` of the answer in their order.

    `stop_matched` is the stop string that ended the content with this delta; `tokens_used` is how many of the
    pushed ids count: those after the one that completed a stop string do not.
    """

    reasoning: str
    parts: Sequence[Part]
    stop_matched: str | None
    tokens_used: int


class TextStream:
    """Turns one choice's ids into reasoning, content and tool calls.

    Joined, the deltas of `push` and of the closing `finish` do not depend on how the ids were split over the
    pushes. Stop strings are looked for in the content only, which is all text when `format` is None, and not before
    `min_tokens` ids were pushed. Calls are looked for in the content too, if `tools` is given; their text is not
    content, and a stop string does not reach over one.
    `thinking` says whether the first id is a thought (see `starts_in_thinking`), and `continued` whether the prompt
    ends in the middle of a thought or an answer. The ids of `hidden` (eos and stop tokens) never show and are no
    reasoning tokens, whatever `skip_special_tokens` says.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        format: ReasoningFormat | None = None,
        thinking: bool = False,
        continued: bool = False,
        stop: StopTable = NO_STOPS,
        skip_special_tokens: bool = True,
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
        hidden: Collection[int] = (),
        tools: ToolFormat | None = None,
    ) -> None:
        self._splitter: ReasoningSplitter | None = None
        if format is not None:
            self._splitter = ReasoningSplitter(tokenizer, format, thinking, skip_special_tokens, continued)
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens)
        self._tools = ToolCallParser(tools) if tools is not None else None
        self._stop = StopStrings(stop, include_stop_str_in_output)
        self._hidden = frozenset(hidden)
        self._free_tokens = min_tokens - 1  # ids to come that complete no stop string

    @property
    def reasoning_tokens(self) -> int:
        """How many ids so far were thoughts, the tags not counted."""
        return self._splitter.reasoning_tokens if self._splitter else 0

    @property
    def complete_calls(self) -> int:
        """How many tool calls so far are complete: their end tag came."""
        return self._tools.complete_calls if self._tools else 0

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Take the next ids. After a stop string has matched, none counts any more."""
        reasonings: list[str] = []
        parts: list[Part] = []
        used = 0
        for token_id in token_ids:
            if self._stop.matched is not None:
                break
            used += 1
            free = self._free_tokens > 0
            self._free_tokens -= free
            if token_id in self._hidden:
                continue
            content = ""
            if self._splitter is None:
                content = self._detokenizer.push_one(token_id)
            else:
                literal = self._tools is not None and self._tools.in_string
                reasoning, content = self._splitter.push(token_id, literal)
                if reasoning:
                    reasonings.append(reasoning)
            if content:
                self._add([content] if self._tools is None else self._tools.push(content), not free, parts)
        matched = self._stop.matched if used else None
        return TextDelta("".join(reasonings), joined(parts), matched, used)

    def _add(self, events: Iterable[Part], armed: bool, parts: list[Part]) -> None:
        """Add what is new of the answer to the parts: the text as far as no stop string may yet come of it."""
        for event in events:
            if isinstance(event, str):
                parts.append(self._stop.push(event, armed)[0])
                if self._stop.matched is not None:
                    break
            else:
                if event.id is not None:
                    parts.append(self._stop.flush())
                parts.append(event)

    def finish(self) -> TextDelta:
        """What was held back, once there are no more ids; it may complete a stop string.

        After a match there is nothing left.
        """
        if self._stop.matched is not None:
            return TextDelta("", [], None, 0)
        reasoning, rest = self._splitter.flush() if self._splitter else ("", self._detokenizer.flush())
        parts: list[Part] = []
        if rest:
            self._add([rest] if self._tools is None else self._tools.push(rest), True, parts)
        if self._tools is not None and self._stop.matched is None:
            self._add(self._tools.flush(), True, parts)
        return TextDelta(reasoning, joined([*parts, self._stop.flush()]), self._stop.matched, 0)
