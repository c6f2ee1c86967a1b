"""What one output may go on with: its thoughts, the tags around its answer, then what the grammar allows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import llguidance
import numpy as np

from fdserve.errors import InvalidRequest
from fdserve.text.grammar_vocabulary import Bits, GrammarVocabulary


@dataclass(frozen=True)
class Layout:
    """What stands between the beginning of an output and the grammar's text.

    thought  whether the output begins inside a thought, which `think_end` ends
    forced   what must come then: bytes, or the id of a tag
    gap      how many newlines may come before the grammar, where the output begins with it
    gap_after_thought   the same after a thought
    openers  tags that may come in the grammar's place, and what they force; `think_start` opens a thought
    """

    thought: bool = False
    think_start: int | None = None
    think_end: int | None = None
    forced: tuple[bytes | int, ...] = ()
    gap: int = 0
    gap_after_thought: int = 0
    openers: Mapping[int, tuple[bytes | int, ...]] = field(default_factory=dict)


class GrammarConstraint:
    """See `fdserve.engine.request.Constraint`. Of one output; cheap to make."""

    def __init__(
        self, matcher: llguidance.LLMatcher, vocabulary: GrammarVocabulary, layout: Layout, param: str
    ) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._layout = layout
        self._param = param
        self._thought = layout.thought
        self._ahead: list[bytes | int] = [] if layout.thought else list(layout.forced)
        self._gap = 0 if layout.thought else layout.gap
        self._openers = {} if layout.thought else dict(layout.openers)
        self._ended = False

    @property
    def finished(self) -> bool:
        """Whether the grammar's text is complete and could not go on."""
        if self._thought or self._ahead or self._openers:
            return False
        return self._ended or (self._matcher.is_stopped() and not self._matcher.is_error())

    def advance(self, token_id: int) -> None:
        """Take the next token. Raises InvalidRequest for one that the grammar has no place for."""
        if self._thought:
            self._thought = token_id != self._layout.think_end
            if not self._thought:
                self._ahead, self._gap = list(self._layout.forced), self._layout.gap_after_thought
            return
        if self._ahead and self._take_ahead(token_id):
            return
        self._ahead = []
        if (forced := self._openers.get(token_id)) is not None:
            self._openers, self._ahead = {}, list(forced)
            self._thought = token_id == self._layout.think_start
            return
        if self._gap and token_id in self._newlines():
            self._gap -= len(self._vocabulary.tokens[token_id])
            return
        self._openers, self._gap = {}, 0
        if token_id in self._vocabulary.eos_token_ids and self._matcher.is_accepting():
            self._ended = True
        elif not self._matcher.consume_token(token_id):
            raise self._error()

    def _take_ahead(self, token_id: int) -> bool:
        """Take a token of the layout, however it is cut into tokens; False for any other token."""
        first = self._ahead[0]
        if isinstance(first, int):
            taken = token_id == first
            rest: bytes | int = b""
        else:
            token = self._vocabulary.tokens[token_id]
            taken = bool(token) and first.startswith(token)
            rest = first[len(token) :]
        if taken:
            self._ahead[:1] = [rest] if rest else []
        return taken

    def _newlines(self) -> frozenset[int]:
        return frozenset().union(*self._vocabulary.newlines[: self._gap])

    def mask(self) -> bytes | None:
        """The ids allowed next; inside a thought all that do not end the output, which is still to come.

        Raises InvalidRequest when that is too costly to tell.
        """
        if self._thought:
            return self._vocabulary.not_ending
        vocabulary = self._vocabulary
        if self._ahead:
            first = self._ahead[0]
            token_id = first if isinstance(first, int) else vocabulary.canonical(first)
            if token_id is not None:
                return vocabulary.bits([token_id]).tobytes()
            self._ahead = []
        if self._ended:
            return vocabulary.bits(vocabulary.eos_token_ids).tobytes()
        allowed = self._allowed()
        also = set(self._openers) | (self._newlines() if self._gap else set())
        if also:
            allowed = allowed | vocabulary.bits(also)
        if not allowed.any():
            raise self._error()
        return allowed.tobytes()

    def _allowed(self) -> Bits:
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise self._error()
        width = self._vocabulary.mask_bytes
        allowed = np.frombuffer(mask[:width].ljust(width, b"\0"), np.uint8) & self._vocabulary.usable
        return np.asarray(allowed, np.uint8)

    def _error(self) -> InvalidRequest:
        reason = clean_message(self._matcher.get_error()) or "no token can follow"
        return InvalidRequest(f"The output cannot follow '{self._param}': {reason}.", param=self._param)


# How the compiler's words begin -> what they mean to whoever wrote the form.
_MEANINGS = (
    ("panic", "the grammar is too large"),
    ("Current row has", "the form allows too many ways to go on: give it fewer options or optional properties"),
    ("Unable to determine if regex is empty", "the patterns are too complex to hold together"),
    ('failed to parse "%json": recursion limit exceeded', "the schema is nested too deeply"),
    ("oneOf constraints are not supported", "the options of oneOf must exclude each other; anyOf needs no such proof"),
    ("Unimplemented keys", "strict is for schemas that can be enforced whole, and these keywords cannot be: {keys}"),
)


def clean_message(message: str) -> str:
    """The compiler's own words, without the dumps of its state and of the grammar's source, or what they mean."""
    message = re.split(r"\n[ \t]*\d+ \| |\n<state>|\n<backtrace>|; consider making", message.strip(), maxsplit=1)[0]
    message = message.removeprefix("Parser Error: ")
    for told in (
        "failed to compile JSON schema: ",
        "regex parse error: ",
        "error: ",
    ):  # before it stands a place in our own rules
        message = message.rpartition(told)[2]
    message = " ".join(message.split())
    for begin, meaning in _MEANINGS:
        if message.startswith(begin):
            return meaning.format(keys=", ".join(re.findall(r'"([^"]*)"', message)))
    return (message if len(message) <= 400 else message[:400] + "…").rstrip(".")
