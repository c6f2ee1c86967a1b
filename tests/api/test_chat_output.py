"""What chats make of the model's tokens: where they end, what is told of them, thoughts."""

from __future__ import annotations

from typing import Any

import pytest

from fdserve.config import Config
from tests.api.chats import choice, joined
from tests.http.client import serving
from tests.http.fake_engine import EOS, FakeEngine, follow, ids, say

pytestmark = pytest.mark.anyio


async def test_length() -> None:
    async with serving() as client:
        whole = choice(await client.chat(max_tokens=5))
        assert (whole["message"]["content"], whole["finish_reason"], whole["stop_reason"]) == ("Hello", "length", None)


async def test_a_stop_token() -> None:
    async with serving() as client:
        response = await client.chat(stop_token_ids=[ord("w")])
        whole = choice(response)
        assert (whole["message"]["content"], whole["finish_reason"]) == ("Hello, ", "stop")
        assert whole["stop_reason"] == ord("w")
        assert response.json()["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize("batch", [1, 5, 100])
async def test_a_stop_string(batch: int) -> None:
    async with serving(FakeEngine(say("Hello, world!", batch=batch))) as client:
        response = await client.chat(stop=["zzz", "o, w"], return_token_ids=True)
        whole = choice(response)
        assert (whole["message"]["content"], whole["finish_reason"], whole["stop_reason"]) == ("Hell", "stop", "o, w")
        assert response.json()["usage"]["completion_tokens"] == 8
        assert whole["message"]["completion_token_ids"] == ids("Hello, w")
        assert not client.engine.active
        kept = choice(await client.chat(stop="o, w", include_stop_str_in_output=True))
        assert kept["message"]["content"] == "Hello, w"
        held = choice(await client.chat(stop="world!!"))
        assert (held["message"]["content"], held["stop_reason"]) == ("Hello, world!", None)


async def test_a_stop_string_before_min_tokens_does_not_stop() -> None:
    async with serving() as client:
        whole = choice(await client.chat(stop="o", min_tokens=6))
        assert (whole["message"]["content"], whole["stop_reason"]) == ("Hello, w", "o")


async def test_a_stop_string_on_the_last_allowed_token() -> None:
    async with serving() as client:
        whole = choice(await client.chat(stop="o", max_tokens=5))
        assert (whole["finish_reason"], whole["stop_reason"]) == ("stop", "o")


async def test_token_ids() -> None:
    async with serving() as client:
        message = choice(await client.chat(return_token_ids=True))["message"]
        assert bytes(message["prompt_token_ids"]) == b"user: Hi\n"
        assert message["completion_token_ids"] == [*b"Hello, world!", EOS]
        events = (await client.chat(return_token_ids=True, stream=True)).events
        assert events[0]["choices"][0]["delta"]["prompt_token_ids"] == message["prompt_token_ids"]
        assert all("prompt_token_ids" not in e["choices"][0]["delta"] for e in events[1:])
        assert joined(events)[0]["completion_token_ids"] == message["completion_token_ids"]


async def test_logprobs() -> None:
    async with serving(FakeEngine(say("hé"))) as client:
        whole = choice(await client.chat(logprobs=True, top_logprobs=2))
        entries = whole["logprobs"]["content"]
        # One entry a token, the eos left out; a token that is half a character has its true byte.
        assert [entry["bytes"] for entry in entries] == [[104], [0xC3], [0xA9]]
        assert [entry["token"] for entry in entries] == ["h", "�", "�"]
        assert entries[0] == {
            "token": "h",
            "logprob": -0.25,
            "bytes": [104],
            "top_logprobs": [
                {"token": "h", "logprob": -0.25, "bytes": [104]},
                {"token": "i", "logprob": -1.25, "bytes": [105]},
            ],
        }
        none = choice(await client.chat(logprobs=True))
        assert [entry["top_logprobs"] for entry in none["logprobs"]["content"]] == [[], [], []]
        assert choice(await client.chat())["logprobs"] is None


THOUGHT = "\nhm, hé\n</think>\n\n<response>\nYes.\n</response>\n"


@pytest.mark.parametrize(("template", "text"), [("x<think>", THOUGHT), ("x</think>", "<think>" + THOUGHT)])
async def test_reasoning(template: str, text: str) -> None:
    """Opened by the prompt, or by the model itself."""
    config = Config(reasoning_parser="ernie-x1", enable_logprob=True)
    async with serving(FakeEngine(say(text)), config, template=template) as client:
        response = await client.chat(logprobs=True)
        whole = choice(response)
        assert (whole["message"]["reasoning_content"], whole["message"]["content"]) == ("hm, hé", "Yes.")
        details = response.json()["usage"]["completion_tokens_details"]
        assert details["reasoning_tokens"] == len("\nhm, hé\n".encode())
        # Every generated token has its logprobs, whichever text it belongs to.
        assert len(whole["logprobs"]["content"]) == len(ids(text))


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("{{ messages[-1].content }}</response>", "\n\nYes.\n</response>\n", (None, "\n\nYes.")),
        ("<think>{{ messages[-1].content }}</think>", "\nhm</think>\nYes.", ("\nhm", "Yes.")),
    ],
)
async def test_a_continued_message_goes_on_where_it_ended(
    template: str, text: str, expected: tuple[str | None, str]
) -> None:
    async with serving(FakeEngine(say(text)), Config(reasoning_parser="ernie_x1"), template=template) as client:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Well:"}]
        message = choice(await client.chat(messages=messages, continue_final_message=True))["message"]
        assert (message["reasoning_content"], message["content"]) == expected


