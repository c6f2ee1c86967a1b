"""An engine on emulated CUDA ops: all that its rank does on a GPU but the GPU's own part, with replays for graphs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from fdserve.engine.engine import Engine
from fdserve.engine.request import Request, SamplingParams, TokenDelta
from tests.cuda.test_emulated_model import ROOT, SHAPE, SPARSE, checkpoint_of
from tests.cuda.test_emulated_ranks import EMULATE
from tests.e2e.engines import at_once, bits, serving
from tests.models.checkpoints import DENSE

PROMPT = [3, 1, 4, 1, 5]
COUNT = 6


async def generate(engine: Engine, prompt: list[int] = PROMPT, **params: Any) -> TokenDelta:
    """All of an answer in one; greedy."""
    whole, logprobs = TokenDelta([]), []
    chosen = SamplingParams(**{"max_tokens": COUNT, "seed": 1, "temperature": 0.0, **params})
    with engine.submit(Request(id="r", prompt=prompt, params=chosen)) as generation, anyio.fail_after(60):
        while True:
            for delta in await generation.receive():
                whole.token_ids += delta.token_ids
                logprobs += delta.logprobs or []
                whole.prompt_logprobs = delta.prompt_logprobs or whole.prompt_logprobs
                if delta.finish_reason is not None:
                    assert delta.finish_reason == "length", delta.error
                    whole.logprobs = logprobs
                    return whole


async def check_logprobs(engine: Engine) -> list[int]:
    """What recorded decodes report is what a prefill reports of the same tokens; returns them."""
    answer = await generate(engine, logprobs=3)
    assert answer.logprobs is not None
    assert [each.logprob for each in answer.logprobs] == [each.top_logprobs[0] for each in answer.logprobs]
    scored = await generate(engine, PROMPT + answer.token_ids, max_tokens=0, prompt_logprobs=3)
    assert scored.prompt_logprobs is not None
    for decoded, prefilled in zip(answer.logprobs, scored.prompt_logprobs[-COUNT:], strict=True):
        assert np.allclose(decoded.logprob, prefilled.logprob, atol=0.05)
        assert np.allclose(decoded.top_logprobs, prefilled.top_logprobs, atol=0.05)
    return answer.token_ids


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(
    ("config", "quantization"), [(DENSE, "none"), (SPARSE, "wint4")], ids=["dense-none", "sparse-wint4"]
)
async def test_an_engine_serves_all_that_a_request_can_ask_for(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], quantization: str
) -> None:
    (tmp_path / "model").mkdir()
    checkpoint = checkpoint_of(tmp_path / "model", config | SHAPE, quantization)
    (tmp_path / "sitecustomize.py").write_text(EMULATE.format(library=str(library)), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    speculation = '{"method": "ngram", "num_speculative_tokens": 3}'
    settings: Any = {"max_model_len": 64, "max_num_seqs": 3, "kv_cache_memory": "1M", "quantization": quantization}
    async with serving(checkpoint, speculative_config=speculation, **settings) as engine:
        tokens = await check_logprobs(engine)
        assert (await generate(engine)).token_ids == tokens
        together = await at_once(*[lambda: generate(engine)] * 3)
        assert [answer.token_ids for answer in together] == [tokens] * 3
        penalised = await generate(engine, presence_penalty=1e4)
        assert len(set(penalised.token_ids)) == COUNT, "no token twice"
        masked = await generate(engine, temperature=1.0, top_p=0.9, allowed_ids=bits(7, 9))
        assert set(masked.token_ids) <= {7, 9}
        # Repeats itself, so that the next tokens are guessed.
        biased = await generate(engine, max_tokens=24, logit_bias=((11, 1e4),), logprobs=0)
        assert biased.token_ids == [11] * 24
        assert engine.stats().accepted_tokens > 0
