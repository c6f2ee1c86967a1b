"""No grammar may hold the process: each of these ends soon, with a clear 400 where it has to."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest

from fdserve.errors import InvalidRequest, Overloaded
from fdserve.text import grammar
from fdserve.text.grammar import GrammarCompiler
from fdserve.text.grammar_spec import Choice, JsonSchema, Lark, Regex, Spec, StructuralTag
from fdserve.text.grammar_vocabulary import GrammarVocabulary
from fdserve.text.tokenizer import Tokenizer
from tests.text.decoding import allowed_ids
from tests.text.vocabulary import ListTokenizer


def schema(**keywords: Any) -> JsonSchema:
    return JsonSchema(keywords, True, "response_format")


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}}
    return value


def chain(length: int, link: Callable[[str], dict[str, Any]]) -> JsonSchema:
    definitions = {f"d{i}": link(f"#/$defs/d{i + 1}") for i in range(length)}
    return JsonSchema({"$defs": {**definitions, f"d{length}": {}}, "$ref": "#/$defs/d0"}, True, "response_format")


def rules(count: int, body: str) -> Lark:
    lines = [f"R{i}: {body.format(f'R{i + 1}')}" for i in range(count)]
    return Lark("\n".join(["start: R0", *lines, f'R{count}: "a"\n']), "guided_grammar")


def inside_each_other(depth: int, leaves: int) -> JsonSchema:
    value: dict[str, Any] = {"enum": [{}] * leaves}
    for outer in reversed(range(depth)):
        value = {"items": value, "$ref": "#" + "/items" * outer}
    return JsonSchema(value, False, "x")


def tags(count: int) -> StructuralTag:
    structures = [{"begin": f"<{i}>", "schema": {}, "end": "</>"} for i in range(count)]
    return StructuralTag({"structures": structures, "triggers": [f"<{i}>" for i in range(count)]}, "x")


REFUSED: dict[str, tuple[Spec, str]] = {
    "nested schema": (JsonSchema(nested(400), True, "x"), "recursion limit|nested too deeply"),
    "chain of references": (chain(12_000, lambda ref: {"$ref": ref, "title": "so long"}), "longer than"),
    "long schema": (schema(description="x" * 600_000), "longer than"),
    "product of options": (
        schema(allOf=[{"anyOf": [{"required": [f"k{i}{j}"]} for j in range(4)]} for i in range(10)]),
        "too large|not supported",
    ),
    "patterns together": (schema(allOf=[{"pattern": f"a.{{{i}}}b"} for i in range(30)]), "more than 10 patterns"),
    "patterns by references": (
        JsonSchema(
            {
                "$defs": {f"d{i}": {"pattern": f"a.{{{i}}}b", "$ref": f"#/$defs/d{i + 1}"} for i in range(30)},
                "$ref": "#/$defs/d0",
            },
            True,
            "x",
        ),
        "more than 10 patterns",
    ),
    "large multiple": (schema(type="integer", multipleOf=999_983), "multipleOf"),
    "multiples together": (schema(allOf=[{"multipleOf": 9973}, {"multipleOf": 9967}]), "multipleOf"),
    "tiny multiple": (schema(multipleOf=1e-300), "multipleOf"),
    "nothing but itself": (schema(**{"$ref": "#"}), "no text can match"),
    "external reference": (schema(**{"$ref": "https://example.com/schema.json"}), "does not fetch"),
    "reference to a file": (schema(**{"$ref": "file:///etc/passwd"}), "does not fetch"),
    "missing reference": (schema(**{"$ref": "#/$defs/none"}), "none"),
    "unknown type": (schema(type="objekt"), "Invalid type: objekt"),
    "unsupported keyword": (schema(**{"not": {}}), "these keywords cannot be: not"),
    "options that overlap": (schema(oneOf=[{"type": "integer"}, {"type": "number"}]), "must exclude each other"),
    "patterns without end": (schema(allOf=[{"pattern": f"^.*{c}.*$"} for c in "abcdefghij"]), "too complex"),
    "unknown format": (schema(type="string", format="iban"), "Unknown format: iban"),
    "empty range": (schema(type="integer", minimum=3, maximum=2), "minimum \\(3\\) is greater"),
    "false": (JsonSchema(False, True, "x"), "nothing matches"),
    "not a number": (schema(const=float("nan")), "not JSON"),
    "half a character": (Choice(["\ud83d"], "x"), "surrogate"),
    "nested regex": (Regex("(" * 5000 + ")" * 5000, "x"), "nest limit|nested"),
    "open regex": (Regex("(" * 100_000, "x"), "unclosed|nest"),
    "look-ahead": (Regex("(?=a)b", "x"), "look-around"),
    "back reference": (Regex(r"(a)\1", "x"), "backreferences"),
    "no choice": (Choice([], "x"), "nothing to choose"),
    "many rules": (rules(3000, '{} "b"'), "more than 1000 rules"),
    "doubling terminals": (rules(40, "{0} {0}"), "too big"),
    "nested grammar": (Lark("start: " + "(" * 9000 + '"a"' + ")" * 9000, "x"), "too deeply nested"),
    "nested GBNF": (Lark("root ::= " + "(" * 9000 + '"a"' + ")" * 9000, "x"), "nested too deeply"),
    "long grammar": (Lark('start: "a"\n' * 10_000, "x"), "longer than"),
    "hidden multiple": (Lark('start: %json {"multiple\\u004ff": 999983}', "x"), "multipleOf"),
    "recursive rule": (Lark("start: start\n", "x"), "no text can match"),
    "not a grammar": (Lark("hello world", "x"), "Expected"),
    "broken GBNF": (Lark('root ::= "a', "x"), "cannot read the grammar as GBNF"),
    "broken JSON inside": (Lark('start: %json {"type": \n', "x"), "%json"),
    "many line breaks": (Lark("\n" * 65_000 + "x", "x"), "Expected token"),
    "line breaks in GBNF": (Lark("\n" * 65_000 + "x ::= y", "x"), "cannot read the grammar as GBNF"),
    "line breaks in a string": (Lark('start: "a" "' + "\n" * 60_000, "x"), "lexer error"),
    "line breaks in a reference": (schema(**{"$ref": "\n" * 60_000}), "Invalid URI"),
    "many multiples": (schema(x=[{"multipleOf": 10**11 + i * 7919} for i in range(17_000)]), "multipleOf"),
    "many multiples in a long schema": (schema(x=[{"multipleOf": 10**11 + i} for i in range(40_000)]), "longer than"),
    "references into each other": (inside_each_other(200, leaves=90_000), "too many references"),
    "very long regex": (Regex("a" * 600_000, "x"), "longer than"),
    "too many choices": (Choice(list(map(str, range(150_000))), "x"), "more than 100000 choices"),
    "long tag": (StructuralTag({"triggers": ["<" * 600_000]}, "x"), "longer than"),
    "many tags and triggers": (tags(5000), "the grammar is too large"),
    "deep formats": (StructuralTag({"format": {"type": "star", "content": {}}}, "x"), "not supported"),
}


@pytest.mark.anyio
@pytest.mark.parametrize("name", REFUSED)
async def test_refused_soon_and_in_words(ernie: Tokenizer, name: str) -> None:
    spec, told = REFUSED[name]
    compiler = GrammarCompiler(ernie, [2], None, ernie.vocab_size)
    began = time.monotonic()
    with pytest.raises(InvalidRequest, match=told) as caught:
        await compiler.compile(spec)
    assert time.monotonic() - began < 5
    assert caught.value.param == spec.param
    assert caught.value.message.startswith(f"Invalid value for '{spec.param}': ")
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500


COSTLY: dict[str, Spec] = {
    "many values": schema(enum=[f"value {i * 7919 % 100_003}" for i in range(10_000)]),
    "many choices": Choice([f"value {i * 7919 % 100_003}" for i in range(10_000)], "x"),
    "many properties": schema(properties={f"p{i}": {"type": "string"} for i in range(300)}),
    "long chain": chain(2000, lambda ref: {"properties": {"a": {"$ref": ref}}, "required": ["a"]}),
    "long chain of references": chain(5000, lambda ref: {"$ref": ref}),
    "multiple": schema(type="number", multipleOf=0.01, minimum=-12345.67, maximum=98765.43),
    "long string": schema(type="string", minLength=100_000, maxLength=1_000_000),
    "long array": schema(type="array", items={"type": "integer"}, minItems=100_000),
    "nested repeats": Regex("((a{1,1000}){1,1000}){1,1000}", "x"),
    "many states": Regex("(a|b)*a(a|b){30}", "x"),
    "exponential for backtracking": Regex("((a+)+)+b", "x"),
    "long regex": Regex("a" * 100_000, "x"),
    "rules that double": Lark(
        "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(60)) + 'r60: "a"\n', "x"
    ),
    "ambiguous": Lark('start: e\ne: e e e | e e | "a" | \n', "x"),
    "long chain of rules": rules(900, '{} "b"'),
    "many exclusions": Lark("start: A\nA: " + " & ".join(f"~/.*a.{{{i}}}b.*/" for i in range(3, 40)) + "\n", "x"),
}  # fmt: skip


@pytest.mark.anyio
@pytest.mark.parametrize("name", COSTLY)
async def test_costly_ones_compile_and_go_on_or_end_their_request(ernie: Tokenizer, name: str) -> None:
    compiler = GrammarCompiler(ernie, [2], None, ernie.vocab_size)
    constraint = (await compiler.compile(COSTLY[name])).constraint(None)
    began = time.monotonic()
    told = ""
    try:
        for _ in range(60):
            allowed = [token_id for token_id in allowed_ids(constraint.mask() or b"") if token_id != 2]
            if not allowed or constraint.finished:
                break
            constraint.advance(allowed[-1])
    except InvalidRequest as error:
        told = error.message
    assert not told or re.match(r"The output cannot follow 'x': [^\n<]+\.$", told)
    assert time.monotonic() - began < 5


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Compiling waits here until the gate is set, but for the choice of "quick"."""
    gate = threading.Event()
    real = grammar.compiled

    def slow(source: str, vocabulary: GrammarVocabulary) -> object:
        if "quick" not in source:
            gate.wait(20)
        return real(source, vocabulary)

    monkeypatch.setattr(grammar, "compiled", slow)
    yield gate
    gate.set()


