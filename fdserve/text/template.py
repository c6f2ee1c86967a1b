"""Chat templates: a conversation to the text that the model reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from fdserve.errors import InvalidRequest, StartupError
from fdserve.text.family_templates import FAMILY_TEMPLATES
from fdserve.text.pieces import well_formed
from fdserve.text.sandbox import BoundedEnvironment, template_message
from fdserve.text.template_meter import current_meter, metered
from fdserve.text.tokenizer import Tokenizer

MAX_SOURCE_CHARS = 128 << 10
MAX_INDENT = 16
MAX_DATE_CHARS = 100
_DATE_FIELD = re.compile(r"%-?[a-zA-Z%]")


class ChatTemplate:
    """A compiled Jinja template, as Hugging Face's chat templates are written.

    It may use `messages`, `tools`, `add_generation_prompt`, the special tokens by name, `raise_exception`,
    `strftime_now`, `tojson` (which leaves non-ASCII text as it is), `break` and `continue`. It runs
    sandboxed and bounded, so its source may come from anybody. Safe to render from several threads. `blamed` is the
    field that an error of rendering names.
    Raises InvalidRequest(param="chat_template") when the source does not compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, blamed: str = "messages") -> None:
        self.source = source
        self._blamed = blamed
        self._special_tokens = dict(special_tokens)
        if len(source) > MAX_SOURCE_CHARS:
            raise InvalidRequest(
                f"The chat template is longer than {MAX_SOURCE_CHARS} characters.", param="chat_template"
            )
        try:
            with metered():
                self._template = _ENVIRONMENT.from_string(source)
        except Exception as error:  # besides TemplateError what Python's compiler raises on odd code
            message = f"The chat template does not compile: {template_message(error)}"
            raise InvalidRequest(message, param="chat_template") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt's text. `content` of a message is a str or None; `kwargs` are the template's variables.

        Raises InvalidRequest, with the blamed field, when the template refuses the conversation, fails on it, or
        would take too much time or memory; the message carries the template's own.
        """
        variables = {**self._special_tokens, **kwargs}
        try:
            with metered():
                text = self._template.render(
                    variables, messages=messages, tools=tools, add_generation_prompt=add_generation_prompt
                )
        except Exception as error:  # a template can make any operation fail in any way
            # Here and below: arguments of calls are JSON in JSON, where a surrogate may stand alone.
            message = well_formed(f"The chat template failed: {template_message(error)}")
            raise InvalidRequest(message, param=self._blamed) from None
        return well_formed(text)


def load_template(tokenizer: Tokenizer, override: str | None = None) -> ChatTemplate:
    """The template of a server: `override` (a path, or Jinja source), else the tokenizer's own, else the family's.

    Of the family's two it is the thinking one where the vocabulary has `<|im_start|>` and `<think>`.
    Raises StartupError.
    """
    if override is not None:
        source = _read_override(override)
    elif tokenizer.chat_template is not None:
        source = tokenizer.chat_template
    else:
        thinks = all(tokenizer.token_id(token) is not None for token in ("<|im_start|>", "<think>"))
        source = FAMILY_TEMPLATES["thinking" if thinks else "plain"]
    try:
        return ChatTemplate(source, tokenizer.special_tokens)
    except InvalidRequest as error:
        raise StartupError(error.message) from None


def _read_override(override: str) -> str:
    if any(mark in override for mark in ("{{", "{%", "{#")):
        return override
    try:
        return Path(override).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise StartupError(f"the chat template {override!r} cannot be read: {problem}.") from None


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > MAX_DATE_CHARS or "%" in _DATE_FIELD.sub("", format):
        raise TemplateError("strftime_now takes a short format of plain fields")
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes HTML. It comes in pieces, each counted."""
    if (indent if isinstance(indent, int) else len(indent or "")) > MAX_INDENT:
        raise TemplateError(f"tojson takes an indent of {MAX_INDENT} at most")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return current_meter().joined(encoder.iterencode(value))


_ENVIRONMENT = BoundedEnvironment()
_ENVIRONMENT.filters["tojson"] = _tojson
_ENVIRONMENT.globals["raise_exception"] = _raise_exception
_ENVIRONMENT.globals["strftime_now"] = _strftime_now
