"""Tokenizing, detokenizing and rendering."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import msgspec
import pytest

from fdserve.config import Config
from fdserve.text import length
from tests.http.client import Client, serving
from tests.http.fake_engine import TEMPLATE, VOCAB_SIZE, ByteTokenizer, FakeEngine, ids, silent

pytestmark = pytest.mark.anyio

MESSAGES = [{"role": "user", "content": "Hé"}]


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
async def test_a_prompt(path: str) -> None:
    async with serving() as client:
        response = await client.post(path, {"model": "fake-model", "prompt": "é</s>", "add_special_tokens": False})
        assert response.status == 200
        assert response.json() == {"count": 3, "max_model_len": 1024, "tokens": [195, 169, 256], "token_strs": None}
        response = await client.post(path, {"prompt": "é</s>", "return_token_strs": True})
        assert response.json()["token_strs"] == ["�", "�", "</s>"]
        response = await client.post(path, {"prompt": ""})
        assert response.json() == {"count": 0, "max_model_len": 1024, "tokens": [], "token_strs": None}
        assert not client.engine.requests


async def test_messages_are_tokenized_as_a_chat_tokenizes_them() -> None:
    async with serving() as client:
        several: list[dict[str, Any]] = [{}, {"chat_template_kwargs": {"think": True}}]
        for fields in several:
            chat = await client.chat(messages=MESSAGES, return_token_ids=True, **fields)
            prompt = chat.json()["choices"][0]["message"]["prompt_token_ids"]
            response = await client.post("/tokenize", {"messages": MESSAGES, **fields, "return_token_strs": True})
            content = response.json()
            assert (content["tokens"], content["count"]) == (prompt, len(prompt))
            assert len(content["token_strs"]) == len(prompt)
            rendered = await client.post("/v1/chat/completions/render", {"messages": MESSAGES, **fields})
            assert rendered.json() == {
                "prompt": "user: Hé\n" + ("<think>" if fields else ""),
                "prompt_token_ids": prompt,
                "count": len(prompt),
                "max_model_len": 1024,
            }


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "prompt"),
        ({"prompt": ["a"]}, 400, "prompt"),
        ({"prompt": "a", "messages": MESSAGES}, 400, "prompt"),
        ({"prompt": "a", "model": "gpt-4"}, 404, "model"),
        ({"messages": MESSAGES, "model": "gpt-4"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, 400, "messages[0].role"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs.messages"),
        ({"prompt": "a", "return_token_strs": "yes"}, 400, "return_token_strs"),
        ([], 400, None),
    ],
)
async def test_what_cannot_be_tokenized(body: Any, status: int, param: str | None) -> None:
    async with serving() as client:
        response = await client.post("/tokenize", body)
        assert (response.status, response.error["param"]) == (status, param)


async def test_rendering_checks_the_whole_request() -> None:
    async with serving() as client:
        for fields, param in (
            ({"messages": []}, "messages"),
            ({"messages": MESSAGES, "temperature": -1}, "temperature"),
            ({"messages": MESSAGES, "top_logprobs": 3}, "top_logprobs"),
            ({"messages": MESSAGES, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ):
            response = await client.post("/v1/chat/completions/render", fields)
            assert (response.status, response.error["param"]) == (400, param)
        assert (await client.post("/v1/chat/completions/render", {"messages": MESSAGES, "model": "x"})).status == 404
        assert not client.engine.requests


@pytest.mark.parametrize("path", ["/detokenize", "/v1/detokenize"])
async def test_detokenize(path: str) -> None:
    async with serving() as client:

        async def text(tokens: list[int]) -> str:
            response = await client.post(path, {"tokens": tokens, "model": "default"})
            assert response.status == 200
            result: str = response.json()["prompt"]
            assert response.json() == {"prompt": result}
            return result

        for whole in ("", "Hello", "é</s><think>", "日本"):
            assert await text(ids(whole)) == whole
        assert await text([195]) == "�"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "tokens"),
        ({"tokens": "a"}, 400, "tokens"),
        ({"tokens": [-1]}, 400, "tokens[0]"),
        ({"tokens": [0, 261]}, 400, "tokens"),
        ({"tokens": [2**70]}, 400, None),
        ({"tokens": [1], "model": "gpt-4"}, 404, "model"),
    ],
)
async def test_what_cannot_be_detokenized(body: Any, status: int, param: str | None) -> None:
    async with serving() as client:
        response = await client.post("/detokenize", body)
        assert response.status == status
        assert param is None or response.error["param"] == param


async def test_the_tokenizer_says_what_it_is() -> None:
    async with serving() as client:
        response = await client.get("/tokenizer_info")
        assert response.status == 200
        info = response.json()
        assert (info["eos_token"], info["bos_token"], info["vocab_size"]) == ("</s>", None, VOCAB_SIZE)
        assert info["chat_template"] == TEMPLATE


async def test_long_texts() -> None:
    text = "0123456789" * 5000
    async with serving() as client:
        token_ids = (await client.post("/tokenize", {"prompt": text})).json()["tokens"]
        assert token_ids == ids(text)
        assert (await client.post("/detokenize", {"tokens": token_ids})).json() == {"prompt": text}
        rendered = await client.post("/v1/chat/completions/render", {"messages": [{"role": "user", "content": text}]})
        assert rendered.json()["prompt"] == f"user: {text}\n"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "x" * 20_000, "return_token_strs": True}),
        ("/tokenize", {"messages": [{"role": "user", "content": "x" * 20_000}], "return_token_strs": True}),
        ("/detokenize", {"tokens": [97] * 20_000}),
        ("/v1/chat/completions/render", {"messages": [{"role": "user", "content": "x" * 20_000}]}),
        ("/v1/chat/completions/render", {"messages": MESSAGES, "chat_template": "Hi"}),
    ],
)
async def test_long_work_and_its_encoding_leave_the_event_loop(
    path: str, body: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set()
    encode = msgspec.json.encode

    def watched(value: Any) -> bytes:
        threads.add(threading.get_ident())
        return encode(value)

    async with serving(config=Config(trust_request_chat_template=True)) as client:
        content = encode(body)
        monkeypatch.setattr(msgspec.json, "encode", watched)
        response = await client.post(path, content)
        assert response.status == 200
    assert threads
    assert threading.get_ident() not in threads


async def test_the_number_of_tokens_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(length, "MAX_TOKENS", 10)
    messages = [{"role": "user", "content": "123"}]  # 10 tokens with "user: " and a line break
    longer = [{"role": "user", "content": "1234"}]
    async with serving() as client:
        for path, good, bad, param in (
            ("/tokenize", {"prompt": "x" * 10}, {"prompt": "x" * 11}, "prompt"),
            ("/tokenize", {"messages": messages}, {"messages": longer}, "messages"),
            ("/detokenize", {"tokens": [97] * 10}, {"tokens": [97] * 11}, "tokens"),
            ("/v1/chat/completions/render", {"messages": messages}, {"messages": longer}, "messages"),
        ):
            assert (await client.post(path, good)).status == 200
            response = await client.post(path, bad)
            assert (response.status, response.error["param"]) == (400, param)
            assert response.error["message"] == "There are 11 tokens; a request may ask about 10 at most."


async def test_a_text_of_too_many_tokens_is_no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer says so, before there is a list of them."""

    def encode(tokenizer: ByteTokenizer, text: str) -> list[int]:
        length.check_length(len(text) * 1000)
        return list(text.encode())

    monkeypatch.setattr(ByteTokenizer, "encode", encode)
    text = "x" * 2000
    async with serving() as client:
        for response, param in (
            (await client.chat(text), "messages"),
            (await client.complete(text), "prompt"),
            (await client.complete(["a", text]), "prompt"),
            (await client.post("/tokenize", {"prompt": text}), "prompt"),
            (await client.post("/v1/responses", {"input": text}), "input"),
        ):
            assert (response.status, response.error["code"]) == (400, "context_length_exceeded")
            assert response.error["param"] == param
            assert "a request may ask about 1048576 at most" in response.error["message"]