@pytest.mark.anyio
async def test_a_grammar_that_takes_too_long_fails_alone(ernie: Tokenizer, gate: threading.Event) -> None:
    compiler = GrammarCompiler(ernie, [2], None, ernie.vocab_size, time_limit=0.3)
    await compiler.compile(Choice(["quick"], "x"))
    with pytest.raises(InvalidRequest, match=r"Invalid value for 'x': it took more than 0.3 seconds"):
        await compiler.compile(Choice(["slow"], "x"))
    await compiler.compile(Choice(["quick", "other"], "x"))  # one thread is still taken, the other is free
    with pytest.raises(InvalidRequest, match="took more than"):
        await compiler.compile(Choice(["slow too"], "x"))
    with pytest.raises(Overloaded) as caught:
        await compiler.compile(Choice(["quick", "third"], "x"))
    assert caught.value.retry_after >= 1
    gate.set()
    with anyio.fail_after(5):
        while True:
            try:
                await compiler.compile(Choice(["quick", "third"], "x"))
                break
            except Overloaded:
                continue


@pytest.mark.anyio
async def test_a_cancelled_compile_returns_at_once(ernie: Tokenizer, gate: threading.Event) -> None:
    compiler = GrammarCompiler(ernie, [2], None, ernie.vocab_size)
    began = time.monotonic()
    with anyio.move_on_after(0.1) as scope:
        await compiler.compile(Choice(["slow"], "x"))
    assert scope.cancelled_caught
    assert time.monotonic() - began < 2


