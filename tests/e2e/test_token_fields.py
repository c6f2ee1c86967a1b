"""Fields that say which tokens may come and where they end, by their effect on the demo model."""

from __future__ import annotations

import openai
import pytest

from tests.e2e.asking import ask, go_on, ids_of, say

# Which tokens may come.


def test_logit_bias(client: openai.OpenAI) -> None:
    plain = ids_of(client)
    assert plain[0] not in ids_of(client, logit_bias={str(plain[0]): -100})
    assert ids_of(client, logit_bias={"300": 100}) == [300] * 8
    assert ids_of(client, logit_bias={"300": 99})[0] == 300
    assert ids_of(client, logit_bias={"300": 0.5}) == plain


def test_bad_words(client: openai.OpenAI) -> None:
    assert "demo model" in say(client)
    for words in (["demo"], ["demo model"], ["fdserve demo"]):  # the longer ones are several tokens
        assert words[0] not in say(client, extra={"bad_words": words})
    plain = ids_of(client)
    assert plain[2] not in ids_of(client, bad_words_token_ids=[plain[2]])


def test_allowed_token_ids(client: openai.OpenAI) -> None:
    drawn = ids_of(client, allowed_token_ids=[301, 302, 303], temperature=50, seed=1, max_tokens=60)
    assert set(drawn) == {301, 302, 303}


def test_line_breaks_are_banned_from_the_answer_and_not_from_the_layout(client: openai.OpenAI) -> None:
    answer = ask(client, extra={"bad_words": ["\n"]}, response_format={"type": "json_object"}, max_tokens=200)
    message = answer.choices[0].message
    assert message.content
    assert "\n" not in message.content


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
def test_what_leaves_one_token_is_greedy(client: openai.OpenAI, name: str) -> None:
    value = {"top_k": 1, "top_p": 0, "min_p": 1.0}[name]
    greedy = ids_of(client, max_tokens=20)
    assert ids_of(client, max_tokens=20, temperature=5, seed=3, **{name: value}) == greedy
    assert ids_of(client, max_tokens=20, temperature=5, seed=3) != greedy


def test_seed_and_n(client: openai.OpenAI) -> None:
    drawn = [choice.text for choice in go_on(client, temperature=5, seed=7, n=3).choices]
    assert len(set(drawn)) > 1
    assert [go_on(client, temperature=5, seed=7 + i).choices[0].text for i in range(3)] == drawn


# Where it ends.


def test_stop_is_found_across_tokens(client: openai.OpenAI) -> None:
    text = say(client)
    for stop in (text[10:25], [text[10:25], "nowhere"], "e d"):
        first = stop if isinstance(stop, str) else stop[0]
        answer = ask(client, extra={"enable_thinking": False}, stop=stop).choices[0]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", first)
        assert answer.message.content == text[: text.index(first)]
        kept = say(client, extra={"include_stop_str_in_output": True}, stop=stop)
        assert kept == text[: text.index(first)] + first


def test_ignoring_the_end(client: openai.OpenAI) -> None:
    answer = ask(client, extra={"enable_thinking": False, "ignore_eos": True}, max_tokens=100)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (100, "length")
    special = say(client, extra={"ignore_eos": True, "skip_special_tokens": False}, max_tokens=100)
    assert "<|im_end|>" in special
    assert "<|im_end|>" not in answer.choices[0].message.content


def test_limits_of_thought_and_answer(client: openai.OpenAI) -> None:
    question = "What is 123 + 456?"
    free = ask(client, question)
    assert free.usage.completion_tokens_details.reasoning_tokens > 30
    short = ask(client, question, {"reasoning_max_tokens": 10, "response_max_tokens": 4})
    assert short.usage.completion_tokens_details.reasoning_tokens <= 10
    limited = ask(client, question, {"response_max_tokens": 6})
    assert limited.choices[0].finish_reason == "length"
    assert limited.choices[0].message.reasoning_content == free.choices[0].message.reasoning_content
    after = limited.usage.completion_tokens - limited.usage.completion_tokens_details.reasoning_tokens
    assert after <= 6 + 2  # and the tag that ends the thought
    assert free.choices[0].message.content.startswith(limited.choices[0].message.content)
    without = ask(client, question, {"response_max_tokens": 3, "enable_thinking": False})
    assert without.usage.completion_tokens == 3


def test_max_tokens_by_its_two_names(client: openai.OpenAI) -> None:
    assert ask(client, max_tokens=3).usage.completion_tokens == 3
    assert ask(client, max_tokens=30, max_completion_tokens=4).usage.completion_tokens == 4
