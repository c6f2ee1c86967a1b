"""Guessing next tokens changes how many steps a request takes, and nothing else, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import anyio
import openai
import pytest

from fdserve.engine.engine import Engine
from fdserve.engine.request import Request, SamplingParams, TokenDelta, TokenLogprobs
from fdserve.engine.speculation import StepCost
from fdserve.engine.stats import EngineStats
from fdserve.text.tokenizer import load_tokenizer
from tests.e2e.engines import CHECKPOINT, SHAPE, at_once, bits, random_checkpoint, serving
from tests.http.processes import ServerProcess
from tests.models.checkpoints import DENSE

NGRAM = json.dumps({"method": "ngram", "num_speculative_tokens": 4})
TEXT = "The sum of 12 and 30 is 42, and the sum of 30 and 12 is 42, too. "
FEW = tuple(range(100, 103))  # so that sampled texts repeat themselves
FEW_BITS = bits(*FEW)
CHOICES: list[dict[str, Any]] = [
    {},
    {"logprobs": 3},
    {"temperature": 1.0, "allowed_ids": FEW_BITS},
    {"temperature": 0.8, "top_p": 0.7, "allowed_ids": FEW_BITS, "logprobs": 2},
    {"temperature": 0.6, "min_p": 0.1, "top_k": 4, "repetition_penalty": 1.1},
    {"presence_penalty": 0.4, "frequency_penalty": 0.05, "logprobs": 0},
    {"repetition_penalty": 1.3, "temperature": 0.3, "allowed_ids": FEW_BITS},
    {"allowed_ids": FEW_BITS, "temperature": 1.0, "min_tokens": 12, "eos_token_ids": FEW[:1]},
    {"allowed_ids": FEW_BITS, "temperature": 1.0, "stop_token_ids": FEW[1:2], "min_tokens": 5},
    {"allowed_ids": FEW_BITS, "temperature": 0.9, "bad_words": ((101, 102, 100), (102, 102))},
    {"banned_ids": FEW_BITS, "temperature": 0.2, "logprobs": 1},
    {"thinking_budget": 9, "think_end_ids": (100, 103, 100), "think_end_id": 103, "answer_limit": 15},
    {"logit_bias": ((100, 9.0), (101, 9.0)), "temperature": 1.0, "prompt_logprobs": 1},
]


@cache
def base() -> list[int]:
    return load_tokenizer(CHECKPOINT).encode(TEXT * 6)


def requests(seed: int, count: int, lengths: tuple[int, ...] = (1, 7, 33, 60)) -> list[Request]:
    """Of every kind; half of them cold, half with a prompt that others share."""
    random = Random(seed)
    made = []
    for index in range(count):
        ids = [random.randrange(100, 200), *base()[: random.randrange(20, 150)]] if index % 2 else base()
        defaults = {"max_tokens": random.choice(lengths), "seed": seed + index, "temperature": 0.0}
        params = SamplingParams(**{**defaults, **CHOICES[index % len(CHOICES)]})
        made.append(Request(id=str(index), prompt=ids, params=params, priority=random.randrange(2)))
    return made


async def generate(engine: Engine, request: Request) -> TokenDelta:
    """All deltas of a request as one."""
    logprobs: list[TokenLogprobs] = []
    whole = TokenDelta([], logprobs=logprobs)
    with engine.submit(request) as generation:
        while whole.finish_reason is None:
            for delta in await generation.receive():
                assert delta.error is None
                assert delta.logprobs is None or len(delta.logprobs) == len(delta.token_ids)
                whole.token_ids += delta.token_ids
                logprobs += delta.logprobs or []
                whole.prompt_logprobs = delta.prompt_logprobs or whole.prompt_logprobs
                whole.finish_reason, whole.stop_token_id = delta.finish_reason, delta.stop_token_id
    return whole


async def generate_all(asked: list[Request], *, checkpoint: Path = CHECKPOINT, **settings: Any) -> Any:
    """What all of them give at the same time, and the engine's figures at the end."""
    outputs: dict[str, TokenDelta] = {}

    async def run(engine: Engine, request: Request) -> None:
        outputs[request.id] = await generate(engine, request)

    async with serving(checkpoint, **settings) as engine:
        async with anyio.create_task_group() as group:
            for request in asked:
                group.start_soon(run, engine, request)
        await anyio.sleep(0.05)
        assert engine.stats().kv_blocks_used == 0
        return [outputs[request.id] for request in asked], engine.stats()


