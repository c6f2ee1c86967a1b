"""Every field of the protocol, by its effect: the openai client against a real server with the demo model."""

from __future__ import annotations

import itertools
import json
import math
import re
import threading
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from tests.http.processes import ServerProcess, until

SETTINGS = {
    "FDSERVE_ENABLE_LOGPROB": "1",
    "FDSERVE_TRUST_REQUEST_CHAT_TEMPLATE": "1",
    "FDSERVE_KV_CACHE_MEMORY": "64M",
    "FDSERVE_MAX_MODEL_LEN": "1024",
    "FDSERVE_BLOCK_SIZE": "16",
    "FDSERVE_MAX_NUM_SEQS": "8",
}
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
QUESTION = "What is the weather in Paris?"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("-m", "fdserve", "--port", "0", **SETTINGS) as process:
        process.listening()
        process.wait_line("^ready")
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="null", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, question: Any = "Hello!", extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    """A chat at temperature 0; `extra` goes into the body as it is."""
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
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


# What the output looks like.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("thinking", [False, True])
def test_json_schemas(client: openai.OpenAI, stream: bool, thinking: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    answer = ask(
        client,
        extra={"enable_thinking": thinking, "min_tokens": 60, "stop_token_ids": list(range(300, 400))},
        stop=["a", "e", '"', "}"],
        response_format=form,
        temperature=1,
        seed=2,
        n=2,
        stream=stream,
    )
    texts = ["", ""]
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            texts[choice.index] += (choice.delta if stream else choice.message).content or ""
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[a-c]{3,5}"}, "[a-c]{3,5}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'start: ("1" | "2") "+" ("1" | "2")'}, "[12][+][12]"),
        ({"guided_json": {"enum": [17, 18]}}, "17|18"),
        ({"guided_json": '{"type": "boolean"}'}, "true|false"),
        ({"structured_outputs": {"choice": ["one", "two"]}}, "one|two"),
        ({"response_format": {"type": "json_object"}, "max_tokens": 300}, r"\{.*\}"),
    ],
)
def test_forms(client: openai.OpenAI, fields: dict[str, Any], pattern: str) -> None:
    limit = fields.get("max_tokens", 100)
    for thinking in (False, True):
        choice = ask(client, extra={"enable_thinking": thinking, **fields}, max_tokens=limit).choices[0]
        assert bool(choice.message.reasoning_content) == thinking
        if choice.finish_reason != "length":
            assert re.fullmatch(pattern, choice.message.content, re.DOTALL), choice
        else:
            assert pattern.startswith(r"\{")  # the demo model may write an object without end
    assert refused(ask, client, extra={**fields, "guided_regex": "x", "guided_choice": ["y"]}).split(".")[0]


def test_a_thought_does_not_end_the_answer(client: openai.OpenAI) -> None:
    towards_the_end = {"2": 99, "4": 99}
    assert ask(client, extra={"logit_bias": towards_the_end}).choices[0].message.content == ""
    answer = ask(client, extra={"guided_choice": ["yes", "no"], "logit_bias": towards_the_end}).choices[0]
    assert answer.message.content in ("yes", "no")
    assert answer.message.reasoning_content


def test_structural_tags(client: openai.OpenAI) -> None:
    tag = {"structures": [{"begin": "<n>", "schema": {"type": "integer"}, "end": "</n>"}], "triggers": ["<n>"]}
    assert say(client, extra={"structural_tag": tag}) == say(client)
    one = {
        "type": "sequence",
        "elements": [{"type": "const_string", "value": "n="}, {"type": "json_schema", "json_schema": {"enum": [7]}}],
    }
    form = {"type": "structural_tag", "format": one}
    assert say(client, response_format=form) == "n=7"


def test_tools(client: openai.OpenAI) -> None:
    answer = ask(client, QUESTION, tools=[{"type": "function", "function": {"name": "get_weather"}}])
    (call,) = answer.choices[0].message.tool_calls
    assert (answer.choices[0].finish_reason, call.function.name) == ("tool_calls", "get_weather")
    assert "Paris" in json.loads(call.function.arguments).values()
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 21, "condition": "sunny"}'},
    ]
    final = ask(client, turns, tools=[WEATHER]).choices[0]
    assert final.finish_reason == "stop"
    assert "sunny" in final.message.content or "21" in final.message.content
    plain = ask(client, QUESTION, tools=[WEATHER], tool_choice="none").choices[0]
    assert plain.message.tool_calls is None


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_forced_calls_fit_their_schemas(client: openai.OpenAI, choice: Any) -> None:
    for question in ("Hello!", "What is 1 + 1?"):
        for fields in ({"temperature": 0}, {"temperature": 1, "seed": 4}):
            answer = ask(
                client, question, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, **fields
            ).choices[0]
            (call,) = answer.message.tool_calls
            jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
            assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)


