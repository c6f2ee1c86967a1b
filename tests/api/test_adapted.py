"""A chat's fields at the endpoints that are other forms of one."""

from __future__ import annotations

from typing import Any

import anyio
import msgspec
import pytest

from fdserve.api import messages_input, responses_input
from fdserve.config import Config
from fdserve.engine.request import Request
from fdserve.protocol.chat import ConversationRequest
from tests.http.client import Client, Response, serving
from tests.http.fake_engine import EOS, FakeEngine, endless, follow, ids, say

pytestmark = pytest.mark.anyio

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
OTHERS = pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
REFUSED = {RESPONSES: responses_input.REFUSED, MESSAGES: messages_input.REFUSED}
TRUSTING = Config(enable_logprob=True, trust_request_chat_template=True)

# Fields -> values that show in what the engine gets.
SERVED: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.25,
    "min_tokens": 2,
    "seed": 7,
    "presence_penalty": 1.5,
    "frequency_penalty": -1.5,
    "repetition_penalty": 1.25,
    "logit_bias": {"5": 1.5},
    "bad_words": ["ab"],
    "bad_words_token_ids": [7],
    "allowed_token_ids": [8, 9],
    "stop_token_ids": [9],
    "ignore_eos": True,
    "priority": -3,
    "cache_salt": "x",
    "truncate_prompt_tokens": 3,
    "response_max_tokens": 4,
    "disable_chat_template": True,
    "chat_template": "{{ messages | length }}",
    "chat_template_kwargs": {"think": True, "top_k": 4},
    "add_generation_prompt": False,
    "continue_final_message": True,
    "extra_body": {"top_k": 5},
}
FORMS: dict[str, Any] = {
    "guided_json": {"type": "object"},
    "guided_regex": "a+",
    "guided_choice": ["a"],
    "guided_grammar": 'start: "a"',
    "structural_tag": {"format": {"type": "const_string", "value": "a"}},
    "structured_outputs": {"regex": "a+"},
}
# What a chat that uses a refused field says.
USED: dict[str, Any] = {
    "messages": [{"role": "user", "content": "x"}],
    "prompt_token_ids": [1],
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "stop": "x",
    "response_format": {"type": "json_object"},
    "reasoning_effort": "high",
    "parallel_tool_calls": False,
    "functions": [{"name": "add"}],
    "function_call": {"name": "add"},
    "n": 2,
    "logprobs": True,
    "top_logprobs": 1,
    "prompt_logprobs": 0,
    "temp_scaled_logprobs": True,
    "top_p_normalized_logprobs": True,
    "return_token_ids": True,
}
# What other tests here are about, and what has no effect anywhere.
OTHER_FIELDS = {"max_streaming_response_tokens", "stream", "stream_options", "request_id", "skip_special_tokens"}
OTHER_FIELDS |= {"include_stop_str_in_output", "stop", "enable_thinking", "reasoning_max_tokens", "model"}
OTHER_FIELDS |= {"temp_scaled_logprobs", "top_p_normalized_logprobs", "logits_processors_args", "modalities", "audio"}
OTHER_FIELDS |= {"user", "metadata", "service_tier"}


async def ask(client: Client, path: str, **fields: Any) -> Response:
    messages = [{"role": "user", "content": "Hi"}]
    body = {
        CHAT: {"messages": messages, "max_tokens": 50},
        RESPONSES: {"input": "Hi", "max_output_tokens": 50},
        MESSAGES: {"messages": messages, "max_tokens": 50},
    }[path]
    return await client.post(path, {**body, **fields})


async def asked(client: Client, path: str, **fields: Any) -> dict[str, Any]:
    """What the engine gets, but for what differs from request to request."""
    response = await ask(client, path, **fields)
    assert response.status == 200, response.body
    request: Request = client.engine.requests[-1]
    params = {**msgspec.structs.asdict(request.params), "seed": request.params.seed if "seed" in fields else 0}
    return {"prompt": request.prompt, "priority": request.priority, "salt": request.cache_salt, "params": params}


