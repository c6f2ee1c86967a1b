"""Decoding without a model: a constraint's masks are obeyed, and chance or a wish chooses among what they allow."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from fdserve.engine.request import Constraint
from fdserve.text.tokenizer import Tokenizer

Chooser = Callable[[list[int]], int]


@dataclass
class Decoded:
    """`ids` are without the eos; `ended` is "finished" (by the constraint), "eos" or "length"."""

    ids: list[int]
    ended: str
    allowed: list[int]  # how many ids each mask allowed, all where there was none


def allowed_ids(mask: bytes) -> list[int]:
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    return [int(each) for each in np.flatnonzero(bits)]


def decode(
    constraint: Constraint,
    vocab_size: int,
    eos_token_ids: Collection[int],
    choose: Chooser,
    max_tokens: int = 300,
) -> Decoded:
    """Drive a constraint as the engine does. `choose` picks one of the allowed ids."""
    out = Decoded([], "length", [])
    for _ in range(max_tokens):
        mask = constraint.mask()
        if mask is not None:
            assert len(mask) == (vocab_size + 31) // 32 * 4
        allowed = allowed_ids(mask) if mask is not None else list(range(vocab_size))
        assert allowed
        assert allowed[-1] < vocab_size
        out.allowed.append(len(allowed))
        token_id = choose(allowed)
        assert token_id in allowed
        if token_id in eos_token_ids:
            out.ended = "eos"
            break
        out.ids.append(token_id)
        constraint.advance(token_id)
        if constraint.finished:
            out.ended = "finished"
            break
    return out


def at_random(rng: random.Random, tokenizer: Tokenizer, eos_token_ids: Collection[int], hurry: int = 40) -> Chooser:
    """A random choice that, after `hurry` tokens, closes what is open: strings, brackets, tags, the output."""
    steps = 0
    closing = (b'"', b"}", b"]", b"}}", b"]}", b"\n", b"</tool_call>", b"</think>")

    def choose(allowed: list[int]) -> int:
        nonlocal steps
        steps += 1
        if steps > hurry:
            ends = [token_id for token_id in allowed if token_id in eos_token_ids]
            ends = ends or [token_id for token_id in allowed if tokenizer.token_bytes(token_id) in closing]
            allowed = ends if ends and rng.random() < 0.8 else allowed
        return rng.choice(allowed)

    return choose


def writing(tokenizer: Tokenizer, text: bytes, eos_token_ids: Collection[int]) -> Chooser:
    """What a model that wants this text, and then the end, writes; where a mask forbids that, the first id allowed."""
    left = text

    def choose(allowed: list[int]) -> int:
        nonlocal left
        if not left:
            return next((token_id for token_id in allowed if token_id in eos_token_ids), allowed[0])
        fitting = [i for i in allowed if (token := tokenizer.token_bytes(i)) and left.startswith(token)]
        if not fitting:
            return allowed[0]
        token_id = max(fitting, key=lambda i: len(tokenizer.token_bytes(i)))
        left = left[len(tokenizer.token_bytes(token_id)) :]
        return token_id

    return choose


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    return b"".join(map(tokenizer.token_bytes, ids))