@pytest.mark.anyio
async def test_clients_that_leave_leave_no_threads_behind(ernie: Tokenizer, gate: threading.Event) -> None:
    compiler = GrammarCompiler(ernie, [2], None, ernie.vocab_size)
    before = threading.active_count()
    for _ in range(20):
        with anyio.move_on_after(0.01):
            await compiler.compile(Choice(["slow"], "x"))
    assert threading.active_count() - before <= grammar.COMPILE_THREADS
    gate.set()
    with anyio.fail_after(5):
        await compiler.compile(Choice(["slow"], "x"))


@pytest.mark.anyio
async def test_a_defect_in_compiling_is_no_500(ernie: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        pass

    def panicking(source: str, vocabulary: GrammarVocabulary) -> object:
        raise Panic("assertion failed")

    monkeypatch.setattr(grammar, "compiled", panicking)
    compiler = GrammarCompiler(ernie, [2], None, ernie.vocab_size)
    with pytest.raises(InvalidRequest, match="could not be compiled"):
        await compiler.compile(Choice(["a"], "x"))


@pytest.mark.anyio
async def test_nothing_is_prepared_before_the_first_grammar() -> None:
    tokenizer = ListTokenizer([b"a", b"b", b"</s>"], special=[b"</s>"])
    asked = []
    tokenizer.token_bytes = lambda token_id: asked.append(token_id) or tokenizer.tokens[token_id]  # type: ignore
    compiler = GrammarCompiler(tokenizer, [2], None, 3)
    assert not asked
    await compiler.compile(Choice(["ab"], "x"))
    assert sorted(asked) == [0, 1, 2]


@pytest.mark.anyio
@pytest.mark.parametrize("vocab_size", [4, 6, 32, 33, 1000])
async def test_masks_are_as_wide_as_the_model(vocab_size: int) -> None:
    tokens = [b"a", b"b", b"</s>", b"", b"ab", b"\xff", b"a"]
    compiler = GrammarCompiler(ListTokenizer(tokens, special=[b"</s>"]), [2, 900], None, vocab_size)
    constraint = (await compiler.compile(Regex("(?s:.)*", "x"))).constraint(None)
    mask = constraint.mask()
    assert mask is not None
    assert len(mask) == (vocab_size + 31) // 32 * 4
    wanted = {0, 1, 2, 4, 6, 900}  # two tokens may be the same text; no empty token, no byte that is no text
    assert set(allowed_ids(mask)) == {token_id for token_id in wanted if token_id < vocab_size}
    constraint.advance(0)
    assert len(constraint.mask() or b"") == len(mask)


@pytest.mark.anyio
async def test_a_model_without_an_eos_ends_where_nothing_can_follow() -> None:
    compiler = GrammarCompiler(ListTokenizer([b"a", b"b"]), [], None, 2)
    constraint = (await compiler.compile(Choice(["ab"], "x"))).constraint(None)
    for token_id in (0, 1):
        assert allowed_ids(constraint.mask() or b"") == [token_id]
        constraint.advance(token_id)
    assert constraint.finished
