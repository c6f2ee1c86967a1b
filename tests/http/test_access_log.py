"""What the log says of each request."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest

from tests.http.client import serving
from tests.http.fake_engine import FakeEngine, broken

pytestmark = pytest.mark.anyio


async def test_the_access_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fdserve.access")
    async with serving() as client:
        await client.chat(headers={"x-request-id": "mine"})
        await client.chat(stream=True)
        await client.get("/no\nwhere")
        await client.request("POST", "/v1/completions", body=b"{")
        await client.request("GET / 200\x1b\u0100", "/health")  # in HTTP/2 a method is any text
    lines = [record.getMessage() for record in caplog.records if record.name == "fdserve.access"]
    assert len(lines) == 5
    assert lines[0].startswith("POST /v1/chat/completions 200 ")
    assert lines[0].endswith("ms prompt=9 generated=14 id=mine")
    assert "prompt=9 generated=14" in lines[1]
    assert lines[2].startswith("GET /no%0Awhere 404 ")
    assert lines[3].startswith("POST /v1/completions 400 ")
    assert " error=invalid_json id=" in lines[3]
    assert lines[4].startswith("GET\\x20/\\x20200\\x1b\\x100 /health 405 ")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/responses", {"input": "Hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}),
    ],
)
async def test_the_access_log_tells_a_broken_stream_from_a_whole_one(
    path: str, body: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fdserve.access")
    async with serving(FakeEngine(broken("abc"))) as client:
        await client.post(path, body | {"stream": True})
    (line,) = [record.getMessage() for record in caplog.records if record.name == "fdserve.access"]
    assert line.startswith(f"POST {path} 200 ")
    assert re.search(r" prompt=\d+ generated=\d+ error=internal_error id=\w+$", line)
