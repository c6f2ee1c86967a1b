"""Structured output: grammars are compiled here, by llguidance, and give each output its constraint."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from typing import TypeVar

import anyio
import anyio.from_thread
import anyio.lowlevel
import llguidance

from fdserve.errors import InvalidRequest, Overloaded
from fdserve.text.grammar_constraint import GrammarConstraint, Layout, clean_message
from fdserve.text.grammar_source import write_grammar
from fdserve.text.grammar_spec import JsonSchema, Spec, ToolCalls
from fdserve.text.grammar_vocabulary import GrammarVocabulary
from fdserve.text.reasoning import ReasoningFormat
from fdserve.text.tokenizer import Tokenizer

log = logging.getLogger("fdserve")
T = TypeVar("T")

COMPILE_SECONDS = 10.0
COMPILE_THREADS = 2
PATIENCE = 6
"""How many times the time limit a grammar waits for its turn: many that take little each may come together."""
CACHED_GRAMMARS = 64
# The compiler recurses as deep as a grammar is nested, references followed; only pages that are touched are used.
COMPILE_STACK = 1 << 30
NEWLINES_BEFORE_ANSWER = 2
NEWLINES_BEFORE_CALLS = 3


def parser_limits() -> llguidance.LLParserLimits:
    """What one grammar may cost: about 20 ms to prepare and 15 ms a token at the very worst, and 100 MB."""
    return llguidance.LLParserLimits(
        max_items_in_row=2000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
    )


class Grammar:
    """A compiled grammar. Any number of outputs may follow it at a time."""

    def __init__(
        self, matcher: llguidance.LLMatcher, vocabulary: GrammarVocabulary, format: ReasoningFormat | None, spec: Spec
    ) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._format = format
        self._calls = spec.mode if isinstance(spec, ToolCalls) else None
        self._only_form = not (isinstance(spec, ToolCalls) and spec.mode == "auto" and spec.content is None)
        self._param = spec.param

    def constraint(self, thinking: bool | None) -> GrammarConstraint:
        """The constraint of one output, at its beginning.

        `thinking` says whether the output begins inside a thought (see `starts_in_thinking`); None that it has no
        tags at all, as in a completion. What the grammar describes is the content that `ReasoningSplitter` finds.
        """
        return GrammarConstraint(self._matcher.deep_copy(), self._vocabulary, self._layout(thinking), self._param)

    def _layout(self, thinking: bool | None) -> Layout:
        format = self._format
        newlines = NEWLINES_BEFORE_CALLS if self._calls is not None and self._only_form else 0
        if format is None or thinking is None:
            return Layout(gap=newlines)
        after_thought = newlines
        forced: tuple[bytes | int, ...] = ()
        openers: dict[int, tuple[bytes | int, ...]] = {}
        if format.response_start is None:
            openers[format.think_start] = ()
            after_thought = NEWLINES_BEFORE_ANSWER if self._calls is None else newlines
        elif self._calls is None and thinking:
            forced = (b"\n\n", format.response_start, b"\n")
        elif self._calls is None:
            openers[format.response_start] = (b"\n",)
        return Layout(
            thought=thinking,
            think_start=format.think_start,
            think_end=format.think_end,
            forced=forced,
            gap=newlines,
            gap_after_thought=after_thought,
            openers=openers,
        )


class GrammarCompiler:
    """Compiles grammars for one model. `vocab_size` is the model's, which a mask has as many bits as.

    Belongs to the event loop that first uses it. The vocabulary is prepared with the first grammar, so that a server
    which never needs one starts no slower.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token_ids: Collection[int],
        reasoning: ReasoningFormat | None,
        vocab_size: int,
        *,
        time_limit: float = COMPILE_SECONDS,
    ) -> None:
        self._new_vocabulary = partial(GrammarVocabulary, tokenizer, eos_token_ids, vocab_size)
        self._vocabulary: GrammarVocabulary | None = None
        self._vocabulary_lock = threading.Lock()
        self._reasoning = reasoning
        self._time_limit = time_limit
        self._cache: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._cache_lock = threading.Lock()
        self._places = anyio.Semaphore(COMPILE_THREADS)

    async def compile(self, spec: Spec) -> Grammar:
        """Compile off the event loop.

        Raises InvalidRequest, with the spec's param, for a grammar that is wrong, too large or takes too long, and
        Overloaded while grammars that take too long keep all threads busy. When cancelled it returns at once; what
        has begun ends on its own.
        """
        try:
            matcher, vocabulary = await self._bounded(lambda: self._matcher(spec))
        except InvalidRequest as error:
            if error.param is not None:
                raise
            raise invalid(error, spec.param) from None
        return Grammar(matcher, vocabulary, self._reasoning, spec)

    async def _bounded(self, work: Callable[[], T]) -> T:
        """Run it in a thread of its own, with a large stack, and stop waiting when the time is over.

        The thread's place is its own until it ends, also where nobody waits for it any more.
        """
        with anyio.move_on_after(PATIENCE * self._time_limit) as waiting:
            await self._places.acquire()
        if waiting.cancelled_caught:
            raise Overloaded("Too many grammars are being compiled.", retry_after=int(self._time_limit) + 1)
        results: list[T | BaseException] = []
        done = anyio.Event()
        loop = anyio.lowlevel.current_token()

        def end() -> None:
            self._places.release()
            done.set()

        def run() -> None:
            try:
                results.append(work())
            except BaseException as error:  # a panic of native code is no Exception
                results.append(error)
            with suppress(RuntimeError):  # the event loop has ended
                anyio.from_thread.run_sync(end, token=loop)

        try:
            _start_thread(run)
        except (RuntimeError, MemoryError):
            self._places.release()
            raise Overloaded("There is no thread to compile a grammar in.") from None
        with anyio.move_on_after(self._time_limit):
            await done.wait()
        if not results:
            raise InvalidRequest(f"it took more than {self._time_limit:g} seconds to compile")
        (result,) = results
        if isinstance(result, InvalidRequest):
            raise result
        if isinstance(result, BaseException):
            log.error("compiling a grammar failed", exc_info=result)
            raise InvalidRequest("it could not be compiled")
        return result

    def _matcher(self, spec: Spec) -> tuple[llguidance.LLMatcher, GrammarVocabulary]:
        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = self._new_vocabulary()
        vocabulary = self._vocabulary
        source = write_grammar(spec, vocabulary, self._reasoning.response_start if self._reasoning else None)
        with self._cache_lock:
            if (matcher := self._cache.get(source)) is not None:
                self._cache.move_to_end(source)
                return matcher, vocabulary
        try:
            matcher = compiled(source, vocabulary)
        except InvalidRequest as error:
            raise (_tool_error(spec, vocabulary) if isinstance(spec, ToolCalls) else None) or error from None
        with self._cache_lock:
            self._cache[source] = matcher
            while len(self._cache) > CACHED_GRAMMARS:
                self._cache.popitem(last=False)
        return matcher, vocabulary


