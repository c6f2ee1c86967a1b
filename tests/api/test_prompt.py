"""Fields that decide what a chat's prompt is."""

from __future__ import annotations

from typing import Any

import pytest

from fdserve.config import Config
from tests.api.asked import asked
from tests.http.client import Client, serving
from tests.http.fake_engine import FakeEngine, ids, say

pytestmark = pytest.mark.anyio


async def prompt_of(client: Client, **fields: Any) -> str:
    return bytes((await asked(client, **fields)).prompt).decode()


async def test_prompts_by_ids() -> None:
    async with serving() as client:
        assert await prompt_of(client, prompt_token_ids=ids("raw")) == "raw"
        response = await client.post("/v1/chat/completions", {"prompt_token_ids": ids("raw"), "messages": []})
        assert response.status == 200
        response = await client.post("/v1/chat/completions", {"extra_body": {"prompt_token_ids": ids("raw")}})
        assert response.status == 200
        assert await prompt_of(client, path="completion", prompt="lost", prompt_token_ids=ids("raw")) == "raw"


async def test_truncated_prompts() -> None:
    async with serving(FakeEngine(max_model_len=64)) as client:
        assert await prompt_of(client, truncate_prompt_tokens=4) == " Hi\n"
        assert await prompt_of(client, truncate_prompt_tokens=400) == "user: Hi\n"
        long = "x" * 100
        assert len(await prompt_of(client, text=long, truncate_prompt_tokens=-1)) == 63
        assert len(await prompt_of(client, text=long, truncate_prompt_tokens=-1, max_tokens=10)) == 54
        assert len(await prompt_of(client, text=long, truncate_prompt_tokens=-1, max_tokens=1000)) == 1
        assert len(await prompt_of(client, path="completion", prompt=long, truncate_prompt_tokens=-1)) == 48
        response = await client.complete([long, "short"], truncate_prompt_tokens=9)
        assert [len(request.prompt) for request in client.engine.requests[-2:]] == [9, 5]
        assert response.json()["usage"]["prompt_tokens"] == 14


TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[end]{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}[assistant]{% endif %}"


async def test_the_generation_prompt() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Well, "}]
    async with serving(template=TEMPLATE) as client:
        opened = "[user]Hi[end][assistant]Well,[end][assistant]"
        assert await prompt_of(client, messages=messages) == opened
        assert await prompt_of(client, messages=messages, add_generation_prompt=True) == opened
        closed = await prompt_of(client, messages=messages, add_generation_prompt=False)
        assert closed == "[user]Hi[end][assistant]Well,[end]"
        assert (
            await prompt_of(client, messages=messages, chat_template_kwargs={"add_generation_prompt": False}) == closed
        )
        for fields in ({}, {"add_generation_prompt": False}):
            going_on = await prompt_of(client, messages=messages, continue_final_message=True, **fields)
            assert going_on == "[user]Hi[end][assistant]Well, "  # the message as it is, whatever the template trims


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template": "x"},
        {"chat_template": ""},
        {"extra_body": {"chat_template": "x"}},
        {"chat_template_kwargs": {"chat_template": "x"}},
        {"extra_body": {"chat_template_kwargs": {"chat_template": "x"}}},
        {"chat_template": "x", "prompt_token_ids": [1]},
    ],
)
async def test_a_template_of_the_request_is_refused_unless_trusted(fields: dict[str, Any]) -> None:
    async with serving() as client:
        body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
        for path in ("/v1/chat/completions", "/v1/chat/completions/render", "/tokenize"):
            response = await client.post(path, body)
            assert (response.status, response.error["param"]) == (400, "chat_template"), path
            assert "--trust-request-chat-template" in response.error["message"]
        assert not client.engine.requests
        assert (await client.chat(chat_template=None)).status == 200


async def test_a_template_of_the_request() -> None:
    async with serving(config=Config(trust_request_chat_template=True)) as client:
        assert await prompt_of(client, chat_template="{{ messages[0].content }}!") == "Hi!"
        assert (
            await prompt_of(client, extra_body={"chat_template": "{{ style }}", "chat_template_kwargs": {"style": 1}})
            == "1"
        )
        response = await client.chat(chat_template="{% for i in range(10**9) %}{% endfor %}")
        assert (response.status, response.error["param"]) == (400, "chat_template")


async def test_any_name_may_be_a_variable() -> None:
    async with serving(template="{{ self }}{{ style }}") as client:
        for name in ("self", "x y", "", "render"):
            assert (await client.chat(chat_template_kwargs={name: 1, "style": "terse"})).status == 200


async def test_no_template() -> None:
    async with serving() as client:
        messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "user", "content": "b"}]
        assert await prompt_of(client, messages=messages, disable_chat_template=True) == "ab"
        response = await client.chat(messages=[{"role": "user", "content": ""}], disable_chat_template=True)
        assert (response.status, response.error["param"]) == (400, "messages")


async def test_a_prompt_without_a_template_is_gone_on_with() -> None:
    config = Config(reasoning_parser="ernie_x1")
    async with serving(FakeEngine(say("a</think>b")), config) as client:
        for text, expected in (("Once", (None, "a</think>b")), ("<think>Once", ("a", "b"))):
            message = (await client.chat(text, disable_chat_template=True)).json()["choices"][0]["message"]
            assert (message["reasoning_content"], message["content"]) == expected


async def test_the_effort_of_reasoning() -> None:
    template = "{{ reasoning_effort }} {{ enable_thinking }}"
    async with serving(template=template) as client:
        assert await prompt_of(client) == " "
        assert await prompt_of(client, reasoning_effort="none") == "none False"
        assert await prompt_of(client, reasoning_effort="minimal") == "minimal False"
        assert await prompt_of(client, reasoning_effort="high") == "high True"
        assert await prompt_of(client, reasoning_effort="high", enable_thinking=False) == "high False"
        assert await prompt_of(client, chat_template_kwargs={"reasoning_effort": "none"}) == "none False"
