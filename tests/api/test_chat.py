from __future__ import annotations

import random
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from fdserve.config import Config
from tests.http.client import Response, serving
from tests.http.fake_engine import EOS, FakeEngine, Script, follow, ids, say

pytestmark = pytest.mark.anyio


def choice(response: Response) -> dict[str, Any]:
    assert response.status == 200, response.body
    content = response.json()
    ChatCompletion.model_validate(content, strict=True)
    assert len(content["choices"]) == 1
    result: dict[str, Any] = content["choices"][0]
    return result


def joined(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The chunks of each choice put together again, in the shape of a completion's choices."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        ChatCompletionChunk.model_validate(event, strict=True)
        for part in event["choices"]:
            whole = choices.setdefault(part["index"], {"content": "", "reasoning_content": "", "logprobs": []})
            assert "finish_reason" not in whole, "a chunk after the last one"
            delta = part["delta"]
            for name in ("content", "reasoning_content"):
                whole[name] += delta.get(name, "")
            if part["logprobs"]:
                whole["logprobs"] += part["logprobs"]["content"]
            whole.setdefault("prompt_token_ids", delta.get("prompt_token_ids"))
            whole.setdefault("completion_token_ids", []).extend(delta.get("completion_token_ids", []))
            if part["finish_reason"]:
                whole.update(finish_reason=part["finish_reason"], stop_reason=part["stop_reason"])
    return choices


async def test_a_completion() -> None:
    async with serving() as client:
        response = await client.chat()
        content = response.json()
        assert choice(response) == {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "Hello, world!",
                "refusal": None,
                "reasoning_content": None,
            },
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
        assert content["id"].startswith("chatcmpl-")
        assert (content["object"], content["model"]) == ("chat.completion", "fake-model")
        assert content["usage"] == {
            "prompt_tokens": 9,
            "completion_tokens": 14,
            "total_tokens": 23,
            "prompt_tokens_details": {"cached_tokens": 1},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }
        assert response.headers["content-type"] == "application/json"
        assert bytes(client.engine.requests[0].prompt) == b"user: Hi\n"


async def test_a_stream() -> None:
    async with serving(FakeEngine(say("Hello", delay=0.002))) as client:
        response = await client.chat(stream=True)
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = response.events
        assert [e["choices"][0]["delta"] for e in events] == [
            {"role": "assistant", "content": ""},
            *({"content": letter} for letter in "Hello"),
            {"content": ""},
        ]
        assert [e["choices"][0]["finish_reason"] for e in events] == [None] * 6 + ["stop"]
        assert len({(e["id"], e["created"], e["model"], e["object"]) for e in events}) == 1
        assert all("usage" not in e for e in events)
        times = [e["choices"][0].get("arrival_time") for e in events]
        assert times[0] is None
        assert times[1:] == sorted(times[1:])
        assert 0 < times[1] < 5


async def test_usage_in_a_stream() -> None:
    async with serving() as client:
        events = (await client.chat(stream=True, stream_options={"include_usage": True})).events
        assert [e["usage"] for e in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1]["choices"] == []
        assert events[-1]["usage"] == (await client.chat()).json()["usage"]
        events = (await client.chat(stream=True, stream_options={})).events
        assert all("usage" not in e for e in events)


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        ("Hé", "user: Hé\n"),
        (None, "user: \n"),
        ([], "user: \n"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "user: ab\n"),
    ],
)
async def test_content(content: Any, prompt: str) -> None:
    async with serving() as client:
        await client.chat(messages=[{"role": "user", "content": content}])
        assert bytes(client.engine.requests[0].prompt).decode() == prompt


async def test_roles() -> None:
    roles = ["system", "developer", "user", "assistant", "tool"]
    async with serving() as client:
        await client.chat(messages=[{"role": role, "content": "x"} for role in roles])
        prompt = bytes(client.engine.requests[0].prompt).decode()
        assert prompt == "system: x\nsystem: x\nuser: x\nassistant: x\ntool: x\n"


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[0].content[0]",
            "text-only",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]", "needs its text"),
        (
            [{"role": "user", "content": "x"}, {"role": "user", "content": 5}],
            "messages[1].content",
            "expected `str | array | null`, got `int`",
        ),
        ([{"role": "wizard", "content": "x"}], "messages[0].role", "wizard"),
        ([], "messages", "at least one"),
    ],
)
async def test_bad_messages(messages: list[Any], param: str, message: str) -> None:
    async with serving() as client:
        response = await client.chat(messages=messages)
        assert (response.status, response.error["param"]) == (400, param)
        assert message in response.error["message"]


