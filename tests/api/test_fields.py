"""Fields that decide what the engine gets, over the fake engine: token rules, limits, names."""

from __future__ import annotations

import threading
import tracemalloc
from typing import Any

import anyio
import msgspec
import pytest

from fdserve.api import generation as generation_module
from fdserve.api import params as params_module
from fdserve.api.choice import Choice
from fdserve.api.fields import read_request
from fdserve.api.token_rules import TokenRules, token_rules
from fdserve.config import Config
from fdserve.errors import InvalidRequest
from fdserve.protocol.chat import ChatRequest
from fdserve.text.stop import StopTable
from tests.api.asked import asked, params_of
from tests.http.client import serving
from tests.http.fake_engine import EOS, VOCAB_SIZE, FakeEngine, endless, ids, say

pytestmark = pytest.mark.anyio


def ids_in(mask: bytes) -> list[int]:
    return [token for token in range(8 * len(mask)) if mask[token // 8] >> token % 8 & 1]


async def test_logit_bias() -> None:
    async with serving() as client:
        params = await params_of(client, logit_bias={"5": 1.5, "6": -100, "7": 0, "8": -99})
        assert params.logit_bias == ((5, 1.5), (8, -99.0))
        assert (ids_in(params.banned_ids), params.bad_words) == ([6], ())
        assert params.allowed_ids == b""
        params = await params_of(client, logit_bias={"5": 100, "6": 100, "7": 50})
        assert (ids_in(params.allowed_ids), params.logit_bias) == ([5, 6], ((7, 50.0),))
        params = await params_of(client, logit_bias={"5": 100, "6": 100}, allowed_token_ids=[6, 7])
        assert ids_in(params.allowed_ids) == [6]


async def test_bad_words() -> None:
    async with serving() as client:
        params = await params_of(client, bad_words=["ab", "</s>"], bad_words_token_ids=[7, 7])
        assert params.bad_words == (tuple(b"ab"), tuple(b" ab"), (ord(" "), EOS))
        assert ids_in(params.banned_ids) == [7, EOS]
        params = await params_of(client)
        assert (params.banned_ids, params.bad_words) == (b"", ())


async def test_lists_of_ids_are_small_however_long_they_are() -> None:
    """They go to the ranks for each choice; with the ids themselves a row of a large vocabulary weighs a megabyte."""
    everything = list(range(VOCAB_SIZE))
    async with serving(config=Config(max_concurrency=64)) as client:
        for field in ("allowed_token_ids", "bad_words_token_ids"):
            fields: dict[str, Any] = {field: everything}
            assert (await client.chat(n=64, **fields)).status == 200
            requests = client.engine.requests[-64:]
            masks = [request.params.allowed_ids + request.params.banned_ids for request in requests]
            assert [ids_in(mask) for mask in masks] == [everything] * 64
            assert len(masks[0]) == 36  # a bit an id, in words of 32
            # One more can only be there twice.
            fields[field] = [*everything, 0]
            response = await client.chat(**fields)
            assert (response.status, response.error["param"]) == (400, field)
            assert f"has {VOCAB_SIZE + 1} ids, and the model only {VOCAB_SIZE}" in response.error["message"]


async def test_long_words_are_refused() -> None:
    async with serving() as client:
        for field in ("stop", "bad_words"):
            fields: dict[str, Any] = {field: ["a" * 8192, "b" * 8192]}
            assert (await client.chat(**fields)).status == 200
            fields[field] = ["a" * 8192, "b" * 8193]
            response = await client.chat(**fields)
            assert (response.status, response.error["param"]) == (400, field)
            assert "16384 characters together" in response.error["message"]


async def test_words_are_prepared_once_for_all_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[StopTable] = []

    def table(stops: list[str]) -> StopTable:
        tables.append(StopTable(stops))
        return tables[-1]

    monkeypatch.setattr(params_module, "StopTable", table)
    rules: list[TokenRules] = []

    def noted(*given: Any) -> TokenRules:
        rules.append(token_rules(*given))
        return rules[-1]

    monkeypatch.setattr(generation_module, "token_rules", noted)
    async with serving() as client:
        assert (await client.complete(["a", "b", "c"], n=2, stop=["x" * 1000], bad_words=["y"])).status == 200
        assert len(client.engine.requests) == 6
        assert (len(tables), len(rules)) == (1, 1)
        assert (await client.chat(n=3, stop="x")).status == 200
        assert len(tables) == 2


async def test_allowed_tokens() -> None:
    async with serving() as client:
        assert (await params_of(client, allowed_token_ids=[9, 8, 9])).allowed_ids == (3 << 8).to_bytes(36, "little")
        assert (await params_of(client)).allowed_ids == b""


async def test_ways_of_telling_logprobs() -> None:
    async with serving() as client:
        params = await params_of(client, temp_scaled_logprobs=True, top_p_normalized_logprobs=True)
        assert (params.temp_scaled_logprobs, params.top_p_normalized_logprobs) == (True, True)
        assert (await params_of(client, prompt_logprobs=3)).prompt_logprobs == 3
        await client.chat(prompt_logprobs=3, n=2)
        assert [request.params.prompt_logprobs for request in client.engine.requests[-2:]] == [3, None]


async def test_null_gives_way_to_the_next_place() -> None:
    async with serving() as client:
        params = await params_of(client, top_k=None, extra_body={"top_k": None}, chat_template_kwargs={"top_k": 7})
        assert params.top_k == 7


async def test_a_limit_for_the_answer() -> None:
    config = Config(reasoning_parser="ernie_x1")
    async with serving(config=config, template="<think>") as client:
        params = await params_of(client, response_max_tokens=5)
        assert (params.answer_limit, params.think_end_id) == (5, ids("</think>")[0])
        assert (params.max_tokens, params.thinking_budget) == (1023, None)
        assert (await params_of(client, response_max_tokens=10**30)).answer_limit == 1023  # no integer is too large
        params = await params_of(client, response_max_tokens=5, reasoning_max_tokens=7)
        assert (params.answer_limit, params.thinking_budget) == (5, 6)
    async with serving(config=config, template="</think>") as client:
        params = await params_of(client, response_max_tokens=5, min_tokens=9)
        assert (params.answer_limit, params.max_tokens, params.min_tokens) == (None, 5, 5)
        assert (await params_of(client, response_max_tokens=5, max_tokens=3)).max_tokens == 3


async def test_salts_and_names() -> None:
    async with serving() as client:
        assert (await asked(client, cache_salt="mine")).cache_salt == "mine"
        assert (await asked(client)).cache_salt == ""
        assert (await client.chat(request_id="abc")).json()["id"] == "chatcmpl-abc"
        assert (await client.chat(request_id="chatcmpl-abc")).json()["id"] == "chatcmpl-abc"
        assert (await client.complete(request_id="abc")).json()["id"] == "cmpl-abc"


async def test_the_service_tier_is_told_where_it_was_asked_for() -> None:
    async with serving() as client:
        assert (await client.chat(service_tier="flex")).json()["service_tier"] == "default"
        assert "service_tier" not in (await client.chat()).json()
        events = (await client.chat(service_tier="flex", stream=True)).events
        assert {event["service_tier"] for event in events} == {"default"}


async def test_tokens_can_be_gathered() -> None:
    async with serving(FakeEngine(say("Hello, world!", delay=0.001))) as client:
        for path, count in (("chat", 1), ("completion", 0)):
            call = client.chat if path == "chat" else client.complete
            events = (await call(stream=True, max_streaming_response_tokens=5)).events
            shown = [e["choices"][0]["delta"]["content"] if path == "chat" else e["choices"][0]["text"] for e in events]
            assert [text for text in shown[count:] if text] == ["Hello", ", wor", "ld!"]


async def test_many_words_are_prepared_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    on_loop: list[bool] = []

    def spied(*given: Any) -> Any:
        on_loop.append(threading.current_thread() is threading.main_thread())
        return token_rules(*given)

    monkeypatch.setattr(generation_module, "token_rules", spied)
    async with serving() as client:
        for words, at_once in ((1, True), (1000, False)):
            on_loop.clear()
            for call in (client.chat, client.complete):
                assert (await call(bad_words=["x" * 16] * words, stop=["y" * 16] * words)).status == 200
            assert on_loop == [at_once] * 2


async def test_no_more_are_gathered_than_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdserve.api.generation.MAX_GATHERED", 5)
    async with serving(FakeEngine(say("Hello, world!", batch=5, delay=0.1))) as client:
        events = (await client.complete(stream=True, max_streaming_response_tokens=1 << 40)).events
        assert [e["choices"][0]["text"] for e in events if e["choices"][0]["text"]] == ["Hello", ", wor", "ld!"]


async def test_usage_in_every_event() -> None:
    async with serving(FakeEngine(say("Hello", delay=0.02))) as client:
        for call, first in ((client.chat, 1), (client.complete, 0)):
            events = (await call(stream=True, stream_options={"continuous_usage_stats": True})).events
            counts = [event["usage"]["completion_tokens"] for event in events]
            assert counts[first : first + 5] == [1, 2, 3, 4, 5]
            assert counts[-1] == 6
            assert events[-1]["choices"] == []


async def test_usage_in_every_event_of_many_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def reasoning_tokens(choice: Choice) -> int:
        looks.append(choice.index)
        return 1

    monkeypatch.setattr(Choice, "reasoning_tokens", property(reasoning_tokens))
    options = {"continuous_usage_stats": True}
    async with serving(FakeEngine(say("Hello", delay=0.001), max_requests=80)) as client:
        reply = await client.complete(prompt=["one", "three"] * 20, n=2, stream=True, stream_options=options)
    *events, last = [event["usage"] for event in reply.events]
    assert len(looks) <= 2 * (len(events) + 80)  # not once for each choice in each event
    assert {usage["prompt_tokens"] for usage in events} == {20 * (3 + 5)}
    counts = [usage["completion_tokens"] for usage in events]
    assert counts == sorted(counts)
    assert events[-1] == last
    assert last["completion_tokens"] == 80 * 6
    assert last["total_tokens"] == 20 * (3 + 5) + 80 * 6
    assert last["prompt_tokens_details"] == {"cached_tokens": 40}
    assert last["completion_tokens_details"] == {"reasoning_tokens": 80}


@pytest.mark.parametrize("by", ["response", "request_id", "header"])
async def test_cancelling_by_id(by: str) -> None:
    async with serving(FakeEngine(endless())) as client:
        id = {"response": "chatcmpl-mine", "request_id": "mine", "header": "http-1"}[by]
        results: list[Any] = []

        async def ask(stream: bool) -> None:
            headers = {"x-request-id": "http-1"}
            results.append(await client.chat(stream=stream, request_id="mine", headers=headers))

        for stream in (False, True):
            with anyio.fail_after(5):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(ask, stream)
                    while not client.engine.active:
                        await anyio.sleep(0.001)
                    await anyio.sleep(0.03)
                    assert (await client.post(f"/v1/requests/{id}/cancel", {})).status == 200
        whole, streamed = results
        assert (whole.status, whole.error["code"]) == (409, "request_cancelled")
        assert streamed.events[-1]["error"]["code"] == "request_cancelled"
        assert not client.engine.active
        assert (await client.post(f"/v1/requests/{id}/cancel", {})).status == 404


def test_fields_that_nobody_knows_become_no_objects() -> None:
    """A body may have hundreds of thousands of them."""
    unknown = {f"unknown{number}": 1 for number in range(100_000)}
    body = msgspec.json.encode({"extra_body": {"messages": [], "top_k": 3, **unknown}, **unknown})
    tracemalloc.start()
    try:
        assert read_request(body, ChatRequest).top_k == 3
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(body)


def test_an_extra_body_that_is_none_is_an_error_whatever_else_there_is() -> None:
    body = msgspec.json.encode({"messages": [], "extra_body": "x", "chat_template_kwargs": {"top_k": 3}})
    with pytest.raises(InvalidRequest, match="'extra_body': expected `object"):
        read_request(body, ChatRequest)
