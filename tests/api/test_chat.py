from __future__ import annotations

import random
from typing import Any

import pytest

from fdserve.config import Config
from tests.api.chats import choice, joined
from tests.http.client import serving
from tests.http.fake_engine import FakeEngine, Script, follow, ids, say

pytestmark = pytest.mark.anyio


async def test_a_completion() -> None:
    async with serving() as client:
        response = await client.chat()
        content = response.json()
        assert choice(response) == {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "Hello, world!",
                "refusal": None,
                "reasoning_content": None,
            },
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
        assert content["id"].startswith("chatcmpl-")
        assert (content["object"], content["model"]) == ("chat.completion", "fake-model")
        assert content["usage"] == {
            "prompt_tokens": 9,
            "completion_tokens": 14,
            "total_tokens": 23,
            "prompt_tokens_details": {"cached_tokens": 1},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }
        assert response.headers["content-type"] == "application/json"
        assert bytes(client.engine.requests[0].prompt) == b"user: Hi\n"


async def test_a_stream() -> None:
    async with serving(FakeEngine(say("Hello", delay=0.02))) as client:
        response = await client.chat(stream=True)
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = response.events
        assert [e["choices"][0]["delta"] for e in events] == [
            {"role": "assistant", "content": ""},
            *({"content": letter} for letter in "Hello"),
            {"content": ""},
        ]
        assert [e["choices"][0]["finish_reason"] for e in events] == [None] * 6 + ["stop"]
        assert len({(e["id"], e["created"], e["model"], e["object"]) for e in events}) == 1
        assert all("usage" not in e for e in events)
        times = [e["choices"][0].get("arrival_time") for e in events]
        assert times[0] is None
        assert times[1:] == sorted(times[1:])
        assert 0 < times[1] < 5


async def test_usage_in_a_stream() -> None:
    async with serving() as client:
        events = (await client.chat(stream=True, stream_options={"include_usage": True})).events
        assert [e["usage"] for e in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1]["choices"] == []
        assert events[-1]["usage"] == (await client.chat()).json()["usage"]
        events = (await client.chat(stream=True, stream_options={})).events
        assert all("usage" not in e for e in events)


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        ("Hé", "user: Hé\n"),
        (None, "user: \n"),
        ([], "user: \n"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "user: ab\n"),
    ],
)
async def test_content(content: Any, prompt: str) -> None:
    async with serving() as client:
        await client.chat(messages=[{"role": "user", "content": content}])
        assert bytes(client.engine.requests[0].prompt).decode() == prompt


async def test_roles() -> None:
    roles = ["system", "developer", "user", "assistant", "tool"]
    async with serving() as client:
        await client.chat(messages=[{"role": role, "content": "x"} for role in roles])
        prompt = bytes(client.engine.requests[0].prompt).decode()
        assert prompt == "system: x\nsystem: x\nuser: x\nassistant: x\ntool: x\n"


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[0].content[0]",
            "text-only",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]", "needs its text"),
        (
            [{"role": "user", "content": "x"}, {"role": "user", "content": 5}],
            "messages[1].content",
            "expected `str | array | null`, got `int`",
        ),
        ([{"role": "wizard", "content": "x"}], "messages[0].role", "wizard"),
        ([], "messages", "at least one"),
    ],
)
async def test_bad_messages(messages: list[Any], param: str, message: str) -> None:
    async with serving() as client:
        response = await client.chat(messages=messages)
        assert (response.status, response.error["param"]) == (400, param)
        assert message in response.error["message"]


async def test_no_messages() -> None:
    async with serving() as client:
        response = await client.post("/v1/chat/completions", {})
        assert response.status == 400
        assert response.error == {
            "message": "Missing required parameter: 'messages'.",
            "type": "invalid_request_error",
            "param": "messages",
            "code": "missing_required_parameter",
        }


