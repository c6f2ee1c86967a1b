"""A stream, put together again, is the answer without `stream`: property tests over what a request can combine."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fdserve.config import Config
from fdserve.engine.request import Request, TokenDelta
from tests.http.client import serving
from tests.http.fake_engine import EOS, FakeEngine, Script, follow, ids

pytestmark = pytest.mark.anyio

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": "é文"}}\n</tool_call>'
PARTS = ["a", "é", "文", "🙂", "\n", " stop", "<think>", "</think>", "<response>", "</response>", CALL, "<tool_call>"]


def script_of(rng: random.Random) -> Script:
    """Each choice has a text of its own, with characters cut in two and a cut one at its end."""
    outputs = []
    for _ in range(6):
        tokens = ids("".join(rng.choices(PARTS, k=25)))
        tokens.insert(rng.randrange(len(tokens)), 0xE6)
        outputs.append(
            follow([*tokens, EOS, *b"x" * 200], batch=rng.choice([1, 2, 7]), delay=rng.choice([0.0, 0.0003]))
        )

    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        async for delta in outputs[int(request.id.rpartition("-")[2]) % len(outputs)](request):
            yield delta

    return script


def options_of(rng: random.Random) -> dict[str, Any]:
    """Fields that both endpoints take."""
    return {
        "n": rng.choice([1, 1, 3]),
        "max_tokens": rng.randrange(1, 200),
        "stop": rng.choice([None, "stop", ["a\n", "文🙂", "x\n"]]),
        "include_stop_str_in_output": rng.random() < 0.3,
        "stop_token_ids": rng.choice([None, [0x61]]),
        "min_tokens": 1,
        "ignore_eos": rng.random() < 0.3,
        "skip_special_tokens": rng.random() < 0.5,
        "return_token_ids": rng.random() < 0.5,
        "prompt_logprobs": rng.choice([None, 0, 2]),
    }


@pytest.mark.parametrize("seed", range(20))
async def test_chats(seed: int) -> None:
    rng = random.Random(seed)
    parser = rng.choice(["none", "ernie_x1", "qwen3"])
    config = Config(enable_logprob=True, reasoning_parser=parser, tool_call_parser=rng.choice(["none", "hermes"]))
    tool = {"type": "function", "function": {"name": "add"}}
    fields = options_of(rng) | {
        "logprobs": (logprobs := rng.random() < 0.5),
        "top_logprobs": rng.randrange(4) if logprobs else None,
        "tools": rng.choice([None, [tool]]),
        "max_streaming_response_tokens": rng.choice([None, 1, 5]),
    }
    engine = FakeEngine(script_of(rng))
    async with serving(engine, config, template=rng.choice(["<think>", "x", "</think>"])) as client:
        whole = (await client.chat(**fields)).json()
        events = (await client.chat(**fields, stream=True, stream_options={"include_usage": True})).events
        assert events[-1]["usage"] == whole["usage"]
        choices = [chat_choice(events, index) for index in range(fields["n"])]
        assert choices == [stripped(choice) for choice in whole["choices"]]
        told = [event["prompt_logprobs"] for event in events if "prompt_logprobs" in event]
        assert told == ([whole["prompt_logprobs"]] if fields["prompt_logprobs"] is not None else [])


def chat_choice(events: list[dict[str, Any]], index: int) -> dict[str, Any]:
    """One choice of a stream, in the shape that `stripped` gives a whole one."""
    result: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}, "logprobs": [], "ids": [], "prompt": None}
    for part in (choice for event in events for choice in event["choices"] if choice["index"] == index):
        assert "finish_reason" not in result, "a chunk after the last one"
        delta = part["delta"]
        result["content"] += delta["content"] or ""
        result["reasoning"] += delta.get("reasoning_content", "")
        for call in delta.get("tool_calls", []):
            seen = result["calls"].setdefault(call["index"], ["", ""])
            seen[0] += call["function"].get("name", "")
            seen[1] += call["function"]["arguments"]
        result["logprobs"] += part["logprobs"]["content"] if part["logprobs"] else []
        result["ids"] += delta.get("completion_token_ids", [])
        result["prompt"] = delta.get("prompt_token_ids", result["prompt"])
        if part["finish_reason"]:
            result |= {"finish_reason": part["finish_reason"], "stop_reason": part["stop_reason"]}
    return result


def stripped(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice["message"]
    calls = [call["function"] for call in message.get("tool_calls", [])]
    assert (message["content"] is None) <= bool(calls)
    return {
        "content": message["content"] or "",
        "reasoning": message["reasoning_content"] or "",
        "calls": {index: [call["name"], call["arguments"]] for index, call in enumerate(calls)},
        "logprobs": choice["logprobs"]["content"] if choice["logprobs"] else [],
        "ids": message.get("completion_token_ids", []),
        "prompt": message.get("prompt_token_ids"),
        "finish_reason": choice["finish_reason"],
        "stop_reason": choice["stop_reason"],
    }


@pytest.mark.parametrize("seed", range(20))
async def test_completions(seed: int) -> None:
    rng = random.Random(seed)
    fields = options_of(rng) | {
        "prompt": rng.choice(["Hé", ["a", "文"], [[0xC3], [0x61, 0xA9]]]),
        "echo": rng.random() < 0.5,
        "logprobs": rng.choice([None, 0, 3]),
        "max_tokens": rng.choice([1, 30, 200]),
    }
    async with serving(FakeEngine(script_of(rng)), Config(enable_logprob=True)) as client:
        whole = (await client.complete(**fields)).json()
        events = (await client.complete(**fields, stream=True, stream_options={"include_usage": True})).events
        assert events[-1]["usage"] == whole["usage"]
        choices: dict[int, dict[str, Any]] = {}
        for part in (choice for event in events for choice in event["choices"]):
            del part["arrival_time"]
            seen = choices.setdefault(part["index"], {})
            assert seen.get("finish_reason") is None, "an event after the last one"
            join(seen, part)
        assert [choices[index] for index in sorted(choices)] == whole["choices"]


def join(whole: dict[str, Any], part: dict[str, Any]) -> None:
    for name, value in part.items():
        if isinstance(value, dict):
            if whole.get(name) is None:
                whole[name] = {}
            join(whole[name], value)
        elif isinstance(value, list) or name == "text":
            whole[name] = whole.get(name, type(value)()) + value
        elif value is not None or name not in whole:
            whole[name] = value
