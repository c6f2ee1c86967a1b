"""Writing grammars in llguidance's variant of Lark: its syntax is in guidance-ai/llguidance, docs/syntax.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import gbnf_to_lark

from fdserve.errors import InvalidRequest
from fdserve.text.grammar_cost import check_cost

# Else a mask would allow but the one token that the tokenizer encodes a forced text with, and ask Python for it.
# At the end of a source, so that lines keep their numbers and a client cannot undo it.
NO_FORCING = '%llguidance {"no_forcing": true}\n'
# One space or one line break with its indent: enough for each common layout, and never a run without an end.
WHITESPACE = r" |\n[ ]{0,40}"
ANY_TEXT = "/(?s:.*)/"
MAX_SOURCE = 1 << 19
"""Characters of a schema or a whole grammar. Deep recursion inside one needs stack in proportion."""
MAX_LARK = 1 << 16
MAX_LARK_RULES = 1000

# White space at the beginning of a line is no more than of that line: a run of line breaks would be tried from each.
_RULE = re.compile(r"^[^\S\n]*[?!]?[A-Za-z_][\w-]*(\[[^\]\n]*\]|\{[^}\n]*\}|\.-?\d+)?\s*(?=:(?!:))", re.MULTILINE)
_LARK = re.compile(r"^[^\S\n]*(%llguidance\b|[?!]?start\s*:(?!:))", re.MULTILINE)
_CONTROL_CHARACTER = re.compile(r"\\u00[01]|\x7f")


class Rules:
    """A grammar that grows by named rules. Methods return what may stand inside another rule.

    `tags` are the texts that are one token each: a grammar that has to write one writes the token.
    """

    def __init__(self, tags: Mapping[str, int]) -> None:
        self._tags = tags
        self._split = re.compile("(" + "|".join(map(re.escape, tags)) + ")") if tags else None
        self._lines: list[str] = []
        self._grammars: list[tuple[str, str]] = []

    def source(self, start: str) -> str:
        """The whole grammar, in the form that llguidance.LLMatcher takes."""
        main = {"name": "main", "lark_grammar": "\n".join([f"start: {start}", *self._lines, NO_FORCING])}
        others = [{"name": name, "lark_grammar": source} for name, source in self._grammars]
        return json.dumps({"grammars": [main, *others]}, ensure_ascii=False)

    def rule(self, body: str, options: str = "") -> str:
        return self._define(f"r{len(self._lines)}", body, options)

    def terminal(self, body: str) -> str:
        """A rule that is one regular expression; only such can be combined by `&`, `~` and in lazy rules."""
        return self._define(f"T{len(self._lines)}", body)

    def _define(self, name: str, body: str, options: str = "") -> str:
        self._lines.append(f"{name}{options}: {body}")
        return name

    def either(self, options: Iterable[str]) -> str:
        return self.rule(" | ".join(options))

    def literal(self, text: str) -> str:
        """Exactly this text, its tags as tokens."""
        if self._split is None:
            return quoted(text)
        parts = [self.token(part) or quoted(part) for part in self._split.split(text) if part]
        return " ".join(parts) or '""'

    def token(self, tag: str) -> str | None:
        """The one token that a tag is, or None where it is several."""
        token_id = self._tags.get(tag)
        return None if token_id is None else f"<[{token_id}]>"

    def json(self, schema: Mapping[str, Any] | bool | None, strict: bool) -> str:
        return self.rule("%json " + json_options(schema, strict))

    def regex(self, pattern: str) -> str:
        if len(pattern) > MAX_SOURCE:
            raise InvalidRequest(f"the regular expression is longer than {MAX_SOURCE} characters")
        escaped: str = llguidance.regex_to_lark(pattern, "dws")
        return self.rule("/" + re.sub(r"\\?\n", r"\\n", escaped) + "/")

    def lark(self, source: str) -> str:
        """Another grammar, whole, as its writer named its rules."""
        name = f"g{len(self._grammars)}"
        self._grammars.append((name, lark_source(source)))
        return "@" + name

    def text_without(self, words: Iterable[str]) -> str:
        """A terminal for any text in which none of these words is spelled out."""
        bans = [f"~/(?s:.*){escaped_regex(word)}(?s:.*)/" for word in sorted(set(words))]
        return self.terminal(" & ".join([ANY_TEXT, *bans]))


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def escaped_regex(text: str) -> str:
    """The regular expression that matches just this text, fit to stand between slashes."""
    return "".join(char if char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)


def json_options(schema: Mapping[str, Any] | bool | None, strict: bool) -> str:
    """A schema as JSON, with the options that say how JSON is to be written.

    Raises InvalidRequest, without a param, for one that would cost too much.
    """
    if schema is False:
        raise InvalidRequest("the schema is false, so nothing matches it")
    schema = {"type": "object"} if schema is None else {} if schema is True else schema
    text = json_text(schema)
    # Before anything walks through it.
    if len(text) > MAX_SOURCE:
        raise InvalidRequest(f"the schema is longer than {MAX_SOURCE} characters")
    check_cost(schema)
    options = {
        "whitespace_flexible": False,
        "whitespace_pattern": WHITESPACE,
        "lenient": not strict,
        # Without \u no half of a surrogate pair can be written, which many parsers refuse. A schema that names
        # control characters needs it.
        "json_allowed_escapes": 'nrbtf\\"' + ("u" if _CONTROL_CHARACTER.search(text) else ""),
    }
    return json_text({**schema, "x-guidance": options})


def json_text(value: Mapping[str, Any]) -> str:
    """A schema or the like as JSON. Raises InvalidRequest, without a param, where it is not."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise InvalidRequest("it is nested too deeply") from None
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"it is not JSON: {error}") from None


