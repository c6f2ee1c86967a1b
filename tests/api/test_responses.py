from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from fdserve.config import Config
from fdserve.engine.request import Request, TokenDelta, TokenLogprobs
from fdserve.errors import Unavailable
from tests.api.responses import ADD, CALLS, THINKS, config, events, respond, short, whole, without_ids
from tests.http.client import Response, serving
from tests.http.fake_engine import FakeEngine, Script, broken, endless, say

pytestmark = pytest.mark.anyio


async def test_a_response() -> None:
    async with serving() as client:
        response = await respond(client, instructions="Be brief.", metadata={"a": "b"}, temperature=0.5)
        content = whole(response)
        assert content["id"].startswith("resp_")
        assert (content["object"], content["status"], content["model"]) == ("response", "completed", "fake-model")
        (message,) = content["output"]
        assert message.pop("id").startswith("msg_")
        text = {"type": "output_text", "text": "Hello, world!", "annotations": [], "logprobs": []}
        assert message == {"type": "message", "status": "completed", "role": "assistant", "content": [text]}
        assert content["usage"] == {
            "input_tokens": 27,
            "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0},
            "output_tokens": 14,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 41,
        }
        assert (content["instructions"], content["metadata"]) == ("Be brief.", {"a": "b"})
        assert (content["temperature"], content["top_p"], content["truncation"]) == (0.5, 1.0, "disabled")
        assert content["text"] == {"format": {"type": "text"}}
        assert (content["error"], content["incomplete_details"]) == (None, None)
        assert content["completed_at"] >= content["created_at"]
        assert bytes(client.engine.requests[0].prompt) == b"system: Be brief.\nuser: Hi\n"
        assert client.engine.requests[0].params.temperature == 0.5


