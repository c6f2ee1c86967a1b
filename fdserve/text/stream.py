"""One choice's ids to the text that its client sees: thoughts, answer, stop strings."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from fdserve.text.detokenizer import Detokenizer
from fdserve.text.reasoning import ReasoningFormat, ReasoningSplitter
from fdserve.text.stop import StopStrings
from fdserve.text.tokenizer import Tokenizer
from fdserve.text.tools import ToolCallDelta


class TextDelta(NamedTuple):
    """New text of one choice.

    `stop_matched` is the stop string that ended the content with this delta; `tokens_used` is how many of the
    pushed ids count: those after the one that completed a stop string do not.
    """

    reasoning: str
    content: str
    stop_matched: str | None
    tokens_used: int
    tool_calls: Sequence[ToolCallDelta] = ()


class TextStream:
    """Turns one choice's ids into reasoning and content.

    Joined, the deltas of `push` and of the closing `finish` do not depend on how the ids were split over the
    pushes. Stop strings are looked for in the content only, which is all text when `format` is None, and not before
    `min_tokens` ids were pushed.
    `thinking` says whether the first id is a thought (see `starts_in_thinking`). The ids of `hidden` (eos and
    stop tokens) never show and are no reasoning tokens, whatever `skip_special_tokens` says.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        format: ReasoningFormat | None = None,
        thinking: bool = False,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
        hidden: Collection[int] = (),
    ) -> None:
        self._splitter: ReasoningSplitter | None = None
        if format is not None:
            self._splitter = ReasoningSplitter(tokenizer, format, thinking, skip_special_tokens)
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens)
        self._stop = StopStrings(stop, include_stop_str_in_output)
        self._hidden = frozenset(hidden)
        self._free_tokens = min_tokens - 1  # ids to come that complete no stop string

    @property
    def reasoning_tokens(self) -> int:
        """How many ids so far were thoughts, the tags not counted."""
        return self._splitter.reasoning_tokens if self._splitter else 0

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Take the next ids. After a stop string has matched, none counts any more."""
        reasonings: list[str] = []
        contents: list[str] = []
        used = 0
        matched: str | None = None
        for token_id in token_ids:
            if self._stop.matched is not None:
                break
            used += 1
            free = self._free_tokens > 0
            self._free_tokens -= free
            if token_id in self._hidden:
                continue
            reasoning, content = self._text_of(token_id)
            reasonings.append(reasoning)
            if content:
                content, matched = self._stop.push(content, armed=not free)
                contents.append(content)
        return TextDelta("".join(reasonings), "".join(contents), matched, used)

    def _text_of(self, token_id: int) -> tuple[str, str]:
        if self._splitter is not None:
            return self._splitter.push(token_id)
        return "", self._detokenizer.push((token_id,))

    def finish(self) -> TextDelta:
        """What was held back, once there are no more ids; it may complete a stop string.

        After a match there is nothing left.
        """
        if self._stop.matched is not None:
            return TextDelta("", "", None, 0)
        reasoning, rest = self._splitter.flush() if self._splitter else ("", self._detokenizer.flush())
        content, matched = self._stop.push(rest)
        return TextDelta(reasoning, content + self._stop.flush(), matched, 0)
