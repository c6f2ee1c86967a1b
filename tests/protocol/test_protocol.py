from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest

from fdserve.protocol.chat import ChatChunk, ChatChunkChoice, ChatRequest, Delta
from fdserve.protocol.completion import CompletionRequest

MESSAGES = [{"role": "user", "content": "Hi"}]


def chat(**fields: Any) -> ChatRequest:
    return msgspec.json.decode(msgspec.json.encode({"messages": MESSAGES, **fields}), type=ChatRequest)


def completion(**fields: Any) -> CompletionRequest:
    return msgspec.json.decode(msgspec.json.encode({"prompt": "Hi", **fields}), type=CompletionRequest)


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_every_optional_field_takes_null(kind: type[msgspec.Struct]) -> None:
    make = chat if kind is ChatRequest else completion
    required = {"messages", "prompt"}
    names = [field.name for field in msgspec.structs.fields(kind) if field.name not in required]
    assert make(**dict.fromkeys(names)) == make()


def test_unknown_fields_are_ignored() -> None:
    assert chat(nonsense={"a": [1]}) == chat()


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("temperature", [0, 0.7, 2.0, 5], [-0.1, "1", True]),
        ("top_p", [0, 0.5, 1], [-0.1, 1.1]),
        ("top_k", [-1, 0, 50], [-2, 1.5]),
        ("min_p", [0, 1], [-0.1, 1.1]),
        ("max_tokens", [1, 10**9], [-1, 1.5, "8"]),
        ("min_tokens", [0, 5], [-1]),
        ("n", [1, 128], [0, 129]),
        ("seed", [0, 922337203685477580, 2**63 - 1], [-1, 2**63]),
        ("presence_penalty", [-2, 0, 2], [-2.1, 2.1]),
        ("frequency_penalty", [-2, 0, 2], [-2.1, 2.1]),
        ("repetition_penalty", [0.1, 1, 2], [0, -1]),
        ("stop", ["a", ["a", "b"], [], ["x"] * 100], ["", [""], 5, [5]]),
        ("stop_token_ids", [[], [1, 2], [2**31 - 1]], [[-1], ["a"], 5, [2**31]]),
        ("stream_options", [{}, {"include_usage": True}], [{"include_usage": 1}, []]),
        ("priority", [-5, 0, 5], ["high", 2**31]),
        (
            "logit_bias",
            [{}, {"5": 1}, {"0": -100, "1": 100.0}],
            [{"a": 1}, {"-1": 1}, {"1": 101}, {"2147483648": 1}, [1]],
        ),
        ("bad_words", [[], ["a"]], ["a", [""]]),
        ("bad_words_token_ids", [[], [1]], [[-1], ["a"], [2**31]]),
        ("allowed_token_ids", [[1]], [[], [-1], [2**31]]),
        ("prompt_logprobs", [0, 20], [-1, 21, True]),
        ("prompt_token_ids", [[1]], [[-1], [[1]], "a"]),
        ("truncate_prompt_tokens", [-1, 1], [-2, "1"]),
        ("max_streaming_response_tokens", [1, 100], [0]),
        ("cache_salt", ["a"], ["", 5]),
        ("request_id", ["a-b.c:d_9"], ["", "a b", "é", "x" * 129, "abc\n", "\nabc", "abc\n\n"]),
        ("response_format", [{"type": "text"}], [{}, {"type": "yaml"}, "text"]),
        ("guided_json", [{}, "{}", True], [5]),
        ("guided_choice", [["a", 1]], ["a", [[1]]]),
    ],
)
@pytest.mark.parametrize("make", [chat, completion])
def test_ranges(make: Any, field: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert getattr(make(**{field: value}), field) is not None
    for value in bad:
        with pytest.raises(msgspec.ValidationError) as error:
            make(**{field: value})
        assert f"$.{field}" in str(error.value)


def test_biases_with_one_hash_are_refused_at_once() -> None:
    collide = 2**61 - 1  # an integer's hash is its remainder
    biases = ", ".join(f'"{i * collide}": 1' for i in range(50_000))
    body = f'{{"prompt": "x", "logit_bias": {{{biases}}}}}'
    started = time.process_time()
    with pytest.raises(msgspec.ValidationError, match=r"2147483647.*\$\.logit_bias"):
        msgspec.json.decode(body, type=CompletionRequest)
    assert time.process_time() - started < 1


def test_top_logprobs() -> None:
    assert chat(top_logprobs=20).top_logprobs == completion(logprobs=20).logprobs == 20
    for value in (-1, 21):
        with pytest.raises(msgspec.ValidationError):
            chat(top_logprobs=value)
        with pytest.raises(msgspec.ValidationError):
            completion(logprobs=value)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "system", "content": "Be kind."},
        {"role": "developer", "content": "Be kind."},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "x", "reasoning_content": "y"},
        {"role": "tool", "content": "42", "tool_call_id": "call_1"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}]},
    ],
)
def test_messages(message: dict[str, Any]) -> None:
    messages = chat(messages=[message]).messages
    assert messages is not None
    assert messages[0].role == message["role"]


@pytest.mark.parametrize(
    ("messages", "path"),
    [
        ("Hi", "$.messages"),
        ([*MESSAGES, {"role": "user", "content": 5}], "$.messages[1].content"),
        ([{"role": "wizard", "content": "x"}], "$.messages[0].role"),
        ([{"content": "x"}], "$.messages[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "$.messages[0].content[0].text"),
        ([{"role": "user", "content": ["x"]}], "$.messages[0].content[0]"),
    ],
)
def test_bad_messages(messages: Any, path: str) -> None:
    with pytest.raises(msgspec.ValidationError) as error:
        chat(messages=messages)
    assert f"`{path}`" in str(error.value)


@pytest.mark.parametrize("prompt", ["Hi", "", ["a", "b"], [1, 2], [[1], [2, 3]], []])
def test_prompts(prompt: Any) -> None:
    assert completion(prompt=prompt).prompt == prompt


@pytest.mark.parametrize("prompt", [5, {"a": 1}, [1.5], [["a"]], [None], [[-1]]])
def test_bad_prompts(prompt: Any) -> None:
    with pytest.raises(msgspec.ValidationError):
        completion(prompt=prompt)


def test_a_chunk_leaves_out_what_was_not_set() -> None:
    choice = ChatChunkChoice(index=0, delta=Delta(content="x"))
    encoded = msgspec.json.encode(ChatChunk(id="a", created=1, model="m", choices=[choice], system_fingerprint="f"))
    assert msgspec.json.decode(encoded) == {
        "id": "a",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": {"content": "x"}, "logprobs": None, "finish_reason": None}],
        "system_fingerprint": "f",
    }
