"""Structural tags: free text with parts that follow schemas, in the two forms that XGrammar and vLLM take."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from fdserve.errors import InvalidRequest
from fdserve.text.grammar_rules import ANY_TEXT, MAX_SOURCE, Rules, json_text, quoted

MAX_DEPTH = 32


def write_structural_tag(rules: Rules, value: Mapping[str, Any]) -> str:
    """Add the rules of a structural tag; return what to start with.

    Raises InvalidRequest, without a param, for what is not well-formed, and for what cannot be expressed, by name.
    """
    if len(json_text(value)) > MAX_SOURCE:
        raise InvalidRequest(f"the structural tag is longer than {MAX_SOURCE} characters")
    if "format" in value:
        return _Formats(rules).write(value["format"], "format", last=True, depth=0)
    structures = _sequence(value, "structures", "structural tag")
    tags = [
        {
            "begin": _text(item, "begin", f"structures[{at}]"),
            "content": {"type": "json_schema", "json_schema": _mapping(item, f"structures[{at}]").get("schema")},
            "end": _text(item, "end", f"structures[{at}]"),
        }
        for at, item in enumerate(structures)
    ]
    triggers = _sequence(value, "triggers", "structural tag")
    return _Formats(rules).triggered({"tags": tags, "triggers": triggers}, "structures", depth=0)


class _Formats:
    """Each method writes one kind of format. `where` is the format's path, for messages."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules

    def write(self, format: object, where: str, *, last: bool, depth: int) -> str:
        """`last` tells that nothing comes after the format, so that free text needs no end."""
        format = _mapping(format, where)
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"formats are nested deeper than {MAX_DEPTH}")
        kind, rules = format.get("type"), self._rules
        if kind == "const_string":
            return rules.literal(_text(format, "value", where))
        if kind == "json_schema":
            return rules.json(_schema(format, where), strict=True)
        if kind == "regex":
            return rules.regex(_text(format, "pattern", where))
        if kind == "grammar":
            return rules.lark(_text(format, "grammar", where))
        if kind == "any_text" and last:
            return rules.terminal(ANY_TEXT)
        if kind == "sequence":
            return self._sequence(format, where, last, depth)
        if kind == "or":
            elements = _sequence(format, "elements", where)
            return rules.either(
                self.write(item, f"{where}.elements[{at}]", last=last, depth=depth + 1)
                for at, item in enumerate(elements)
            )
        if kind in ("optional", "star", "plus"):
            content = self.write(format.get("content"), f"{where}.content", last=False, depth=depth + 1)
            return rules.rule(f"({content})" + {"optional": "?", "star": "*", "plus": "+"}[kind])
        if kind == "tag":
            return self._tag(format, where, "", depth)
        if kind == "triggered_tags" and last:
            return self.triggered(format, where, depth)
        if kind == "tags_with_separator":
            return self._separated(format, where, depth)
        if kind in ("any_text", "triggered_tags"):
            raise InvalidRequest(f"{where}: {kind} can only be the last part, or any_text the content of a tag")
        raise InvalidRequest(f"{where}: the format {kind!r} is not supported")

    def _sequence(self, format: Mapping[str, Any], where: str, last: bool, depth: int) -> str:
        elements = _sequence(format, "elements", where)
        parts = [
            self.write(item, f"{where}.elements[{at}]", last=last and at == len(elements) - 1, depth=depth + 1)
            for at, item in enumerate(elements)
        ]
        return self._rules.rule(" ".join(parts))

    def _tag(self, format: object, where: str, begun: str, depth: int) -> str:
        """A tag, of whose `begin` this much is already written."""
        format = _mapping(format, where)
        rules = self._rules
        begin = rules.literal(_text(format, "begin", where).removeprefix(begun))
        ends = format.get("end")
        ends = [ends] if isinstance(ends, str) else ends
        if not isinstance(ends, Sequence) or not ends or not all(isinstance(end, str) for end in ends):
            raise InvalidRequest(f"{where}.end must be a string or a list of strings")
        content = _mapping(format.get("content"), f"{where}.content")
        if content.get("type") == "any_text":
            return rules.rule(f"{begin} {self._text_until(ends)}")
        body = self.write(content, f"{where}.content", last=False, depth=depth + 1)
        return rules.rule(f"{begin} {body} {rules.either(map(rules.literal, ends))}")

    def _text_until(self, ends: Sequence[str]) -> str:
        """Free text and the first of the ends."""
        rules = self._rules
        if not all(ends):
            raise InvalidRequest("a tag with any_text needs an end that is not empty")
        plain = [end for end in ends if rules.literal(end) == quoted(end)]
        options = [rules.rule(f"{rules.terminal(ANY_TEXT)} {quoted(end)}", "[lazy]") for end in plain]
        tokens = [end for end in ends if end not in plain]
        options += [f"{rules.text_without(ends)} {rules.literal(end)}" for end in tokens]
        return rules.either(options)

    def triggered(self, format: Mapping[str, Any], where: str, depth: int) -> str:
        """Free text in which each trigger begins one of its tags."""
        rules = self._rules
        triggers = _shortest(_strings(format, "triggers", where))
        sizes = {len(trigger) for trigger in triggers}
        tags = _sequence(format, "tags", where)
        text = rules.text_without(triggers)
        bodies: dict[str, list[str]] = {trigger: [] for trigger in triggers}
        for at, tag in enumerate(tags):
            begin = _text(tag, "begin", f"{where}.tags[{at}]")
            trigger = _beginning(begin, bodies, sizes)
            if trigger is None:
                raise InvalidRequest(f"{where}.tags[{at}]: no trigger begins its begin")
            bodies[trigger].append(self._tag(tag, f"{where}.tags[{at}]", trigger, depth + 1))
        options = [f"{self._up_to(trigger, text)} {rules.either(some)}" for trigger, some in bodies.items() if some]
        tagged = rules.either(options)
        least = format.get("at_least_one") is True
        if format.get("stop_after_first") is True:
            return tagged if least else rules.either([tagged, text])
        return rules.rule(f"{tagged}{'+' if least else '*'} {text}")

    def _up_to(self, trigger: str, text: str) -> str:
        rules = self._rules
        literal = rules.literal(trigger)
        if literal != quoted(trigger):
            return f"{text} {literal}"
        return rules.rule(f"{rules.terminal(ANY_TEXT)} {quoted(trigger)}", "[lazy]")

    def _separated(self, format: Mapping[str, Any], where: str, depth: int) -> str:
        rules = self._rules
        tags = _sequence(format, "tags", where)
        tag = rules.either(self._tag(item, f"{where}.tags[{at}]", "", depth + 1) for at, item in enumerate(tags))
        separator = rules.literal(_text(format, "separator", where))
        tail = "" if format.get("stop_after_first") is True else f"({separator} {tag})*"
        optional = "" if format.get("at_least_one") is True else "?"
        return rules.rule(f"({tag} {tail}){optional}")


