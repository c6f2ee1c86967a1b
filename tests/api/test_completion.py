from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from msgspec import UNSET
from openai.types import Completion

from fdserve.api.chat_answer import ChatAnswer
from fdserve.api.completion_answer import CompletionAnswer, PromptReport
from fdserve.api.logprobs import prompt_logprobs
from fdserve.config import Config
from fdserve.engine.request import Request, TokenDelta, TokenLogprobs
from tests.http.client import Response, serving
from tests.http.fake_engine import EOS, ByteTokenizer, FakeEngine, follow, ids, logprobs_of, say

pytestmark = pytest.mark.anyio


def choices(response: Response) -> list[dict[str, Any]]:
    assert response.status == 200, response.body
    Completion.model_validate(response.json(), strict=True)
    result: list[dict[str, Any]] = response.json()["choices"]
    return result


async def test_a_completion() -> None:
    async with serving() as client:
        response = await client.complete()
        assert choices(response) == [
            {"index": 0, "text": "Hello, world!", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
        ]
        content = response.json()
        assert content["id"].startswith("cmpl-")
        assert (content["object"], content["usage"]["total_tokens"]) == ("text_completion", 2 + 14)


async def test_a_stream() -> None:
    async with serving(FakeEngine(say("Hello", delay=0.002))) as client:
        events = (await client.complete(stream=True, stream_options={"include_usage": True})).events
        # The client's types deny the null finish reason that OpenAI's own streams have.
        Completion.model_validate(events[-2], strict=True)
        assert [e["choices"][0]["text"] for e in events[:-1]] == [*"Hello", ""]
        assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None] * 5 + ["stop"]
        assert events[-2]["choices"][0]["stop_reason"] is None
        assert events[-1]["choices"] == []
        assert events[-1]["usage"]["completion_tokens"] == 6
        assert all(e["usage"] is None for e in events[:-1])


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("Hi", [b"Hi"]),
        (["Hi"], [b"Hi"]),
        (["a", "bc"], [b"a", b"bc"]),
        ([72, 105], [b"Hi"]),
        ([[97], [98, 99]], [b"a", b"bc"]),
    ],
)
async def test_prompts(prompt: Any, prompts: list[bytes]) -> None:
    async with serving() as client:
        response = await client.complete(prompt, n=2)
        assert [c["index"] for c in choices(response)] == list(range(2 * len(prompts)))
        asked = [bytes(request.prompt) for request in client.engine.requests]
        assert asked == [p for p in prompts for _ in range(2)]
        usage = response.json()["usage"]
        assert usage["prompt_tokens"] == sum(map(len, prompts))
        assert usage["completion_tokens"] == 14 * 2 * len(prompts)
        assert usage["prompt_tokens_details"]["cached_tokens"] == len(prompts)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        (["a", ""], "empty"),
        ([[1], []], "empty"),
        (["a", 1], "mixes"),
        ([1, [1]], "mixes"),
        ([1, -1], "negative"),
        ([1, 261], "261 is out of range: the model has ids from 0 to 260"),
        (["a", [1], 2], "mixes"),
    ],
)
async def test_bad_prompts(prompt: Any, message: str) -> None:
    async with serving() as client:
        response = await client.complete(prompt)
        assert (response.status, response.error["param"]) == (400, "prompt")
        assert message in response.error["message"]
        assert not client.engine.requests


async def test_too_many_prompts_are_refused_before_they_are_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as client:
        monkeypatch.setattr(ByteTokenizer, "encode", None)
        response = await client.complete(["a"] * 1025)
        assert response.status == 400
        assert response.error["param"] == "prompt"


async def test_no_prompt() -> None:
    async with serving() as client:
        response = await client.post("/v1/completions", {"model": "null"})
        assert (response.status, response.error["code"]) == (400, "missing_required_parameter")


