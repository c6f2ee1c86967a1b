"""Telling a model's thoughts from its answer, by the tags' ids: each tag is one token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fdserve.errors import StartupError
from fdserve.text.detokenizer import Detokenizer
from fdserve.text.parser_names import format_named
from fdserve.text.tokenizer import Tokenizer

# What a parser may be called -> the format. The names are FastDeploy's and vLLM's; "-" reads as "_".
_FORMAT_OF = {
    "ernie_x1": "ernie_x1",
    "ernie45": "ernie_x1",
    "ernie_45_vl": "ernie_45_vl",
    "ernie_45_vl_thinking": "ernie_45_vl",
    "deepseek_r1": "think",
    "qwen3": "think",
    "think": "think",
}


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """The ids of a format's tags, and of the token that begins a turn of the dialogue, if there is one.

    "ernie_x1" writes `<think>…</think><response>…</response>`, "ernie_45_vl" and "think" write
    `<think>…</think>…` and have no response tags.
    """

    name: str
    think_start: int
    think_end: int
    response_start: int | None = None
    response_end: int | None = None
    turn_start: int | None = None


def resolve_reasoning(name: str | None, tokenizer: Tokenizer, template_source: str) -> ReasoningFormat | None:
    """The format that a parser's name stands for; None switches reasoning off.

    "none" is off. A `name` of None looks for itself: a template that writes `<think>` and a vocabulary in
    which the tags are single tokens mean "think", and "ernie_x1" where the same holds for `<response>`.
    Raises StartupError for an unknown name, or when a named format's tags are not in the vocabulary.
    """
    kind = _detect(tokenizer, template_source) if name is None else format_named("reasoning", name, _FORMAT_OF)
    if kind is None:
        return None
    tags = ["<think>", "</think>"] + (["<response>", "</response>"] if kind == "ernie_x1" else [])
    ids = [tokenizer.token_id(tag) for tag in tags]
    if missing := [tag for tag, token_id in zip(tags, ids, strict=True) if token_id is None]:
        raise StartupError(f"reasoning parser {name!r} needs {', '.join(missing)} as single tokens")
    think_start, think_end, *response = [token_id for token_id in ids if token_id is not None]
    response_start, response_end = response or (None, None)
    turn_start = tokenizer.token_id("<|im_start|>")
    return ReasoningFormat(kind, think_start, think_end, response_start, response_end, turn_start)


def _detect(tokenizer: Tokenizer, template_source: str) -> str | None:
    def written(tag: str) -> bool:
        return tokenizer.token_id(tag) is not None

    if "<think>" not in template_source or not (written("<think>") and written("</think>")):
        return None
    if "<response>" in template_source and written("<response>") and written("</response>"):
        return "ernie_x1"
    return "think"


def starts_in_thinking(format: ReasoningFormat, prompt_ids: Sequence[int], continued: bool = False) -> bool:
    """Whether the model's first token is a thought: the last tag in the prompt's last turn decides.

    `<think>` means yes, any other tag no. In a turn without a tag the formats differ. ernie_x1 models think
    always and their template opens the thought for them, so what they write is a thought (FastDeploy decides
    the same), unless the prompt ends inside of a message that is `continued`: that is an answer. The others may be
    asked not to think, and where they do they can write `<think>` themselves, which `ReasoningSplitter` sees.
    Earlier turns do not count: whoever writes about a tag may have written one there.
    """
    others = {format.think_end, format.response_start, format.response_end} - {None}
    for token_id in reversed(prompt_ids):
        if token_id == format.think_start:
            return True
        if token_id in others:
            return False
        if token_id == format.turn_start:
            break
    return format.name == "ernie_x1" and not continued


class ReasoningSplitter:
    """Turns one choice's ids into its reasoning and its content, the tags left out.

    The regions of an output, and what ends each:
      opening   nothing but white space so far: `<think>` begins a thought, anything else is the answer
      thought   until the first `</think>`
      gap       after `</think>` or `</response>`: `<response>` opens the answer; other text is the answer,
                without the newlines before it (a model may leave the response tags out)
      response  until `</response>`
      answer    text with no tags around it; `<response>` may still open, and `</response>` close
    One newline next to a tag, inside, belongs to the layout and not to the text. White space in a gap is
    dropped. `<think>` and `</think>` inside an answer are literal text.
    An output that is `continued` begins in the middle: of a thought if `thinking`, else of an answer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        format: ReasoningFormat,
        thinking: bool,
        skip_special_tokens: bool = True,
        continued: bool = False,
    ) -> None:
        self._format = format
        self._tags = {format.think_start, format.think_end, format.response_start, format.response_end} - {None}
        # Whether a tag may end the content, so that its last newline is not certain to be text.
        self._content_closable = format.response_end is not None
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens)
        self._region = "thought" if thinking else "answer" if continued else "opening"
        self._at_start = not continued  # of the region: no text of it yet
        self._held = ""  # white space that the next token may turn into layout
        self.reasoning_tokens = 0  # ids in thoughts, the tags not counted

    def push(self, token_id: int, literal: bool = False) -> tuple[str, str]:
        """Take one id; return the (reasoning, content) that is certain now.

        Where it is `literal`, as inside a string of a tool call, a tag is text of the content.
        """
        after = self._region_after(token_id) if token_id in self._tags and not literal else None
        if after is None:
            if self._region == "thought":
                self.reasoning_tokens += 1
            return self._take(self._detokenizer.push_one(token_id))
        texts = self._take(self._detokenizer.flush())
        self._held = ""
        self._region = after
        self._at_start = True
        return texts

    def _region_after(self, token_id: int) -> str | None:
        """The region that this tag leads to, or None for a token that is text here."""
        format = self._format
        if token_id == format.think_start:
            begins = self._region == "opening" or (self._region == "thought" and self._at_start)
            return "thought" if begins else None
        if self._region == "thought":
            return "gap" if token_id == format.think_end else None
        if token_id == format.response_start:
            return "response"
        return "gap" if token_id == format.response_end else None

    def _take(self, text: str) -> tuple[str, str]:
        """Add text to the region; return what of it is certain."""
        if not text:
            return "", ""
        between = self._region in ("opening", "gap")
        if between and text.isspace():
            self._held += text
            return "", ""
        if self._held:
            text, self._held = self._held + text, ""
        if between:
            text = text if self._region == "opening" else text.lstrip("\n")
            self._region = "answer"
        elif self._at_start:
            text = text.removeprefix("\n")
        self._at_start = False
        thought = self._region == "thought"
        if (thought or self._content_closable) and text[-1:] == "\n":
            text, self._held = text[:-1], "\n"
        return (text, "") if thought else ("", text)

    def flush(self) -> tuple[str, str]:
        """The rest, at the end of the output: what was held back is text after all, save in a gap."""
        reasoning, content = self._take(self._detokenizer.flush())
        held = "" if self._region == "gap" else self._held
        self._held = ""
        if self._region == "thought":
            return reasoning + held, content
        return reasoning, content + held
