"""Fields that say what the prompt is and what is told of it, by their effect on the demo model."""

from __future__ import annotations

import itertools
import math
from typing import Any

import openai
import pytest

from tests.e2e.asking import ask, go_on, refused, say

# What the prompt is.


def test_prompts_by_ids_and_cut(client: openai.OpenAI) -> None:
    whole = ask(client, extra={"return_token_ids": True})
    ids = whole.choices[0].message.prompt_token_ids
    again = ask(client, "lost", {"prompt_token_ids": ids})
    assert again.choices[0].message.content == whole.choices[0].message.content
    assert ask(client, extra={"truncate_prompt_tokens": 5, "return_token_ids": True}).usage.prompt_tokens == 5
    assert go_on(client, "word " * 2000, truncate_prompt_tokens=-1).usage.prompt_tokens == 1024 - 8
    assert refused(go_on, client, "word " * 2000) == "prompt"


def test_templates(client: openai.OpenAI) -> None:
    raw = go_on(client, return_token_ids=True).choices[0]
    for extra in (
        {"disable_chat_template": True},
        {"chat_template": "{{ messages[0].content }}"},
        {"chat_template_kwargs": {"disable_chat_template": True}},
    ):
        message = (
            ask(client, "Chunked prefill is", {**extra, "return_token_ids": True}, max_tokens=8).choices[0].message
        )
        assert message.prompt_token_ids == raw.prompt_token_ids
        assert message.completion_token_ids == raw.completion_token_ids
    variable = {"chat_template": "{{ topic }} is", "chat_template_kwargs": {"topic": "Chunked prefill"}}
    message = ask(client, extra={**variable, "return_token_ids": True}).choices[0].message
    assert message.prompt_token_ids == raw.prompt_token_ids


def test_going_on_with_the_last_message(client: openai.OpenAI) -> None:
    whole = say(client)
    begun = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": whole[:11]}]
    assert whole[:11] + say(client, begun, {"continue_final_message": True}) == whole
    length = [ask(client, extra={"add_generation_prompt": add}).usage.prompt_tokens for add in (True, False)]
    assert length[0] > length[1]


def test_thinking_by_three_names(client: openai.OpenAI) -> None:
    for fields in ({"extra": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        assert ask(client, **fields).choices[0].message.reasoning_content is None
    inside = {"chat_template_kwargs": {"enable_thinking": False}}
    assert ask(client, extra=inside).choices[0].message.reasoning_content is None
    assert ask(client, reasoning_effort="high").choices[0].message.reasoning_content


def test_salts_part_the_prefix_cache(client: openai.OpenAI) -> None:
    question = "Tell me about prefix caching. " * 20

    def cached(**extra: str) -> int:
        usage = ask(client, question, extra, max_tokens=1).usage
        return int(usage.prompt_tokens_details.cached_tokens)

    assert cached(cache_salt="one") < 32
    assert cached(cache_salt="one") > 100
    assert cached(cache_salt="two") < 32


# What is told of it.


def test_logprobs_are_those_of_the_prompt(client: openai.OpenAI) -> None:
    """The same tokens have the same probabilities, generated or read."""
    answer = go_on(client, return_token_ids=True, logprobs=2, ignore_eos=True)
    choice = answer.choices[0]
    both = choice.prompt_token_ids + choice.completion_token_ids
    echo = go_on(client, both, echo=True, logprobs=2, max_tokens=0).choices[0]
    start = len(choice.prompt_token_ids)
    assert echo.text == "Chunked prefill is" + choice.text
    assert "".join(echo.logprobs.tokens) == echo.text
    assert echo.logprobs.text_offset == [
        sum(map(len, echo.logprobs.tokens[:i])) for i in range(len(echo.logprobs.tokens))
    ]
    assert echo.logprobs.token_logprobs[0] is None
    assert echo.logprobs.token_logprobs[start:] == pytest.approx(choice.logprobs.token_logprobs, abs=0.05)
    assert all(len(top) in (2, 3) for top in echo.logprobs.top_logprobs[1:])
    assert echo.finish_reason == "length"
    one = go_on(client, both, echo=True, logprobs=2, max_tokens=1).choices[0]
    assert len(one.logprobs.tokens) == len(both) + 1
    assert one.logprobs.token_logprobs[: len(both)] == pytest.approx(echo.logprobs.token_logprobs, abs=0.05)


def test_the_first_token_is_the_likeliest_for_a_greedy_echo(client: openai.OpenAI) -> None:
    (choice,) = go_on(client, echo=True, logprobs=1, max_tokens=6, ignore_eos=True).choices
    generated = choice.logprobs.top_logprobs[-6:]
    assert [max(top, key=top.get) for top in generated] == choice.logprobs.tokens[-6:]


def test_prompt_logprobs(client: openai.OpenAI) -> None:
    answer = ask(client, extra={"prompt_logprobs": 2, "return_token_ids": True}, n=2)
    ids = answer.choices[0].message.prompt_token_ids
    assert answer.prompt_logprobs[0] is None
    assert len(answer.prompt_logprobs) == len(ids)
    for token, entry in zip(ids[1:], answer.prompt_logprobs[1:], strict=True):
        assert entry[str(token)]["logprob"] <= 0
        assert {1, 2} <= {candidate["rank"] for candidate in entry.values()}
    chunks = list(ask(client, extra={"prompt_logprobs": 2}, stream=True))
    told = [chunk.prompt_logprobs for chunk in chunks if hasattr(chunk, "prompt_logprobs")]
    assert told == [answer.prompt_logprobs]


def test_logprobs_of_the_temperature_and_of_the_top_p_set(client: openai.OpenAI) -> None:
    def first(**extra: Any) -> list[float]:
        answer = ask(
            client, extra={"enable_thinking": False, **extra}, logprobs=True, top_logprobs=20, max_tokens=1, seed=1
        )
        return [top.logprob for top in answer.choices[0].logprobs.content[0].top_logprobs]

    raw = first(temperature=2.0)
    scaled = first(temperature=2.0, temp_scaled_logprobs=True)
    gaps = [a - b for a, b in itertools.pairwise(raw)]
    assert [2 * (a - b) for a, b in itertools.pairwise(scaled)] == pytest.approx(gaps, abs=1e-3)
    inside = [value for value in first(top_p=0.5, top_p_normalized_logprobs=True) if value > -100]
    assert sum(map(math.exp, inside)) == pytest.approx(1, abs=1e-3)


def test_best_of(client: openai.OpenAI) -> None:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    fields = {"temperature": 5, "seed": 11, "logprobs": 0, "ignore_eos": True}
    every = go_on(client, n=4, **fields).choices
    best = go_on(client, n=2, best_of=4, **fields)
    ranked = sorted(every, key=lambda choice: mean(choice.logprobs.token_logprobs), reverse=True)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert best.usage.completion_tokens == 32
