"""From what a request asks for to one grammar."""

from __future__ import annotations

from collections.abc import Sequence

from fdserve.errors import InvalidRequest
from fdserve.text.grammar_rules import MAX_SOURCE, Rules, quoted
from fdserve.text.grammar_spec import Choice, JsonSchema, Lark, Regex, Spec, StructuralTag, ToolCalls
from fdserve.text.grammar_tags import write_structural_tag
from fdserve.text.grammar_vocabulary import GrammarVocabulary

MAX_CALLS = 128
"""Calls in one answer; OpenAI's own limit."""
MAX_CHOICES = 100_000
_CALL = ("<tool_call>", "</tool_call>")
_RESPONSE = ("<response>", "</response>")


def write_grammar(spec: Spec, vocabulary: GrammarVocabulary, response: int | None = None) -> str:
    """The grammar in the form that llguidance.LLMatcher takes. `response` is the tag before an answer, if there is one.

    Raises InvalidRequest, without a param, for what is malformed or too large.
    """
    rules = Rules({tag: token for tag, token in vocabulary.tags.items() if "tool" in tag})
    tag = "" if response is None else f'<[{response}]> "\\n" '
    source = rules.source(_start(spec, rules, vocabulary, tag))
    if len(source) > 2 * MAX_SOURCE:
        raise InvalidRequest("the grammar is too large")
    return source


def _start(spec: Spec, rules: Rules, vocabulary: GrammarVocabulary, tag: str) -> str:
    if isinstance(spec, JsonSchema):
        return rules.json(spec.schema, spec.strict)
    if isinstance(spec, Regex):
        return rules.regex(spec.pattern)
    if isinstance(spec, Choice):
        return _choice(spec.choices, rules)
    if isinstance(spec, Lark):
        return rules.lark(spec.source)
    if isinstance(spec, StructuralTag):
        body = write_structural_tag(rules, spec.value)
        # Free text ends as the model ends it everywhere else, by the tag that closes its answer.
        end = vocabulary.tags.get(_RESPONSE[1])
        return rules.rule(f"{body} (<[{end}]> /\\n*/)?") if tag and end is not None else body
    return _calls(spec, rules, vocabulary, tag)


def _choice(choices: Sequence[str], rules: Rules) -> str:
    if len(choices) > MAX_CHOICES:
        raise InvalidRequest(f"there are more than {MAX_CHOICES} choices")
    unique = sorted(set(choices))
    if not unique:
        raise InvalidRequest("there is nothing to choose from")
    return rules.terminal(" | ".join(map(quoted, unique)))


def _calls(spec: ToolCalls, rules: Rules, vocabulary: GrammarVocabulary, tag: str) -> str:
    named = {} if spec.mode in ("auto", "required") else {spec.mode: spec.tools.get(spec.mode)}
    if named and spec.mode not in spec.tools:
        raise InvalidRequest(f"there is no tool {spec.mode!r}")
    tools = named or spec.tools
    if not tools:
        raise InvalidRequest("there are no tools to call")
    begin, end = map(rules.literal, _CALL)
    bodies = []
    for name, parameters in tools.items():
        schema = {**(parameters or {}), "type": "object"}
        try:
            arguments = rules.json(schema, strict=name in spec.strict)
        except InvalidRequest as error:
            raise InvalidRequest(f"tool {name!r}: {error.message}") from None
        head = f'\n{{"name": {quoted(name)}, "arguments": '
        bodies.append(f"{quoted(head)} {arguments} {quoted(chr(125) + chr(10))} {end}")
    body = rules.either(bodies)
    several = spec.parallel and not named
    if spec.mode != "auto" or spec.content is not None:
        call = rules.rule(f"{begin} {body}")
        # The line break after a call is no promise of another one.
        gap = rules.terminal("/\\n{1,3}/")
        calls = rules.rule(f"{call} ({gap} {call}){{0,{MAX_CALLS - 1}}} {gap}?") if several else call
        if spec.mode != "auto" or spec.content is None:
            return calls
        return rules.rule(f"{calls} | {tag}{_start(spec.content, rules, vocabulary, tag)}")
    # Anything may stand around calls, the tags of the answer too, but no call that is spelled with other tokens.
    text = rules.text_without(_CALL[:1])
    tags = [f"<[{vocabulary.tags[tag]}]>" for tag in _RESPONSE if tag in vocabulary.tags]
    words = rules.rule(" | ".join(f"{text} {tag}" for tag in tags)) if tags else ""
    free = f"{words}* {text}" if words else text
    if begin == quoted(_CALL[0]):
        call = rules.rule(f"{rules.rule(f'/(?s:.*)/ {begin}', '[lazy]')} {body}")
    else:
        call = rules.rule(f"{text} {begin} {body}")
    if not words:
        return rules.rule(f"{call}{{0,{MAX_CALLS}}} {text}" if several else f"{call}? {text}")
    part = rules.rule(f"{words}* {call}")
    return rules.rule(f"{part}{{0,{MAX_CALLS}}} {free}" if several else f"{part}? {free}")
