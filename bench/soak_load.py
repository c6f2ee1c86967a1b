"""The mixed load of `bench soak`: what is asked, and a client that may leave before the end."""

from __future__ import annotations

import http.client
import json
import random
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from bench.datasets import WORDS

TIMEOUT_SECONDS = 120.0
READ_BYTES = 256
Fields = dict[str, Any]

_PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
_TOOL = {"type": "function", "function": {"name": "find_person", "description": "Find one.", "parameters": _PERSON}}


def _words(generator: random.Random, least: int, most: int) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(least, most)))


def _completion(generator: random.Random) -> Fields:
    return {"prompt": _words(generator, 5, 200), "max_tokens": generator.randint(1, 48)}


def _chat(generator: random.Random) -> Fields:
    return {"messages": [{"role": "user", "content": _words(generator, 3, 80)}], "max_tokens": generator.randint(8, 64)}


KINDS: dict[str, tuple[str, Callable[[random.Random], Fields]]] = {
    "completion": ("/v1/completions", _completion),
    "chat": ("/v1/chat/completions", _chat),
    "choices": ("/v1/completions", lambda g: _completion(g) | {"n": g.randint(2, 4), "temperature": 1.0}),
    "stop strings": ("/v1/completions", lambda g: _completion(g) | {"stop": [" the", _words(g, 1, 2), "e"]}),
    "logprobs": ("/v1/completions", lambda g: _completion(g) | {"logprobs": 5, "echo": g.random() < 0.5}),
    "chat logprobs": ("/v1/chat/completions", lambda g: _chat(g) | {"logprobs": True, "top_logprobs": 5}),
    "tools": ("/v1/chat/completions", lambda g: _chat(g) | {"tools": [_TOOL], "tool_choice": "required"}),
    "JSON schema": (
        "/v1/chat/completions",
        lambda g: (
            _chat(g) | {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": _PERSON}}}
        ),
    ),
    "refused": ("/v1/completions", lambda g: _completion(g) | {"temperature": -1.0}),
}
"""Of each kind of request its path, and what makes its body. All but the last are to succeed."""


def draw(generator: random.Random) -> tuple[str, Fields, bool]:
    """A request of any kind: the kind's name, its fields, and whether its client leaves early."""
    kind = generator.choice(list(KINDS))
    fields = KINDS[kind][1](generator)
    fields["stream"] = generator.random() < 0.7
    return kind, fields, fields["stream"] and generator.random() < 0.25


def exchange(base_url: str, path: str, fields: Fields, *, leave: bool) -> int:
    """Send a request on a connection of its own and read its answer, or leave after a first piece; the status.

    Raises OSError or HTTPException if the answer breaks off, and ValueError if a stream ends with an error.
    """
    address = urlsplit(base_url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("POST", path, json.dumps(fields), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if leave:
            response.read1(READ_BYTES)
        else:
            body = response.read()
            if response.status == 200 and b'data: {"error"' in body:
                raise ValueError(body[body.index(b'data: {"error"') :][:200].decode(errors="replace"))
        return response.status
    finally:
        connection.close()