async def test_no_messages() -> None:
    async with serving() as client:
        response = await client.post("/v1/chat/completions", {})
        assert response.status == 400
        assert response.error == {
            "message": "Missing required parameter: 'messages'.",
            "type": "invalid_request_error",
            "param": "messages",
            "code": "missing_required_parameter",
        }


async def test_what_the_template_gets() -> None:
    template = (
        "{{ tools | length if tools else 'no' }} tools, {{ style }}, {{ enable_thinking is defined }} "
        "{{ enable_thinking }}, {{ add_generation_prompt }}, {{ messages[0].tool_calls[0].function.name }}"
    )
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    async with serving(template=template) as client:
        fields = {
            "messages": [call],
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "chat_template_kwargs": {"style": "terse"},
        }
        await client.chat(**fields, enable_thinking=False)
        await client.chat(**fields, tool_choice="none")
        prompts = [bytes(request.prompt).decode() for request in client.engine.requests]
        assert prompts == ["1 tools, terse, True False, True, f", "no tools, terse, False , True, f"]


async def test_a_template_that_refuses() -> None:
    async with serving(template="{{ raise_exception('Roles must alternate.') }}") as client:
        response = await client.chat()
        assert (response.status, response.error["param"]) == (400, "messages")
        assert "Roles must alternate." in response.error["message"]


async def test_a_long_prompt_is_tokenized_off_the_loop() -> None:
    async with serving(FakeEngine(max_model_len=100_000)) as client:
        assert (await client.chat("x" * 50_000)).json()["usage"]["prompt_tokens"] == 50_007


async def test_length() -> None:
    async with serving() as client:
        whole = choice(await client.chat(max_tokens=5))
        assert (whole["message"]["content"], whole["finish_reason"], whole["stop_reason"]) == ("Hello", "length", None)