def compiled(source: str, vocabulary: GrammarVocabulary) -> llguidance.LLMatcher:
    """The matcher of a grammar that begins. Raises InvalidRequest, without a param, with the compiler's words."""
    try:
        source.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("it holds half of a surrogate pair") from None
    matcher = llguidance.LLMatcher(vocabulary.tokenizer, source, log_level=0, limits=parser_limits())
    if not matcher.is_error():
        # Prepares the lexer for all who copy it, and finds what nothing matches or what is too wide to begin.
        matcher.compute_bitmask()
    if matcher.is_error():
        raise InvalidRequest(_explained(matcher.get_error()))
    return matcher


def _tool_error(spec: ToolCalls, vocabulary: GrammarVocabulary) -> InvalidRequest | None:
    """The error that one part alone makes: the tool's with its name, the content's with its own param."""
    for name, parameters in spec.tools.items():
        try:
            compiled(write_grammar(JsonSchema(parameters, name in spec.strict, spec.param), vocabulary), vocabulary)
        except InvalidRequest as error:
            return InvalidRequest(f"tool {name!r}: {error.message}")
    if spec.content is not None:
        try:
            compiled(write_grammar(spec.content, vocabulary), vocabulary)
        except InvalidRequest as error:
            return invalid(error, spec.content.param)
    return None


def invalid(error: InvalidRequest, param: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid value for '{param}': {error.message.rstrip('.')}.", param=param)


def _explained(message: str) -> str:
    if message.startswith("NoExtension"):
        return "no text can match it"
    return clean_message(message)


def _start_thread(run: Callable[[], None]) -> None:
    before = threading.stack_size(COMPILE_STACK)
    try:
        threading.Thread(target=run, name="fdserve-grammar", daemon=True).start()
    finally:
        threading.stack_size(before)
