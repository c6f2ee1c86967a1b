"""The inside of one block of tool calls, while it comes."""

from __future__ import annotations

import uuid
from collections.abc import Callable

from fdserve.text.tools import ToolCallDelta
from fdserve.text.tools_json import JsonScanner, StringDecoder

LAYOUT = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")


class _Call:
    """One call of a block, as far as it came."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.begun = False  # its arguments have, and are an object
        self.complete = False  # its arguments are
        self.sent = False  # name and arguments are known, and so told
        self.early: list[str] = []  # arguments that came before that


class CallBlock:
    """Reads a call, or a list of calls, and the end tag.

    calls   how many were sent so far, the first of them as number `index`
    deltas  what was sent; whoever takes them empties the list
    raw     the text since the latest text that belongs to a sent call, or since the start tag
    done    the end tag came
    failed  the text is not what a block can be
    """

    def __init__(self, end_tag: str, index: int) -> None:
        self.calls = 0
        self.deltas: list[ToolCallDelta] = []
        self.raw: list[str] = []
        self.done = False
        self.failed = False
        self._index = index
        self._end_tag = end_tag
        self._tag = 0  # characters of the end tag so far
        self._state = "block"
        self._in_list = False
        self._owned = False  # whether the text of this step belongs to a sent call
        self._call = _Call()
        self._key = ""
        self._parts: list[str] = []  # of a key or a name
        self._string = StringDecoder()
        self._value = JsonScanner()

    @property
    def in_string(self) -> bool:
        """Whether the next character is inside a JSON string."""
        if self._state in ("in key", "in name", "in string arguments"):
            return True
        return self._state in ("in arguments", "in other") and self._value.in_string

    def push(self, text: str, at: int) -> int:
        """Take text[at:]; return where the block ends or fails, or the end of the text."""
        while at < len(text) and not self.done and not self.failed:
            end = _STEPS.get(self._state, CallBlock._structure)(self, text, at)
            if not self._owned:
                self.raw.append(text[at:end])
            self._owned = False
            at = end
        return at

    def _fail(self, at: int) -> int:
        self.failed = True
        return at

    def _structure(self, text: str, at: int) -> int:
        char = text[at]
        if char in LAYOUT:
            return at + 1
        following = _FOLLOWING.get((self._state, char))
        if following is None and self._state in _MAY_END and self._call.sent and self._call.complete:
            if char == "<":
                following, self._tag = "end tag", 1
            elif char in "}]":  # one too many, or the wrong one
                return at + 1
        if following is None:
            return self._fail(at)
        if following == "call end":
            return self._end_call(at)
        if char == "{":
            self._call = _Call()
        elif following == "in key":
            self._string, self._parts = StringDecoder(), []
        self._in_list = self._in_list or following == "list"
        self._state = following
        return at + 1

    def _end_call(self, at: int) -> int:
        call = self._call
        if call.name is None:
            return self._fail(at)
        if not call.begun:
            call.early.append("{}")
            call.complete = True
            self._begin()
        self._state = "item" if self._in_list else "end"
        self.raw, self._owned = [], True
        return at + 1

    def _in_key(self, text: str, at: int) -> int:
        at = self._decode(text, at)
        if self._string.done:
            self._key, self._state = "".join(self._parts), "colon"
        return at

    def _in_name(self, text: str, at: int) -> int:
        at = self._decode(text, at)
        if self._string.done:
            self._call.name, self._state = "".join(self._parts), "member"
            if not self._call.name:
                return self._fail(at)
            self._send_if_known()
        return at

    def _decode(self, text: str, at: int) -> int:
        while at < len(text) and not self._string.done and not self.failed:
            at, piece = self._string.step(text, at)
            self._parts.append(piece)
            self.failed = self._string.failed
        return at

    def _before_value(self, text: str, at: int) -> int:
        char = text[at]
        call = self._call
        if char in LAYOUT:
            return at + 1
        self._string, self._value, self._parts = StringDecoder(), JsonScanner(), []
        if self._key == "name" and call.name is None:
            self._state = "in name"
            return at + 1 if char == '"' else self._fail(at)
        if self._key not in _ARGUMENTS or call.begun:
            self._state = "in other"
            return at
        if char == '"':
            self._state = "in string arguments"
            return at + 1
        if char != "{":
            return self._fail(at)
        self._state = "in arguments"
        self._begin()
        return at

    def _in_other(self, text: str, at: int) -> int:
        at, _ = self._value.push(text, at)
        self.failed = self._value.failed
        if self._value.done:
            self._state = "member"
        return at

    def _in_arguments(self, text: str, at: int) -> int:
        at, taken = self._value.push(text, at)
        self._add_arguments(taken)
        self.failed = self._value.failed
        if self._value.done:
            self._call.complete, self._state = True, "member"
        return at

    def _in_string_arguments(self, text: str, at: int) -> int:
        escaped = text[at] == "\\" or self._string.in_escape
        end, piece = self._string.step(text, at)
        if self._string.failed or (self._string.done and not self._value.done):
            self.failed, end = True, at
        elif self._string.done:
            self._call.complete, self._state = True, "member"
        else:
            taken = self._take_decoded(piece)
            if self.failed and not escaped:
                end = at + taken
        if self._call.sent:
            self._owned = True
            self.raw = [self._string.escape] if self.failed and escaped else []
        return end

    def _take_decoded(self, piece: str) -> int:
        """Take decoded arguments; return how many of the characters can be."""
        at, taken = 0, ""
        if not self._value.done:
            first = piece.lstrip(LAYOUT)[:1]
            if first and not self._call.begun:
                if first != "{":
                    return self._fail(0)
                self._begin()
            at, taken = self._value.push(piece, 0)
        if self._value.done:
            rest = piece[at:]
            space = len(rest) - len(rest.lstrip(LAYOUT))
            at, taken = at + space, taken + rest[:space]
        self._add_arguments(taken)
        self.failed = at < len(piece)
        return at

    def _begin(self) -> None:
        self._call.begun = True
        self._send_if_known()

    def _send_if_known(self) -> None:
        call = self._call
        if call.name is None or not call.begun:
            return
        self.deltas.append(ToolCallDelta(self._index + self.calls, f"call_{uuid.uuid4().hex[:24]}", call.name, ""))
        self.calls += 1
        self.raw, self._owned = [], True
        call.sent = True
        self._add_arguments("".join(call.early))

    def _add_arguments(self, text: str) -> None:
        if not self._call.sent:
            self._call.early.append(text)
        elif text:
            self._owned = True
            self.deltas.append(ToolCallDelta(self._index + self.calls - 1, None, None, text))

    def _in_end_tag(self, text: str, at: int) -> int:
        if text[at] != self._end_tag[self._tag]:
            return self._fail(at)
        self._tag += 1
        self.done = self._tag == len(self._end_tag)
        return at + 1


# Where complete arguments may be behind.
_MAY_END = ("member", "item", "end")

# Where brackets and signs lead, from what is expected.
_FOLLOWING = {
    ("block", "["): "list",
    ("block", "{"): "key",
    ("list", "{"): "key",
    ("key", '"'): "in key",
    ("colon", ":"): "value",
    ("member", ","): "key",
    ("member", "}"): "call end",
    ("item", ","): "list",
    ("item", "]"): "end",
}

_STEPS: dict[str, Callable[[CallBlock, str, int], int]] = {
    "in key": CallBlock._in_key,
    "value": CallBlock._before_value,
    "in name": CallBlock._in_name,
    "in other": CallBlock._in_other,
    "in arguments": CallBlock._in_arguments,
    "in string arguments": CallBlock._in_string_arguments,
    "end tag": CallBlock._in_end_tag,
}
