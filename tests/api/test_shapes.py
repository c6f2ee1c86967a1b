"""Every body and every chunk, in the strict reading of OpenAI's own models, with all keys that its API requires."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from fdserve.config import Config
from tests.http.client import serving
from tests.http.fake_engine import FakeEngine, say

pytestmark = pytest.mark.anyio

TOOL = {"type": "function", "function": {"name": "add"}}
ANSWER = "\nhm\n</think>\n\n<response>\nSo: é\n</response>\n"
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'

# What OpenAI's specification requires of each object, null or not.
REQUIRED = {
    "chat.completion": {"id", "choices", "created", "model", "object"},
    "chat.completion.chunk": {"id", "choices", "created", "model", "object"},
    "text_completion": {"id", "choices", "created", "model", "object"},
    "choice": {"finish_reason", "index", "message", "logprobs"},
    "message": {"role", "content", "refusal"},
    "chunk choice": {"delta", "finish_reason", "index"},
    "completion choice": {"finish_reason", "index", "logprobs", "text"},
    "logprobs": {"content", "refusal"},
    "token": {"token", "logprob", "bytes", "top_logprobs"},
    "top": {"token", "logprob", "bytes"},
    "lists": {"text_offset", "token_logprobs", "tokens", "top_logprobs"},
    "call": {"id", "type", "function"},
    "function": {"name", "arguments"},
    "usage": {"prompt_tokens", "completion_tokens", "total_tokens"},
}


def objects(body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects inside a body, each with its name in REQUIRED."""
    kind = body["object"]
    yield kind, body
    if body.get("usage"):
        yield "usage", body["usage"]
    for choice in body["choices"]:
        if kind == "text_completion":
            yield "completion choice", choice
            if choice["logprobs"]:
                yield "lists", choice["logprobs"]
            continue
        yield ("choice" if kind == "chat.completion" else "chunk choice"), choice
        if kind == "chat.completion":
            yield "message", choice["message"]
            for call in choice["message"].get("tool_calls", []):
                yield "call", call
                yield "function", call["function"]
            if "function_call" in choice["message"]:
                yield "function", choice["message"]["function_call"]
        if choice["logprobs"]:
            yield "logprobs", choice["logprobs"]
            for token in choice["logprobs"]["content"]:
                yield "token", token
                yield from (("top", top) for top in token["top_logprobs"])


def check(body: dict[str, Any]) -> None:
    for name, value in objects(body):
        assert value.keys() >= REQUIRED[name], name
    if body["object"] == "chat.completion":
        ChatCompletion.model_validate(body, strict=True)
    elif body["object"] == "chat.completion.chunk":
        ChatCompletionChunk.model_validate(body, strict=True)
    else:
        # The client's types deny the nulls that OpenAI's own answers have: in a stream's finish_reason, and for the
        # first token of an echo.
        for choice in body["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
            for name in ("token_logprobs", "top_logprobs") if choice["logprobs"] else ():
                values = choice["logprobs"][name]
                assert None not in values[1:]
                choice["logprobs"][name] = [value for value in values if value is not None]
        Completion.model_validate(body, strict=True)


@pytest.mark.parametrize("text", [ANSWER, "\nhm\n</think>\n\n\n" + CALL, "", "cut"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 2, "logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1},
        {"tools": [TOOL], "logprobs": True, "return_token_ids": True},
        {"functions": [TOOL["function"]], "service_tier": "auto"},
        {"max_tokens": 7, "stop": "é"},
    ],
)
async def test_chats(text: str, fields: dict[str, Any]) -> None:
    config = Config(reasoning_parser="ernie_x1", tool_call_parser="ernie_x1", enable_logprob=True)
    async with serving(FakeEngine(say(text, batch=2)), config, template="<think>") as client:
        check((await client.chat(**fields)).json())
        for options in ({}, {"include_usage": True}, {"continuous_usage_stats": True}):
            for event in (await client.chat(**fields, stream=True, stream_options=options)).events:
                check(event)


@pytest.mark.parametrize("text", ["Hé!", ""])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"logprobs": 2, "echo": True, "n": 2},
        {"logprobs": 0, "prompt_logprobs": 0, "return_token_ids": True},
        {"echo": True, "max_tokens": 0, "logprobs": 1},
        {"max_tokens": 2, "prompt": ["a", "b"]},
    ],
)
async def test_completions(text: str, fields: dict[str, Any]) -> None:
    async with serving(FakeEngine(say(text, batch=2))) as client:
        check((await client.complete(**fields)).json())
        for event in (await client.complete(**fields, stream=True, stream_options={"include_usage": True})).events:
            check(event)
