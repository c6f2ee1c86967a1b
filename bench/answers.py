"""From an exchange to the figures of one request."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec

from bench.client import Exchange
from bench.response import Response, parse_response, timed_events


@dataclass
class Answer:
    """One request as its client saw it; times in seconds.

    A chunk is an event with tokens. `error` is empty if the request succeeded; then the other fields hold.
    """

    index: int
    sent: float
    """`time.perf_counter()`"""
    error: str = ""
    ttft: float = 0.0
    itls: list[float] = field(default_factory=list)
    """Between one chunk and the next."""
    e2el: float = 0.0
    """From sending the request to the last event of its choice."""
    input_len: int = 0
    """0 if the server does not tell."""
    output_len: int = 0
    """Counts the chunks where the server does not tell."""
    text: str = ""
    received: int = 0
    """How many times something was read from the socket."""

    @property
    def chunks(self) -> int:
        return len(self.itls) + 1

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None if there is only one."""
        return (self.e2el - self.ttft) / (self.output_len - 1) if self.output_len > 1 else None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    completion_token_ids: list[int] | None = None

    def content(self) -> str:
        if self.delta is None:
            return self.text or ""
        return (self.delta.reasoning_content or self.delta.reasoning or "") + (self.delta.content or "")

    def has_tokens(self) -> bool:
        calls = self.delta is not None and self.delta.tool_calls
        return bool(calls or self.token_ids or self.completion_token_ids or self.content())


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


def read_answer(exchange: Exchange, *, keep_text: bool = False) -> Answer:
    """The request's figures, or its error. A chunk is told by its text, tool calls or token ids."""
    answer = Answer(exchange.index, exchange.sent, exchange.error, received=len(exchange.parts))
    if answer.error:
        return answer
    try:
        response = parse_response(b"".join(exchange.parts))
        if response.status != 200:
            answer.error = _refusal(response)
        else:
            _read_stream(answer, exchange, response, keep_text)
    except (ValueError, msgspec.DecodeError) as error:
        answer.error = f"an answer that cannot be read: {error}"
    return answer


def _read_stream(answer: Answer, exchange: Exchange, response: Response, keep_text: bool) -> None:
    times: list[float] = []
    texts: list[str] = []
    for time, data in timed_events(response, exchange.times, [len(part) for part in exchange.parts]):
        if data == b"[DONE]":
            break
        event = _decode(data)
        if event.error is not None:
            answer.error = message_of(event.error)
            return
        if event.usage is not None:
            answer.input_len = event.usage.prompt_tokens
            answer.output_len = event.usage.completion_tokens
        if event.choices:
            answer.e2el = time - exchange.sent
            if any(choice.has_tokens() for choice in event.choices):
                times.append(time)
                texts += [choice.content() for choice in event.choices]
    if not times:
        answer.error = "an answer without a token"
        return
    answer.ttft = times[0] - exchange.sent
    answer.itls = [later - earlier for earlier, later in pairwise(times)]
    answer.output_len = answer.output_len or len(times)
    answer.text = "".join(texts) if keep_text else ""


def _refusal(response: Response) -> str:
    try:
        body = msgspec.json.decode(response.body)
        message = message_of(body.get("error", body) if isinstance(body, dict) else body)
    except msgspec.DecodeError:
        message = response.body[:200].decode(errors="replace").strip()
    return f"HTTP {response.status}: {message}"


def message_of(error: object) -> str:
    """The message of an error in any of the forms that servers give it."""
    if isinstance(error, dict):
        error = error.get("message", error.get("detail", error))
    return str(error)
