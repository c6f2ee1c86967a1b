"""Answers of /v1/chat/completions, checked to be what openai's client takes."""

from __future__ import annotations

from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.http.client import Response


def choice(response: Response) -> dict[str, Any]:
    assert response.status == 200, response.body
    content = response.json()
    ChatCompletion.model_validate(content, strict=True)
    assert len(content["choices"]) == 1
    result: dict[str, Any] = content["choices"][0]
    return result


def joined(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The chunks of each choice put together again, in the shape of a completion's choices."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        ChatCompletionChunk.model_validate(event, strict=True)
        for part in event["choices"]:
            whole = choices.setdefault(part["index"], {"content": "", "reasoning_content": "", "logprobs": []})
            assert "finish_reason" not in whole, "a chunk after the last one"
            delta = part["delta"]
            for name in ("content", "reasoning_content"):
                whole[name] += delta.get(name, "")
            if part["logprobs"]:
                whole["logprobs"] += part["logprobs"]["content"]
            whole.setdefault("prompt_token_ids", delta.get("prompt_token_ids"))
            whole.setdefault("completion_token_ids", []).extend(delta.get("completion_token_ids", []))
            if part["finish_reason"]:
                whole.update(finish_reason=part["finish_reason"], stop_reason=part["stop_reason"])
    return choices