def test_streamed_calls(client: openai.OpenAI) -> None:
    fields = {"tools": [WEATHER], "tool_choice": "required", "seed": 1}
    whole = ask(client, QUESTION, **fields).choices[0].message.tool_calls
    with client.chat.completions.stream(
        model="default", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=200, **fields
    ) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    assert [call.function.arguments for call in streamed] == [call.function.arguments for call in whole]
    assert [call.function.name for call in streamed] == [call.function.name for call in whole]


def test_functions_are_the_older_form(client: openai.OpenAI) -> None:
    functions = [WEATHER["function"]]
    answer = ask(client, QUESTION, functions=functions, function_call={"name": "get_weather"}).choices[0]
    assert answer.finish_reason == "function_call"
    jsonschema.validate(json.loads(answer.message.function_call.arguments), PARAMETERS)


# How it is served.


def test_streams(client: openai.OpenAI) -> None:
    def sizes(**extra: Any) -> list[int]:
        extra |= {"return_token_ids": True, "enable_thinking": False}
        chunks = [c for chunk in ask(client, extra=extra, stream=True) for c in chunk.choices]
        return [len(getattr(c.delta, "completion_token_ids", [])) for c in chunks]

    assert max(sizes()) < 10
    gathered = [size for size in sizes(max_streaming_response_tokens=10) if size]
    assert min(gathered[:-1]) >= 10
    usages = [chunk.usage for chunk in ask(client, stream=True, stream_options={"continuous_usage_stats": True})]
    counts = [usage.completion_tokens for usage in usages]
    assert counts == sorted(counts)
    assert usages[-1].prompt_tokens > 0


def test_priority(client: openai.OpenAI, server: ServerProcess) -> None:
    """Of two that find every row taken, the later one comes first."""
    order: list[str] = []

    def run(name: str, n: int, priority: int) -> None:
        go_on(client, n=n, max_tokens=100, ignore_eos=True, priority=priority)
        order.append(name)

    def begin(name: str, n: int, priority: int) -> threading.Thread:
        thread = threading.Thread(target=run, args=(name, n, priority))
        thread.start()
        return thread

    def waiting() -> int:
        match = re.search(rb"^fdserve_requests_waiting (\d+)", server.get("/metrics")[1], re.MULTILINE)
        assert match is not None
        return int(match[1])

    threads = [begin("first", 48, 0)]
    until(lambda: waiting() > 20)
    threads.append(begin("late", 32, 5))
    until(lambda: waiting() > 50)
    threads.append(begin("soon", 1, -5))
    for thread in threads:
        thread.join()
    assert order == ["soon", "first", "late"]


def test_cancelling(client: openai.OpenAI, server: ServerProcess) -> None:
    stream = ask(client, extra={"request_id": "to-cancel", "ignore_eos": True}, max_tokens=900, stream=True)
    chunk = next(iter(stream))
    assert chunk.id == "chatcmpl-to-cancel"
    assert client.post("/requests/to-cancel/cancel", body={}, cast_to=object)
    with pytest.raises(openai.APIError, match="cancelled"):
        list(stream)
    until(lambda: b"fdserve_requests_running 0" in server.get("/metrics")[1])


def test_ignored_fields_change_nothing(client: openai.OpenAI) -> None:
    plain = ask(client).choices[0]
    fields = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "verbosity": "low"}
    extra = {"safety_identifier": "s", "prompt_cache_key": "k", "prediction": {"type": "content", "content": "x"}}
    assert ask(client, extra=extra, **fields).choices[0] == plain


def test_refused_fields(client: openai.OpenAI) -> None:
    assert refused(go_on, client, suffix="end") == "suffix"
    assert refused(ask, client, modalities=["text", "audio"]) == "modalities"
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]
    with pytest.raises(openai.BadRequestError, match="text-only"):
        ask(client, [{"role": "user", "content": image}])
