"""What requests get from the demo model."""

from __future__ import annotations

import concurrent.futures
import re
from typing import Any

import openai
import pytest

from fdserve.demo.sums import held_out_sums
from tests.e2e.asking import chat, check_that_a_stream_adds_up


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 5, "n": 3},
        {"temperature": 0, "logprobs": True, "top_logprobs": 3},
        {"temperature": 0, "stop": ["requests keep"]},
        {"temperature": 0, "max_tokens": 30},
        {"temperature": 0, "extra_body": {"enable_thinking": False}},
        {
            "temperature": 0.7,
            "top_p": 0.9,
            "seed": 1,
            "extra_body": {"top_k": 4, "min_p": 0.02, "repetition_penalty": 1.1},
        },
    ],
)
def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    check_that_a_stream_adds_up(client, **fields)


def test_thinking_can_be_switched_off_and_cut_short(client: openai.OpenAI) -> None:
    thinking = chat(client, "What is 123 + 456?", temperature=0)
    assert "579" in thinking.choices[0].message.content
    assert "carry" in thinking.choices[0].message.reasoning_content
    reasoning_tokens = thinking.usage.completion_tokens_details.reasoning_tokens
    assert reasoning_tokens > 30
    direct = chat(client, "Hello!", temperature=0, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert direct.choices[0].message.content
    assert not direct.choices[0].message.reasoning_content
    short = chat(client, "What is 123 + 456?", temperature=0, extra_body={"reasoning_max_tokens": 10})
    assert short.usage.completion_tokens_details.reasoning_tokens <= 10
    assert short.choices[0].message.content
    assert short.choices[0].finish_reason == "stop"


def test_prompts_of_every_form(client: openai.OpenAI) -> None:
    text = "Chunked prefill is"
    fields = {"return_token_ids": True}
    answer: Any = client.completions.create(model="null", prompt=text, temperature=0, extra_body=fields)
    ids = answer.choices[0].prompt_token_ids
    assert "long prompt" in answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    for prompt in (ids, [text, "A KV cache"], [ids, ids]):
        again = client.completions.create(model="null", prompt=prompt, temperature=0)
        assert again.choices[0].text == answer.choices[0].text
        assert len(again.choices) == (1 if prompt is ids else 2)


def test_a_warm_prefix_is_reported(client: openai.OpenAI) -> None:
    question = "Tell me about fdserve. " * 20
    chat(client, question, max_tokens=1)
    usage = chat(client, question, max_tokens=1).usage
    assert usage.prompt_tokens_details.cached_tokens >= usage.prompt_tokens - 65


def test_min_tokens_and_stop_token_ids(client: openai.OpenAI) -> None:
    long = chat(client, "Hello!", temperature=0, extra_body={"min_tokens": 80, "return_token_ids": True})
    assert long.usage.completion_tokens >= 80
    ids = (
        chat(client, "Hello!", temperature=0, extra_body={"return_token_ids": True})
        .choices[0]
        .message.completion_token_ids
    )
    stopped = chat(client, "Hello!", temperature=0, extra_body={"stop_token_ids": [ids[3]]})
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].stop_reason == ids[3]
    assert stopped.usage.completion_tokens == ids.index(ids[3]) + 1


def test_penalties_make_repetition_rarer(client: openai.OpenAI) -> None:
    def distinct(**penalty: float) -> int:
        fields = {"ignore_eos": True, "return_token_ids": True, **penalty}
        answer: Any = client.completions.create(
            model="null", prompt="Once upon a time", temperature=0, max_tokens=200, extra_body=fields
        )
        return len(set(answer.choices[0].completion_token_ids))

    plain = distinct()
    for penalty in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"repetition_penalty": 3.0}):
        assert distinct(**penalty) > plain


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"extra_body": {"top_k": "many"}}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"min_tokens": 50}, "max_tokens": 10}, "min_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"extra_body": {"reasoning_max_tokens": 0}}, "reasoning_max_tokens"),
        ({"n": 0}, "n"),
    ],
)
def test_bad_values_are_refused_by_name(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, "Hello!", **fields)
    assert error.value.param == param


def test_a_prompt_that_is_too_long(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, "many words " * 2000)
    assert error.value.code == "context_length_exceeded"
    assert "1024 tokens" in error.value.message


def test_held_out_sums_are_right(client: openai.OpenAI) -> None:
    sums = held_out_sums(100, seed=11)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda s: chat(client, s[0], temperature=0).choices[0].message.content, sums))
    right = [re.findall(r"\d+", text)[-1:] == [str(a + b)] for (_, a, b), text in zip(sums, answers, strict=True)]
    assert sum(right) >= 95
