"""Finding tool calls in a choice's content, while it comes."""

from __future__ import annotations

from fdserve.text.tools import ToolCallDelta, ToolFormat
from fdserve.text.tools_block import LAYOUT, CallBlock


class ToolCallParser:
    """Splits content into text and the deltas of calls, in their order.

    A block is a start tag, a call or a list of calls, and an end tag. It is text, verbatim, until a call is known to be
    one: its name came, and its arguments have begun. From then on the block belongs to the call, unless it stops being
    JSON: what comes from there is text again, and the call stays as it is. White space around a block is left out.
    `complete_calls` counts the calls whose end tag came.
    """

    def __init__(self, format: ToolFormat) -> None:
        # A tag has a "<" in front and nowhere else: one that breaks off is found where another one begins.
        self._start, self._end = format.start, format.end
        self._spaces: list[str] = []  # which a call would make layout
        self._tag = 0  # characters of the start tag so far
        self._block: CallBlock | None = None
        self._after_block = False
        self._calls = 0
        self.complete_calls = 0

    @property
    def in_string(self) -> bool:
        """Whether the next character is inside a JSON string of a block."""
        return self._block is not None and self._block.in_string

    def push(self, text: str) -> list[str | ToolCallDelta]:
        """Take more content; return what is certain now."""
        events: list[str | ToolCallDelta] = []
        at = 0
        while at < len(text):
            at = self._outside(text, at, events) if self._block is None else self._inside(self._block, text, at, events)
        return events

    def _outside(self, text: str, at: int, events: list[str | ToolCallDelta]) -> int:
        if self._after_block:
            at = len(text) - len(text[at:].lstrip(LAYOUT))
            self._after_block = at == len(text)
            if self._after_block:
                return at
        if self._tag:
            if text[at] != self._start[self._tag]:
                self._let_go(self._start[: self._tag], events)
                self._tag = 0
                return at
            self._tag += 1
            if self._tag == len(self._start):
                self._tag = 0
                self._block = CallBlock(self._end, self._calls)
            return at + 1
        tag = text.find("<", at)
        self._let_go(text[at : tag if tag >= 0 else None], events)
        self._tag = int(tag >= 0)
        return tag + 1 if tag >= 0 else len(text)

    def _inside(self, block: CallBlock, text: str, at: int, events: list[str | ToolCallDelta]) -> int:
        at = block.push(text, at)
        if block.deltas:
            events += block.deltas
            block.deltas = []
            self._spaces = []
        if block.done or block.failed:
            self._calls += block.calls
            self._block = None
        if block.done:
            self.complete_calls += block.calls
            self._after_block = True
        elif block.failed:
            # Its last character may begin a tag, together with the one that it failed at.
            text = self._text_of(block)
            self._let_go(text.removesuffix("<"), events)
            self._tag = int(text.endswith("<"))
        return at

    def _text_of(self, block: CallBlock) -> str:
        return ("" if block.calls else self._start) + "".join(block.raw)

    def _let_go(self, text: str, events: list[str | ToolCallDelta]) -> None:
        """Pass text on, but for the white space at its end."""
        certain = text.rstrip(LAYOUT)
        if certain:
            events.append("".join(self._spaces) + certain)
            self._spaces = []
        if len(certain) < len(text):
            self._spaces.append(text[len(certain) :])

    def flush(self) -> list[str | ToolCallDelta]:
        """The rest, at the end of the content: what could have become a call is text, and what began as one is not."""
        rest = self._start[: self._tag]
        if self._block is not None and not self._block.calls:
            rest = self._text_of(self._block)
        rest = "".join(self._spaces) + rest
        self._block, self._tag, self._spaces = None, 0, []
        return [rest] if rest else []