def lark_source(source: str) -> str:
    """A client's grammar in Lark's syntax: GBNF is converted, JSON schemas inside get our options.

    Raises InvalidRequest, without a param, when it is too long or cannot be converted.
    """
    if len(source) > MAX_LARK:
        raise InvalidRequest(f"the grammar is longer than {MAX_LARK} characters")
    if "::=" in source and not _LARK.search(source):
        if source.count("::=") > MAX_LARK_RULES:
            raise InvalidRequest(f"the grammar has more than {MAX_LARK_RULES} rules")
        try:
            source = gbnf_to_lark(_without_unicode_escapes(source))
        except RecursionError:
            raise InvalidRequest("the grammar is nested too deeply") from None
        except Exception as error:  # its parser raises bare Exceptions, and IndexErrors for what ends too early
            raise InvalidRequest(f"cannot read the grammar as GBNF: {error}") from None
    if len(_RULE.findall(source)) > MAX_LARK_RULES:
        raise InvalidRequest(f"the grammar has more than {MAX_LARK_RULES} rules")
    return _with_json_options(source) + "\n" + NO_FORCING


def _without_unicode_escapes(source: str) -> str:
    """GBNF's \\uXXXX as the character itself, where that is a letter or the like: the converter drops zeros."""

    def char(match: re.Match[str]) -> str:
        text = chr(int(match[1], 16))
        return text if text.isalnum() else "\\x" + match[1][2:] if match[1].startswith("00") else match[0]

    return re.sub(r"\\u([0-9a-fA-F]{4})", char, source)


def _with_json_options(source: str) -> str:
    decoder = json.JSONDecoder()
    parts, at = [], 0
    for match in re.finditer(r"%json\s*(?=[{\[tf])", source):
        if match.start() < at:
            continue
        try:
            schema, end = decoder.raw_decode(source, match.end())
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"cannot read a %json of the grammar: {error}") from None
        if not isinstance(schema, (dict, bool)):
            raise InvalidRequest("a %json of the grammar is neither an object nor a boolean")
        parts += [source[at : match.end()], json_options(schema, strict=True)]
        at = end
    return "".join(parts) + source[at:]
