"""The Responses API and the Messages API over the demo model, through the openai and anthropic clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from pydantic import BaseModel

from tests.http.processes import ServerProcess, until

SETTINGS = {"FDSERVE_ENABLE_LOGPROB": "1", "FDSERVE_KV_CACHE_MEMORY": "64M", "FDSERVE_MAX_MODEL_LEN": "1024"}
SUM = "What is 123 + 456?"
WEATHER = "What is the weather in Paris?"
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
ABOUT = "Get the weather of a city"
FUNCTION: Any = {"type": "function", "name": "get_weather", "description": ABOUT, "parameters": SCHEMA}
TOOL: Any = {"name": "get_weather", "description": ABOUT, "input_schema": SCHEMA}
GREEDY = {"temperature": 0}  # newer versions of anthropic's client have no argument for it
THINK: Any = {"type": "enabled", "budget_tokens": 400}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("-m", "fdserve", "--port", "0", "--api-key", "secret", **SETTINGS) as process:
        process.listening()
        until(lambda: process.get("/health")[0] == 200)
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="secret", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=f"http://127.0.0.1:{server.port}", api_key="secret", max_retries=0) as client:
        yield client


def respond(client: openai.OpenAI, input: Any, **fields: Any) -> Any:
    return client.responses.create(model="null", input=input, temperature=0, **fields)


def test_responses_continue_each_other(client: openai.OpenAI) -> None:
    first = respond(client, SUM, instructions="You are the demo model.")
    assert "579" in first.output_text
    thought = first.output[0]
    assert "carry" in thought.content[0].text
    assert 30 < first.usage.output_tokens_details.reasoning_tokens < first.usage.output_tokens
    second = respond(client, "What is 20 + 34?", previous_response_id=first.id)
    assert "54" in second.output_text
    assert second.previous_response_id == first.id
    # The same, with the conversation in the client's hands.
    items = [{"role": "user", "content": SUM}, *first.output, {"role": "user", "content": "What is 20 + 34?"}]
    third = respond(client, items, store=False)
    assert third.output_text == second.output_text
    assert third.usage.input_tokens == second.usage.input_tokens
    assert third.usage.input_tokens_details.cached_tokens > 0
    assert client.responses.retrieve(second.id) == second
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError, match="not found"):
        client.responses.retrieve(second.id)
    with pytest.raises(openai.NotFoundError, match="not found"):
        client.responses.retrieve(third.id)


@pytest.mark.parametrize("fields", [{}, {"reasoning": {"summary": "auto"}}, {"reasoning": {"effort": "none"}}])
def test_a_stream_of_a_response_adds_up(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    whole = respond(client, SUM, **fields)
    texts, thoughts = "", ""
    with client.responses.stream(model="null", input=SUM, temperature=0, **fields) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                texts += event.delta
                assert event.snapshot == texts
            elif event.type in ("response.reasoning_text.delta", "response.reasoning_summary_text.delta"):
                thoughts += event.delta
        final = stream.get_final_response()
    assert texts == whole.output_text == final.output_text
    given = [part.text for item in whole.output if item.type == "reasoning" for part in item.summary or item.content]
    assert [thoughts] * bool(thoughts) == given
    assert bool(thoughts) == (fields.get("reasoning", {}).get("effort") != "none")
    assert final.usage is not None
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_function_is_called_and_answers(client: openai.OpenAI) -> None:
    first = respond(client, WEATHER, tools=[FUNCTION])
    call = first.output[-1]
    assert (call.type, call.name) == ("function_call", "get_weather")
    assert "Paris" in call.arguments
    with client.responses.stream(model="null", input=WEATHER, temperature=0, tools=[FUNCTION]) as stream:
        deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        last: Any = stream.get_final_response().output[-1]
        assert "".join(deltas) == last.arguments == call.arguments
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny, 21 degrees"}
    assert "sunny" in respond(client, [result], previous_response_id=first.id, tools=[FUNCTION]).output_text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_function_is_called_because_it_must_be(client: openai.OpenAI, choice: Any) -> None:
    call = respond(client, "Hello!", tools=[FUNCTION], tool_choice=choice).output[-1]
    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
    assert set(json.loads(call.arguments)) >= {"city"}


class Sum(BaseModel):
    first: int
    second: int


def test_a_response_in_a_form(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model="null", input="12 and 34", text_format=Sum, temperature=0)
    assert isinstance(parsed.output_parsed, Sum)


def test_logprobs_of_a_response(client: openai.OpenAI) -> None:
    text = respond(client, SUM, top_logprobs=2).output[-1].content[0]
    assert b"".join(bytes(entry.bytes) for entry in text.logprobs).decode() == text.text
    assert all(len(entry.top_logprobs) == 2 for entry in text.logprobs)


def test_a_response_that_is_cut_off(client: openai.OpenAI) -> None:
    response = respond(client, SUM, max_output_tokens=10)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.output_tokens == 10


def test_openais_client_on_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        respond(client, SUM, tools=[{"type": "web_search"}])
    assert (error.value.param, error.value.code) == ("tools[0].type", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError) as error:
        respond(client, SUM, previous_response_id="resp_none")
    assert error.value.code == "previous_response_not_found"


def ask(claude: anthropic.Anthropic, *messages: Any, **fields: Any) -> Any:
    return claude.messages.create(model="null", max_tokens=500, messages=_turns(messages), extra_body=GREEDY, **fields)


def _turns(messages: tuple[Any, ...]) -> Any:
    """The messages, of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(messages)]


