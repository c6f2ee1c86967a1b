"""A stand-in for a model that a grammar holds, and schemas that tests share."""

from __future__ import annotations

import random

from fdserve.text.grammar import GrammarCompiler
from fdserve.text.grammar_spec import Spec
from fdserve.text.reasoning import ReasoningFormat
from fdserve.text.tokenizer import Tokenizer
from tests.text.decoding import Decoded, at_random, decode, text_of, writing

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
EXTRA_IDS = 37  # that the model has beyond its tokenizer


def formats(tokenizer: Tokenizer) -> dict[str, ReasoningFormat | None]:
    ids = [tokenizer.token_id(tag) for tag in ("<think>", "</think>", "<response>", "</response>")]
    start, end, response_start, response_end = ids
    assert start is not None
    assert end is not None
    return {
        "none": None,
        "think": ReasoningFormat("think", start, end),
        "ernie_x1": ReasoningFormat("ernie_x1", start, end, response_start, response_end),
    }


class Model:
    """What stands for a model: a tokenizer, its eos ids and a reasoning format."""

    def __init__(self, tokenizer: Tokenizer, reasoning: str = "none", **options: float) -> None:
        self.tokenizer = tokenizer
        self.format = formats(tokenizer)[reasoning] if reasoning != "none" else None
        eos = tokenizer.eos_token_id
        end = tokenizer.token_id("<|im_end|>")
        self.eos = sorted({i for i in (eos, end) if i is not None})
        self.vocab_size = tokenizer.vocab_size + EXTRA_IDS
        self.compiler = GrammarCompiler(tokenizer, self.eos, self.format, self.vocab_size, **options)

    async def random(self, spec: Spec, thinking: bool | None = None, seed: int = 0, hurry: int = 40) -> Decoded:
        constraint = (await self.compiler.compile(spec)).constraint(thinking)
        return decode(
            constraint, self.vocab_size, self.eos, at_random(random.Random(seed), self.tokenizer, self.eos, hurry)
        )

    async def wishing(self, spec: Spec, text: str, thinking: bool | None = None) -> Decoded:
        constraint = (await self.compiler.compile(spec)).constraint(thinking)
        return decode(constraint, self.vocab_size, self.eos, writing(self.tokenizer, text.encode(), self.eos))

    async def accepts(self, spec: Spec, text: str) -> bool:
        """Whether the output may be this text: every token allowed, the end too."""
        out = await self.wishing(spec, text)
        return text_of(self.tokenizer, out.ids) == text.encode() and out.ended != "length"

    def text(self, out: Decoded) -> str:
        return text_of(self.tokenizer, out.ids).decode()
