"""The whole server over the demo model, on every way to run it, through the openai client."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from random import Random
from typing import Any

import openai
import pytest

from fdserve.demo.sums import held_out_sums
from tests.http.processes import ServerProcess, read_until, until

SETTINGS = {"FDSERVE_ENABLE_LOGPROB": "1", "FDSERVE_KV_CACHE_MEMORY": "64M", "FDSERVE_MAX_MODEL_LEN": "1024"}
# Plain hypercorn keeps its one worker in a process of its own.
COMMANDS = {
    "fdserve": ["fdserve", "--port", "0"],
    "hypercorn": ["hypercorn", "fdserve.app:app", "-b", "127.0.0.1:0"],
    "hypercorn uvloop": ["hypercorn", "fdserve.app:app", "-b", "127.0.0.1:0", "-k", "uvloop", "-w", "0"],
    "hypercorn trio": ["hypercorn", "fdserve.app:app", "-b", "127.0.0.1:0", "-k", "trio", "-w", "0"],
}


@pytest.fixture(scope="module", params=list(COMMANDS))
def server(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    with ServerProcess("-m", *COMMANDS[request.param], **SETTINGS) as process:
        process.listening()
        assert process.get("/health")[0] in (200, 503)
        until(lambda: process.get("/health")[0] == 200)
        yield process
        process.stop()  # by a signal: hypercorn's workers would outlive a killed parent
        process.wait()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="null", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, question: str, **fields: Any) -> Any:
    messages = [{"role": "user", "content": question}]
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
    question = "What is chunked prefill?"
    whole = ask(client, question, **fields)
    streamed = collect(ask(client, question, stream=True, **fields))
    assert sorted(streamed) == [choice.index for choice in whole.choices] == list(range(fields.get("n", 1)))
    for choice in whole.choices:
        seen = streamed[choice.index]
        assert seen["content"] == choice.message.content
        assert seen["reasoning"] == (getattr(choice.message, "reasoning_content", None) or "")
        assert seen["finish"] == choice.finish_reason
        assert seen["logprobs"] == (choice.logprobs.content if choice.logprobs else [])


def test_thinking_can_be_switched_off_and_cut_short(client: openai.OpenAI) -> None:
    thinking = ask(client, "What is 123 + 456?", temperature=0)
    assert "579" in thinking.choices[0].message.content
    assert "carry" in thinking.choices[0].message.reasoning_content
    reasoning_tokens = thinking.usage.completion_tokens_details.reasoning_tokens
    assert reasoning_tokens > 30
    direct = ask(client, "Hello!", temperature=0, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert direct.choices[0].message.content
    assert not direct.choices[0].message.reasoning_content
    short = ask(client, "What is 123 + 456?", temperature=0, extra_body={"reasoning_max_tokens": 10})
    assert short.usage.completion_tokens_details.reasoning_tokens <= 10
    assert short.choices[0].message.content
    assert short.choices[0].finish_reason == "stop"


def test_prompts_of_every_form(client: openai.OpenAI) -> None:
    text = "Chunked prefill is"
    answer = client.completions.create(model="null", prompt=text, temperature=0, extra_body={"return_token_ids": True})
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
    ask(client, question, max_tokens=1)
    usage = ask(client, question, max_tokens=1).usage
    assert usage.prompt_tokens_details.cached_tokens >= usage.prompt_tokens - 65


def test_min_tokens_and_stop_token_ids(client: openai.OpenAI) -> None:
    long = ask(client, "Hello!", temperature=0, extra_body={"min_tokens": 80, "return_token_ids": True})
    assert long.usage.completion_tokens >= 80
    ids = (
        ask(client, "Hello!", temperature=0, extra_body={"return_token_ids": True})
        .choices[0]
        .message.completion_token_ids
    )
    stopped = ask(client, "Hello!", temperature=0, extra_body={"stop_token_ids": [ids[3]]})
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].stop_reason == ids[3]
    assert stopped.usage.completion_tokens == ids.index(ids[3]) + 1


def test_penalties_make_repetition_rarer(client: openai.OpenAI) -> None:
    def distinct(**penalty: float) -> int:
        fields = {"ignore_eos": True, "return_token_ids": True, **penalty}
        answer = client.completions.create(
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
        ask(client, "Hello!", **fields)
    assert error.value.param == param


def test_a_prompt_that_is_too_long(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, "many words " * 2000)
    assert error.value.code == "context_length_exceeded"
    assert "1024 tokens" in error.value.message


def test_a_client_that_leaves_frees_its_blocks(server: ServerProcess) -> None:
    sock = server.open("Once upon a time", stream=True, max_tokens=900, ignore_eos=True)
    read_until(sock, b'"text"')
    assert metric(server, "kv_blocks_used") > 0
    sock.close()
    assert until(lambda: metric(server, "kv_blocks_used") == 0) < 1.0


@pytest.mark.parametrize("half_closed", [False, True])
def test_clients_that_leave_at_any_moment_leave_nothing_behind(server: ServerProcess, half_closed: bool) -> None:
    restarts = metric(server, "rank_restarts_total")
    random = Random(5)

    def come_and_go(_: int) -> None:
        sock = server.open("a", stream=True, max_tokens=60)
        if half_closed:
            sock.shutdown(socket.SHUT_WR)
        time.sleep(0.006 * random.random())
        sock.close()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(come_and_go, range(400)))
    until(lambda: metric(server, "kv_blocks_used") == 0)
    assert metric(server, "rank_restarts_total") == restarts
    assert server.post("Chunked prefill is", max_tokens=3)[0] == 200


def test_many_clients_at_once_get_what_they_get_alone(server: ServerProcess) -> None:
    questions = [f"What is {a} + {3 * a + 7}?" for a in range(10, 42)]

    def answer(question: str) -> str:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="null") as client:
            return str(ask(client, question, temperature=0).choices[0].message.content)

    alone = [answer(question) for question in questions[:4]]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(answer, questions))
    assert together[:4] == alone
    assert sum(str(4 * a + 7) in text for a, text in zip(range(10, 42), together, strict=True)) >= 30
    until(lambda: metric(server, "kv_blocks_used") == 0)


def metric(server: ServerProcess, name: str) -> int:
    match = re.search(rf"^fdserve_{name} (\d+)", server.get("/metrics")[1].decode(), re.MULTILINE)
    assert match is not None
    return int(match[1])


def test_held_out_sums_are_right() -> None:
    sums = held_out_sums(100, seed=11)
    with ServerProcess("-m", "fdserve", "--port", "0", **SETTINGS) as server:
        server.listening()
        server.wait_line("^ready")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="null")
        with client, concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda s: ask(client, s[0], temperature=0).choices[0].message.content, sums))
    right = [re.findall(r"\d+", text)[-1:] == [str(a + b)] for (_, a, b), text in zip(sums, answers, strict=True)]
    assert sum(right) >= 95


def test_a_killed_rank_costs_what_ran_and_nothing_else() -> None:
    with ServerProcess("-m", "fdserve", "--port", "0", **SETTINGS) as server:
        server.listening()
        server.wait_line("^ready")
        sock = server.open("Once upon a time", stream=True, max_tokens=900, ignore_eos=True)
        read_until(sock, b'"text"')
        os.kill(rank_of(server), signal.SIGKILL)
        rest = read_until(sock, b"[DONE]")
        error = json.loads(re.findall(rb"data: (\{\"error.*)", rest)[0])["error"]
        assert "SIGKILL" in error["message"]
        assert b"Traceback" not in rest
        status, body = server.get("/health")
        assert status == 503
        assert b"SIGKILL" in body
        assert until(lambda: server.get("/health")[0] == 200) < 15
        assert server.post("Chunked prefill is", max_tokens=5)[0] == 200


def test_nothing_is_left_when_the_server_is_killed() -> None:
    with ServerProcess("-m", "fdserve", "--port", "0", **SETTINGS) as server:
        server.listening()
        server.wait_line("^ready")
        rank = rank_of(server)
        server.stop(signal.SIGKILL)
        server.wait()
        deadline = time.monotonic() + 5
        while os.path.exists(f"/proc/{rank}") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not os.path.exists(f"/proc/{rank}")


def rank_of(server: ServerProcess) -> int:
    children = f"/proc/{server.process.pid}/task/{server.process.pid}/children"
    with open(children) as file:
        (rank,) = file.read().split()
    return int(rank)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/no/such/directory"], "/no/such/directory"),
        (["--max-model-len", "100000"], "--max-model-len 100000"),
        (["--kv-cache-memory", "1K"], "--kv-cache-memory"),
        (["--tensor-parallel-size", "3"], "--tensor-parallel-size 3"),
        (["--max-model-length", "5"], "--max-model-len"),
        (["--block-size", "24"], "block_size"),
        (["--reasoning-parser", "nope"], "nope"),
    ],
)
def test_a_start_that_cannot_work_ends_in_seconds_with_the_reason(arguments: list[str], words: str) -> None:
    started = time.monotonic()
    with ServerProcess("-m", "fdserve", "--port", "0", *arguments) as server:
        assert server.wait() == 1
    output = "".join(server.output)
    assert words in output
    assert "Traceback" not in output
    assert time.monotonic() - started < 10