def _shortest(words: Iterable[str]) -> list[str]:
    """Those words that begin with no other of them."""
    kept: dict[str, None] = {}
    sizes: set[int] = set()
    for word in sorted(set(words), key=len):
        if _beginning(word, kept, sizes) is None:
            kept[word] = None
            sizes.add(len(word))
    return list(kept)


def _beginning(text: str, words: Collection[str], sizes: Iterable[int]) -> str | None:
    """One of the words that the text begins with. `sizes` are the words' lengths."""
    return next((text[:size] for size in sizes if text[:size] in words), None)


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{where} must be an object")
    return value


def _sequence(value: Mapping[str, Any], key: str, where: str) -> Sequence[Any]:
    items = value.get(key)
    if not isinstance(items, (list, tuple)) or not items:
        raise InvalidRequest(f"{where}.{key} must be a list with at least one item")
    return items


def _strings(value: Mapping[str, Any], key: str, where: str) -> list[str]:
    items = _sequence(value, key, where)
    if not all(isinstance(item, str) and item for item in items):
        raise InvalidRequest(f"{where}.{key} must be a list of strings that are not empty")
    return list(items)


def _text(value: object, key: str, where: str) -> str:
    text = _mapping(value, where).get(key)
    if not isinstance(text, str):
        raise InvalidRequest(f"{where}.{key} must be a string")
    return text


def _schema(format: Mapping[str, Any], where: str) -> Mapping[str, Any] | bool:
    schema = format.get("json_schema")
    if not isinstance(schema, (Mapping, bool)):
        raise InvalidRequest(f"{where}.json_schema must be a JSON schema")
    return schema
