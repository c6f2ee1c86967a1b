"""Fields that say how a request is served, by their effect on a real server."""

from __future__ import annotations

import re
import threading
from typing import Any

import openai
import pytest

from tests.e2e.asking import ask, go_on, refused
from tests.http.processes import ServerProcess, until


def test_streams(client: openai.OpenAI) -> None:
    def sizes(**extra: Any) -> list[int]:
        extra |= {"return_token_ids": True, "enable_thinking": False}
        chunks = [c for chunk in ask(client, extra=extra, stream=True) for c in chunk.choices]
        return [len(getattr(c.delta, "completion_token_ids", [])) for c in chunks]

    assert max(sizes()) < 10
    gathered = [size for size in sizes(max_streaming_response_tokens=10) if size]
    assert min(gathered[:-1]) >= 10
    usages = [chunk.usage for chunk in ask(client, stream=True, stream_options={"continuous_usage_stats": True})]
    counts = [usage.completion_tokens for usage in usages]
    assert counts == sorted(counts)
    assert usages[-1].prompt_tokens > 0


def test_priority(client: openai.OpenAI, server: ServerProcess) -> None:
    """Of two that find every row taken, the later one comes first."""
    order: list[str] = []

    def run(name: str, n: int, priority: int) -> None:
        go_on(client, n=n, max_tokens=100, ignore_eos=True, priority=priority)
        order.append(name)

    def begin(name: str, n: int, priority: int) -> threading.Thread:
        thread = threading.Thread(target=run, args=(name, n, priority))
        thread.start()
        return thread

    def waiting() -> int:
        match = re.search(rb"^fdserve_requests_waiting (\d+)", server.get("/metrics")[1], re.MULTILINE)
        assert match is not None
        return int(match[1])

    threads = [begin("first", 48, 0)]
    until(lambda: waiting() > 20)
    threads.append(begin("late", 32, 5))
    until(lambda: waiting() > 50)
    threads.append(begin("soon", 1, -5))
    for thread in threads:
        thread.join()
    assert order == ["soon", "first", "late"]


def test_cancelling(client: openai.OpenAI, server: ServerProcess) -> None:
    stream = ask(client, extra={"request_id": "to-cancel", "ignore_eos": True}, max_tokens=900, stream=True)
    chunk = next(iter(stream))
    assert chunk.id == "chatcmpl-to-cancel"
    assert client.post("/requests/to-cancel/cancel", body={}, cast_to=object)
    with pytest.raises(openai.APIError, match="cancelled"):
        list(stream)
    until(lambda: b"fdserve_requests_running 0" in server.get("/metrics")[1])


def test_ignored_fields_change_nothing(client: openai.OpenAI) -> None:
    plain = ask(client).choices[0]
    fields = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "verbosity": "low"}
    extra = {"safety_identifier": "s", "prompt_cache_key": "k", "prediction": {"type": "content", "content": "x"}}
    assert ask(client, extra=extra, **fields).choices[0] == plain


def test_refused_fields(client: openai.OpenAI) -> None:
    assert refused(go_on, client, suffix="end") == "suffix"
    assert refused(ask, client, modalities=["text", "audio"]) == "modalities"
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]
    with pytest.raises(openai.BadRequestError, match="text-only"):
        ask(client, [{"role": "user", "content": image}])
