"""What a completion tells of its prompt: the echo, and logprobs."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from msgspec import UNSET

from fdserve.api.chat_answer import ChatAnswer
from fdserve.api.completion_answer import CompletionAnswer, PromptReport
from fdserve.api.logprobs import prompt_logprobs
from fdserve.config import Config
from fdserve.engine.request import Request, TokenDelta, TokenLogprobs
from tests.api.completions import choices
from tests.http.client import serving
from tests.http.fake_engine import EOS, FakeEngine, follow, ids, logprobs_of, say

pytestmark = pytest.mark.anyio


async def test_echo() -> None:
    async with serving(FakeEngine(say("yz"))) as client:
        (choice,) = choices(await client.complete("é!", echo=True))
        assert choice["text"] == "é!yz"
        response = await client.complete(ids("é!"), echo=True, logprobs=1, max_tokens=1)
        assert response.json()["choices"][0]["logprobs"] == {
            "tokens": ["bytes:\\xc3", "bytes:\\xa9", "!", "y"],
            "token_logprobs": [None, -0.25, -0.25, -0.25],
            "top_logprobs": [None, {"bytes:\\xa9": -0.25}, {"!": -0.25}, {"y": -0.25}],
            "text_offset": [0, 0, 1, 2],
        }
        assert client.engine.requests[-1].params.prompt_logprobs == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_alone(stream: bool) -> None:
    async with serving() as client:
        response = await client.complete(["abc", "d"], echo=True, logprobs=0, max_tokens=0, stream=stream)
        parts = response.events if stream else [response.json()]
        told = [choice for part in parts for choice in part["choices"]]
        assert [choice["text"] for choice in sorted(told, key=lambda choice: choice["index"])] == ["abc", "d"]
        assert {choice["finish_reason"] for choice in told} == {"length"}
        lists = next(choice["logprobs"] for choice in told if choice["index"] == 0)
        assert lists["tokens"] == ["a", "b", "c"]
        assert lists["token_logprobs"] == [None, -0.25, -0.25]
        assert lists["top_logprobs"] == [None, {"b": -0.25}, {"c": -0.25}]
        if not stream:
            assert response.json()["usage"]["completion_tokens"] == 0


async def test_the_tokens_of_an_echo_join_to_its_text() -> None:
    async with serving(FakeEngine(follow([*b"o", EOS, *b"k", EOS]))) as client:
        for skip in (True, False):
            fields = {"ignore_eos": True, "max_tokens": 4, "skip_special_tokens": skip}
            response = await client.complete("a</s>b", echo=True, logprobs=0, **fields)
            (choice,) = response.json()["choices"]
            assert choice["text"] == "a</s>b" + ("ok" if skip else "o</s>k</s>")
            lists = choice["logprobs"]
            assert "".join(lists["tokens"]) == choice["text"]
            ends = [*lists["text_offset"][1:], len(choice["text"])]
            spans = [choice["text"][a:b] for a, b in zip(lists["text_offset"], ends, strict=True)]
            assert spans == lists["tokens"]


async def test_the_logprobs_of_a_prompt() -> None:
    async with serving(FakeEngine(say("z"))) as client:
        (choice,) = choices(await client.complete("ab", prompt_logprobs=2))
        assert choice["prompt_logprobs"] == [
            None,
            {
                "98": {"logprob": -0.25, "rank": 1, "decoded_token": "b"},
                "99": {"logprob": -1.25, "rank": 2, "decoded_token": "c"},
            },
        ]
        (choice,) = choices(await client.complete("ab", prompt_logprobs=0))
        assert choice["prompt_logprobs"] == [None, {"98": {"logprob": -0.25, "rank": None, "decoded_token": "b"}}]
        assert "prompt_logprobs" not in choices(await client.complete("ab"))[0]
        # The echo and the prompt's own may want different numbers of alternatives.
        response = await client.complete("ab", echo=True, logprobs=1, prompt_logprobs=0, max_tokens=0)
        (choice,) = response.json()["choices"]
        assert choice["logprobs"]["top_logprobs"] == [None, {"b": -0.25}]
        assert list(choice["prompt_logprobs"][1]) == ["98"]
        chat = (await client.chat(prompt_logprobs=1, n=2)).json()
        assert [next(iter(entry.values()))["decoded_token"] for entry in chat["prompt_logprobs"][1:]] == list(
            "ser: Hi\n"
        )


@pytest.mark.parametrize("max_tokens", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_all_choices_tell_what_their_first_one_learns_of_the_prompt(stream: bool, max_tokens: int) -> None:
    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        if request.params.prompt_logprobs is not None:
            await anyio.sleep(0.02)  # the others are faster: they find the prompt in the cache
        async for delta in say("xyz", batch=2)(request):
            yield delta

    fields = {"echo": True, "logprobs": 1, "prompt_logprobs": 2, "max_tokens": max_tokens}
    async with serving(FakeEngine(script)) as client:
        alone = (await client.complete(["ab", "cdé"], **fields)).json()["choices"]
        client.engine.requests.clear()
        response = await client.complete(["ab", "cdé"], n=3, stream=stream, **fields)
        asked = [request.params.prompt_logprobs for request in client.engine.requests]
        assert asked == [2, None, None, 2, None, None]
        if not stream:
            for choice in response.json()["choices"]:
                assert choice | {"index": 0} == alone[choice["index"] // 3] | {"index": 0}
            return
        for index in range(6):
            parts = [each for event in response.events for each in event["choices"] if each["index"] == index]
            whole = alone[index // 3]
            assert parts[0]["prompt_logprobs"] == whole["prompt_logprobs"]
            assert all("prompt_logprobs" not in part for part in parts[1:])
            assert "".join(part["text"] for part in parts) == whole["text"]
            for name, values in whole["logprobs"].items():
                assert [value for part in parts for value in part["logprobs"][name]] == values


async def test_the_best_are_told_the_prompt_though_others_learnt_it() -> None:
    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        prompt = None if request.params.prompt_logprobs is None else [logprobs_of(98, 1)]
        values = TokenLogprobs(-1.0 / (1 + int(request.id[-1])), (), ())
        yield TokenDelta([65], logprobs=[values], prompt_logprobs=prompt, finish_reason="length")

    async with serving(FakeEngine(script)) as client:
        response = await client.complete("ab", n=1, best_of=4, echo=True, logprobs=1, max_tokens=1)
        (choice,) = response.json()["choices"]
        assert choice["logprobs"]["token_logprobs"] == [None, -0.25, -0.25]


@pytest.mark.parametrize("stream", [False, True])
async def test_large_answers_are_made_off_the_event_loop(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    threads: dict[str, list[bool]] = {"completion_answer": [], "chat_answer": []}
    for name, calls in threads.items():

        def spied(*given: Any, calls: list[bool] = calls) -> Any:
            calls.append(threading.current_thread() is threading.main_thread())
            return prompt_logprobs(*given)

        monkeypatch.setattr(f"fdserve.api.{name}.prompt_logprobs", spied)
    async with serving() as client:
        for size, at_once in ((10, True), (500, False)):
            await client.complete("x" * size, n=2, prompt_logprobs=3, stream=stream)
            await client.chat("x" * size, n=2, prompt_logprobs=3, stream=stream)
            assert {name: calls.copy() for name, calls in threads.items()} == {name: [at_once] for name in threads}
            for calls in threads.values():
                calls.clear()


@pytest.mark.parametrize("kind", [ChatAnswer, CompletionAnswer])
@pytest.mark.parametrize("stream", [False, True])
async def test_the_ids_of_a_long_prompt_are_encoded_off_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, kind: type[Any], stream: bool
) -> None:
    monkeypatch.setattr("fdserve.api.generation.LONG_TEXT", 5000)
    name = "_opening" if kind is ChatAnswer and stream else "_choice"
    make, on_loop = getattr(kind, name), []

    def spied(self: Any, *given: Any, **options: Any) -> Any:
        on_loop.append(threading.current_thread() is threading.main_thread())
        return make(self, *given, **options)

    monkeypatch.setattr(kind, name, spied)
    async with serving(FakeEngine(say("a", batch=2))) as client:
        call = client.chat if kind is ChatAnswer else client.complete
        for size, at_once in ((10, True), (900, False)):
            on_loop.clear()
            assert (await call("x" * size, n=2, return_token_ids=True, stream=stream)).status == 200
            assert on_loop == [at_once] * 2


async def test_more_logprobs_than_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdserve.api.params.MAX_LOGPROBS", 120)
    async with serving(FakeEngine(say("Hello, world!", delay=0.001))) as client:

        async def answer(stream: bool, **fields: Any) -> tuple[int, str | None]:
            response = await client.complete(max_tokens=1, stream=stream, **fields)
            return response.status, response.error["param"] if response.status != 200 else None

        for stream in (False, True):
            assert await answer(stream, prompt="a" * 60, prompt_logprobs=1) == (200, None)
            assert await answer(stream, prompt="a" * 61, prompt_logprobs=1) == (400, "prompt_logprobs")
            assert await answer(stream, prompt=["a" * 30] * 2, prompt_logprobs=2) == (400, "prompt_logprobs")
            # Each choice tells them, and both kinds.
            assert await answer(stream, prompt="a" * 30, echo=True, logprobs=1, n=3) == (400, "echo")
            assert await answer(stream, prompt="a" * 30, echo=True, logprobs=1, prompt_logprobs=2) == (
                400,
                "prompt_logprobs",
            )
            assert await answer(stream, prompt="a" * 121, echo=True, n=3) == (200, None)
        # Those of generated tokens count where the answer is kept whole.
        many = {"logprobs": 4, "n": 2}
        response = await client.complete(**many)
        assert (response.status, response.error["param"]) == (400, "logprobs")
        assert not client.engine.active
        assert (await client.complete(**many, stream=True)).events[-1]["choices"][0]["finish_reason"] == "stop"
        response = await client.chat(prompt_logprobs=20)
        assert (response.status, response.error["param"]) == (400, "prompt_logprobs")


async def test_what_is_told_of_a_prompt_is_let_go_with_its_last_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[PromptReport] = []
    take = PromptReport.take

    def taken(self: PromptReport, values: Any) -> None:
        assert all(report.echo is None and report.prompt_logprobs is UNSET for report in reports)
        take(self, values)
        reports.append(self)

    monkeypatch.setattr(PromptReport, "take", taken)
    fields: dict[str, Any] = {
        "prompt": ["one", "two", "three"],
        "n": 2,
        "best_of": 3,
        "echo": True,
        "logprobs": 1,
        "prompt_logprobs": 1,
    }
    async with serving() as client:
        told = (await client.complete(**fields)).json()["choices"]
    assert [choice["text"] for choice in told[::2]] == [f"{text}Hello, world!" for text in fields["prompt"]]
    assert all(choice["prompt_logprobs"] for choice in told)
    assert len(reports) == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_large_answers_do_not_wait_for_long_prompts(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr("fdserve.api.generation.LONG_TEXT", 1000)
    go = threading.Event()

    def slow(text: str, *given: Any) -> list[int]:
        go.wait(5)
        return [1]

    async with serving(FakeEngine(say("Hello, world!", batch=13)), Config(enable_logprob=True)) as client:
        monkeypatch.setattr("fdserve.api.tokens.tokenized", slow)
        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(client.post, "/tokenize", {"prompt": "x" * 2000})
            await anyio.sleep(0.05)
            began = anyio.current_time()
            for call in (client.chat, client.complete):
                fields: dict[str, Any] = (
                    {"logprobs": True, "top_logprobs": 5} if call == client.chat else {"logprobs": 5}
                )
                assert (await call(**fields, n=3, stream=stream)).status == 200
            waited = anyio.current_time() - began
            go.set()
    assert waited < 3
