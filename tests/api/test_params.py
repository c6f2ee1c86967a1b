from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from fdserve.api.fields import read_request
from fdserve.api.params import MAX_TEMPERATURE, for_choice
from fdserve.config import Config
from fdserve.engine.request import SamplingParams
from fdserve.errors import InvalidRequest
from fdserve.models.config import GenerationDefaults
from fdserve.protocol.chat import ChatRequest
from fdserve.protocol.completion import CompletionRequest
from tests.api.asked import params_of
from tests.http.client import serving
from tests.http.fake_engine import EOS, FakeEngine

USER = {"role": "user", "content": "Hi"}  # 9 tokens as "user: Hi\n"


def read(**fields: Any) -> ChatRequest:
    return read_request(msgspec.json.encode({"messages": [USER], **fields}), ChatRequest)


def test_extra_body_and_template_kwargs_are_merged_in_order() -> None:
    request = read(
        top_k=1,
        extra_body={"top_k": 2, "min_p": 0.2, "chat_template_kwargs": {"lost": True}},
        chat_template_kwargs={"top_k": 3, "min_p": 0.3, "min_tokens": 3, "enable_thinking": False, "style": "x"},
    )
    assert (request.top_k, request.min_p, request.min_tokens, request.enable_thinking) == (1, 0.2, 3, False)
    assert request.chat_template_kwargs is not None
    assert request.chat_template_kwargs["style"] == "x"


def test_template_kwargs_inside_extra_body() -> None:
    request = read(extra_body={"chat_template_kwargs": {"enable_thinking": False, "temperature": 0.5}})
    assert request.enable_thinking is False
    assert request.temperature is None  # no extra field: the template may mean anything by it


def test_completions_have_no_template_kwargs() -> None:
    body = msgspec.json.encode({"prompt": "x", "extra_body": {"seed": 1}, "chat_template_kwargs": {"top_k": 3}})
    request = read_request(body, CompletionRequest)
    assert (request.seed, request.top_k) == (1, None)


def test_extra_fields_are_read_as_the_body_is() -> None:
    """As text: neither are objects made of them twice, nor are numbers and keys other ones than in the body."""
    fields = {"logit_bias": {"5": 1}, "temperature": 1, "seed": 2**63 - 1, "top_k": 2**70}
    inside, outside = read(extra_body=fields), read(**fields)
    assert inside == outside
    assert inside.logit_bias == {5: 1.0}
    with pytest.raises(InvalidRequest) as error:
        read_request(b'{"messages": [], "extra_body": {"seed": 1, "stop": "\\ud800"}}', ChatRequest)
    assert error.value.code == "invalid_json"