async def test_thoughts_are_an_item_of_their_own() -> None:
    async with serving(FakeEngine(say(THINKS)), config()) as client:
        content = whole(await respond(client))
        thought, message = content["output"]
        assert (thought["type"], thought["summary"]) == ("reasoning", [])
        assert thought["content"] == [{"type": "reasoning_text", "text": "ab"}]
        assert message["content"][0]["text"] == "Hello"
        assert content["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}
        thought = whole(await respond(client, reasoning={"summary": "auto"}))["output"][0]
        assert (thought["summary"], thought["content"]) == ([{"type": "summary_text", "text": "ab"}], [])


async def test_a_stream() -> None:
    async with serving(FakeEngine(say(THINKS, delay=0.01)), config()) as client:
        got = events(await respond(client, stream=True))
        assert short(got) == [
            *("created", "in_progress", "output_item.added", "content_part.added"),
            *("reasoning_text.delta", "reasoning_text.delta", "reasoning_text.done"),
            *("content_part.done", "output_item.done", "output_item.added", "content_part.added"),
            *["output_text.delta"] * 5,
            *("output_text.done", "content_part.done", "output_item.done", "completed"),
        ]
        assert [e["output_index"] for e in got[2:-1]] == [0] * 7 + [1] * 10
        assert len({e["item_id"] for e in got[3:8] if "item_id" in e}) == 1
        assert [e["delta"] for e in got if e["type"].endswith(".delta")] == list("abHello")
        first, last = got[0]["response"], got[-1]["response"]
        assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
        assert last["status"] == "completed"
        assert [e["item"] for e in got if e["type"] == "response.output_item.done"] == last["output"]
        assert without_ids(last["output"]) == without_ids(whole(await respond(client))["output"])


async def test_a_stream_of_a_summary() -> None:
    async with serving(FakeEngine(say(THINKS, delay=0.01)), config()) as client:
        got = events(await respond(client, stream=True, reasoning={"effort": "high", "summary": "detailed"}))
        assert short(got)[2:9] == [
            *("output_item.added", "reasoning_summary_part.added"),
            *["reasoning_summary_text.delta"] * 2,
            *("reasoning_summary_text.done", "reasoning_summary_part.done", "output_item.done"),
        ]
        assert got[-1]["response"]["reasoning"] == {"effort": "high", "summary": "detailed"}


async def test_a_call() -> None:
    async with serving(FakeEngine(say(CALLS)), config()) as client:
        content = whole(await respond(client, tools=[ADD]))
        thought, call = content["output"]
        assert thought["type"] == "reasoning"
        assert (call["type"], call["status"], call["name"]) == ("function_call", "completed", "add")
        assert json.loads(call["arguments"]) == {"a": 1}
        assert call["call_id"]
        assert content["tools"] == [{**ADD, "description": None, "strict": None}]


async def test_a_stream_of_calls() -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": %d}}\n</tool_call>\n'
    script = say("x</think>\n\n<response>\nI add.\n</response>\n" + call % 1 + call % 2, delay=0.001)
    async with serving(FakeEngine(script), config()) as client:
        got = events(await respond(client, stream=True, tools=[ADD]))
        names = short(got)
        added = [i for i, name in enumerate(names) if name == "output_item.added"]
        assert [got[i]["item"]["type"] for i in added] == ["reasoning", "message", "function_call", "function_call"]
        last = names[added[3] :]
        assert set(last[1:-3]) == {"function_call_arguments.delta"}
        assert last[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
        output = got[-1]["response"]["output"]
        for index in (2, 3):
            deltas = [e["delta"] for e in got if e.get("output_index") == index and e["type"].endswith(".delta")]
            assert len(deltas) > 1
            assert "".join(deltas) == output[index]["arguments"]
        assert [json.loads(item["arguments"]) for item in output[2:]] == [{"a": 1}, {"a": 2}]
        again = whole(await respond(client, tools=[ADD]))["output"]
        assert [item["arguments"] for item in again[2:]] == [item["arguments"] for item in output[2:]]


@pytest.mark.parametrize("batch", [1, 22, 46, 500])
async def test_texts_and_calls_keep_their_order_however_many_tokens_come_at_once(batch: int) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": %d}}\n</tool_call>\n'
    script = say("x</think>\n\n" + call % 1 + "And the second.\n" + call % 2 + "Done.", batch=batch, delay=0.001)
    async with serving(FakeEngine(script), config()) as client:
        output = whole(await respond(client, tools=[ADD]))["output"][1:]
        assert [item["arguments"] if "arguments" in item else item["content"][0]["text"] for item in output] == [
            '{"a": 1}', "And the second.", '{"a": 2}', "Done.",
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("script", "last"), [(say("ab</think>\n\n<response>\nHello"), "message"), (say("abcdefghij"), "reasoning")]
)
async def test_the_limit_of_tokens(script: Script, last: str) -> None:
    async with serving(FakeEngine(script), config()) as client:
        content = whole(await respond(client, max_output_tokens=8))
        assert content["status"] == "incomplete"
        assert content["incomplete_details"] == {"reason": "max_output_tokens"}
        assert content["completed_at"] is None
        assert content["max_output_tokens"] == 8
        assert [item["status"] for item in content["output"]][-1] == "incomplete"
        assert content["output"][-1]["type"] == last
        got = events(await respond(client, max_output_tokens=8, stream=True))
        assert short(got)[-1] == "incomplete"
        assert got[-1]["response"]["status"] == "incomplete"


@pytest.mark.parametrize("delay", [0.0, 0.001])
async def test_logprobs_are_those_of_the_text(delay: float) -> None:
    script = say("ab</think>\n\n<response>\n\nHé</response>\n", delay=delay)
    async with serving(FakeEngine(script), config()) as client:
        content = whole(await respond(client, top_logprobs=2))
        text = content["output"][1]["content"][0]
        assert [entry["bytes"] for entry in text["logprobs"]] == [[byte] for byte in text["text"].encode()]
        assert [len(entry["top_logprobs"]) for entry in text["logprobs"]] == [2] * len(text["logprobs"])
        got = events(await respond(client, include=["message.output_text.logprobs"], stream=True))
        deltas = [e for e in got if e["type"] == "response.output_text.delta"]
        streamed = [entry["bytes"] for e in deltas for entry in e["logprobs"]]
        assert streamed == [entry["bytes"] for entry in text["logprobs"]]
        done = next(e for e in got if e["type"] == "response.output_text.done")
        assert [entry["bytes"] for entry in done["logprobs"]] == streamed
        assert done["logprobs"][0]["top_logprobs"] == []


def numbered(text: str) -> Script:
    """A script that says the text, and in place of each token's logprob how many tokens came before."""

    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        number = 0
        async for delta in say(text)(request):
            delta.logprobs = [TokenLogprobs(-float(number + i), (), ()) for i in range(len(delta.token_ids))]
            number += len(delta.token_ids)
            yield delta

    return script


@pytest.mark.parametrize(
    ("parser", "text", "fields", "first", "last"),
    [
        ("ernie_x1", "Hello", {"disable_chat_template": True}, 0, 4),
        ("ernie_x1", "Hello", {"continue_final_message": True}, 0, 4),
        ("think", "\n<think>He</think>Hello", {}, 5, 9),
        ("think", "<think>Hello", {"continue_final_message": True}, 0, 5),
    ],
)
async def test_logprobs_are_those_of_the_text_wherever_it_begins(
    parser: str, text: str, fields: dict[str, bool], first: int, last: int
) -> None:
    settings = Config(enable_logprob=True, reasoning_parser=parser)
    async with serving(FakeEngine(numbered(text)), settings) as client:
        output = whole(await respond(client, include=["message.output_text.logprobs"], **fields))["output"]
    numbers = [-entry["logprob"] for entry in output[-1]["content"][0]["logprobs"]]
    assert numbers == list(range(first, last + 1))


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "gpt-5"}, 404, "model"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"input": 5}, 400, "input"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_logprobs": 21}, 400, "top_logprobs"),
        ({"metadata": {"a": 1}}, 400, "metadata[...]"),
        ({"metadata": {str(i): "x" for i in range(17)}}, 400, "metadata"),
        ({"truncation": "sometimes"}, 400, "truncation"),
        ({"tool_choice": "any"}, 400, "tool_choice"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "name": "other"}}, 400, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, 400, "text.format.type"),
        ({"background": True}, 400, "background"),
        ({"tools": [{**ADD, "name": "x" * 257}]}, 400, "tools[0].name"),
    ],
)
async def test_refused(fields: dict[str, Any], status: int, param: str) -> None:
    async with serving(config=config()) as client:
        response = await client.post("/v1/responses", {"input": "Hi", **fields})
        assert (response.status, response.error["param"]) == (status, param)
        assert not client.engine.requests


