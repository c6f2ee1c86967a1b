from __future__ import annotations

import json
from typing import Any

import pytest

from bench.answers import Answer, read_answer
from bench.client import Exchange
from tests.bench.scripted import stream


def chat(**delta: Any) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})


def text(content: str, **fields: Any) -> str:
    return json.dumps({"choices": [{"index": 0, "text": content, **fields}]})


def usage(prompt: int, completion: int) -> str:
    return json.dumps({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}})


def answer(*events: str, end: str = "\n\n", glued: bool = False) -> Answer:
    """Of a request sent at second 10, whose head came at 11 and whose events came one a second from then on."""
    parts = stream(*events, end=end)
    if glued:
        parts = [b"".join(parts)]
    exchange = Exchange(b"", sent=10.0, parts=parts, times=[11.0 + number for number in range(len(parts))])
    return read_answer(exchange, keep_text=True)


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n"])
def test_times_of_a_completion(end: str) -> None:
    read = answer(text("a"), text("b"), text("c", finish_reason="length"), usage(7, 5), end=end)
    assert (read.ttft, read.itls, read.e2el) == (2.0, [1.0, 1.0], 4.0)
    assert (read.input_len, read.output_len, read.chunks, read.text) == (7, 5, 3, "abc")
    assert read.tpot == pytest.approx(0.5)


def test_what_comes_at_once_has_no_gaps() -> None:
    read = answer(text("a"), text("b"), glued=True)
    assert (read.ttft, read.itls) == (1.0, [0.0])
    assert read.received == 1


def test_the_first_event_of_a_chat_is_no_token() -> None:
    read = answer(chat(role="assistant", content=""), chat(reasoning_content="r"), chat(content="c"), chat())
    assert (read.ttft, read.itls, read.e2el) == (3.0, [1.0], 5.0)
    assert (read.output_len, read.text) == (2, "rc")


def test_token_ids_without_text_and_tool_calls_are_chunks() -> None:
    ids = [text("", token_ids=[5]), text("", completion_token_ids=[6, 7])]
    assert answer(*ids).chunks == 2
    assert answer(chat(tool_calls=[{"index": 0}]), chat(content="x")).chunks == 2


@pytest.mark.parametrize(
    ("events", "error"),
    [
        ([text("a"), '{"error": {"message": "lost", "code": 503}}'], "lost"),
        ([usage(3, 0)], "an answer without a token"),
        ([text("a"), "{"], "an answer that cannot be read: Input data was truncated"),
    ],
)
def test_errors_within_a_stream(events: list[str], error: str) -> None:
    assert answer(*events).error == error


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"error": {"message": "too long"}}', "too long"),
        ('{"message": "too long"}', "too long"),
        ('{"detail": "too long"}', "too long"),
        ("<html>no</html>", "<html>no</html>"),
    ],
)
def test_a_refusal_is_told_in_the_servers_words(body: str, message: str) -> None:
    head = f"HTTP/1.1 429 Too Many Requests\r\nContent-Length: {len(body)}\r\n\r\n"
    read = read_answer(Exchange(b"", parts=[(head + body).encode()], times=[1.0]))
    assert read.error == f"HTTP 429: {message}"
