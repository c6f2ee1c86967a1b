from __future__ import annotations

import time
import tracemalloc
from typing import Any, Literal

import anyio
import msgspec
import pytest

from fdserve.errors import InvalidRequest, RequestTimeout
from fdserve.http import request as request_module
from fdserve.http.asgi import Message
from fdserve.http.request import Request, decode
from tests.http.client import serving


class Inner(msgspec.Struct):
    name: str


class Body(msgspec.Struct):
    items: list[Inner]
    number: int = 0
    deep: dict[str, object] = {}


@pytest.mark.parametrize(
    ("body", "param", "code", "message"),
    [
        (b"{}", "items", "missing_required_parameter", "Missing required parameter: 'items'."),
        (b'{"items": [{}]}', "items[0].name", "missing_required_parameter", "parameter: 'items[0].name'."),
        (b'{"items": [{"name": "a"}, {"name": 1}]}', "items[1].name", "invalid_value", "expected `str`, got `int`."),
        (b'{"items": [], "number": "1"}', "number", "invalid_value", "Invalid value for 'number': expected `int`"),
        (b"[]", None, "invalid_value", "Invalid request: expected `object`, got `array`."),
        (b"", None, "invalid_json", "not valid JSON: it is empty."),
        (b'{"items"', None, "invalid_json", "not valid JSON"),
        (b"\xff\xfe", None, "invalid_json", "not valid JSON: it is not UTF-8: invalid start byte (byte 0)."),
        (b'{"items": [{"name": "\xff"}]}', None, "invalid_json", "it is not UTF-8: invalid start byte (byte 21)."),
        (b'{"items": [{"name": "\xc3\xa9\xc3"}]}', None, "invalid_json", "invalid continuation byte (byte 23)."),
        (b'{"items": [{"name": "ab\\ud800"}]}', None, "invalid_json", "a surrogate stands alone (byte 23)."),
        (b'{"items": [{"name": "\\ud83d\\ude00\\ud83d!"}]}', None, "invalid_json", "stands alone (byte 33)."),
        (b'{"items": [{"name": "\\udc00"}]}', None, "invalid_json", "invalid utf-16 surrogate pair (byte 27)."),
        (b'{"items": [{"name": "\\\\ud800"}]', None, "invalid_json", "not valid JSON: Input data was truncated."),
        (b'{"items": []} {}', None, "invalid_json", "not valid JSON: trailing characters (byte 15)."),
        (b'{"items": [], "deep": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001, None, "invalid_json", "nested too deeply"),
        (b'{"items": [], "unknown": ' + b"[" * 100_000, None, "invalid_json", "nested too deeply"),
    ],
)
def test_bad_bodies(body: bytes, param: str | None, code: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        decode(body, msgspec.json.Decoder(Body))
    assert (error.value.param, error.value.code) == (param, code)
    assert message in error.value.message
    assert "$" not in error.value.message


def test_what_is_wrong_with_a_long_body_takes_no_more_memory_than_it_has() -> None:
    body = b'{"items": [{"name": "' + rb"\\" * 2_000_000 + rb"\ud800" + b'"}]}'
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match=r"a surrogate stands alone \(byte 4000021\)"):
            decode(body, msgspec.json.Decoder(Body))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(body)


class Picky(msgspec.Struct):
    choice: Literal["yes", "no"]


@pytest.mark.parametrize("value", ["a - at `$.b", "a - at `$.b`", " - at `key` in `$`", " - at ", "it's `$.x`\n"])
def test_a_value_that_reads_like_a_place(value: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        decode(msgspec.json.encode({"choice": value}), msgspec.json.Decoder(Picky))
    assert error.value.param == "choice"
    message = f"Invalid value for 'choice': invalid enum value {value!r}. Supported values are: 'no', 'yes'."
    assert error.value.message == message


@pytest.mark.parametrize("value", ["x" * 8_000_000, "a - at `$." + "[" * 1_000_000])
def test_a_long_value_is_cut(value: str) -> None:
    body = msgspec.json.encode({"choice": value})
    started = time.process_time()
    with pytest.raises(InvalidRequest) as error:
        decode(body, msgspec.json.Decoder(Picky))
    assert time.process_time() - started < 1
    assert error.value.param == "choice"
    assert f"invalid enum value {value[:200]!r}"[:-1] in error.value.message
    assert error.value.message.endswith("…'. Supported values are: 'no', 'yes'.")
    assert len(error.value.message) < 400


@pytest.mark.parametrize(
    ("text", "query"),
    [
        (b"", []),
        (b"a=1&b&a=", [("a", "1"), ("b", ""), ("a", "")]),
        (b"a%5B%5D=%C3%A9+x", [("a[]", "é x")]),
        (b"\xff=%ff", [("ÿ", "\ufffd")]),
        (b"&&", []),
    ],
)
@pytest.mark.anyio
async def test_queries(text: bytes, query: list[tuple[str, str]]) -> None:
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": text}

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    assert Request(scope, receive).query == query


@pytest.mark.anyio
async def test_a_body_in_many_parts() -> None:
    async with serving() as client:
        body = b'{"messages": [{"role": "user", "content": "Hi"}]}'
        response = await client.request("POST", "/v1/chat/completions", body=[body[i : i + 5] for i in range(0, 50, 5)])
        assert response.status == 200


@pytest.mark.anyio
async def test_a_body_over_the_limit() -> None:
    from fdserve.config import Config

    async with serving(config=Config(max_request_bytes=2000)) as client:
        parts = [b"x" * 1000] * 3
        response = await client.request("POST", "/v1/completions", body=parts)
        assert (response.status, response.error["code"]) == (413, "request_too_large")
        assert "2000 bytes" in response.error["message"]
        # The declared length alone decides, too.
        response = await client.request("POST", "/v1/completions", body=b"{", headers={"content-length": "2001"})
        assert response.status == 413
        # It was read to its end, so the connection can be used again.
        assert "connection" not in response.headers
        exact = b'{"prompt": "Hi"}'.ljust(2000)
        assert (await client.request("POST", "/v1/completions", body=exact)).status == 200


@pytest.mark.anyio
async def test_a_body_too_large_to_be_discarded_closes_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    from fdserve.config import Config

    monkeypatch.setattr(request_module, "DISCARD_BYTES", 5000)
    async with serving(config=Config(max_request_bytes=1024)) as client:
        response = await client.request("POST", "/v1/completions", body=[b"x" * 1000] * 20)
        assert (response.status, response.headers["connection"]) == (413, "close")
        response = await client.request("POST", "/v1/completions", body=[b"x" * 1000] * 20, http_version="2")
        assert response.status == 413
        assert "connection" not in response.headers


@pytest.mark.anyio
async def test_bodies_that_nobody_reads_take_no_memory() -> None:
    """Those of /health need no key."""
    async with serving() as client:
        tracemalloc.start()
        try:
            response = await client.request("GET", "/health", body=[bytes(1 << 16)] * 250)
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()
        assert response.status == 200
        response = await client.request("GET", "/health", body=[bytes(1 << 16)] * 257)
        assert response.status == 413


@pytest.mark.anyio
async def test_a_client_that_leaves_while_it_sends() -> None:
    async with serving() as client:

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        async def send(message: object) -> None:
            raise AssertionError("nobody is there")

        for path in ("/v1/completions", "/nowhere"):
            scope: dict[str, Any] = {"type": "http", "method": "POST", "path": path, "headers": []}
            await client.app(scope, receive, send)
        assert client.app.active == 0
        assert not client.engine.requests
        assert b'endpoint="/v1/completions",status="499"' in (await client.get("/metrics")).body


@pytest.mark.anyio
async def test_the_disconnect_after_an_answer_does_not_interrupt_its_last_send() -> None:
    """Servers report the end of every answer as a disconnect, while they still close the connection in that send."""
    steps: list[Any] = []
    gone = anyio.Event()

    async def receive() -> Message:
        if not steps:
            steps.append("body")
            return {"type": "http.request", "body": b"{", "more_body": True}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            gone.set()
            for _ in range(5):
                await anyio.lowlevel.checkpoint()
            steps.append("closed")

    async with serving() as client:
        headers = [(b"content-length", b"99999999999")]
        with anyio.fail_after(5):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(request_module, "DISCARD_BYTES", 1)
                scope: dict[str, Any] = {
                    "type": "http",
                    "method": "POST",
                    "path": "/v1/completions",
                    "headers": headers,
                }
                await client.app(scope, receive, send)
        assert steps == ["body", "closed"]
        assert b'endpoint="/v1/completions",status="413"} 1.0' in (await client.get("/metrics")).body


@pytest.mark.anyio
async def test_a_body_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdserve.http.request.BODY_SECONDS", 0.05)

    async def receive() -> Message:
        await anyio.sleep(0.02)
        return {"type": "http.request", "body": b" ", "more_body": True}

    request = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)
    with pytest.raises(RequestTimeout, match=r"within 0\.05 seconds"):
        await request.read(1024)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("root", "path", "expected"),
    [
        ("/llm", "/llm/v1/models", "/v1/models"),
        ("/llm/", "/llm/v1/models", "/v1/models"),
        ("/llm", "http://example.com/llm/v1/models", "/v1/models"),
        ("/llm", "/v1/models", "/v1/models"),  # the proxy has taken it off
        ("/llm", "/llms/v1/models", "/llms/v1/models"),
        ("", "/llm/v1/models", "/llm/v1/models"),
    ],
)
async def test_a_path_below_that_of_a_proxy(root: str, path: str, expected: str) -> None:
    async def receive() -> dict[str, object]:
        raise AssertionError("not called")

    scope = {"type": "http", "method": "GET", "path": path, "root_path": root, "headers": []}
    assert Request(scope, receive).path == expected