async def test_errors_of_the_form_name_text_format() -> None:
    wrong = {"type": "json_schema", "name": "x", "schema": {"type": "string", "pattern": "("}}
    async with serving(config=config()) as client:
        error = (await client.post("/v1/responses", {"input": "Hi", "text": {"format": wrong}})).error
        assert error["param"] == "text.format.schema"
        assert "Invalid value for 'text.format.schema': " in error["message"]
        fields = {"input": "Hi", "text": {"format": {"type": "json_object"}}, "guided_regex": "a"}
        error = (await client.post("/v1/responses", fields)).error
        assert error["message"].startswith("text.format and guided_regex both say")


async def test_the_input_is_required() -> None:
    async with serving() as client:
        response = await client.post("/v1/responses", {})
        assert response.error["message"] == "Missing required parameter: 'input'."
        wrong = await client.get("/v1/responses")
        assert (wrong.status, wrong.headers["allow"]) == (405, "POST, OPTIONS")


async def test_an_error_before_the_answer() -> None:
    async with serving(FakeEngine(broken("half", Unavailable("The rank is lost.")))) as client:
        response = await respond(client)
        assert (response.status, response.error["message"]) == (503, "The rank is lost.")


async def test_an_error_in_a_stream_is_a_failed_response() -> None:
    async with serving(FakeEngine(broken("half", Unavailable("The rank is lost.")))) as client:
        got = events(await respond(client, stream=True))
        assert short(got)[-2:] == ["output_text.delta", "failed"]
        failed = got[-1]["response"]
        assert failed["status"] == "failed"
        assert failed["error"] == {"code": "server_error", "message": "The rank is lost."}
        assert failed["output"][0]["status"] == "incomplete"
        assert failed["output"][0]["content"][0]["text"] == "half"
        assert (await client.get(f"/v1/responses/{failed['id']}")).status == 404


@pytest.mark.parametrize("stream", [True, False])
async def test_leaving_cancels_and_stores_nothing(stream: bool) -> None:
    async with serving(FakeEngine(endless())) as client:
        await client.post("/v1/responses", {"input": "Hi", "stream": stream}, leave_after=3 if stream else 0)
        with anyio.fail_after(5):
            while client.engine.active:
                await anyio.sleep(0.002)
        assert len(client.engine.cancelled) == 1
        assert client.app.server is not None
        assert len(client.app.server.responses) == 0


async def test_cancelling_by_the_responses_id() -> None:
    async with serving(FakeEngine(endless())) as client:
        answers: list[Response] = []

        async def stream() -> None:
            answers.append(await client.post("/v1/responses", {"input": "Hi", "stream": True}))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream)
            with anyio.fail_after(5):
                while not client.engine.active:
                    await anyio.sleep(0.002)
            assert client.app.server is not None
            (id,) = [name for name in client.app.server.running._cancels if name.startswith("resp_")]
            assert (await client.post(f"/v1/requests/{id}/cancel", {})).status == 200
        got = events(answers[0])
        assert (got[-1]["type"], got[-1]["response"]["id"]) == ("response.failed", id)


async def test_streams_refuse_http2() -> None:
    async with serving() as client:
        response = await client.post("/v1/responses", {"input": "Hi", "stream": True}, http_version="2")
        assert (response.status, response.error["param"]) == (400, "stream")
