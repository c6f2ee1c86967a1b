"""Responses that go on from others: stored, by reference, cut to what fits."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from fdserve.server.response_store import ResponseStore
from tests.api.responses import ADD, CALLS, THINKS, config, events, respond, whole
from tests.http.client import serving
from tests.http.fake_engine import ByteTokenizer, FakeEngine, say

pytestmark = pytest.mark.anyio


async def test_a_conversation_goes_on_from_a_stored_response() -> None:
    async with serving(FakeEngine(say(THINKS)), config()) as client:
        first = whole(await respond(client, "one", instructions="sys"))
        second = events(await respond(client, "two", previous_response_id=first["id"], stream=True))[-1]["response"]
        third = whole(await respond(client, "three", previous_response_id=second["id"], instructions="new"))
        assert third["previous_response_id"] == second["id"]
        prompts = [bytes(request.prompt).decode() for request in client.engine.requests]
        assert prompts[0] == "system: sys\nuser: one\n"
        assert prompts[1] == "user: one\nassistant: Hello\nuser: two\n"
        assert prompts[2] == "system: new\nuser: one\nassistant: Hello\nuser: two\nassistant: Hello\nuser: three\n"


async def test_results_of_calls_follow_a_stored_response() -> None:
    async with serving(FakeEngine(say(CALLS)), config()) as client:
        first = whole(await respond(client, tools=[ADD]))
        result = {"type": "function_call_output", "call_id": first["output"][-1]["call_id"], "output": "2"}
        await respond(client, [result], previous_response_id=first["id"])
        assert bytes(client.engine.requests[1].prompt).decode() == "user: Hi\nassistant: \ntool: 2\n"


async def test_stored_responses_can_be_had_and_deleted() -> None:
    async with serving() as client:
        first = whole(await respond(client))
        path = f"/v1/responses/{first['id']}"
        assert whole(await client.get(path)) == first
        deleted = await client.request("DELETE", path)
        assert deleted.json() == {"id": first["id"], "object": "response", "deleted": True}
        for method in ("GET", "DELETE"):
            missing = await client.request(method, path)
            assert missing.status == 404
            assert missing.error["message"] == f"Response with id '{first['id']}' not found."
        after = await respond(client, previous_response_id=first["id"])
        assert after.status == 400
        assert after.error == {
            "message": f"Previous response with id '{first['id']}' not found.",
            "type": "invalid_request_error",
            "param": "previous_response_id",
            "code": "previous_response_not_found",
        }


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("stream=true", "stream"),
        ("stream=True&starting_after=3", "stream"),
        ("starting_after=3&stream=true", "starting_after"),
        ("include=message.output_text.logprobs", "include"),
        ("include[]=message.output_text.logprobs", "include"),
        ("include%5B%5D=reasoning.encrypted_content", "include"),
    ],
)
async def test_a_stored_response_comes_in_no_other_form(query: str, param: str) -> None:
    async with serving(config=config()) as client:
        path = f"/v1/responses/{whole(await respond(client))['id']}"
        response = await client.get(f"{path}?{query}")
        assert (response.status, response.error["param"]) == (400, param)
        assert response.error["code"] == "unsupported_parameter"
        assert response.error["message"].startswith(f"{param} is not supported here")
        assert (await client.request("DELETE", f"{path}?{query}")).status == 200


async def test_a_query_that_asks_for_nothing_else() -> None:
    async with serving(config=config()) as client:
        first = whole(await respond(client))
        for query in ("", "stream=false", "include_obfuscation=false", "unknown", "&&="):
            assert whole(await client.get(f"/v1/responses/{first['id']}?{query}")) == first


async def test_items_by_reference() -> None:
    async with serving(FakeEngine(say(THINKS)), config()) as client:
        first = whole(await respond(client, "one"))
        (message,) = (item for item in first["output"] if item["type"] == "message")
        items = [
            {"role": "user", "content": "one"},
            {"type": "item_reference", "id": message["id"]},
            {"role": "user", "content": "two"},
        ]
        assert whole(await respond(client, items))["status"] == "completed"
        assert bytes(client.engine.requests[1].prompt) == b"user: one\nassistant: Hello\nuser: two\n"
        await respond(client, [{"role": "user", "content": "mine", "id": "guessable"}])
        for id in ("msg_none", "guessable"):
            unknown = await respond(client, [{"type": "item_reference", "id": id}])
            assert (unknown.status, unknown.error["param"]) == (404, "input[0].id")


async def test_many_references_read_a_stored_item_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as client:
        first = whole(await respond(client, "one"))
        looked_up: list[str] = []
        item = ResponseStore.item

        def watched(self: ResponseStore, item_id: str) -> bytes | None:
            looked_up.append(item_id)
            return item(self, item_id)

        monkeypatch.setattr(ResponseStore, "item", watched)
        ids = [item["id"] for item in first["output"]]
        again = await respond(client, [{"type": "item_reference", "id": id} for id in ids * 3])
        assert again.status == 200
        assert looked_up == ids


async def test_logprobs_are_no_part_of_a_stored_conversation() -> None:
    """They would be most of it."""
    async with serving() as client:
        first = whole(await respond(client, "one", top_logprobs=20))
        stored = client.server.responses.get(first["id"])
        assert stored is not None
        assert len(stored.body) > 10_000
        assert sum(map(len, stored.conversation)) < 1000


@pytest.mark.parametrize("limits", [{"max_request_bytes": 1024}, {}])
async def test_a_conversation_is_no_larger_than_a_body(monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]) -> None:
    if not limits:
        monkeypatch.setattr("fdserve.http.body_values.MAX_VALUES", 60)
    async with serving(config=config(**limits)) as client:
        turns: list[dict[str, Any]] = []
        answer = await respond(client, "x" * 200)
        while answer.status == 200 and len(turns) < 20:
            turns.append(whole(answer))
            answer = await respond(client, "x" * 200, previous_response_id=turns[-1]["id"])
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")
        assert answer.error["message"].startswith("The conversation ")
        assert len(turns) > 1
        assert whole(await client.get(f"/v1/responses/{turns[-1]['id']}")) == turns[-1]


async def test_a_long_stored_conversation_is_tokenized_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(FakeEngine(max_model_len=100_000)) as client:
        first = whole(await respond(client, "x" * 20_000))
        threads: list[int] = []
        encode = ByteTokenizer.encode

        def watched(self: ByteTokenizer, text: str) -> list[int]:
            threads.append(threading.get_ident())
            return encode(self, text)

        monkeypatch.setattr(ByteTokenizer, "encode", watched)
        await respond(client, "short")
        await respond(client, "short", previous_response_id=first["id"])
        assert threads[0] == threading.get_ident()
        assert threads[-1] != threading.get_ident()


async def test_what_is_not_to_be_stored_is_not() -> None:
    async with serving() as client:
        content = whole(await respond(client, store=False))
        assert content["store"] is False
        assert (await client.get(f"/v1/responses/{content['id']}")).status == 404


async def test_truncation_leaves_out_the_oldest_turns() -> None:
    async with serving(FakeEngine(max_model_len=100)) as client:
        items: list[Any] = [{"role": "developer", "content": "dev"}]
        for word in ("one", "two", "three", "four", "five"):
            items += [{"role": "user", "content": word}, {"role": "assistant", "content": "yes, " + word}]
        items.append({"role": "user", "content": "six"})
        refused = await respond(client, items)
        assert (refused.status, refused.error["code"]) == (400, "context_length_exceeded")
        assert refused.error["param"] == "input"
        assert "your input resulted in" in refused.error["message"]
        content = whole(await respond(client, items, truncation="auto"))
        assert content["truncation"] == "auto"
        prompt = bytes(client.engine.requests[-1].prompt).decode()
        assert prompt == "system: dev\nuser: four\nassistant: yes, four\nuser: five\nassistant: yes, five\nuser: six\n"
        await respond(client, items, truncation="auto", max_output_tokens=45)
        assert bytes(client.engine.requests[-1].prompt).decode().startswith("system: dev\nuser: five\n")
        await respond(client, "short", truncation="auto")
        assert bytes(client.engine.requests[-1].prompt) == b"user: short\n"
        too_long = await respond(client, "x" * 200, truncation="auto")
        assert too_long.error["code"] == "context_length_exceeded"
