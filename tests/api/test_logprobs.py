"""Many log-probabilities are made and encoded token by token: one call for all would hold up all other threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from fdserve.api.logprobs import chat_logprobs, prompt_logprobs
from fdserve.engine.request import TokenLogprobs
from fdserve.http import response
from fdserve.http.response import encoded_apart
from fdserve.protocol.chat import TokenLogprob
from fdserve.protocol.generation import PromptLogprob
from tests.api.responses import respond
from tests.http.client import Client, serving
from tests.http.fake_engine import ByteTokenizer, FakeEngine, logprobs_of, say

TOKENS = 100


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each call encodes, without what was JSON before."""
    sizes: list[int] = []

    def encode(value: object) -> bytes:
        data = msgspec.json.encode(value)
        sizes.append(len(data) - _encoded_before(value))
        return data

    monkeypatch.setattr(response, "_encode", encode)
    return sizes


def _encoded_before(value: object) -> int:
    if isinstance(value, msgspec.Raw):
        return len(bytes(value))
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.astuple(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_encoded_before, parts))


async def chat(client: Client, **fields: Any) -> int:
    answer = await client.chat("x" * TOKENS, logprobs=True, top_logprobs=20, prompt_logprobs=20, **fields)
    return len(answer.body)


async def complete(client: Client, **fields: Any) -> int:
    fields = {"logprobs": 20, "prompt_logprobs": 20, "echo": True, "max_tokens": TOKENS, **fields}
    return len((await client.complete("x" * TOKENS, **fields)).body)


async def responses(client: Client, **fields: Any) -> int:
    return len((await respond(client, top_logprobs=20, **fields)).body)


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", [chat, complete, responses])
async def test_no_piece_of_a_large_answer_is_large(pieces: list[int], ask: Any, stream: bool) -> None:
    async with serving(FakeEngine(say("y" * TOKENS, batch=TOKENS))) as client:
        size = await ask(client, stream=stream)
    assert size > 90_000
    assert max(pieces) < size / 30


def test_shapes_are_asked_for_as_they_are_encoded(pieces: list[int]) -> None:
    def shapes() -> Iterator[list[int]]:
        for number in range(5):
            assert len(pieces) == number
            yield [number]

    assert list(map(bytes, encoded_apart(shapes()))) == [b"[0]", b"[1]", b"[2]", b"[3]", b"[4]"]


def test_no_more_than_a_tokens_shapes_are_there_at_a_time(pieces: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of many at once holds the lock, too."""
    ahead: list[int] = []

    def counted(kind: type, per_token: int) -> Any:
        made = 0

        def make(*values: Any) -> Any:
            nonlocal made
            made += 1
            ahead.append((made - 1) // per_token - len(pieces))
            return kind(*values)

        return make

    tokenizer, ids = ByteTokenizer(), list(b"y" * TOKENS)
    values: list[TokenLogprobs] = [logprobs_of(id, 2) for id in ids]
    monkeypatch.setattr("fdserve.api.logprobs.TokenLogprob", counted(TokenLogprob, 1))
    chat_logprobs(tokenizer, list(zip(ids, values, strict=True)))
    assert ahead == [0] * TOKENS
    pieces.clear()
    ahead.clear()
    monkeypatch.setattr("fdserve.api.logprobs.PromptLogprob", counted(PromptLogprob, 3))
    prompt_logprobs(tokenizer, ids, values[1:])
    assert ahead == [-1] * 3 * (TOKENS - 1)  # the prompt's first token has none, and a piece all the same