def test_a_message(claude: anthropic.Anthropic) -> None:
    direct = ask(claude, "Hello!", system="You are the demo model.")
    assert [block.type for block in direct.content] == ["text"]
    assert direct.stop_reason == "end_turn"
    thinking = ask(claude, SUM, thinking=THINK)
    thought, text = thinking.content
    assert "carry" in thought.thinking
    assert "579" in text.text
    assert thinking.usage.to_dict()["output_tokens_details"]["thinking_tokens"] > 30
    for _ in range(2):
        again = ask(claude, SUM, thinking.content, "What is 20 + 34?", thinking=THINK)
        assert "54" in again.content[-1].text
    assert again.usage.cache_read_input_tokens > 0
    counted = claude.messages.count_tokens(
        model="null", messages=_turns((SUM, thinking.content, "What is 20 + 34?")), thinking=THINK
    )
    assert counted.input_tokens == again.usage.input_tokens + again.usage.cache_read_input_tokens


def test_a_begun_answer_goes_on(claude: anthropic.Anthropic) -> None:
    whole = ask(claude, "Hello!").content[0].text
    assert ask(claude, "Hello!", whole[:11]).content[0].text == whole[11:]


@pytest.mark.parametrize("fields", [{}, {"thinking": THINK}, {"thinking": THINK, "tools": [TOOL]}])
def test_a_stream_of_a_message_adds_up(claude: anthropic.Anthropic, fields: dict[str, Any]) -> None:
    question = WEATHER if "tools" in fields else SUM
    whole = ask(claude, question, **fields)
    with claude.messages.stream(
        model="null", max_tokens=500, messages=_turns((question,)), extra_body=GREEDY, **fields
    ) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "".join(block.text for block in whole.content if block.type == "text")

    def comparable(message: Any) -> list[Any]:
        return [block.model_dump(exclude={"id", "parsed_output"}) for block in message.content]

    assert comparable(final) == comparable(whole)
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_tool_is_used_and_answers(claude: anthropic.Anthropic) -> None:
    first = ask(claude, WEATHER, tools=[TOOL])
    use = first.content[-1]
    assert (first.stop_reason, use.type, use.name) == ("tool_use", "tool_use", "get_weather")
    assert "Paris" in use.input.values()
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny, 21 degrees"}
    assert "sunny" in ask(claude, WEATHER, first.content, [result], tools=[TOOL]).content[-1].text


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_tool_is_used_because_it_must_be(claude: anthropic.Anthropic, choice: Any) -> None:
    message = ask(claude, "Hello!", tools=[TOOL], tool_choice=choice)
    use = message.content[-1]
    assert (message.stop_reason, use.type, use.name) == ("tool_use", "tool_use", "get_weather")
    assert "city" in use.input


def test_a_message_in_a_form(claude: anthropic.Anthropic) -> None:
    schema = {**Sum.model_json_schema(), "additionalProperties": False}
    form = {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    message = claude.messages.create(
        model="null", max_tokens=200, messages=_turns(("12 and 34",)), extra_body={**GREEDY, **form}
    )
    assert isinstance(Sum.model_validate_json(message.content[0].text), Sum)  # type: ignore[union-attr]


def test_a_stop_sequence(claude: anthropic.Anthropic) -> None:
    message = ask(claude, "Hello!", stop_sequences=["demo"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "demo")
    assert "demo" not in message.content[0].text


def test_anthropics_client_on_errors(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as bad:
        ask(claude, [{"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/x"}}])
    assert bad.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    assert bad.value.request_id
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="other", max_tokens=5, messages=_turns(("Hi",)))
    stranger = anthropic.Anthropic(base_url=str(claude.base_url), api_key="wrong", max_retries=0)
    with stranger, pytest.raises(anthropic.AuthenticationError):
        ask(stranger, "Hi")


def test_leaving_a_stream_cancels_it() -> None:
    command = ["-m", "hypercorn", "tests.http.fake_main:app", "-w", "0", "-b", "127.0.0.1:0", "-k", "trio"]
    with ServerProcess(*command) as process:
        url = f"http://127.0.0.1:{process.listening().port}"
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
            client.responses.create(model="null", input="endless", stream=True) as responses,
        ):
            assert any(event.type == "response.output_text.delta" for event in responses)
            assert process.running() == 1
        assert until(lambda: process.running() == 0) < 1
        with (
            anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as claude,
            claude.messages.create(model="null", max_tokens=9, messages=_turns(("endless",)), stream=True) as messages,
        ):
            assert any(event.type == "content_block_delta" for event in messages)
            assert process.running() == 1
        assert until(lambda: process.running() == 0) < 1