@OTHERS
@pytest.mark.parametrize("name", SERVED)
async def test_fields_that_are_served_are_a_chats(path: str, name: str) -> None:
    async with serving(FakeEngine(say("x" * 60)), TRUSTING) as client:
        expected = await asked(client, CHAT, **{name: SERVED[name]})
        assert expected != await asked(client, CHAT) or name in ("add_generation_prompt", "continue_final_message")
        assert await asked(client, path, **{name: SERVED[name]}) == expected


@OTHERS
@pytest.mark.parametrize("name", FORMS)
async def test_forms_are_a_chats(path: str, name: str) -> None:
    async with serving() as client:
        assert (await ask(client, path, **{name: FORMS[name]})).status == 200
        assert client.engine.requests[-1].constraint is not None


@OTHERS
async def test_fields_stand_where_they_stand_in_a_chat(path: str) -> None:
    async with serving() as client:
        places: dict[str, Any] = {"extra_body": {"top_k": 2, "min_p": 0.5}, "chat_template_kwargs": {"top_k": 3}}
        params = (await asked(client, path, **places))["params"]
        assert (params["top_k"], params["min_p"]) == (2, 0.5)
        assert (await asked(client, path, **places, top_k=1))["params"]["top_k"] == 1
        assert (await ask(client, path, no_such_field=1, extra_body={"nor_this": 2})).status == 200


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in REFUSED.items() for name in names])
async def test_fields_that_are_refused(path: str, name: str) -> None:
    async with serving() as client:
        for fields in ({name: USED[name]}, {"extra_body": {name: USED[name]}}):
            if path == RESPONSES or name != "messages":
                response = await ask(client, path, **fields)
                assert response.status == 400
                assert f"{name} is not supported here." in response.json()["error"]["message"]
                if path == RESPONSES:
                    assert response.error["param"] == name
                    assert response.error["code"] == "unsupported_parameter"
        assert not client.engine.requests


@OTHERS
async def test_refused_fields_may_say_what_holds_anyway(path: str) -> None:
    neutral: dict[str, Any] = {"n": 1, "response_format": {"type": "text"}, "function_call": "none", "functions": []}
    neutral |= {"return_token_ids": False, "logprobs": False, "parallel_tool_calls": True, "top_logprobs": 0}
    async with serving() as client:
        assert await asked(client, path, **neutral) == await asked(client, path)
        assert (await ask(client, path, **dict.fromkeys(REFUSED[path].keys() - {"max_tokens"}))).status == 200


@OTHERS
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"logits_processors_args": {"x": 1}}, "logits_processors_args"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "continuous_usage_stats"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"chat_template": "x"}, "chat_template"),
        ({"min_tokens": 51}, "min_tokens"),
        ({"top_k": "x"}, "top_k"),
    ],
)
async def test_what_a_chat_refuses(path: str, fields: dict[str, Any], named: str) -> None:
    async with serving() as client:
        response = await ask(client, path, **fields)
        assert response.status == 400
        assert named in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "own"),
    [(RESPONSES, {"top_logprobs", "parallel_tool_calls"}), (MESSAGES, set())],
)
def test_each_field_of_a_chat_is_served_or_refused(path: str, own: set[str]) -> None:
    fields = set(ConversationRequest.__struct_fields__)
    assert fields - own == fields & {*SERVED, *FORMS, *REFUSED[path], *OTHER_FIELDS}
    assert not {*SERVED, *FORMS, *own} & REFUSED[path].keys()


def text_of(response: Response) -> str:
    """The text of a whole answer of either endpoint."""
    assert response.status == 200, response.body
    content = response.json()
    text: str = content["output"][0]["content"][0]["text"] if "output" in content else content["content"][0]["text"]
    return text


@OTHERS
async def test_fields_of_the_text(path: str) -> None:
    async with serving(FakeEngine(follow([*ids("a"), EOS, *ids("bcd"), EOS]))) as client:
        stop = {"stop": "c"} if path == RESPONSES else {"stop_sequences": ["c"]}
        options: dict[str, Any] = {"ignore_eos": True, "include_stop_str_in_output": True}
        assert text_of(await ask(client, path, **stop, **options)) == "abc"
        assert text_of(await ask(client, path, **stop, **options, skip_special_tokens=False)) == "a</s>bc"


