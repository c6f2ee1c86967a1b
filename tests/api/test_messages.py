from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from fdserve.errors import Unavailable
from tests.api.messages import ADD, CALL, PATH, THINKS, config, error, events, send, whole
from tests.http.client import serving
from tests.http.fake_engine import EOS, FakeEngine, broken, endless, follow, ids, say, silent

pytestmark = pytest.mark.anyio
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if enable_thinking %}<think>{% endif %}"
)
WRONG = {"type": "string", "pattern": "("}


async def test_a_message() -> None:
    async with serving() as client:
        response = await send(client, system="Be brief.", temperature=0.5, top_k=3)
        content = whole(response)
        assert content.pop("id").startswith("msg_")
        assert content == {
            "type": "message",
            "role": "assistant",
            "model": "fake-model",
            "content": [{"type": "text", "text": "Hello, world!", "citations": None}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {
                "input_tokens": 26,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 1,
                "output_tokens": 14,
                "output_tokens_details": {"thinking_tokens": 0},
                "service_tier": "standard",
            },
        }
        assert response.headers["request-id"] == response.headers["x-request-id"]
        request = client.engine.requests[0]
        assert bytes(request.prompt) == b"system: Be brief.\nuser: Hi\n"
        assert (request.params.temperature, request.params.top_k, request.params.max_tokens) == (0.5, 3, 200)


async def test_thinking() -> None:
    async with serving(FakeEngine(say(THINKS)), config(), template=TEMPLATE) as client:
        content = whole(await send(client, thinking={"type": "enabled", "budget_tokens": 50}))
        thought, text = content["content"]
        assert thought == {"type": "thinking", "thinking": "ab", "signature": ""}
        assert text["text"] == "Hello"
        assert content["usage"]["output_tokens_details"] == {"thinking_tokens": 2}
        request = client.engine.requests[0]
        assert bytes(token for token in request.prompt if token < EOS) == b"user: Hi\n"
        assert request.params.thinking_budget is not None
        omitted = whole(await send(client, thinking={"type": "adaptive", "display": "omitted"}))["content"]
        assert omitted == [{"type": "thinking", "thinking": "", "signature": ""}, text]


async def test_a_stream() -> None:
    thinking = {"type": "adaptive"}
    async with serving(FakeEngine(say(THINKS, delay=0.01)), config(), template=TEMPLATE) as client:
        got = events(await send(client, stream=True, thinking=thinking))
        assert [event["type"] for event in got] == [
            *("message_start", "ping", "content_block_start"),
            *["content_block_delta"] * 3,
            *("content_block_stop", "content_block_start"),
            *["content_block_delta"] * 5,
            *("content_block_stop", "message_delta", "message_stop"),
        ]
        assert [event["index"] for event in got if "index" in event] == [0] * 5 + [1] * 7
        start = got[0]["message"]
        assert (start["content"], start["stop_reason"]) == ([], None)
        assert (start["usage"]["input_tokens"], start["usage"]["cache_read_input_tokens"]) == (9, 1)
        deltas = [event["delta"] for event in got if event["type"] == "content_block_delta"]
        assert deltas[:3] == [
            {"type": "thinking_delta", "thinking": "a"},
            {"type": "thinking_delta", "thinking": "b"},
            {"type": "signature_delta", "signature": ""},
        ]
        assert [delta["text"] for delta in deltas[3:]] == list("Hello")
        plain = whole(await send(client, thinking=thinking))
        assert got[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
        assert {**got[-2]["usage"], "service_tier": "standard"} == plain["usage"]
        omitted = events(await send(client, stream=True, thinking={**thinking, "display": "omitted"}))
        assert "thinking_delta" not in str(omitted)


async def test_calls() -> None:
    script = FakeEngine(say("x</think>\n\n<response>\nI add.\n</response>\n" + CALL % 1 + CALL % 2))
    async with serving(script, config()) as client:
        content = whole(await send(client, tools=[ADD]))
        blocks = content["content"]
        assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use", "tool_use"]
        assert [(block["name"], block["input"]) for block in blocks[2:]] == [("add", {"a": 1}), ("add", {"a": 2})]
        assert blocks[2]["id"] != blocks[3]["id"]
        assert content["stop_reason"] == "tool_use"


async def test_a_stream_of_calls() -> None:
    script = FakeEngine(say("x</think>\n\n" + CALL % 1 + CALL % 2, delay=0.001))
    async with serving(script, config()) as client:
        got = events(await send(client, tools=[ADD], stream=True))
        blocks = [event["content_block"] for event in got if event["type"] == "content_block_start"]
        assert [block["type"] for block in blocks] == ["thinking", "tool_use", "tool_use"]
        assert [block["input"] for block in blocks[1:]] == [{}, {}]
        for index in (1, 2):
            parts = [e["delta"]["partial_json"] for e in got if e.get("index") == index and "delta" in e]
            assert len(parts) > 1
            assert json.loads("".join(parts)) == {"a": index}
        assert got[-2]["delta"]["stop_reason"] == "tool_use"


async def test_what_only_json_can_say_stays_in_a_calls_input() -> None:
    """Python reads it, and then cannot write it as JSON again."""
    odd = '{"a": 1e400, "b": "\\ud800"}'
    call = CALL.replace('{"a": %d}', odd)
    async with serving(FakeEngine(say("x</think>\n\n" + call)), config()) as client:
        response = await send(client, tools=[ADD])
        assert response.status == 200
        assert f'"input":{odd}'.encode() in response.body


async def test_a_call_that_the_length_cuts_off() -> None:
    async with serving(FakeEngine(say("x</think>\n\n" + CALL % 12345)), config()) as client:
        content = whole(await send(client, tools=[ADD], max_tokens=53))
        assert content["stop_reason"] == "max_tokens"
        assert content["content"][1]["input"] == {}
        got = events(await send(client, tools=[ADD], max_tokens=53, stream=True))
        parts = [e["delta"]["partial_json"] for e in got if e.get("index") == 1 and "delta" in e]
        assert '{"a": 12345}'.startswith("".join(parts))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("fields", "reason", "sequence"),
    [
        ({"stop_sequences": ["zz", "wor"]}, "stop_sequence", "wor"),
        ({"max_tokens": 5}, "max_tokens", None),
        ({"max_tokens": 14}, "end_turn", None),
    ],
)
async def test_why_it_stopped(stream: bool, fields: dict[str, Any], reason: str, sequence: str | None) -> None:
    async with serving() as client:
        response = await send(client, stream=stream, **fields)
        end = events(response)[-2]["delta"] if stream else whole(response)
        assert (end["stop_reason"], end["stop_sequence"]) == (reason, sequence)


async def test_an_empty_answer_has_no_blocks() -> None:
    async with serving(FakeEngine(follow([EOS]))) as client:
        assert whole(await send(client))["content"] == []
        got = [event["type"] for event in events(await send(client, stream=True))]
        assert got == ["message_start", "ping", "message_delta", "message_stop"]


async def test_counting_tokens() -> None:
    async with serving() as client:
        messages = [{"role": "user", "content": "Hé"}]
        for fields in ({}, {"system": "x"}, {"thinking": {"type": "adaptive"}}, {"tools": [ADD]}):
            counted = await client.post(f"{PATH}/count_tokens", {"messages": messages, **fields})
            usage = whole(await send(client, "Hé", **fields))["usage"]
            assert counted.json() == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
        assert counted.json()["input_tokens"] == len(ids("user: Hé\n"))
        assert len(client.engine.requests) == 4
        assert error(await client.post(f"{PATH}/count_tokens", {"messages": []}))["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"temperature": "hot"}, "temperature"),
        ({"tools": [{**ADD, "name": ""}]}, "tools[0].name"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"output_config": {"format": {"type": "json_schema", "schema": WRONG}}}, "'output_config.format.schema'"),
    ],
)
async def test_refused(fields: dict[str, Any], message: str) -> None:
    async with serving(config=config()) as client:
        response = await send(client, **fields)
        assert response.status == 400
        assert error(response)["type"] == "invalid_request_error"
        assert message in error(response)["message"]
        assert not client.engine.requests