async def test_what_the_template_gets() -> None:
    template = (
        "{{ tools | length if tools else 'no' }} tools, {{ style }}, {{ enable_thinking is defined }} "
        "{{ enable_thinking }}, {{ add_generation_prompt }}, {{ messages[0].tool_calls[0].function.name }}"
    )
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    async with serving(template=template) as client:
        fields: dict[str, Any] = {
            "messages": [call],
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "chat_template_kwargs": {"style": "terse"},
        }
        await client.chat(**fields, enable_thinking=False)
        await client.chat(**fields, tool_choice="none")
        prompts = [bytes(request.prompt).decode() for request in client.engine.requests]
        assert prompts == ["1 tools, terse, True False, True, f", "no tools, terse, False , True, f"]


async def test_a_template_that_refuses() -> None:
    async with serving(template="{{ raise_exception('Roles must alternate.') }}") as client:
        response = await client.chat()
        assert (response.status, response.error["param"]) == (400, "messages")
        assert "Roles must alternate." in response.error["message"]


async def test_a_long_prompt_is_tokenized_off_the_loop() -> None:
    async with serving(FakeEngine(max_model_len=100_000)) as client:
        assert (await client.chat("x" * 50_000)).json()["usage"]["prompt_tokens"] == 50_007


async def test_choices() -> None:
    texts = ["first", "second, longer", "3"]
    engine = FakeEngine()
    numbered: dict[str, Script] = {f"-{i}": say(text, delay=0.001) for i, text in enumerate(texts)}

    async def script(request: Any) -> Any:
        async for delta in numbered[request.id[-2:]](request):
            yield delta

    engine.script = script
    async with serving(engine) as client:
        response = await client.chat(n=3, seed=5)
        assert [c["message"]["content"] for c in response.json()["choices"]] == texts
        assert [c["index"] for c in response.json()["choices"]] == [0, 1, 2]
        assert response.json()["usage"]["prompt_tokens"] == 9
        assert response.json()["usage"]["completion_tokens"] == sum(map(len, texts)) + 3
        assert [request.params.seed for request in engine.requests] == [5, 6, 7]
        events = (await client.chat(n=3, stream=True)).events
        assert [e["choices"][0]["delta"].get("role") for e in events[:4]] == ["assistant"] * 3 + [None]
        streamed = joined(events)
        assert [streamed[i]["content"] for i in range(3)] == texts
        indexes = [e["choices"][0]["index"] for e in events[3:]]
        assert indexes != sorted(indexes)  # they come in turn


@pytest.mark.parametrize("seed", range(12))
async def test_streaming_says_the_same(seed: int) -> None:
    """Whatever the text, the split into steps, and what is asked for."""
    rng = random.Random(seed)
    alphabet = ["a", "é", "文", "🙂", "\n", " stop", "<think>", "</think>", "<response>", "</response>"]
    text = "".join(rng.choices(alphabet, k=60))
    script = follow([*ids(text), *b"\xe6"], delay=0.0005 * rng.randrange(2), batch=rng.choice([1, 2, 7]))
    config = Config(enable_logprob=True, reasoning_parser=rng.choice(["none", "ernie_x1", "qwen3"]))
    template = rng.choice(["<think>", "x", "</think>"])
    fields: dict[str, Any] = {
        "max_tokens": rng.randrange(20, 200),
        "stop": rng.choice([None, "stop", ["a\n", "文🙂"]]),
        "logprobs": True,
        "top_logprobs": rng.randrange(4),
        "return_token_ids": True,
        "ignore_eos": True,
    }
    fields["max_tokens"] = min(fields["max_tokens"], len(ids(text)) + 1)
    async with serving(FakeEngine(script), config, template=template) as client:
        whole = choice(await client.chat(**fields))
        streamed = joined((await client.chat(**fields, stream=True)).events)[0]
        assert streamed == {
            "content": whole["message"]["content"],
            "reasoning_content": whole["message"]["reasoning_content"] or "",
            "logprobs": whole["logprobs"]["content"],
            "prompt_token_ids": whole["message"]["prompt_token_ids"],
            "completion_token_ids": whole["message"]["completion_token_ids"],
            "finish_reason": whole["finish_reason"],
            "stop_reason": whole["stop_reason"],
        }
