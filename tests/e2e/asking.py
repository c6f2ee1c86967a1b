"""Ways to ask a server through the openai client."""

from __future__ import annotations

from typing import Any

import openai
import pytest


def ask(client: openai.OpenAI, question: Any = "Hello!", extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    """A chat at temperature 0; `extra` goes into the body as it is."""
    messages: Any = [{"role": "user", "content": question}] if isinstance(question, str) else question
    fields = {"temperature": 0, "max_tokens": 200, **fields}
    return client.chat.completions.create(model="default", messages=messages, extra_body=extra, **fields)


def say(client: openai.OpenAI, question: Any = "Hello!", extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    """What the model says, without thinking."""
    return ask(client, question, {"enable_thinking": False, **(extra or {})}, **fields).choices[0].message.content


def go_on(client: openai.OpenAI, prompt: Any = "Chunked prefill is", **fields: Any) -> Any:
    """A completion at temperature 0; fields that the client does not know go into the body as they are."""
    known = {"max_tokens", "echo", "logprobs", "n", "best_of", "stream", "temperature", "seed", "stop", "suffix"}
    extra = {name: fields.pop(name) for name in list(fields) if name not in known}
    return client.completions.create(
        model="default", prompt=prompt, extra_body=extra, **{"temperature": 0, "max_tokens": 8, **fields}
    )


def refused(call: Any, *args: Any, **fields: Any) -> str:
    with pytest.raises(openai.BadRequestError) as error:
        call(*args, **fields)
    assert isinstance(error.value.param, str)
    return error.value.param


def ids_of(client: openai.OpenAI, **fields: Any) -> list[int]:
    answer = go_on(client, return_token_ids=True, ignore_eos=True, **fields)
    result: list[int] = answer.choices[0].completion_token_ids
    return result


def chat(client: openai.OpenAI, question: str, **fields: Any) -> Any:
    """A chat with these fields and no others."""
    messages: Any = [{"role": "user", "content": question}]
    return client.chat.completions.create(model="null", messages=messages, **fields)


def collect(stream: Any) -> dict[int, dict[str, Any]]:
    """What a stream's chunks add up to, for each choice."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in stream:
        for choice in chunk.choices:
            seen = choices.setdefault(choice.index, {"content": "", "reasoning": "", "logprobs": [], "finish": None})
            seen["content"] += choice.delta.content or ""
            seen["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            seen["logprobs"] += choice.logprobs.content if choice.logprobs else []
            seen["finish"] = choice.finish_reason or seen["finish"]
    return choices


def check_that_a_stream_adds_up(client: openai.OpenAI, **fields: Any) -> None:
    """Its chunks make the whole answer."""
    question = "What is chunked prefill?"
    whole = chat(client, question, **fields)
    streamed = collect(chat(client, question, stream=True, **fields))
    assert sorted(streamed) == [choice.index for choice in whole.choices] == list(range(fields.get("n", 1)))
    for choice in whole.choices:
        seen = streamed[choice.index]
        assert seen["content"] == choice.message.content
        assert seen["reasoning"] == (getattr(choice.message, "reasoning_content", None) or "")
        assert seen["finish"] == choice.finish_reason
        assert seen["logprobs"] == (choice.logprobs.content if choice.logprobs else [])