async def test_a_stop_token() -> None:
    async with serving() as client:
        response = await client.chat(stop_token_ids=[ord("w")])
        whole = choice(response)
        assert (whole["message"]["content"], whole["finish_reason"]) == ("Hello, ", "stop")
        assert whole["stop_reason"] == ord("w")
        assert response.json()["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize("batch", [1, 5, 100])
async def test_a_stop_string(batch: int) -> None:
    async with serving(FakeEngine(say("Hello, world!", batch=batch))) as client:
        response = await client.chat(stop=["zzz", "o, w"], return_token_ids=True)
        whole = choice(response)
        assert (whole["message"]["content"], whole["finish_reason"], whole["stop_reason"]) == ("Hell", "stop", "o, w")
        assert response.json()["usage"]["completion_tokens"] == 8
        assert whole["message"]["completion_token_ids"] == ids("Hello, w")
        assert not client.engine.active
        kept = choice(await client.chat(stop="o, w", include_stop_str_in_output=True))
        assert kept["message"]["content"] == "Hello, w"
        held = choice(await client.chat(stop="world!!"))
        assert (held["message"]["content"], held["stop_reason"]) == ("Hello, world!", None)


async def test_a_stop_string_before_min_tokens_does_not_stop() -> None:
    async with serving() as client:
        whole = choice(await client.chat(stop="o", min_tokens=6))
        assert (whole["message"]["content"], whole["stop_reason"]) == ("Hello, w", "o")


async def test_a_stop_string_on_the_last_allowed_token() -> None:
    async with serving() as client:
        whole = choice(await client.chat(stop="o", max_tokens=5))
        assert (whole["finish_reason"], whole["stop_reason"]) == ("stop", "o")


async def test_token_ids() -> None:
    async with serving() as client:
        message = choice(await client.chat(return_token_ids=True))["message"]
        assert bytes(message["prompt_token_ids"]) == b"user: Hi\n"
        assert message["completion_token_ids"] == [*b"Hello, world!", EOS]
        events = (await client.chat(return_token_ids=True, stream=True)).events
        assert events[0]["choices"][0]["delta"]["prompt_token_ids"] == message["prompt_token_ids"]
        assert all("prompt_token_ids" not in e["choices"][0]["delta"] for e in events[1:])
        assert joined(events)[0]["completion_token_ids"] == message["completion_token_ids"]


async def test_logprobs() -> None:
    async with serving(FakeEngine(say("hé"))) as client:
        whole = choice(await client.chat(logprobs=True, top_logprobs=2))
        entries = whole["logprobs"]["content"]
        # One entry a token, the eos left out; a token that is half a character has its true byte.
        assert [entry["bytes"] for entry in entries] == [[104], [0xC3], [0xA9]]
        assert [entry["token"] for entry in entries] == ["h", "�", "�"]
        assert entries[0] == {
            "token": "h",
            "logprob": -0.25,
            "bytes": [104],
            "top_logprobs": [
                {"token": "h", "logprob": -0.25, "bytes": [104]},
                {"token": "i", "logprob": -1.25, "bytes": [105]},
            ],
        }
        none = choice(await client.chat(logprobs=True))
        assert [entry["top_logprobs"] for entry in none["logprobs"]["content"]] == [[], [], []]
        assert choice(await client.chat())["logprobs"] is None


THOUGHT = "\nhm, hé\n</think>\n\n<response>\nYes.\n</response>\n"


@pytest.mark.parametrize(("template", "text"), [("x<think>", THOUGHT), ("x</think>", "<think>" + THOUGHT)])
async def test_reasoning(template: str, text: str) -> None:
    """Opened by the prompt, or by the model itself."""
    config = Config(reasoning_parser="ernie-x1", enable_logprob=True)
    async with serving(FakeEngine(say(text)), config, template=template) as client:
        response = await client.chat(logprobs=True)
        whole = choice(response)
        assert (whole["message"]["reasoning_content"], whole["message"]["content"]) == ("hm, hé", "Yes.")
        details = response.json()["usage"]["completion_tokens_details"]
        assert details["reasoning_tokens"] == len("\nhm, hé\n".encode())
        # Every generated token has its logprobs, whichever text it belongs to.
        assert len(whole["logprobs"]["content"]) == len(ids(text))


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("{{ messages[-1].content }}</response>", "\n\nYes.\n</response>\n", (None, "\n\nYes.")),
        ("<think>{{ messages[-1].content }}</think>", "\nhm</think>\nYes.", ("\nhm", "Yes.")),
    ],
)
async def test_a_continued_message_goes_on_where_it_ended(
    template: str, text: str, expected: tuple[str | None, str]
) -> None:
    async with serving(FakeEngine(say(text)), Config(reasoning_parser="ernie_x1"), template=template) as client:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Well:"}]
        message = choice(await client.chat(messages=messages, continue_final_message=True))["message"]
        assert (message["reasoning_content"], message["content"]) == expected


async def test_thinking_in_a_stream_comes_first() -> None:
    text = "\nhm\n</think>\n\n<response>\nYes.\n</response>\n"
    config = Config(reasoning_parser="ernie_x1")
    async with serving(FakeEngine(say(text)), config, template="<think>") as client:
        events = (await client.chat(stream=True, return_token_ids=True)).events
        deltas = [list(e["choices"][0]["delta"]) for e in events]
        assert deltas[1:] == [["content", "reasoning_content", "completion_token_ids"], ["content"], ["content"]]
        # Whoever prints the content of every delta prints the answer and nothing else.
        assert "".join(e["choices"][0]["delta"]["content"] for e in events) == "Yes."


async def test_a_thinking_budget() -> None:
    async with serving(config=Config(reasoning_parser="ernie_x1"), template="<think>") as client:
        await client.chat(reasoning_max_tokens=5)
        params = client.engine.requests[-1].params
        # The newline that is forced before the tag is thought, too.
        assert (params.thinking_budget, params.think_end_ids) == (4, tuple(ids("\n</think>\n\n")))
        assert params.think_end_id == ids("</think>")[0]
        await client.chat(reasoning_max_tokens=5, max_tokens=3)
        assert client.engine.requests[-1].params.thinking_budget is None
        # Where max_tokens ends the answer first, nothing is forced.
        await client.chat(reasoning_max_tokens=3, max_tokens=3)
        assert client.engine.requests[-1].params.thinking_budget is None
        await client.chat(reasoning_max_tokens=1, max_tokens=9)
        assert client.engine.requests[-1].params.thinking_budget == 0
        await client.chat()
        assert client.engine.requests[-1].params.thinking_budget is None
    async with serving(config=Config(reasoning_parser="qwen3"), template="<think>") as client:
        await client.chat(extra_body={"reasoning_max_tokens": 5})
        params = client.engine.requests[-1].params
        assert (params.thinking_budget, params.think_end_ids) == (5, (ids("</think>")[0],))
    async with serving(config=Config(reasoning_parser="qwen3"), template="<think></think>") as client:
        await client.chat(reasoning_max_tokens=5)
        assert client.engine.requests[-1].params.thinking_budget is None


