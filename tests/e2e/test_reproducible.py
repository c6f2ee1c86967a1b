"""The same request at temperature 0 gives the same tokens and logprobs, bit for bit, whatever else happens."""

from __future__ import annotations

from functools import partial
from typing import Any

import anyio
import pytest

from fdserve.engine.engine import Engine
from fdserve.engine.request import Request, SamplingParams, TokenLogprobs
from fdserve.text.tokenizer import load_tokenizer
from tests.e2e.engines import CHECKPOINT, at_once, serving

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]
Output = tuple[list[int], list[TokenLogprobs], int]

# Long enough for several blocks and several chunks, and ends in the middle of a block.
TEXT = "Chunked prefill is what a server does with a long prompt. " * 9 + "The sum of 12 and 30 is"
SAMPLING: dict[str, Any] = {"max_tokens": 40, "seed": 7, "temperature": 0.0, "logprobs": 5}


def prompt() -> list[int]:
    return load_tokenizer(CHECKPOINT).encode(TEXT)


async def generate(engine: Engine, ids: list[int], **changes: Any) -> Output:
    params = SamplingParams(**{**SAMPLING, **changes})
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    with engine.submit(Request(id="r", prompt=ids, params=params)) as generation:
        while True:
            for delta in await generation.receive():
                tokens += delta.token_ids
                logprobs += delta.logprobs or []
                if delta.finish_reason is not None:
                    assert delta.finish_reason == "length"
                    assert delta.error is None
                    return tokens, logprobs, delta.cached_tokens


async def generate_many(engine: Engine, prompts: list[list[int]], **changes: float) -> list[Output]:
    return await at_once(*[partial(generate, engine, ids, **changes) for ids in prompts])


def others(count: int) -> list[list[int]]:
    """Prompts of different lengths that share no prefix with `prompt()`."""
    ids = prompt()
    return [[5 + index, *ids[index : 20 + 17 * index]] for index in range(count)]


@pytest.fixture(scope="module")
def reference() -> Output:
    """Alone, cold, the prefill in one step."""

    async def run() -> Output:
        async with serving(max_num_batched_tokens=2048) as engine:
            return await generate(engine, prompt())

    tokens, logprobs, cached = anyio.run(run)
    assert len(prompt()) > 130
    assert (len(tokens), len(logprobs), cached) == (40, 40, 0)
    assert len(set(tokens)) > 5
    return tokens, logprobs, cached


async def test_however_the_prefill_is_chunked(reference: Output) -> None:
    async def chunked(budget: int) -> Output:
        async with serving(max_num_batched_tokens=budget) as engine:
            return await generate(engine, prompt())

    for output in await at_once(partial(chunked, 7), partial(chunked, 64)):
        assert output[:2] == reference[:2]


async def test_in_a_batch_of_sixteen_and_with_a_warm_cache(reference: Output) -> None:
    async with serving(max_num_batched_tokens=100) as engine:
        outputs = await generate_many(engine, [*others(8), prompt(), *others(15)[8:]])
        assert outputs[8][:2] == reference[:2]
        warm = await generate(engine, prompt())
        assert warm[2] >= 112
        assert warm[:2] == reference[:2]
        # and when several prompts fill the same blocks in the same step
        for output in await generate_many(engine, [[9, *prompt()]] * 3):
            assert output[0] == (await generate(engine, [9, *prompt()]))[0]


async def test_after_preemption(reference: Output) -> None:
    async with serving(num_gpu_blocks_override=32, max_num_batched_tokens=256) as engine:
        outputs = await generate_many(engine, [*others(3), prompt()] * 3)
        assert engine.stats().preemptions > 0
        for output in outputs[3::4]:
            assert output[:2] == reference[:2]


async def test_with_another_number_of_threads_and_no_prefix_cache(reference: Output) -> None:
    async with serving(num_threads=1, enable_prefix_caching=False) as engine:
        for _ in range(2):
            tokens, logprobs, cached = await generate(engine, prompt())
            assert (tokens, logprobs, cached) == (*reference[:2], 0)


async def test_a_seed_reproduces_a_sampled_text_in_any_company() -> None:
    async with serving(max_num_batched_tokens=64) as engine:
        alone = await generate(engine, prompt(), temperature=1.0)
        other = await generate(engine, prompt(), temperature=1.0, seed=8)
        together = await generate_many(engine, [*others(5), prompt()], temperature=1.0)
    assert together[5][:2] == alone[:2]
    assert other[0] != alone[0]


@pytest.mark.parametrize(("quantization", "kv_cache_dtype"), [("wint8", "auto"), ("wint4", "int8"), ("w8a8", "int8")])
async def test_quantized(quantization: str, kv_cache_dtype: str) -> None:
    settings: dict[str, Any] = {"quantization": quantization, "kv_cache_dtype": kv_cache_dtype}

    async def alone() -> list[Output]:
        async with serving(**settings) as engine:
            return [await generate(engine, prompt())]

    async def in_company() -> list[Output]:
        async with serving(**settings, max_num_batched_tokens=64, num_threads=1) as engine:
            outputs = await generate_many(engine, [*others(8), prompt(), *others(15)[8:]])
            return [outputs[8], await generate(engine, prompt())]

    (expected,), outputs = await at_once(alone, in_company)
    for output in outputs:
        assert output[:2] == expected[:2]
