"""lm-evaluation-harness over /v1/completions gives the numbers of a direct forward.

It runs where the harness is installed: tox run -e lm-eval.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.http.processes import ServerProcess

lm_eval = pytest.importorskip("lm_eval")

QUESTIONS = [
    {"question": "The sum of 2 and 3 is", "choices": [" 5", " 7", " blue"], "answer": 0},
    {"question": "A prompt is made of", "choices": [" tokens", " stones", " rivers of milk"], "answer": 0},
    {"question": "fdserve is a", "choices": [" server", " planet", " kind of cheese", " fish"], "answer": 0},
    {"question": "Paris is a", "choices": [" city", " number"], "answer": 0},
]


def task(directory: Path) -> dict[str, Any]:
    """A multiple-choice task over a local file."""
    data = directory / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def direct(context: str, continuation: str) -> tuple[float, bool]:
    """The log-likelihood of a continuation, and whether it is the greedy one, from the model itself."""
    from fdserve.demo import CHECKPOINT
    from fdserve.models.config import read_config
    from fdserve.models.loader import load_model
    from fdserve.text.tokenizer import load_tokenizer
    from tests.models.stepping import Chunk, Stepper

    tokenizer = load_tokenizer(CHECKPOINT)
    # As the harness splits the ids of the whole text: what the context alone has comes first.
    ids, start = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    model = load_model(CHECKPOINT, read_config(CHECKPOINT), rank=0, world_size=1, dtype="bfloat16")
    logits = Stepper(model, 1).step([Chunk(0, ids)]).astype(np.float64)
    logprobs = logits - logits.max(1, keepdims=True)
    logprobs -= np.log(np.exp(logprobs).sum(1, keepdims=True))
    rows = range(start - 1, len(ids) - 1)
    total = sum(logprobs[row, ids[row + 1]] for row in rows)
    return float(total), all(int(logprobs[row].argmax()) == ids[row + 1] for row in rows)


def test_log_likelihoods_are_those_of_a_direct_forward(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "base_url": f"http://127.0.0.1:{server.port}/v1/completions",
            "model": "default",
            "num_concurrent": 2,
            "max_length": 1024,
        },
        tasks=[task(tmp_path)],
        bootstrap_iters=0,
    )
    right = 0
    for sample in results["samples"]["local_choice"]:
        question = QUESTIONS[sample["doc_id"]]
        told = [response[0] if isinstance(response[0], tuple | list) else response for response in sample["resps"]]
        expected = [direct(str(question["question"]), choice) for choice in question["choices"]]
        assert [greedy for _, greedy in told] == [greedy for _, greedy in expected]
        assert np.allclose([total for total, _ in told], [total for total, _ in expected], atol=1e-3)
        right += int(np.argmax([total for total, _ in expected]) == question["answer"])
    assert results["results"]["local_choice"]["acc,none"] == right / len(QUESTIONS)