async def test_a_missing_field() -> None:
    async with serving() as client:
        response = await client.post(PATH, {"messages": [{"role": "user", "content": "Hi"}]})
        assert error(response)["message"] == "Missing required parameter: 'max_tokens'."


async def test_errors_before_the_handler_have_the_form_too() -> None:
    async with serving(config=config(api_key="alpha", max_request_bytes=2048)) as client:
        for headers in ({}, {"x_api_key": "beta"}, {"authorization": "Bearer beta"}):
            response = await send(client, headers=headers)
            assert (response.status, error(response)["type"]) == (401, "authentication_error")
        key = {"x_api_key": "alpha"}
        assert (await send(client, headers=key)).status == 200
        response = await client.request("GET", PATH, headers=key)
        assert (response.status, error(response)["type"]) == (405, "invalid_request_error")
        assert response.headers["allow"] == "POST, OPTIONS"
        response = await client.post(f"{PATH}/batches", {}, headers=key)
        assert (response.status, error(response)["type"]) == (404, "not_found_error")
        response = await send(client, headers=key, model="other")
        assert (response.status, error(response)["type"]) == (404, "not_found_error")
        response = await send(client, "x" * 2048, headers=key)
        assert (response.status, error(response)["type"]) == (413, "request_too_large")
        # Other paths keep OpenAI's form.
        assert (await client.get("/v1/models")).error["type"] == "authentication_error"


async def test_too_many_requests_and_no_engine() -> None:
    async with serving(FakeEngine(silent, max_requests=0)) as client:
        response = await send(client)
        assert (response.status, error(response)["type"]) == (429, "rate_limit_error")
        assert response.headers["retry-after"] == "7"
        client.engine.drain()
        response = await send(client)
        assert (response.status, error(response)["type"]) == (503, "overloaded_error")


async def test_an_unknown_error_keeps_its_secrets() -> None:
    async with serving(FakeEngine(broken("half", RuntimeError("secret")))) as client:
        response = await send(client)
        assert (response.status, error(response)["type"]) == (500, "api_error")
        assert b"secret" not in response.body


async def test_an_error_in_a_stream() -> None:
    async with serving(FakeEngine(broken("half", Unavailable("The rank is lost.")))) as client:
        response = await send(client, stream=True)
        got = events(response)
        assert [event["type"] for event in got[-2:]] == ["content_block_delta", "error"]
        assert got[-1]["error"] == {"type": "overloaded_error", "message": "The rank is lost."}
        assert got[-1]["request_id"] == response.headers["request-id"]


@pytest.mark.parametrize("stream", [True, False])
async def test_leaving_cancels(stream: bool) -> None:
    async with serving(FakeEngine(endless())) as client:
        await send(client, stream=stream, leave_after=3 if stream else 0)
        with anyio.fail_after(5):
            while client.engine.active:
                await anyio.sleep(0.002)
        assert len(client.engine.cancelled) == 1


async def test_streams_refuse_http2() -> None:
    async with serving() as client:
        response = await send(client, stream=True, http_version="2")
        assert (response.status, error(response)["type"]) == (400, "invalid_request_error")
