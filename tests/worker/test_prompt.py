from __future__ import annotations

import numpy as np
import paddle

from fdserve.executor.wire import PROMPT_SLICE
from fdserve.worker.prompt import prompt_logprobs


def test_logprobs_of_a_prompt_come_slice_by_slice() -> None:
    rng = np.random.default_rng(0)
    count, vocab = 2 * PROMPT_SLICE + 11, 300
    hidden = rng.normal(size=(count, 8)).astype(np.float32)
    head = rng.normal(size=(8, vocab)).astype(np.float32)
    targets = rng.integers(0, vocab, count).astype(np.int32)
    sizes = []

    def logits_of(rows: paddle.Tensor) -> paddle.Tensor:
        sizes.append(len(rows))
        return paddle.to_tensor(rows.numpy() @ head)

    report = prompt_logprobs(paddle.to_tensor(hidden), logits_of, targets, 3, vocab)
    logits = (hidden @ head).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    order = np.argsort(-expected, axis=1)[:, :3]
    assert sizes == [PROMPT_SLICE, PROMPT_SLICE, 11]
    np.testing.assert_allclose(report.logprobs, expected[np.arange(count), targets], atol=2e-5)
    assert (report.top_ids == order).all()
    np.testing.assert_allclose(report.top_logprobs, np.take_along_axis(expected, order, 1), atol=2e-5)
