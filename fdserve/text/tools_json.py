"""JSON as it comes: one value checked, or one string decoded, a piece at a time (RFC 8259)."""

from __future__ import annotations

import re

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_UNTIL_ESCAPE = re.compile(r'[^"\\]*')
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_HEX = frozenset("0123456789abcdefABCDEF")
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
_SPACE = frozenset(" \t\r\n")


def _number_states() -> dict[str, dict[str, str]]:
    """What may follow in a number, state by state."""

    def digits(state: str) -> dict[str, str]:
        return dict.fromkeys("0123456789", state)

    exponent = {"e": "e", "E": "e"}
    first = {**digits("integer"), "0": "zero"}
    return {
        "start": {**first, "-": "minus"},
        "minus": first,
        "zero": {".": "point", **exponent},
        "integer": {**digits("integer"), ".": "point", **exponent},
        "point": digits("fraction"),
        "fraction": {**digits("fraction"), **exponent},
        "e": {**digits("exponent"), "+": "sign", "-": "sign"},
        "sign": digits("exponent"),
        "exponent": digits("exponent"),
    }


_NUMBER = _number_states()
_NUMBER_ENDS = frozenset({"zero", "integer", "fraction", "exponent"})


def _end_of(run: re.Pattern[str], text: str, at: int) -> int:
    """Where a run that begins at `at` ends."""
    match = run.match(text, at)
    assert match is not None, "a run may be empty"
    return match.end()


class JsonScanner:
    """Checks one JSON value while it comes, and passes its text on.

    What `push` has passed on is at any time the beginning of a valid value, and all of one when `done`. It is the
    text that came, but for control characters inside strings, which become escapes. Every character costs the same,
    however deep the value is.
    """

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self._state = "value"
        self._open: list[str] = []  # the brackets that are to come
        self._is_key = False
        self._rest = ""  # of a literal
        self._digits = 0  # of a \u escape, to come

    @property
    def in_string(self) -> bool:
        """Whether the next character is part of a string."""
        return self._state in ("string", "escape", "hex")

    def push(self, text: str, at: int) -> tuple[int, str]:
        """Take text[at:], as far as it belongs to the value; return where that ends, and it.

        It ends before the end of the text where the value is `done`, or at a character that cannot be (`failed`).
        """
        parts: list[str] = []
        start = at
        while at < len(text):
            if self._state == "string":
                at = _end_of(_PLAIN, text, at)
                if at < len(text):
                    if text[at] < " ":
                        parts += text[start:at], _escaped(text[at])
                        start = at + 1
                    else:
                        self._leave_plain(text[at])
                    at += 1
            elif self._take(text[at]):
                at += 1
            if self.done or self.failed:
                break
        parts.append(text[start:at])
        return at, "".join(parts)

    def _leave_plain(self, char: str) -> None:
        if char == "\\":
            self._state = "escape"
        elif self._is_key:
            self._state = "colon"
        else:
            self._end_value()

    def _end_value(self) -> None:
        self._state = "after"
        self.done = not self._open

    def _take(self, char: str) -> bool:
        """Take one character outside of the plain part of strings; False if it stays where it is."""
        state = self._state
        if state in _NUMBER:
            if (following := _NUMBER[state].get(char)) is not None:
                self._state = following
                return True
            if state not in _NUMBER_ENDS:
                return self._fail()
            self._end_value()
            return not self.done and self._take(char)
        if state == "literal":
            if char != self._rest[0]:
                return self._fail()
            self._rest = self._rest[1:]
            if not self._rest:
                self._end_value()
            return True
        if state == "escape":
            self._state, self._digits = ("hex", 4) if char == "u" else ("string", 0)
            return char == "u" or char in _ESCAPES or self._fail()
        if state == "hex":
            self._digits -= 1
            if not self._digits:
                self._state = "string"
            return char in _HEX or self._fail()
        return char in _SPACE or self._take_structure(char)

    def _take_structure(self, char: str) -> bool:
        state = self._state
        if self._open and char == self._open[-1] and state in ("after", "first value", "first key"):
            self._open.pop()
            self._end_value()
        elif state == "after":
            if char != ",":
                return self._fail()
            self._state = "key" if self._open[-1] == "}" else "value"
        elif state == "colon":
            self._state = "value"
            return char == ":" or self._fail()
        elif state in ("key", "first key"):
            self._state, self._is_key = "string", True
            return char == '"' or self._fail()
        else:
            return self._begin_value(char)
        return True

    def _begin_value(self, char: str) -> bool:
        if char == '"':
            self._state, self._is_key = "string", False
        elif char == "{":
            self._open.append("}")
            self._state = "first key"
        elif char == "[":
            self._open.append("]")
            self._state = "first value"
        elif char in _LITERALS:
            self._state, self._rest = "literal", _LITERALS[char]
        else:
            self._state = "start"
            return self._take(char)
        return True

    def _fail(self) -> bool:
        self.failed = True
        return False


def _escaped(char: str) -> str:
    return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(char, f"\\u{ord(char):04x}")


class StringDecoder:
    """Decodes one JSON string, from behind its opening quote, while it comes.

    Raw control characters are taken as they are. A surrogate without its other half becomes U+FFFD.
    """

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self.escape = ""  # the latest escape, as far as it came
        self.in_escape = False
        self._high = 0  # a surrogate whose other half is to come

    def step(self, text: str, at: int) -> tuple[int, str]:
        """Take a little of text[at:]: a run without escapes, or a character; return where it ends, and what it reads.

        The closing quote makes it `done`.
        """
        if self.in_escape:
            return self._step_in_escape(text, at)
        if self._high and text[at] != "\\":
            self._high = 0
            return at, "\ufffd"
        if text[at] == "\\":
            self.escape, self.in_escape = "\\", True
            return at + 1, ""
        if text[at] == '"':
            self.done = True
            return at + 1, ""
        end = _end_of(_UNTIL_ESCAPE, text, at)
        return end, text[at:end]

    def _step_in_escape(self, text: str, at: int) -> tuple[int, str]:
        char = text[at]
        first = len(self.escape) == 1
        if (char != "u" and char not in _ESCAPES) if first else char not in _HEX:
            self.failed = True
            return at, ""
        self.escape += char
        lost = "\ufffd" if self._high else ""
        if first and char != "u":
            self.in_escape, self._high = False, 0
            return at + 1, lost + _ESCAPES[char]
        if len(self.escape) < 6:
            return at + 1, ""
        self.in_escape = False
        code = int(self.escape[2:], 16)
        if 0xDC00 <= code < 0xE000:
            high, self._high = self._high, 0
            return at + 1, chr(0x10000 + ((high - 0xD800) << 10) + (code - 0xDC00)) if high else "\ufffd"
        if 0xD800 <= code < 0xDC00:
            self._high = code
            return at + 1, lost
        self._high = 0
        return at + 1, lost + chr(code)
