"""A client that speaks ASGI to an application in the same event loop."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import anyio

from fdserve.app import App, create_app
from fdserve.config import Config
from fdserve.server.server import Server
from tests.http.fake_engine import FakeEngine, builder

TIMEOUT = 10.0


@dataclass
class Response:
    """What came back; `sends` are the bodies as they were sent, one by one."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    sends: list[bytes] = field(default_factory=list)
    complete: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.sends)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        content = self.json()
        assert list(content) == ["error"]
        error: dict[str, Any] = content["error"]
        assert list(error) == ["message", "type", "param", "code"]
        return error

    @property
    def events(self) -> list[Any]:
        """The events' data, without the end mark, which must be there."""
        parts = self.body.split(b"\n\n")
        assert parts[-2:] == [b"data: [DONE]", b""]
        assert all(part.startswith(b"data: ") for part in parts[:-1])
        return [json.loads(part[6:]) for part in parts[:-2]]

    @property
    def named_events(self) -> list[Any]:
        """The data of events that have names, which are the types in the data, too; there is no end mark."""
        assert self.headers["content-type"] == "text/event-stream; charset=utf-8"
        parts = self.body.decode().split("\n\n")
        assert parts.pop() == ""
        result = []
        for part in parts:
            name, data = part.split("\n")
            result.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {result[-1]['type']}"
        return result


@dataclass
class Client:
    """Talks to `app`, behind which there is `engine`."""

    app: App
    engine: FakeEngine

    @property
    def server(self) -> Server:
        assert self.app.server is not None
        return self.app.server

    async def get(self, path: str, **headers: str) -> Response:
        return await self.request("GET", path, headers=headers)

    async def post(self, path: str, content: Any, **options: Any) -> Response:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return await self.request("POST", path, body=body, **options)

    async def chat(self, text: str = "Hi", *, messages: Any = None, **fields: Any) -> Response:
        """A chat completion; options of `request` among the fields go there."""
        messages = messages if messages is not None else [{"role": "user", "content": text}]
        return await self._call("/v1/chat/completions", {"messages": messages, **fields})

    async def complete(self, prompt: Any = "Hi", **fields: Any) -> Response:
        return await self._call("/v1/completions", {"prompt": prompt, **fields})

    async def _call(self, path: str, fields: dict[str, Any]) -> Response:
        options = {name: fields.pop(name) for name in ("headers", "leave_after", "http_version") if name in fields}
        return await self.post(path, fields, **options)

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | list[bytes] = b"",
        headers: dict[str, str] | None = None,
        leave_after: int | None = None,
        http_version: str = "1.1",
    ) -> Response:
        """Do one request. `leave_after` disconnects after that many body parts of the response; 0: at once.

        A list as `body` is sent in parts. What follows a question mark in the path is the query.
        """
        path, _, query = path.partition("?")
        parts = body if isinstance(body, list) else [body]
        response = Response()
        waiting = [{"type": "http.request", "body": p, "more_body": i + 1 < len(parts)} for i, p in enumerate(parts)]
        gone = anyio.Event()
        if leave_after == 0:
            gone.set()

        async def receive() -> dict[str, Any]:
            if waiting:
                return waiting.pop(0)
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await anyio.lowlevel.checkpoint()
            if message["type"] == "http.response.start":
                assert response.status == 0
                response.status = message["status"]
                response.headers = {k.decode(): v.decode() for k, v in message["headers"]}
                return
            assert not response.complete
            response.sends.append(message["body"])
            if leave_after is not None and len(response.sends) >= leave_after:
                gone.set()
            if not message["more_body"]:
                response.complete = True
                gone.set()

        scope = {
            "type": "http",
            "http_version": http_version,
            "method": method,
            "path": path,
            "raw_path": quote(path).encode(),
            "query_string": query.encode(),
            "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in (headers or {}).items()],
        }
        with anyio.fail_after(TIMEOUT):
            await self.app(scope, receive, send)
        return response


@asynccontextmanager
async def serving(
    engine: FakeEngine | None = None, config: Config | None = None, **options: Any
) -> AsyncIterator[Client]:
    """An application over the fake engine, its lifespan around the block."""
    engine = engine or FakeEngine()
    app = create_app(config or Config(enable_logprob=True), builder(engine, **options))
    async with lifespan(app):
        with anyio.fail_after(TIMEOUT):
            if not engine.hold_loading and engine.failure is None:
                await engine.wait_ready()
        yield Client(app, engine)


@asynccontextmanager
async def lifespan(app: App) -> AsyncIterator[list[str]]:
    """The application's lifespan around the block; yields the messages that the application sends."""
    started, ending, ended = anyio.Event(), anyio.Event(), anyio.Event()
    sent: list[Any] = []
    inbox = [{"type": "lifespan.startup"}]

    async def receive() -> dict[str, Any]:
        if inbox:
            return inbox.pop()
        await ending.wait()
        return {"type": "lifespan.shutdown"}

    async def send(message: Any) -> None:
        sent.append(message)
        started.set()

    async def run() -> None:
        await app({"type": "lifespan"}, receive, send)
        ended.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        try:
            with anyio.fail_after(TIMEOUT):
                await started.wait()
            yield sent
        finally:
            ending.set()
            with anyio.move_on_after(TIMEOUT, shield=True):
                await ended.wait()
            tasks.cancel_scope.cancel()