async def test_an_unfinished_character_is_flushed() -> None:
    async with serving(FakeEngine(follow([*b"a\xe4\xb8", EOS]))) as client:
        assert choice(await client.chat())["message"]["content"] == "a�"
        assert joined((await client.chat(stream=True)).events)[0]["content"] == "a�"


async def test_special_tokens_can_be_kept() -> None:
    async with serving(FakeEngine(follow([*b"a", EOS, *b"b"]))) as client:
        fields = {"ignore_eos": True, "max_tokens": 3}
        assert choice(await client.chat(**fields))["message"]["content"] == "ab"
        assert choice(await client.chat(**fields, skip_special_tokens=False))["message"]["content"] == "a</s>b"


async def test_choices() -> None:
    texts = ["first", "second, longer", "3"]
    engine = FakeEngine()
    numbered: dict[str, Script] = {f"-{i}": say(text, delay=0.001) for i, text in enumerate(texts)}

    async def script(request: Any) -> Any:
        async for delta in numbered[request.id[-2:]](request):
            yield delta

    engine.script = script
    async with serving(engine) as client:
        response = await client.chat(n=3, seed=5)
        assert [c["message"]["content"] for c in response.json()["choices"]] == texts
        assert [c["index"] for c in response.json()["choices"]] == [0, 1, 2]
        assert response.json()["usage"]["prompt_tokens"] == 9
        assert response.json()["usage"]["completion_tokens"] == sum(map(len, texts)) + 3
        assert [request.params.seed for request in engine.requests] == [5, 6, 7]
        events = (await client.chat(n=3, stream=True)).events
        assert [e["choices"][0]["delta"].get("role") for e in events[:4]] == ["assistant"] * 3 + [None]
        streamed = joined(events)
        assert [streamed[i]["content"] for i in range(3)] == texts
        indexes = [e["choices"][0]["index"] for e in events[3:]]
        assert indexes != sorted(indexes)  # they come in turn


@pytest.mark.parametrize("seed", range(12))
async def test_streaming_says_the_same(seed: int) -> None:
    """Whatever the text, the split into steps, and what is asked for."""
    rng = random.Random(seed)
    alphabet = ["a", "é", "文", "🙂", "\n", " stop", "<think>", "</think>", "<response>", "</response>"]
    text = "".join(rng.choices(alphabet, k=60))
    script = follow([*ids(text), *b"\xe6"], delay=0.0005 * rng.randrange(2), batch=rng.choice([1, 2, 7]))
    config = Config(enable_logprob=True, reasoning_parser=rng.choice(["none", "ernie_x1", "qwen3"]))
    template = rng.choice(["<think>", "x", "</think>"])
    fields: dict[str, Any] = {
        "max_tokens": rng.randrange(20, 200),
        "stop": rng.choice([None, "stop", ["a\n", "文🙂"]]),
        "logprobs": True,
        "top_logprobs": rng.randrange(4),
        "return_token_ids": True,
        "ignore_eos": True,
    }
    fields["max_tokens"] = min(fields["max_tokens"], len(ids(text)) + 1)
    async with serving(FakeEngine(script), config, template=template) as client:
        whole = choice(await client.chat(**fields))
        streamed = joined((await client.chat(**fields, stream=True)).events)[0]
        assert streamed == {
            "content": whole["message"]["content"],
            "reasoning_content": whole["message"]["reasoning_content"] or "",
            "logprobs": whole["logprobs"]["content"],
            "prompt_token_ids": whole["message"]["prompt_token_ids"],
            "completion_token_ids": whole["message"]["completion_token_ids"],
            "finish_reason": whole["finish_reason"],
            "stop_reason": whole["stop_reason"],
        }


async def test_stop_strings_that_would_hold_up_others_are_refused() -> None:
    async with serving() as client:
        response = await client.chat(stop=["x" * 8192, "y" * 8193])
        assert response.status == 400
        assert response.error["param"] == "stop"
        assert (await client.chat(stop=["x" * 8192, "y" * 8192])).status == 200