def test_null_gives_way() -> None:
    assert read(top_k=None, extra_body={"top_k": 2}).top_k == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"extra_body": {"top_k": "x"}}, "top_k"),
        ({"extra_body": {"messages": []}, "temperature": "x"}, "temperature"),
        ({"chat_template_kwargs": {"enable_thinking": "yes"}}, "enable_thinking"),
        ({"extra_body": {"chat_template_kwargs": 5}}, "chat_template_kwargs"),
        ({"extra_body": []}, "extra_body"),
    ],
)
def test_bad_extras(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        read(**fields)
    assert error.value.param == param


@pytest.mark.anyio
async def test_defaults() -> None:
    async with serving() as client:
        params = await params_of(client)
        expected = SamplingParams(max_tokens=1024 - 9, seed=params.seed, eos_token_ids=(EOS,))
        assert params == expected
        assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (1.0, 1.0, 0, 1.0)
        assert (await params_of(client)).seed != params.seed
        await client.complete()
        assert client.engine.requests[-1].params.max_tokens == 16


@pytest.mark.anyio
async def test_the_checkpoints_defaults() -> None:
    defaults = GenerationDefaults(temperature=0.8, top_p=0.7, top_k=-1, repetition_penalty=1.1, min_p=0.05)
    async with serving(defaults=defaults) as client:
        params = await params_of(client)
        assert (params.temperature, params.top_p, params.top_k) == (0.8, 0.7, 0)
        assert (params.repetition_penalty, params.min_p) == (1.1, 0.05)
        given = await params_of(client, temperature=0, top_p=1, top_k=5, repetition_penalty=1, min_p=0)
        assert (given.temperature, given.top_p, given.top_k) == (0.0, 1.0, 5)
        assert (given.repetition_penalty, given.min_p) == (1.0, 0.0)


@pytest.mark.anyio
async def test_fields_reach_the_engine() -> None:
    async with serving() as client:
        params = await params_of(
            client, seed=7, min_tokens=3, max_tokens=50, presence_penalty=1, frequency_penalty=-1, stop_token_ids=[65]
        )
        assert (params.seed, params.min_tokens, params.max_tokens) == (7, 3, 50)
        assert (params.presence_penalty, params.frequency_penalty) == (1.0, -1.0)
        assert (params.eos_token_ids, params.stop_token_ids) == ((EOS,), (65,))
        assert params.logprobs is None
        await client.chat(priority=-3)
        assert client.engine.requests[-1].priority == -3


@pytest.mark.anyio
async def test_edges_of_sampling() -> None:
    async with serving() as client:
        assert (await params_of(client, temperature=1e-6)).temperature == 0.0
        assert (await params_of(client, temperature=1e-4)).temperature == 1e-4
        assert (await params_of(client, temperature=1e9)).temperature == 1e9
        # The ranks compute with float32.
        for large in (1e39, 1e308):
            assert np.float32((await params_of(client, temperature=large)).temperature) == np.float32(MAX_TEMPERATURE)
        assert np.isfinite(np.float32(MAX_TEMPERATURE))
        assert np.float32(1) / np.float32(MAX_TEMPERATURE) > np.finfo(np.float32).tiny
        assert (await params_of(client, top_p=0)).top_p > 0
        assert (await params_of(client, top_k=-1)).top_k == 0
        vocab_size = client.server.model.vocab_size  # no integer is too large for a rank
        assert (await params_of(client, top_k=2**64)).top_k == vocab_size
        assert (await params_of(client, ignore_eos=True, max_tokens=5)).eos_token_ids == ()


@pytest.mark.anyio
async def test_logprobs_reach_the_engine() -> None:
    async with serving() as client:
        assert (await params_of(client, logprobs=True)).logprobs == 0
        assert (await params_of(client, logprobs=True, top_logprobs=20)).logprobs == 20
        assert (await params_of(client, logprobs=False, top_logprobs=0)).logprobs is None
        await client.complete(logprobs=0)
        assert client.engine.requests[-1].params.logprobs == 0


@pytest.mark.anyio
async def test_max_tokens_is_cut_to_the_room() -> None:
    async with serving() as client:
        assert (await params_of(client, max_tokens=10**9)).max_tokens == 1015
        assert (await params_of(client, max_tokens=5)).max_tokens == 5
        assert (await params_of(client, max_tokens=5, max_completion_tokens=6)).max_tokens == 6
        assert (await params_of(client, max_tokens=10**9, min_tokens=10**8)).min_tokens == 1015


@pytest.mark.anyio
async def test_a_prompt_that_leaves_no_room() -> None:
    async with serving(FakeEngine(max_model_len=16)) as client:
        response = await client.chat("12345678")  # "user: 12345678\n" is 15 tokens
        assert response.status == 200
        response = await client.chat("123456789")
        assert (response.status, response.error["code"]) == (400, "context_length_exceeded")
        assert response.error["param"] == "messages"
        assert response.error["message"] == (
            "This model's maximum context length is 16 tokens. However, your messages resulted in 16 tokens. "
            "Please reduce the length of the messages."
        )
        response = await client.complete(["ok", "x" * 20])
        assert (response.error["code"], response.error["param"]) == ("context_length_exceeded", "prompt")


def test_choices_have_seeds_of_their_own() -> None:
    params = SamplingParams(max_tokens=1, seed=2**63 - 1)
    assert for_choice(params, 0) is params
    assert [for_choice(params, index).seed for index in (1, 2)] == [0, 1]


TOOL = {"type": "function", "function": {"name": "f"}}
BAD_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 3}, "top_logprobs"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"stop_token_ids": [5, 1000]}, "stop_token_ids"),
    ({"logit_bias": {"1000": 1}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 100}, "allowed_token_ids": [6]}, "logit_bias"),
    ({"allowed_token_ids": [1000]}, "allowed_token_ids"),
    ({"bad_words_token_ids": [1000]}, "bad_words_token_ids"),
    ({"response_format": {}}, "response_format.type"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
    ({"tools": [TOOL], "tool_choice": "perhaps"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),  # the model has no form for calls
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions[0].name"),
    ({"functions": [{"name": "f"}], "tools": [TOOL]}, "functions"),
    ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"functions": [], "function_call": {"name": "f"}}, "function_call"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ({"chat_template_kwargs": {"top_k": "x"}}, "top_k"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"chat_template": "{% if %}"}, "chat_template"),
    ({"chat_template": "no messages here", "continue_final_message": True}, "continue_final_message"),
    ({"chat_template": "{# empty #}"}, "messages"),
    ({"prompt_token_ids": []}, "prompt_token_ids"),
    ({"prompt_token_ids": [1000]}, "prompt_token_ids"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"request_id": "no spaces"}, "request_id"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"reasoning_effort": "heroic"}, "reasoning_effort"),
    ({"logits_processors_args": {"x": 1}}, "logits_processors_args"),
    ({"n": 100}, "n"),
]


