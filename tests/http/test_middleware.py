from __future__ import annotations

import gc
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest

from fdserve.api.choice import Choice
from fdserve.api.fields import read_request
from fdserve.config import Config
from fdserve.errors import Unavailable
from fdserve.http.middleware import LONG_BODY_BYTES
from fdserve.http.request import Request
from tests.http.client import Client, serving
from tests.http.fake_engine import FakeEngine, broken, endless, say, silent

pytestmark = pytest.mark.anyio


async def until(condition: Any) -> None:
    """Wait, at most 5 s, until the condition holds."""
    with anyio.fail_after(5):
        while not condition():
            await anyio.sleep(0.002)


@pytest.mark.parametrize(
    "authorization", [None, "Bearer", "Bearer ", "Bearer wrong", "Basic alpha", "alpha", "Bearer alphabeta", "Bearer ä"]
)
async def test_a_wrong_key(authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    async with serving(config=Config(api_key="alpha,beta")) as client:
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions")):
            response = await client.request(method, path, headers=headers, body=[b"x" * 1000] * 3)
            assert (response.status, response.error["code"]) == (401, "invalid_api_key")
            assert response.error["type"] == "authentication_error"
            assert response.headers["www-authenticate"] == "Bearer"
        assert not client.engine.requests


async def test_others_get_on_between_long_bodies_that_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = 0
    decoded: dict[bool, list[int]] = {True: [], False: []}

    def read(body: bytes, kind: type) -> Any:
        decoded[len(body) > LONG_BODY_BYTES].append(turns)
        return read_request(body, kind)

    async def take_turns() -> None:
        nonlocal turns
        while len(decoded[True]) < 8:
            await anyio.lowlevel.checkpoint()
            turns += 1

    monkeypatch.setattr("fdserve.api.chat.read_request", read)
    async with serving() as client, anyio.create_task_group() as tasks:
        tasks.start_soon(take_turns)
        for text in ("Hi", "x" * LONG_BODY_BYTES) * 8:
            tasks.start_soon(client.chat, text)
    spans = {long: max(when) - min(when) for long, when in decoded.items()}
    assert spans[True] >= 70  # a token takes several turns
    assert spans[False] <= 2


async def test_a_long_body_that_comes_alone_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdserve.http.middleware.TURN_SECONDS", 60.0)
    async with serving() as client:
        for _ in range(2):
            with anyio.fail_after(5):
                await client.chat("x" * LONG_BODY_BYTES)


async def test_a_right_key() -> None:
    async with serving(config=Config(api_key="alpha,betä")) as client:
        for key in ("Bearer alpha", "bearer betä"):
            assert (await client.get("/v1/models", authorization=key)).status == 200


async def test_anthropics_header_for_the_key() -> None:
    async with serving(config=Config(api_key="alpha")) as client:
        assert (await client.get("/v1/models", x_api_key="alpha")).status == 200
        response = await client.get("/v1/models", x_api_key="beta")
        assert (response.status, response.error["message"]) == (401, "Incorrect API key provided.")


async def test_probes_need_no_key() -> None:
    async with serving(config=Config(api_key="alpha")) as client:
        assert (await client.get("/health")).status == 200
        assert (await client.get("/metrics")).status == 200


async def test_the_request_id_is_echoed_or_made() -> None:
    async with serving() as client:
        assert (await client.get("/health", x_request_id="abc-1.2:3_D")).headers["x-request-id"] == "abc-1.2:3_D"
        made = [(await client.get("/health")).headers["x-request-id"] for _ in range(2)]
        assert len(set(made)) == 2
        for bad in ("a b", "x" * 129, "a\tb", "ä"):
            echoed = (await client.get("/health", x_request_id=bad)).headers["x-request-id"]
            assert echoed != bad
            assert len(echoed) == 32
        assert (await client.get("/nowhere", x_request_id="lost")).headers["x-request-id"] == "lost"


async def test_too_many_requests() -> None:
    async with serving(FakeEngine(silent), Config(max_concurrency=2)) as client, anyio.create_task_group() as tasks:
        for _ in range(2):
            tasks.start_soon(client.chat)
        await until(lambda: client.app.active == 2)
        response = await client.chat()
        assert (response.status, response.error["code"]) == (429, "queue_full")
        assert response.error["type"] == "rate_limit_error"
        assert response.headers["retry-after"] == "1"
        assert (await client.get("/health")).status == 200
        tasks.cancel_scope.cancel()
    assert client.app.active == 0


async def test_the_engines_queue_is_full() -> None:
    async with serving(FakeEngine(max_requests=2)) as client:
        response = await client.chat(n=3)
        assert (response.status, response.headers["retry-after"]) == (429, "7")
        assert len(client.engine.cancelled) == 2  # all or nothing
        assert (await client.chat(n=2)).status == 200


async def test_an_engine_error() -> None:
    async with serving(FakeEngine(broken("half"))) as client:
        response = await client.chat()
        assert (response.status, response.error["type"]) == (500, "internal_error")
        assert response.error["message"] == "the model's output was not a number"
        assert client.app.active == 0


async def test_an_engine_error_in_a_stream() -> None:
    error = Unavailable("the request was lost: rank 0 died")
    async with serving(FakeEngine(broken("half", error))) as client:
        for send in (client.chat, client.complete):
            response = await send(stream=True)
            assert (response.status, response.complete) == (200, True)
            *chunks, last = response.events
            assert "half" in str(chunks)
            assert last == {
                "error": {
                    "message": "the request was lost: rank 0 died",
                    "type": "server_error",
                    "param": None,
                    "code": "unavailable",
                }
            }


async def test_one_broken_choice_ends_the_others() -> None:
    engine = FakeEngine()

    async def script(request: Any) -> Any:
        chosen = broken("bad") if request.id.endswith("-1") else silent
        async for delta in chosen(request):
            yield delta

    engine.script = script
    async with serving(engine) as client:
        assert (await client.chat(n=3)).status == 500
        assert (await client.chat(n=3, stream=True)).events[-1]["error"]["code"] == "internal_error"
        assert not engine.active
        assert len(engine.cancelled) == 4


async def test_an_unknown_error_keeps_its_secrets(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving() as client:

        def render(*args: Any, **kwargs: Any) -> str:
            raise KeyError("secret")

        monkeypatch.setattr(client.server.template, "render", render)
        response = await client.chat()
        assert (response.status, response.error["code"]) == (500, "internal_error")
        assert b"secret" not in response.body
        assert "KeyError: 'secret'" in caplog.text


async def test_a_client_that_leaves_a_stream() -> None:
    engine = FakeEngine(endless())
    async with serving(engine) as client:
        for n in (1, 3):
            engine.cancelled.clear()
            response = await client.chat(stream=True, n=n, leave_after=4)
            assert not response.complete
            assert len(engine.cancelled) == n
            assert not engine.active
        assert b'endpoint="/v1/chat/completions",status="499"} 2.0' in (await client.get("/metrics")).body
    assert client.app.active == 0


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_client_that_leaves_before_the_answer(path: str) -> None:
    engine = FakeEngine(silent)
    body = b'{"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "n": 2}'
    async with serving(engine) as client:
        response = await client.request("POST", path, body=body, leave_after=0)
        assert response.status == 0
        assert not engine.active


async def test_cancelling_the_server_cancels_the_requests() -> None:
    engine = FakeEngine(silent)
    async with serving(engine) as client, anyio.create_task_group() as tasks:
        tasks.start_soon(client.chat)
        await until(lambda: engine.active)
        tasks.cancel_scope.cancel()
    assert len(engine.cancelled) == 1


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", ["upload", "whole", "stream"])
async def test_a_server_that_cuts_its_requests_off_tells_the_clients(kind: str, n: int) -> None:
    engine = FakeEngine(endless())
    body = msgspec.json.encode({"prompt": "Hi", "n": n, "stream": kind == "stream"})
    inbox = [{"type": "http.request", "body": body, "more_body": kind == "upload"}]
    sent: list[Any] = []

    async def receive() -> Any:
        if not inbox:
            await anyio.sleep_forever()
        return inbox.pop()

    async def send(message: Any) -> None:
        await anyio.lowlevel.checkpoint()
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    async with serving(engine) as client:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.app, scope, receive, send)
            await until(lambda: len(sent) > 3 if kind == "stream" else not inbox)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        assert not engine.active
        assert b'endpoint="/v1/completions",status="%d"' % sent[0]["status"] in (await client.get("/metrics")).body
    assert sent[0]["status"] == (200 if kind == "stream" else 503)
    assert b"The server is shutting down." in sent[-1]["body"]
    assert sent[-1]["body"].endswith(b"[DONE]\n\n" if kind == "stream" else b"}}")
    assert not sent[-1]["more_body"]


async def test_a_slow_reader_is_sent_what_waits_at_once() -> None:
    """The engine is far ahead of the client: everything goes out in a few sends, and nothing is lost."""
    text = "0123456789" * 100
    async with serving(FakeEngine(say(text), max_model_len=4096)) as client:
        response = await client.complete(max_tokens=2000, stream=True)
        assert "".join(event["choices"][0]["text"] for event in response.events) == text
        assert len(response.sends) < 20


async def test_one_send_a_token_when_nothing_else_waits() -> None:
    async with serving(FakeEngine(say("abc", delay=0.01))) as client:
        response = await client.complete(stream=True)
        assert [event["choices"][0]["text"] for event in response.events] == ["a", "b", "c", ""]
        assert [send.count(b"data: ") for send in response.sends] == [1, 1, 1, 1, 1]


async def test_streams_refuse_http2() -> None:
    async with serving() as client:
        response = await client.complete(stream=True, http_version="2")
        assert response.error["param"] == "stream"


async def test_many_requests_at_once() -> None:
    statuses = []
    engine = FakeEngine(say("0123456789", delay=0.002), max_requests=1000)
    async with serving(engine) as client:

        async def one(client: Client, stream: bool) -> None:
            response = await client.complete(stream=stream)
            statuses.append(response.status)
            text = "".join(e["choices"][0]["text"] for e in (response.events if stream else [response.json()]))
            assert text == "0123456789"

        async with anyio.create_task_group() as tasks:
            for index in range(100):
                tasks.start_soon(one, client, index % 2 == 0)
    assert statuses == [200] * 100
    assert not engine.cancelled


async def test_what_is_over_is_no_garbage() -> None:
    """Prompts would wait for Python's collector, which is in no hurry."""
    async with serving() as client:
        gc.collect()
        gc.disable()
        try:
            for _ in range(3):
                await client.chat(n=2)
                await client.chat(stream=True)
            left = [found for found in gc.get_objects() if isinstance(found, (Choice, Request))]
        finally:
            gc.enable()
    assert not left