async def test_null_is_no_form_of_a_request() -> None:
    async with serving() as client:
        assert (await client.post("/tokenize", {"prompt": "a", "messages": None})).json()["tokens"] == [97]
        assert (await client.post("/tokenize", {"prompt": None, "messages": MESSAGES})).status == 200
        assert (await client.post("/tokenize", {"prompt": None, "messages": None})).error["param"] == "prompt"


async def test_they_count_for_the_limit() -> None:
    async with serving(FakeEngine(silent), Config(max_concurrency=1)) as client, anyio.create_task_group() as tasks:
        tasks.start_soon(client.chat)
        with anyio.fail_after(5):
            while not client.app.active:
                await anyio.sleep(0.01)
        await check_all(client, 429)
        tasks.cancel_scope.cancel()


async def test_no_engine_is_needed() -> None:
    engine = FakeEngine(max_model_len=0)
    engine.hold_loading = True
    async with serving(engine) as client:
        await check_all(client, 200)


async def test_keys_are() -> None:
    async with serving(config=Config(api_key="secret")) as client:
        await check_all(client, 401)


async def check_all(client: Client, status: int) -> None:
    for path, body in (
        ("/tokenize", {"prompt": "a"}),
        ("/v1/tokenize", {"messages": MESSAGES}),
        ("/detokenize", {"tokens": [97]}),
        ("/v1/chat/completions/render", {"messages": MESSAGES}),
        ("/v1/messages/count_tokens", {"model": "default", "messages": MESSAGES}),
    ):
        assert (await client.post(path, body)).status == status
