from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai.types import Completion

from fdserve.engine.request import Request, TokenDelta, TokenLogprobs
from tests.api.completions import choices
from tests.http.client import serving
from tests.http.fake_engine import EOS, ByteTokenizer, FakeEngine, follow, ids, say

pytestmark = pytest.mark.anyio


async def test_a_completion() -> None:
    async with serving() as client:
        response = await client.complete()
        assert choices(response) == [
            {"index": 0, "text": "Hello, world!", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
        ]
        content = response.json()
        assert content["id"].startswith("cmpl-")
        assert (content["object"], content["usage"]["total_tokens"]) == ("text_completion", 2 + 14)


async def test_a_stream() -> None:
    async with serving(FakeEngine(say("Hello", delay=0.02))) as client:
        events = (await client.complete(stream=True, stream_options={"include_usage": True})).events
        # The client's types deny the null finish reason that OpenAI's own streams have.
        Completion.model_validate(events[-2], strict=True)
        assert [e["choices"][0]["text"] for e in events[:-1]] == [*"Hello", ""]
        assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None] * 5 + ["stop"]
        assert events[-2]["choices"][0]["stop_reason"] is None
        assert events[-1]["choices"] == []
        assert events[-1]["usage"]["completion_tokens"] == 6
        assert all(e["usage"] is None for e in events[:-1])


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("Hi", [b"Hi"]),
        (["Hi"], [b"Hi"]),
        (["a", "bc"], [b"a", b"bc"]),
        ([72, 105], [b"Hi"]),
        ([[97], [98, 99]], [b"a", b"bc"]),
    ],
)
async def test_prompts(prompt: Any, prompts: list[bytes]) -> None:
    async with serving() as client:
        response = await client.complete(prompt, n=2)
        assert [c["index"] for c in choices(response)] == list(range(2 * len(prompts)))
        asked = [bytes(request.prompt) for request in client.engine.requests]
        assert asked == [p for p in prompts for _ in range(2)]
        usage = response.json()["usage"]
        assert usage["prompt_tokens"] == sum(map(len, prompts))
        assert usage["completion_tokens"] == 14 * 2 * len(prompts)
        assert usage["prompt_tokens_details"]["cached_tokens"] == len(prompts)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        (["a", ""], "empty"),
        ([[1], []], "empty"),
        (["a", 1], "mixes"),
        ([1, [1]], "mixes"),
        ([1, -1], "negative"),
        ([1, 261], "261 is out of range: the model has ids from 0 to 260"),
        (["a", [1], 2], "mixes"),
    ],
)
async def test_bad_prompts(prompt: Any, message: str) -> None:
    async with serving() as client:
        response = await client.complete(prompt)
        assert (response.status, response.error["param"]) == (400, "prompt")
        assert message in response.error["message"]
        assert not client.engine.requests


async def test_too_many_prompts_are_refused_before_they_are_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as client:
        monkeypatch.setattr(ByteTokenizer, "encode", None)
        response = await client.complete(["a"] * 1025)
        assert response.status == 400
        assert response.error["param"] == "prompt"


async def test_no_prompt() -> None:
    async with serving() as client:
        response = await client.post("/v1/completions", {"model": "null"})
        assert (response.status, response.error["code"]) == (400, "missing_required_parameter")


async def test_logprobs() -> None:
    async with serving(FakeEngine(say("hé!"))) as client:
        (choice,) = choices(await client.complete(logprobs=2))
        assert choice["logprobs"] == {
            # The eos has its entry too, and is no text.
            "tokens": ["h", "bytes:\\xc3", "bytes:\\xa9", "!", ""],
            "token_logprobs": [-0.25] * 5,
            "top_logprobs": [
                {"h": -0.25, "i": -1.25},
                {"bytes:\\xc3": -0.25, "bytes:\\xc4": -1.25},
                {"bytes:\\xa9": -0.25, "bytes:\\xaa": -1.25},
                {"!": -0.25, '"': -1.25},
                {"\x00": -0.25, "\x01": -1.25, "</s>": -0.25},
            ],
            # In characters of the text: both halves of the é begin where it stands.
            "text_offset": [0, 1, 1, 2, 3],
        }
        (choice,) = choices(await client.complete(logprobs=0))
        assert choice["logprobs"]["top_logprobs"][0] == {"h": -0.25}
        events = (await client.complete(logprobs=2, stream=True, stop="!")).events
        streamed = [e["choices"][0]["logprobs"] for e in events]
        offsets = [offset for part in streamed for offset in part["text_offset"]]
        assert offsets == [0, 1, 1, 2]