def compare(asked: list[Request], plain: dict[str, Any], drafting: dict[str, Any]) -> tuple[EngineStats, EngineStats]:
    """The figures without guesses and with them; the outputs are the same."""
    (without, before), (guessed, after) = anyio.run(
        at_once,
        partial(generate_all, asked, **plain),
        partial(generate_all, asked, **drafting, speculative_config=NGRAM),
    )
    for request, ours, theirs in zip(asked, guessed, without, strict=True):
        assert ours == theirs, request
    assert before.drafted_tokens == 0
    assert 0 < after.accepted_tokens < after.drafted_tokens
    assert after.generated_tokens == before.generated_tokens
    return before, after


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guess also where it does not pay: these models compute a token nearly as fast as none."""
    monkeypatch.setattr(StepCost, "note", lambda self, tokens, seconds: None)
    monkeypatch.setattr("fdserve.engine.speculation.FIRST_FIXED_TOKENS", 1000.0)


@pytest.mark.usefixtures("eager")
def test_every_kind_of_request_gets_the_same_tokens() -> None:
    asked = requests(1, 30)
    before, after = compare(asked, {}, {"max_num_batched_tokens": 100})
    assert after.accepted_tokens > 0.05 * after.generated_tokens
    assert before.preemptions == after.preemptions == 0


@pytest.mark.usefixtures("eager")
def test_also_with_few_blocks_and_after_preemptions() -> None:
    settings = {"num_gpu_blocks_override": 32, "max_num_batched_tokens": 200}
    _, after = compare(requests(2, 16, (70, 120)), {"num_threads": 1}, settings)
    assert after.preemptions > 0


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("quantization", ["wint8", "w8a8"])
def test_also_quantized(quantization: str) -> None:
    compare(requests(3, 12), {"quantization": quantization}, {"quantization": quantization})


@pytest.mark.usefixtures("eager")
def test_also_on_two_ranks(tmp_path: Path) -> None:
    settings = {"checkpoint": random_checkpoint(tmp_path / "model", {**DENSE, **SHAPE}), "tensor_parallel_size": 2}
    asked = []
    for index in range(12):
        params = SamplingParams(max_tokens=60, seed=index, temperature=(0.0, 0.4)[index % 2], logprobs=index % 3)
        asked.append(Request(id=str(index), prompt=[3, 4, 5 + index] * (2 + index), params=params))
    compare(asked, settings, settings)


def test_a_loop_takes_a_fraction_of_the_steps() -> None:
    params = SamplingParams(max_tokens=100, seed=0, temperature=0.0, allowed_ids=bits(100))
    before, after = compare_alone(Request(id="r", prompt=base(), params=params))
    assert before.steps == 100
    assert after.steps < 30
    assert after.accepted_tokens > 0.9 * after.drafted_tokens


def compare_alone(request: Request) -> tuple[EngineStats, EngineStats]:
    (without,), before = anyio.run(lambda: generate_all([request]))
    (guessed,), after = anyio.run(lambda: generate_all([request], speculative_config=NGRAM))
    assert guessed == without
    return before, after


@pytest.fixture(scope="module")
def servers() -> Iterator[list[openai.OpenAI]]:
    """One without guesses, one with them."""
    settings = {"FDSERVE_ENABLE_LOGPROB": "1", "FDSERVE_KV_CACHE_MEMORY": "64M", "FDSERVE_MAX_MODEL_LEN": "1024"}
    command = ("-m", "fdserve", "--port", "0")
    with (
        ServerProcess(*command, **settings) as plain,
        ServerProcess(*command, "--speculative-config", NGRAM, **settings) as drafting,
    ):
        clients = []
        for process in (plain, drafting):
            process.listening()
            process.wait_line("^ready")
            clients.append(openai.OpenAI(base_url=f"http://127.0.0.1:{process.port}/v1", api_key="x", max_retries=0))
        yield clients
        metrics = drafting.get("/metrics")[1].decode()
        counts = [float(line.split()[1]) for line in metrics.splitlines() if line.startswith("fdserve_accepted_tokens")]
        assert counts[0] > 50  # how many are guessed depends on what steps cost at the time
        for client in clients:
            client.close()


LOOP: dict[str, Any] = {
    "prompt": TEXT,
    "temperature": 0,
    "extra_body": {"allowed_token_ids": list(FEW), "ignore_eos": True},
}


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 50},
        {"max_tokens": 3},
        {"max_tokens": 60, "n": 3, "temperature": 1.0, "seed": 4},
        {"max_tokens": 40, "logprobs": 2},
        {"max_tokens": 40, "temperature": 0.7, "seed": 1, "presence_penalty": 0.5},
    ],
)
def test_clients_see_no_difference(servers: list[openai.OpenAI], fields: dict[str, Any]) -> None:
    answers = [client.completions.create(model="null", **{**LOOP, **fields}) for client in servers]
    assert answers[0].choices == answers[1].choices
    assert answers[0].usage == answers[1].usage


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", [5, 6, 7, 8, 9, 17])
def test_a_stop_string_amid_right_guesses_drops_what_follows(
    servers: list[openai.OpenAI], stream: bool, place: int
) -> None:
    whole = servers[0].completions.create(model="null", max_tokens=40, **LOOP).choices[0].text
    stop = whole[place : place + 3]
    ends = []
    for client in servers:
        options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        answer = client.completions.create(model="null", max_tokens=40, stop=[stop], **options, **LOOP)
        chunks = list(answer) if stream else [answer]
        text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
        reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
        ends.append((text, reasons, chunks[-1].usage))
    assert ends[0] == ends[1]
    assert ends[0][:2] == (whole[: whole.index(stop)], ["stop"])


def test_a_cancelled_stream_frees_its_blocks(servers: list[openai.OpenAI]) -> None:
    client = servers[1]
    for _ in range(3):
        with client.completions.create(model="null", max_tokens=800, stream=True, **LOOP) as stream:
            for number, _chunk in enumerate(stream):
                if number == 3:
                    break
    answer = client.completions.create(model="null", max_tokens=20, **LOOP)
    assert answer.usage.completion_tokens == 20