async def test_logprobs() -> None:
    async with serving(FakeEngine(say("hé!"))) as client:
        (choice,) = choices(await client.complete(logprobs=2))
        assert choice["logprobs"] == {
            # The eos has its entry too, and is no text.
            "tokens": ["h", "bytes:\\xc3", "bytes:\\xa9", "!", ""],
            "token_logprobs": [-0.25] * 5,
            "top_logprobs": [
                {"h": -0.25, "i": -1.25},
                {"bytes:\\xc3": -0.25, "bytes:\\xc4": -1.25},
                {"bytes:\\xa9": -0.25, "bytes:\\xaa": -1.25},
                {"!": -0.25, '"': -1.25},
                {"\x00": -0.25, "\x01": -1.25, "</s>": -0.25},
            ],
            # In characters of the text: both halves of the é begin where it stands.
            "text_offset": [0, 1, 1, 2, 3],
        }
        (choice,) = choices(await client.complete(logprobs=0))
        assert choice["logprobs"]["top_logprobs"][0] == {"h": -0.25}
        events = (await client.complete(logprobs=2, stream=True, stop="!")).events
        streamed = [e["choices"][0]["logprobs"] for e in events]
        offsets = [offset for part in streamed for offset in part["text_offset"]]
        assert offsets == [0, 1, 1, 2]


async def test_offsets_after_broken_characters() -> None:
    # A byte that no character goes on with: its U+FFFD stands before the next token, however late it is known.
    async with serving(FakeEngine(follow([*b"a\xc3b\xe2\x82", EOS]))) as client:
        response = await client.complete([*b"x\xc3y"], logprobs=0, echo=True)
        (choice,) = response.json()["choices"]
        assert choice["text"] == "x\ufffdya\ufffdb\ufffd"
        assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4, 5, 6, 6, 7]


async def test_token_ids() -> None:
    async with serving(FakeEngine(say("abc", delay=0.001))) as client:
        (choice,) = choices(await client.complete(return_token_ids=True))
        assert choice["prompt_token_ids"] == ids("Hi")
        assert choice["completion_token_ids"] == [*b"abc", EOS]
        events = (await client.complete(return_token_ids=True, stream=True)).events
        first, *others = (e["choices"][0] for e in events)
        assert first["prompt_token_ids"] == ids("Hi")
        assert all("prompt_token_ids" not in other for other in others)
        assert [t for part in (first, *others) for t in part["completion_token_ids"]] == [*b"abc", EOS]


async def test_held_back_text_sends_no_empty_event() -> None:
    async with serving(FakeEngine(say("aXYb", delay=0.002))) as client:
        events = (await client.complete(stream=True, stop="XYZ")).events
        assert [e["choices"][0]["text"] for e in events] == ["a", "XYb", ""]


async def test_tags_are_text_here() -> None:
    from fdserve.config import Config

    config = Config(reasoning_parser="ernie_x1")
    async with serving(FakeEngine(follow([*ids("<think>a</think>b"), EOS])), config) as client:
        (choice,) = choices(await client.complete())
        assert choice["text"] == "<think>a</think>b"


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


async def test_the_best_of_several() -> None:
    means = {"0": -2.0, "1": -0.5, "2": -1.0}

    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        index = request.id[-1]
        values = TokenLogprobs(means[str(int(index) % 3)], (), ())
        assert request.params.logprobs == 0
        yield TokenDelta([ord(index), EOS], logprobs=[values] * 2, finish_reason="stop", stop_token_id=EOS)

    async with serving(FakeEngine(script)) as client:
        response = await client.complete(["a", "b"], n=2, best_of=3)
        assert [choice["text"] for choice in choices(response)] == ["1", "2", "4", "5"]
        assert [choice["index"] for choice in choices(response)] == [0, 1, 2, 3]
        assert all(choice["logprobs"] is None for choice in choices(response))
        assert response.json()["usage"]["completion_tokens"] == 12  # all of them were generated
        assert response.json()["usage"]["prompt_tokens"] == 2


async def test_best_of_as_many_as_are_sent() -> None:
    async with serving() as client:
        assert (await client.complete(n=2, best_of=2, stream=True)).status == 200
        assert [request.params.logprobs for request in client.engine.requests] == [None, None]


async def test_of_two_tokens_with_one_text_the_likelier_counts() -> None:
    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        values = TokenLogprobs(-3.0, (1000, 2000), (-1.0, -2.0))  # none of them is in the vocabulary
        yield TokenDelta([65], logprobs=[values], finish_reason="length")

    async with serving(FakeEngine(script)) as client:
        (choice,) = choices(await client.complete(logprobs=2))
        assert choice["logprobs"]["top_logprobs"] == [{"": -1.0, "A": -3.0}]


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
    fields = {
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
                fields = {"logprobs": True, "top_logprobs": 5} if call == client.chat else {"logprobs": 5}
                assert (await call(**fields, n=3, stream=stream)).status == 200
            waited = anyio.current_time() - began
            go.set()
    assert waited < 3