async def test_offsets_after_broken_characters() -> None:
    # A byte that no character goes on with: its U+FFFD stands before the next token, however late it is known.
    async with serving(FakeEngine(follow([*b"a\xc3b\xe2\x82", EOS]))) as client:
        response = await client.complete([*b"x\xc3y"], logprobs=0, echo=True)
        (choice,) = response.json()["choices"]
        assert choice["text"] == "x\ufffdya\ufffdb\ufffd"
        assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4, 5, 6, 6, 7]


async def test_token_ids() -> None:
    async with serving(FakeEngine(say("abc", delay=0.001))) as client:
        (choice,) = choices(await client.complete(return_token_ids=True))
        assert choice["prompt_token_ids"] == ids("Hi")
        assert choice["completion_token_ids"] == [*b"abc", EOS]
        events = (await client.complete(return_token_ids=True, stream=True)).events
        first, *others = (e["choices"][0] for e in events)
        assert first["prompt_token_ids"] == ids("Hi")
        assert all("prompt_token_ids" not in other for other in others)
        assert [t for part in (first, *others) for t in part["completion_token_ids"]] == [*b"abc", EOS]


async def test_held_back_text_sends_no_empty_event() -> None:
    async with serving(FakeEngine(say("aXYb", delay=0.02))) as client:
        events = (await client.complete(stream=True, stop="XYZ")).events
        assert [e["choices"][0]["text"] for e in events] == ["a", "XYb", ""]


async def test_tags_are_text_here() -> None:
    from fdserve.config import Config

    config = Config(reasoning_parser="ernie_x1")
    async with serving(FakeEngine(follow([*ids("<think>a</think>b"), EOS])), config) as client:
        (choice,) = choices(await client.complete())
        assert choice["text"] == "<think>a</think>b"


async def test_the_best_of_several() -> None:
    means = {"0": -2.0, "1": -0.5, "2": -1.0}

    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        index = request.id[-1]
        values = TokenLogprobs(means[str(int(index) % 3)], (), ())
        assert request.params.logprobs == 0
        yield TokenDelta([ord(index), EOS], logprobs=[values] * 2, finish_reason="stop", stop_token_id=EOS)

    async with serving(FakeEngine(script)) as client:
        response = await client.complete(["a", "b"], n=2, best_of=3)
        assert [choice["text"] for choice in choices(response)] == ["1", "2", "4", "5"]
        assert [choice["index"] for choice in choices(response)] == [0, 1, 2, 3]
        assert all(choice["logprobs"] is None for choice in choices(response))
        assert response.json()["usage"]["completion_tokens"] == 12  # all of them were generated
        assert response.json()["usage"]["prompt_tokens"] == 2


async def test_best_of_as_many_as_are_sent() -> None:
    async with serving() as client:
        assert (await client.complete(n=2, best_of=2, stream=True)).status == 200
        assert [request.params.logprobs for request in client.engine.requests] == [None, None]


async def test_of_two_tokens_with_one_text_the_likelier_counts() -> None:
    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        values = TokenLogprobs(-3.0, (1000, 2000), (-1.0, -2.0))  # none of them is in the vocabulary
        yield TokenDelta([65], logprobs=[values], finish_reason="length")

    async with serving(FakeEngine(script)) as client:
        (choice,) = choices(await client.complete(logprobs=2))
        assert choice["logprobs"]["top_logprobs"] == [{"": -1.0, "A": -3.0}]