async def test_thinking_in_a_stream_comes_first() -> None:
    text = "\nhm\n</think>\n\n<response>\nYes.\n</response>\n"
    config = Config(reasoning_parser="ernie_x1")
    async with serving(FakeEngine(say(text)), config, template="<think>") as client:
        events = (await client.chat(stream=True, return_token_ids=True)).events
        deltas = [list(e["choices"][0]["delta"]) for e in events]
        assert deltas[1:] == [["content", "reasoning_content", "completion_token_ids"], ["content"], ["content"]]
        # Whoever prints the content of every delta prints the answer and nothing else.
        assert "".join(e["choices"][0]["delta"]["content"] for e in events) == "Yes."


async def test_a_thinking_budget() -> None:
    async with serving(config=Config(reasoning_parser="ernie_x1"), template="<think>") as client:
        await client.chat(reasoning_max_tokens=5)
        params = client.engine.requests[-1].params
        # The newline that is forced before the tag is thought, too.
        assert (params.thinking_budget, params.think_end_ids) == (4, tuple(ids("\n</think>\n\n")))
        assert params.think_end_id == ids("</think>")[0]
        await client.chat(reasoning_max_tokens=5, max_tokens=3)
        assert client.engine.requests[-1].params.thinking_budget is None
        # Where max_tokens ends the answer first, nothing is forced.
        await client.chat(reasoning_max_tokens=3, max_tokens=3)
        assert client.engine.requests[-1].params.thinking_budget is None
        await client.chat(reasoning_max_tokens=1, max_tokens=9)
        assert client.engine.requests[-1].params.thinking_budget == 0
        await client.chat()
        assert client.engine.requests[-1].params.thinking_budget is None
    async with serving(config=Config(reasoning_parser="qwen3"), template="<think>") as client:
        await client.chat(extra_body={"reasoning_max_tokens": 5})
        params = client.engine.requests[-1].params
        assert (params.thinking_budget, params.think_end_ids) == (5, (ids("</think>")[0],))
    async with serving(config=Config(reasoning_parser="qwen3"), template="<think></think>") as client:
        await client.chat(reasoning_max_tokens=5)
        assert client.engine.requests[-1].params.thinking_budget is None


async def test_an_unfinished_character_is_flushed() -> None:
    async with serving(FakeEngine(follow([*b"a\xe4\xb8", EOS]))) as client:
        assert choice(await client.chat())["message"]["content"] == "a�"
        assert joined((await client.chat(stream=True)).events)[0]["content"] == "a�"


async def test_special_tokens_can_be_kept() -> None:
    async with serving(FakeEngine(follow([*b"a", EOS, *b"b"]))) as client:
        fields: dict[str, Any] = {"ignore_eos": True, "max_tokens": 3}
        assert choice(await client.chat(**fields))["message"]["content"] == "ab"
        assert choice(await client.chat(**fields, skip_special_tokens=False))["message"]["content"] == "a</s>b"


async def test_stop_strings_that_would_hold_up_others_are_refused() -> None:
    async with serving() as client:
        response = await client.chat(stop=["x" * 8192, "y" * 8193])
        assert response.status == 400
        assert response.error["param"] == "stop"
        assert (await client.chat(stop=["x" * 8192, "y" * 8192])).status == 200
