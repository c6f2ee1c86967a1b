"""A request's body while it is answered."""

from __future__ import annotations

import threading
import tracemalloc
from functools import partial

import anyio
import pytest

from tests.http.client import serving
from tests.http.fake_engine import ByteTokenizer, FakeEngine, silent

pytestmark = pytest.mark.anyio

SIZE = 8 << 20
MESSAGES = b'"messages": [{"role": "user", "content": "Hi"}]'
BODIES = {
    "/v1/chat/completions": MESSAGES,
    "/v1/completions": b'"prompt": "Hi"',
    "/v1/responses": b'"input": "Hi"',
    "/v1/messages": MESSAGES + b', "max_tokens": 5',
    "/tokenize": b'"prompt": "Hi"',
    "/v1/tokenize": MESSAGES,
    "/v1/chat/completions/render": MESSAGES,
    "/v1/messages/count_tokens": MESSAGES,
}


@pytest.mark.parametrize("path", BODIES)
async def test_it_is_let_go_once_it_is_decoded(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizing, goes_on = threading.Event(), threading.Event()
    encode = ByteTokenizer.encode

    def slow_encode(self: ByteTokenizer, text: str) -> list[int]:
        tokenizing.set()
        goes_on.wait(10)
        return encode(self, text)

    body = [b"{" + BODIES[path], b" " * SIZE, b"}"]
    async with serving(FakeEngine(silent)) as client, anyio.create_task_group() as tasks:
        monkeypatch.setattr(ByteTokenizer, "encode", slow_encode)
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            tasks.start_soon(partial(client.request, "POST", path, body=body))
            while not tokenizing.is_set():
                await anyio.sleep(0.01)
            now, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            goes_on.set()
        assert peak - before > SIZE  # there was a body
        assert now - before < SIZE / 8
        tasks.cancel_scope.cancel()