@pytest.mark.anyio
async def test_fields_that_cannot_be_honoured() -> None:
    config = Config(enable_logprob=True, max_concurrency=64, trust_request_chat_template=True)
    async with serving(config=config) as client:
        for fields, param in BAD_CHAT:
            response = await client.chat(**fields)
            assert (response.status, response.error["param"]) == (400, param), fields
            assert response.error["type"] == "invalid_request_error"
        bad_completions: list[tuple[dict[str, Any], str]] = [
            ({"suffix": "x"}, "suffix"),
            ({"best_of": 2, "stream": True}, "best_of"),
            ({"n": 3, "best_of": 2}, "best_of"),
            ({"prompt": ["x"] * 33, "best_of": 2}, "prompt"),
            ({"prompt": ["x"], "n": 65}, "n"),
            ({"prompt_token_ids": [1000]}, "prompt_token_ids"),
            ({"prompt": ["x"] * 33, "n": 2}, "prompt"),
        ]
        for fields, param in bad_completions:
            response = await client.complete(**fields)
            assert (response.status, response.error["param"]) == (400, param), fields
        assert not client.engine.requests


@pytest.mark.anyio
async def test_values_that_change_nothing() -> None:
    async with serving() as client:
        neutral: dict[str, Any] = {"logit_bias": {}, "response_format": {"type": "text"}, "tools": []}
        assert (await client.chat(**neutral, tool_choice="auto", modalities=["text"], functions=[])).status == 200
        assert (await client.complete(suffix="", echo=False, n=2, best_of=2)).status == 200


@pytest.mark.anyio
async def test_logprobs_are_off_unless_enabled() -> None:
    async with serving(config=Config()) as client:
        for response, param in (
            (await client.chat(logprobs=True), "logprobs"),
            (await client.complete(logprobs=1), "logprobs"),
            (await client.chat(prompt_logprobs=0), "prompt_logprobs"),
        ):
            assert (response.status, response.error["param"]) == (400, param)
            assert (
                response.error["message"]
                == "Logprobs is disabled, please enable it in startup config: --enable-logprob (enable_logprob)."
            )


@pytest.mark.anyio
async def test_the_models_names() -> None:
    async with serving(config=Config(model="owner/fake-model")) as client:
        for name in ("fake-model", "owner/fake-model", "default", "null", "", None):
            response = await client.chat(model=name)
            assert (response.status, response.json()["model"]) == (200, "fake-model")
        for response in (await client.chat(model="gpt-4"), await client.complete(model="gpt-4")):
            assert (response.status, response.error["code"]) == (404, "model_not_found")
            assert response.error["param"] == "model"
            assert "'gpt-4'" in response.error["message"]