@OTHERS
async def test_tokens_of_a_stream_can_be_gathered(path: str) -> None:
    async with serving(FakeEngine(say("abcdef", delay=0.001))) as client:
        body = (await ask(client, path, stream=True, max_streaming_response_tokens=3)).body
        deltas = [part for part in body.decode().split("\n\n") if "text_delta" in part or "output_text.delta" in part]
        assert [("abc" in part, "def" in part) for part in deltas] == [(True, False), (False, True)]


async def test_kinds_of_logprobs() -> None:
    async with serving() as client:
        for name in ("temp_scaled_logprobs", "top_p_normalized_logprobs"):
            assert (await asked(client, RESPONSES, top_logprobs=1, **{name: True}))["params"][name] is True


@OTHERS
async def test_a_request_can_be_cancelled_by_its_own_id(path: str) -> None:
    statuses = []
    async with serving(FakeEngine(endless())) as client, anyio.create_task_group() as tasks:

        async def cancelled() -> None:
            statuses.append((await ask(client, path, request_id="mine", ignore_eos=True)).status)

        tasks.start_soon(cancelled)
        while not client.engine.active:
            await anyio.sleep(0.002)
        assert (await client.request("POST", "/v1/requests/mine/cancel")).json()["cancelled"] is True
    assert statuses == [409]


async def test_only_an_id_that_leads_to_nothing_is_the_clients() -> None:
    async with serving() as client:
        assert (await ask(client, MESSAGES, request_id="mine")).json()["id"] == "msg_mine"
        assert "mine" not in (await ask(client, RESPONSES, request_id="mine")).json()["id"]


async def test_thinking_in_a_chats_words() -> None:
    template = "{{ enable_thinking }}"
    async with serving(template=template) as client:

        async def rendered(path: str = MESSAGES, **fields: Any) -> str:
            return bytes((await asked(client, path, **fields))["prompt"]).decode()

        assert await rendered() == "False"
        assert await rendered(enable_thinking=True) == "True"
        assert await rendered(chat_template_kwargs={"enable_thinking": True}) == "True"
        assert await rendered(RESPONSES, enable_thinking=True) == "True"
        for fields in ({"enable_thinking": True}, {"reasoning_max_tokens": 5}):
            response = await ask(client, MESSAGES, thinking={"type": "adaptive"}, **fields)
            assert response.status == 400
            assert next(iter(fields)) in response.json()["error"]["message"]


async def test_a_budget_for_thoughts_in_a_chats_words() -> None:
    config = Config(reasoning_parser="ernie_x1")
    async with serving(config=config, template="{% if enable_thinking %}<think>{% endif %}x") as client:
        for path in (CHAT, RESPONSES, MESSAGES):
            params = (await asked(client, path, enable_thinking=True, reasoning_max_tokens=9))["params"]
            assert params["thinking_budget"] == 8


async def test_an_answer_that_was_begun_can_be_left_as_it_is() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    template = "{% for m in messages %}{{ m.content }}.{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    async with serving(template=template) as client:

        async def rendered(**fields: Any) -> str:
            return bytes((await asked(client, MESSAGES, messages=messages, **fields))["prompt"]).decode()

        assert await rendered() == "Hi.Yo"
        assert await rendered(add_generation_prompt=True) == "Hi.Yo.!"
        assert await rendered(continue_final_message=False, add_generation_prompt=False) == "Hi.Yo."


async def test_counting_takes_the_same_fields() -> None:
    async with serving() as client:
        body = {"messages": [{"role": "user", "content": "Hi"}]}
        counted = await client.post(f"{MESSAGES}/count_tokens", {**body, "extra_body": {"truncate_prompt_tokens": 3}})
        assert counted.json() == {"input_tokens": 3}
        assert (await client.post(f"{MESSAGES}/count_tokens", {**body, "n": 2})).status == 400
